"""The figures of a comparison: curves, fronts, and pictures of the same prompts."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from ddrl_jax.compare.bars import (
    COLLAPSED_DATA_LOSS,
    COLLAPSED_RETRIEVAL,
    KEPT_DATA_LOSS,
)
from ddrl_jax.compare.runs import METRICS, Run, Runs, Summary, labels, summarise
from ddrl_jax.pictures import GAP, LINE

# Hues of Okabe and Ito, which readers of every colour vision tell apart; the arms of a
# role share the hue and differ in lightness and line.
_COLOURS = {
    "DDPO": ("#D55E00", "#E69F00"),
    "KL": ("#56B4E9", "#0072B2", "#003A5C"),
    "DDRL": ("#33BB92", "#00634A", "#009E73"),
    "data only": ("#808080", "#404040"),
}
_LINES = ("-", "--", ":")
_PANELS = ("kilobytes", "retrieval", "within_prompt", "data_loss")
_DPI = 150
_LABEL = 9.0  # points
_HALO = [withStroke(linewidth=2.5, foreground="white")]  # words stay readable on lines
_MANY = 8  # pictures a row


def draw(runs: Runs, path: str | Path) -> list[Path]:
    """Writes the figures of a comparison.

    Args:
      runs: of `load_runs`.
      path: of the curves, NAME.png; beside it NAME_fronts.png and, where the runs have
        pictures, NAME_pictures.png.

    Returns:
      The paths written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    summaries, style = summarise(runs), styles(runs)
    written = [_save(_curves(summaries, style), path)]
    fronts = _fronts(runs, summaries, style)
    written.append(_save(fronts, path.with_stem(path.stem + "_fronts")))
    if (sheet := _pictures(runs)) is not None:
        written.append(_save(sheet, path.with_stem(path.stem + "_pictures")))
    return written


def styles(runs: Runs) -> dict[str, dict[str, Any]]:
    """Colour and line of each arm: a hue a role, a lightness and line a weight."""
    count: dict[str, int] = {}
    style = {}
    for arm, summary in summarise(runs).items():
        number = count.get(summary.role, 0)
        count[summary.role] = number + 1
        colours = _COLOURS[summary.role]
        style[arm] = {
            "color": colours[number % len(colours)],
            "linestyle": _LINES[number % len(_LINES)],
        }
    return style


