"""The curves of a run, as pictures: what metrics.jsonl holds over its epochs."""

import io
import math
import re
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Rows = list[dict[str, Any]]


class _Curve(NamedTuple):
    """One panel: its title, the keys it draws (a regular expression) and a note."""

    title: str
    keys: str
    note: str = ""
    log: bool = False


_CURVES = (
    _Curve("Reward (trained)", r"reward/(mean|[^/]+/mean)", "of the rollouts"),
    _Curve("Trained reward (evaluated)", r"evaluation/.+/mean", "fixed prompts"),
    _Curve("Held-out judge (never trained on)", r"heldout/.+/mean"),
    _Curve("Data loss", r"data/(loss|heldout_loss)", "of the diffusion model itself"),
    _Curve("Diversity", r"diversity/.+"),
    _Curve("Ratio deviation", r"policy/ratio_max_deviation", "0 when exact"),
    _Curve("Clipped share of the policy term", r"policy/clip_fraction"),
    _Curve("KL to the policy of the rollout", r"policy/approx_kl"),
    _Curve("Share of samples with a score", r"(reward|heldout/.+|evaluation/.+)/valid"),
    _Curve("Samples without a score", r"reward/(not_finite|.+/missing)"),
    _Curve("Gradient norm", r"grad_norm", log=True),
    _Curve("Samples per second", r"samples_per_second"),
    _Curve("Share of the peak FLOP/s (MFU)", r"mfu|perf/mfu_.+"),
    _Curve("TFLOP/s of a device", r"perf/tflops"),
)
_SHARES = r"time/(rollout|reward|update|rest|evaluate|checkpoint)"


def curves(rows: Rows) -> tuple[list[tuple[str, bytes]], list[str]]:
    """Draws every curve that has values.

    Args:
      rows: lines of metrics.jsonl.

    Returns:
      (title, PNG) of each, and the names of those without any value.
    """
    drawn, absent = [], []
    for curve in _CURVES:
        series = series_of(rows, curve.keys)
        if series:
            drawn.append((curve.title, _draw_curve(curve, series)))
        else:
            absent.append(curve.title.lower())
    shares = series_of(rows, _SHARES)
    if shares:
        drawn.append(("where the time goes", _draw_shares(shares)))
    else:
        absent.append("time per stage")
    return drawn, absent


def series_of(rows: Rows, keys: str) -> dict[str, tuple[list[int], list[int | float]]]:
    """Returns (steps, values) of each key that matches, without null and text.

    Args:
      rows: lines of metrics.jsonl.
      keys: a regular expression for the whole key.
    """
    found: dict[str, tuple[list[int], list[int | float]]] = {}
    for row in rows:
        for key, value in row.items():
            number = isinstance(value, int | float) and math.isfinite(value)
            if number and "step" in row and re.fullmatch(keys, key):
                steps, values = found.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(value)
    return found


def _draw_curve(curve: _Curve, series: dict[str, tuple[list, list]]) -> bytes:
    figure = Figure(figsize=(5.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    for key, (steps, values) in series.items():
        axes.plot(steps, values, marker="." if len(steps) < 40 else "", label=key)
    axes.set_title(f"{curve.title} {f'({curve.note})' if curve.note else ''}", size=10)
    if curve.log and all(
        value > 0 for _, values in series.values() for value in values
    ):
        axes.set_yscale("log")
    _finish(axes)
    return _png(figure)


def _draw_shares(series: dict[str, tuple[list, list]]) -> bytes:
    """The share of each stage in each epoch, stacked to 100 %."""
    figure = Figure(figsize=(5.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    steps = sorted({step for steps, _ in series.values() for step in steps})
    seconds = {key: dict(zip(*pair, strict=True)) for key, pair in series.items()}
    totals = [sum(found.get(step, 0) for found in seconds.values()) for step in steps]
    base = [0.0] * len(steps)
    for key, found in seconds.items():
        pairs = zip(steps, totals, strict=True)
        share = [100 * found.get(step, 0) / (total or 1) for step, total in pairs]
        axes.bar(steps, share, width=1.0, bottom=base, label=key)
        base = [low + part for low, part in zip(base, share, strict=True)]
    axes.set_title("Where the time goes (% of an epoch)", size=10)
    _finish(axes)
    return _png(figure)


def _finish(axes: Any) -> None:
    axes.set_xlabel("epoch", size=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
