"""A workdir as one page: report.html, which needs no network and no other file."""

import base64
import html
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ddrl_jax.curves import Rows, curves, series_of
from ddrl_jax.errors import UserError
from ddrl_jax.start_note import of_the_run
from ddrl_jax.text import parse_json

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 13px; }
td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
tr:nth-child(even) td { background: #f6f6f6; }
pre { background: #f6f6f6; padding: .6rem; overflow-x: auto; }
img { max-width: 100%; } .pair { display: flex; gap: 1rem; flex-wrap: wrap; }
.pair figure { flex: 1 1 20rem; } figure { margin: 0; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); }
.missing { color: #a04000; } details summary { cursor: pointer; }
"""


_SUMMARY = (
    "model.name", "model.init", "data.source", "sampler.kernel", "sampler.steps",
    "rewards.weights", "advantages.kind", "policy.term", "policy.weight", "policy.beta",
    "policy.transform", "policy.kl_weight", "data_term.weight", "data_term.levels",
    "prompts.per_epoch", "prompts.group_size", "train.epochs", "optimizer.lr", "seed",
)  # fmt: skip


class _Run(NamedTuple):
    """What a workdir holds, and in words what it lacks."""

    root: Path
    config: dict[str, Any]
    rows: Rows
    starts: Rows
    samples: dict[str, list[tuple[int, Path]]]
    missing: list[str]


def write_report(workdir: str | os.PathLike) -> Path:
    """Writes report.html of a workdir, finished or not.

    Args:
      workdir: the folder of a run; what it lacks is named in the page.

    Returns:
      The path of the page.

    Raises:
      UserError: the folder is not a workdir, or the page can not be written.
    """
    root = Path(workdir)
    run = _read(root)
    page = "\n".join(_page(run))
    path, draft = root / "report.html", root / ".report.html.tmp"
    try:
        draft.write_text(page, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} could not be written",
            got=error,
            wanted="a disk with room, and permission to write",
            way_out="make room and run --mode=report again",
        ) from error
    return path


def _read(root: Path) -> _Run:
    missing: list[str] = []
    names = ("config.json", "metrics.jsonl", "samples")
    if not any((root / name).exists() for name in names):
        raise UserError(
            f"{root} is not a workdir",
            got="none of " + ", ".join(names),
            wanted="the folder that --workdir named in a training run",
            way_out="--mode=report --workdir=THAT_FOLDER",
        )
    config = _read_config(root / "config.json", missing)
    rows = _read_lines(root / "metrics.jsonl", missing)
    starts = of_the_run(_read_lines(root / "starts.jsonl", missing))
    samples = _find_samples(root / "samples")
    if not samples:
        missing.append("samples/: no pictures yet (the first evaluation writes them)")
    discarded = root / "metrics.discarded.jsonl"
    if discarded.is_file():
        count = len(discarded.read_bytes().splitlines())
        missing.append(f"{count} lines of {discarded.name}: epochs run again, or ends")
    wanted = _lookup(config, "train.epochs")
    done = rows[-1].get("step") if rows else 0
    if wanted is not None and (done or 0) < wanted:
        missing.append(f"the run is not finished: epoch {done} of {wanted}")
    return _Run(root, config, rows, starts, samples, missing)


def _read_config(path: Path, missing: list[str]) -> dict[str, Any]:
    """The configuration; {} where there is none, or something else in its place."""
    try:
        config = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        missing.append(f"{path.name}: {error}")
        return {}
    if isinstance(config, dict):
        counted = isinstance(_lookup(config, "train.epochs"), int)
        if counted or "train" not in config:
            return config
    missing.append(f"{path.name}: not the configuration of a run")
    return {}


def _read_lines(path: Path, missing: list[str]) -> Rows:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        missing.append(f"{path.name}: no such file yet")
        return []
    except OSError as error:
        missing.append(f"{path.name}: {error}")
        return []
    rows = [row for row in map(_read_line, lines) if row is not None]
    if broken := len(lines) - len(rows):
        missing.append(f"{path.name}: {broken} unreadable lines")
    return rows


def _read_line(line: str) -> dict[str, Any] | None:
    """An object in which what the page looks into has its kind, None for others."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step", 0), int):
        return None
    kinds = (("nonfinite", list), ("versions", dict))  # or null, which is none of it
    fits = (isinstance(row.get(key) or kind(), kind) for key, kind in kinds)
    return row if all(fits) else None