def spread_out(places: Sequence[float], gap: float) -> list[float]:
    """Moves numbers apart so that neighbours differ by at least `gap`.

    Each cluster stays centred on the mean of its members, and the order is kept.

    Args:
      places: numbers in any order.
      gap: the smallest difference.

    Returns:
      The moved numbers in the order given.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    clusters: list[tuple[float, int]] = []  # mean, members
    for i in order:
        mean, size = float(places[i]), 1
        # the last member of the cluster below lies (size - 1) / 2 gaps above its mean
        while clusters and mean - clusters[-1][0] < gap * (size + clusters[-1][1]) / 2:
            below, members = clusters.pop()
            mean = (mean * size + below * members) / (size + members)
            size += members
        clusters.append((mean, size))
    moved = [m + gap * (k - (n - 1) / 2) for m, n in clusters for k in range(n)]
    result = [0.0] * len(places)
    for i, place in zip(order, moved, strict=True):
        result[i] = place
    return result


def cell_of(shape: tuple[int, ...], count: int, columns: int = _MANY) -> int | None:
    """Pixels of a picture in a sheet of `pictures.grid`, from the sheet's own size.

    Args:
      shape: of the sheet, its height first.
      count: pictures in it.
      columns: pictures a row.

    Returns:
      The size; None where no square pictures of that number make such a sheet.
    """
    if not count:
        return None
    columns = min(columns, count)
    rows, inner = -(-count // columns), shape[1] - GAP
    size = inner // columns - GAP
    fits = inner % columns == 0 and size > 0
    high = shape[0] == rows * (size + GAP + LINE) + GAP
    return size if fits and high else None


def cut_pictures(
    sheet: Shaped[np.ndarray, "H W c"], size: int, count: int, columns: int = _MANY
) -> tuple[UInt8[np.ndarray, "n h w 3"], UInt8[np.ndarray, "n l w 3"]]:
    """Takes a sheet of `pictures.grid` apart again.

    The gaps are read off the sheet's own size, so no number of `grid` is known here.

    Args:
      sheet: uint8, pictures with a caption line below each.
      size: pixels a picture is wide and high.
      count: pictures in the sheet.
      columns: pictures a row.

    Returns:
      The pictures, and the strip below each, which holds its caption.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    gap = (sheet.shape[1] - columns * size) // (columns + 1)
    step = (sheet.shape[0] - gap) // rows
    tops = [gap + (i // columns) * step for i in range(count)]
    lefts = [gap + (i % columns) * (size + gap) for i in range(count)]
    corners = list(zip(tops, lefts, strict=True))
    rgb = sheet[..., :3]
    pictures = [rgb[y : y + size, x : x + size] for y, x in corners]
    captions = [rgb[y + size : y + step, x : x + size] for y, x in corners]
    return np.stack(pictures), np.stack(captions)


def _curves(summaries: Mapping[str, Summary], style: Mapping[str, Any]) -> Figure:
    """Four metrics over reward calls: the mean as a line, min to max as a band."""
    figure = Figure(figsize=(10.5, 7.2), dpi=_DPI, layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        axes.set_title(METRICS[name].title, size=11, loc="left")
        axes.set_xlabel("reward calls (data only: as many updates)", size=_LABEL)
        _bounds(axes, name, summaries)
        ends = []
        for arm, summary in summaries.items():
            calls, look = summary.calls, style[arm]
            axes.plot(calls, summary.mean[name], lw=1.8, **look)
            axes.fill_between(
                calls, summary.low[name], summary.high[name],
                color=look["color"], alpha=0.15, lw=0,
            )  # fmt: skip
            ends.append((calls[-1], summary.mean[name][-1], summary.label, look))
        _finish(axes, name)
        _write_labels(figure, axes, ends)
    return figure


def _bounds(axes: Axes, name: str, summaries: Mapping[str, Summary]) -> None:
    """The limits by which `bars` judges, as multiples of the base's mean."""
    base = next(iter(summaries.values())).mean[name][0]
    factors = {
        "retrieval": (COLLAPSED_RETRIEVAL,),
        "data_loss": (KEPT_DATA_LOSS, COLLAPSED_DATA_LOSS),
    }
    for factor in factors.get(name, ()) if np.isfinite(base) else ():
        axes.axhline(base * factor, color="#999999", lw=0.8, ls=(0, (1, 2)))
        axes.annotate(
            f"{factor:.3g} x base", (0.99, base * factor), ha="right", va="bottom",
            xycoords=("axes fraction", "data"), size=7.5, color="#777777",
            path_effects=_HALO,
        )  # fmt: skip


def _fronts(
    runs: Runs, summaries: Mapping[str, Summary], style: Mapping[str, Any]
) -> Figure:
    """Trained reward against what it costs; each seed thin, the mean with dots."""
    figure = Figure(figsize=(10.5, 4.4), dpi=_DPI, layout="constrained")
    for axes, name in zip(
        figure.subplots(1, 2), ("retrieval", "data_loss"), strict=True
    ):
        ends = []
        for arm, summary in summaries.items():
            look = style[arm]
            for run in runs[arm]:
                size, value = run.values["kilobytes"], run.values[name]
                axes.plot(size, value, lw=0.6, alpha=0.45, color=look["color"])
            size, value = summary.mean["kilobytes"], summary.mean[name]
            axes.plot(size, value, lw=1.8, marker="o", ms=3, **look)
            ends.append((size[-1], value[-1], summary.label, look))
        base = next(iter(summaries.values())).mean
        axes.plot(base["kilobytes"][0], base[name][0], "ko", ms=6, zorder=5)
        ends.append((base["kilobytes"][0], base[name][0], "base", {"color": "k"}))
        axes.set_title(f"{METRICS[name].title} at a JPEG size", size=11, loc="left")
        axes.set_xlabel("JPEG size (kB), smaller is the trained reward", size=_LABEL)
        _finish(axes, name)
        axes.invert_xaxis()
        _write_labels(figure, axes, ends)
    return figure


def _finish(axes: Axes, name: str) -> None:
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)
    known = np.isfinite(axes.dataLim.minposy)  # infinite where nothing was measured
    if name == "data_loss" and known:  # a collapse is far from what parts the others
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.0), high)


def _write_labels(figure: Figure, axes: Axes, ends: Sequence[tuple]) -> None:
    """Names the lines at their ends, moved apart where they end together."""
    known = [end for end in ends if np.isfinite(end[1])]
    if not known:
        return
    figure.draw_without_rendering()  # places the axes
    points = axes.transData.transform([end[:2] for end in known])
    height = 1.25 * _LABEL * figure.dpi / 72
    # lines that end within the width of a word share a column of labels
    width = axes.get_window_extent().width / 4
    for column in _columns(points[:, 0], width):
        moved = spread_out([points[i, 1] for i in column], height)
        for i, y in zip(column, moved, strict=True):
            x, _, label, look = known[i]
            offset = (y - points[i, 1]) * 72 / figure.dpi
            axes.annotate(
                label, known[i][:2], (5, offset), textcoords="offset points",
                color=look["color"], size=_LABEL, va="center", weight="bold",
                annotation_clip=False, path_effects=_HALO, zorder=6,
            )  # fmt: skip


def _columns(x: Shaped[np.ndarray, " n"], width: float) -> Iterable[list[int]]:
    """Indices of ends, those within `width` of the first of a column together."""
    column: list[int] = []
    for i in np.argsort(x):
        if column and x[i] - x[column[0]] > width:
            yield column
            column = []
        column.append(int(i))
    yield column


def _pictures(runs: Runs) -> Figure | None:
    """The base and the end of each arm on the same prompts and noise, a row each."""
    seeds = [{run.seed for run in of_arm} for of_arm in runs.values()]
    shared = sorted(set.intersection(*seeds))
    if not shared:
        return None
    chosen = [r for of_arm in runs.values() for r in of_arm if r.seed == shared[0]]
    sheets = [(chosen[0], 0), *((run, -1) for run in chosen)]
    found = [_row(run, int(run.steps[at])) for run, at in sheets]
    rows = [row for row in found if row is not None]
    if len(rows) < len(found):
        return None
    names, gap = labels(runs), 6
    heads = ["base"]
    heads += [f"{names[run.arm]}\n{run.calls[-1]:,} calls" for run in chosen]
    # captions below the base only: they are the same for all
    strips = [np.concatenate(rows[0], 0), *(pictures for pictures, _ in rows[1:])]
    padded = [
        np.pad(s, ((0, gap), (0, 0), (0, 0)), constant_values=255) for s in strips
    ]
    middles = np.cumsum([len(p) for p in padded]) - [len(p) / 2 for p in padded]
    return _sheet(np.concatenate(padded), heads, middles)


def _row(run: Run, step: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Pictures and captions of an evaluation, side by side; None without a file."""
    path = run.root / "samples" / f"evaluation_{step:06d}.png"
    if not path.exists():
        return None
    sheet = np.asarray(Image.open(path).convert("RGB"))
    count = min(run.config["evaluate.pictures"], run.config["evaluate.samples"])
    if (size := cell_of(sheet.shape, count)) is None:
        return None
    pictures, captions = cut_pictures(sheet, size, count)
    between = ((0, 0), (0, 0), (0, 6), (0, 0))
    padded = (
        np.pad(p[:_MANY], between, constant_values=255) for p in (pictures, captions)
    )
    top, bottom = (np.concatenate(list(p), axis=1) for p in padded)
    return top, bottom


def _sheet(picture: np.ndarray, heads: Sequence[str], middles: np.ndarray) -> Figure:
    """A picture at its own resolution with a name beside each row."""
    margin, dpi = 1.25, 100
    height, width = picture.shape[0] / dpi, picture.shape[1] / dpi
    figure = Figure(figsize=(width + margin, height), dpi=dpi)
    axes = figure.add_axes((margin / (width + margin), 0, width / (width + margin), 1))
    axes.imshow(picture, interpolation="nearest", aspect="auto")
    axes.set_yticks(middles, heads, size=11)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png")
    return path