def _find_samples(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    """Pictures by name, each with its steps in order: NAME_STEP.png."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("*.png")):
        match = re.fullmatch(r"(.+)_(\d+)", path.stem)
        if match and not path.name.startswith(".") and path.is_file():
            found.setdefault(match[1], []).append((int(match[2]), path))
    return {name: sorted(pictures) for name, pictures in sorted(found.items())}


def _page(run: _Run) -> Iterable[str]:
    name = html.escape(str(run.config.get("name", run.root.name)))
    yield "<!doctype html>"
    yield f'<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
    yield f"<style>{_STYLE}</style></head><body>"
    yield f"<h1>{name}</h1>"
    yield from _headline(run)
    if run.missing:
        items = "".join(f"<li>{html.escape(text)}</li>" for text in run.missing)
        yield f'<ul class="missing">{items}</ul>'
    yield "<h2>Before and after</h2>"
    yield from _pictures(run)
    yield "<h2>Curves</h2>"
    yield from _curves(run)
    yield "<h2>First and last values</h2>"
    yield from _first_last(run.rows)
    yield "<h2>Configuration</h2>"
    yield from _configuration(run.config)
    yield "<h2>Machine, versions and command</h2>"
    yield from _machine(run.starts)
    yield "</body></html>"


def _headline(run: _Run) -> Iterable[str]:
    if not run.rows:
        return
    total = run.config.get("train", {}).get("epochs", "?")
    seen = run.rows[-1].get("samples_seen")
    text = f"{run.rows[-1].get('step')} of {total} epochs"
    yield f"<p>{text}{f', {seen} samples' if seen is not None else ''}</p>"


def _pictures(run: _Run) -> Iterable[str]:
    if not run.samples:
        yield _missing("No pictures in samples/.")
    for name, pictures in run.samples.items():
        alone = len(pictures) == 1
        shown = pictures if alone else [pictures[0], pictures[-1]]
        words = ("",) if alone else ("before: ", "after: ")
        note = "one step so far" if alone else "same prompts and noise"
        yield f"<h3>{html.escape(name)} ({note})</h3>"
        yield '<div class="pair">'
        for (step, path), word in zip(shown, words, strict=True):
            yield f"<figure><figcaption>{word}epoch {step}</figcaption>"
            yield _image(path.read_bytes(), f"{name}, epoch {step}") + "</figure>"
        yield "</div>"


def _curves(run: _Run) -> Iterable[str]:
    pictures, absent = curves(run.rows)
    yield '<div class="curves">'
    for title, picture in pictures:
        yield _image(picture, title)
    yield "</div>"
    if absent:
        yield _missing(f"Not in metrics.jsonl: {', '.join(absent)}.")


def _first_last(rows: Rows) -> Iterable[str]:
    series = series_of(rows, r"(?!step$).+")
    if not series:
        yield _missing("No numbers in metrics.jsonl.")
        return
    yield "<table><tr><th>metric</th><th>first</th><th>last</th><th>epochs</th></tr>"
    for key in sorted(series):
        steps, values = series[key]
        ends = (values[0], values[-1])
        first, last = (v if isinstance(v, int) else f"{v:.5g}" for v in ends)
        yield f'<tr><td>{html.escape(key)}</td><td class="n">{first}</td>'
        yield f'<td class="n">{last}</td><td>{steps[0]} to {steps[-1]}</td></tr>'
    yield "</table>"
    bad = {key for row in rows for key in map(str, row.get("nonfinite") or ())}
    if bad:
        yield _missing(f"Not finite at some epoch: {', '.join(sorted(bad))}.")


def _configuration(config: dict[str, Any]) -> Iterable[str]:
    if not config:
        yield _missing("No readable config.json.")
        return
    found = [(key, _lookup(config, key)) for key in _SUMMARY]
    yield _table([(key, value) for key, value in found if value is not None])
    text = html.escape(json.dumps(config, indent=2, sort_keys=True))
    yield f"<details><summary>every key</summary><pre>{text}</pre></details>"


def _machine(starts: Rows) -> Iterable[str]:
    if not starts:
        yield _missing(
            "No start of training in starts.jsonl: machine and command are not known."
        )
        return
    last = dict(starts[-1])
    last.pop("mode", None)  # it is that of training
    versions = last.pop("versions", None) or {}
    command = str(last.pop("command", "not known"))
    yield f"<pre>{html.escape(command)}</pre>"
    yield _table([*last.items(), *versions.items()])
    if len(starts) > 1:
        yield f"<p>Started {len(starts)} times; the last one is shown.</p>"


def _lookup(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _table(pairs: Sequence[tuple[str, Any]]) -> str:
    cells = (
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in pairs
    )
    return f"<table>{''.join(cells)}</table>"


def _missing(text: str) -> str:
    return f'<p class="missing">{html.escape(text)}</p>'


def _image(content: bytes, alt: str) -> str:
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    return f'<img src="{uri}" alt="{html.escape(alt)}">'
