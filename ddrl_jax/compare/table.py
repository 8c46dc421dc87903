"""A comparison as markdown: bars, values, matched sizes, what the arms differ in."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ddrl_jax.compare.bars import (
    FALL,
    GAIN,
    KEPT_DATA_LOSS,
    LONGER,
    TAIL,
    evaluated,
    first_collapse,
    judged,
    verdicts,
)
from ddrl_jax.compare.runs import (
    METRICS,
    Runs,
    Summary,
    at_matched_size,
    labels,
    read_lines,
    summarise,
)
from ddrl_jax.compare.values import write_values
from ddrl_jax.start_note import of_the_run

FALLS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)  # of the base's JPEG size
_OWN = ("name", "seed", "train.epochs")  # keys that differ without being an anchor


def write_table(
    runs: Runs,
    path: str | os.PathLike,
    facts: dict[str, str] | None = None,
    figures: Sequence[Path] = (),
) -> Path:
    """Writes the comparison as markdown, and every run's evaluations as CSV beside it.

    Args:
      runs: of `load_runs`.
      path: of the file.
      facts: further lines of the list at its head, such as the command.
      figures: to be shown in it, in the same folder.

    Returns:
      The path.
    """
    path, summaries = Path(path), summarise(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = write_values(runs, path.with_suffix(".csv"))
    parts = (
        _head(runs, (facts or {}) | {"every run's evaluations": f"`{values.name}`"}),
        (f"![{figure.stem}]({figure.name})\n" for figure in figures),
        _bars(runs, summaries),
        _values(summaries),
        _matched(runs, summaries),
        _anchors(runs),
        _every_evaluation(summaries),
    )
    text = "\n\n".join(filter(None, ("\n".join(part) for part in parts)))
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
    return path


def _head(runs: Runs, facts: Mapping[str, str]) -> Iterator[str]:
    every = [run for of_arm in runs.values() for run in of_arm]
    notes = (line for r in every for line in read_lines(r.root / "starts.jsonl"))
    starts = of_the_run(notes)
    config, last = every[0].config, starts[-1] if starts else {}
    dates = sorted(str(start.get("date", ""))[:10] for start in starts)
    machines = {
        f"{s.get('cpu')}, {s.get('cores')} cores, {s.get('devices')}" for s in starts
    }
    versions = [f"{name} {v}" for name, v in last.get("versions", {}).items()]
    hours = sum(run.seconds for run in every) / 3600
    yield "# Comparison on JPEG compressibility\n"
    for name, fact in facts.items():
        yield f"- {name}: {fact}"
    seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in every}))
    yield f"- seeds: {seeds}; {len(every)} runs"
    yield f"- machine: {'; '.join(sorted(machines)) or 'not known'}"
    yield f"- versions: {', '.join(versions) or 'not known'}"
    if dates:
        yield f"- dates: {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"
    yield f"- hours of all epochs together, evaluation and start-up aside: {hours:.2f}"
    yield (
        f"- evaluation: {config.get('evaluate.samples')} samples of "
        f"{config.get('prompts.limit') or 'all'} prompts in their order, "
        f"{_sampler(config)}, averaged weights. "
        "Prompts and noise are those of the seed: equal for all arms, other ones for "
        "another seed, so the spread over seeds holds the choice of prompts too"
    )
    yield (
        "- reward calls: pictures judged for training; for an arm of data only the "
        "pictures it trained on, which are as many updates"
    )
    for run in every:
        if run.epochs_left:
            left = f"{run.epochs_left} epochs are left"
            yield f"- **not finished**: {run.arm}, seed {run.seed}: {left}"


def _sampler(config: Mapping[str, object]) -> str:
    """How the evaluated pictures were drawn."""
    if config.get("evaluate.solver") == "rollout":
        return (
            f"the sampler of training ({config.get('sampler.kernel')}, "
            f"{config.get('sampler.steps')} steps, guidance "
            f"{config.get('sampler.guidance_scale')})"
        )
    scale = config.get("evaluate.guidance_scale")
    return f"{config.get('evaluate.steps')} ODE steps, guidance {scale}"


def _bars(runs: Runs, summaries: Mapping[str, Summary]) -> Iterator[str]:
    yield "## Bars\n"
    found, young = verdicts(runs), _young(runs, summaries)
    runs = evaluated(runs)
    if young:
        yield f"Evaluated only before training, and left out here: {young}.\n"
    if not found:
        yield (
            "Not computed: there is no arm without an anchor beside another one, or "
            "neither retrieval nor held-out data loss was measured."
        )
        return
    arm = next(arm for arm in runs if summaries[arm].role == "DDPO")
    free, ends = summaries[arm].label, [first_collapse(run) for run in runs[arm]]
    yield (
        f"{free} collapses at {_calls(ends)} reward calls (each seed), which is "
        "retrieval below a third of the base's or data loss above twice the base's. "
        "The bars are set for DDRL, the other arms are measured alike. (a) No collapse "
        f"in {LONGER} times the calls that collapse {free}, and a data loss of at most "
        f"+{KEPT_DATA_LOSS - 1:.0%}. (b) After a fall of at least {FALL:.0%}, at least "
        f"{GAIN} times {free}'s retrieval at that size; size and retrieval are means "
        f"of the last {TAIL} evaluations. `ddrl_jax/compare/bars.py` has the rules to "
        "the letter.\n"
    )
    yield (
        "| arm | calls, of those to stand | collapses at | largest data loss | (a) | "
        f"fall of size | retrieval there | {free} there | ratio | "
        "seeds of (b) | (b) |"
    )
    yield "|---" * 11 + "|"
    for v in found:
        other = "not reached" if v.reference is None else _known(v.reference, ".1%")
        ratio = _known(v.retrieval / v.reference, ".2f") if v.reference else "-"
        horizon = f"{v.horizon:,}" if v.horizon else "an unknown number"
        cells = (
            summaries[v.arm].label, f"{v.calls:,} of {horizon}", _calls(v.collapsed),
            _known(v.data_loss - 1, "+.0%"), _word(v.anchored), f"{v.fall:.1%}",
            _known(v.retrieval, ".1%"), other, ratio, f"{v.seeds_above} of {v.seeds}",
            _word(v.kept),
        )  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    blind = [summaries[a].label for a, rs in runs.items() if not all(map(judged, rs))]
    if blind:
        yield f"\nNeither retrieval nor data loss was measured of {', '.join(blind)}."


def _young(runs: Runs, summaries: Mapping[str, Summary]) -> str:
    new = [(arm, run.seed) for arm in runs for run in runs[arm] if len(run.steps) < 2]
    return ", ".join(f"{summaries[arm].label} seed {seed}" for arm, seed in new)


def _values(summaries: Mapping[str, Summary]) -> Iterator[str]:
    """The metrics at the last number of calls that all arms have, and at the ends."""
    shared = set.intersection(*(set(s.calls.tolist()) for s in summaries.values()))
    equal = max(shared)
    yield f"## After {equal:,} reward calls, and at the end of longer arms\n"
    yield "Mean (smallest to largest seed).\n"
    yield "| arm | seeds | calls | " + _titles() + " |"
    yield "|---" * (3 + len(METRICS)) + "|"
    yield from _rows([("base", s, 0) for s in list(summaries.values())[:1]])
    every = summaries.values()
    yield from _rows([(s.label, s, equal) for s in every])
    yield from _rows([(s.label, s, None) for s in every if s.calls[-1] > equal])


def _every_evaluation(summaries: Mapping[str, Summary]) -> Iterator[str]:
    yield "<details><summary>Every evaluation</summary>\n"
    yield "| arm | seeds | calls | " + _titles() + " |"
    yield "|---" * (3 + len(METRICS)) + "|"
    for s in summaries.values():
        yield from _rows([(s.label, s, int(calls)) for calls in s.calls])
    yield "\n</details>"


def _rows(wanted: Sequence[tuple[str, Summary, int | None]]) -> Iterator[str]:
    for label, s, calls in wanted:
        at = len(s.calls) - 1 if calls is None else int(np.argmax(s.calls == calls))
        cells = [label, str(len(s.seeds)), f"{s.calls[at]:,}"]
        cells += [
            _spread(name, s.mean[name][at], s.low[name][at], s.high[name][at])
            for name in METRICS
        ]
        yield f"| {' | '.join(cells)} |"


def _matched(runs: Runs, summaries: Mapping[str, Summary]) -> Iterator[str]:
    """Retrieval of every arm where it first is a share smaller than its base."""
    yield "## Held-out retrieval at a JPEG size\n"
    yield (
        "Where a seed is first so much smaller than its base, linear between two "
        "evaluations. Mean (smallest to largest) over the seeds that get there, with "
        "their number where it is not all of them. A first crossing may be a dip of a "
        "wandering curve: compare rows, not single cells.\n"
    )
    yield "| size | " + " | ".join(s.label for s in summaries.values()) + " |"
    yield "|---" * (1 + len(summaries)) + "|"
    for fall in FALLS:
        cells = [f"-{fall:.0%}"]
        for of_arm in runs.values():
            targets = [(r, (1 - fall) * r.values["kilobytes"][0]) for r in of_arm]
            found = [at_matched_size(r, size) for r, size in targets]
            cells.append(_reached([v for v in found if v is not None], len(of_arm)))
        yield f"| {' | '.join(cells)} |"


def _anchors(runs: Runs) -> Iterator[str]:
    """The keys in which the arms differ, read from their configurations."""
    yield "## What the arms differ in\n"
    configs = {name: runs[arm][0].config for arm, name in labels(runs).items()}
    keys = sorted(set().union(*configs.values()) - set(_OWN))
    differ = [k for k in keys if len({str(c.get(k)) for c in configs.values()}) > 1]
    yield "| arm | " + " | ".join((*differ, "train.epochs")) + " |"
    yield "|---" * (2 + len(differ)) + "|"
    for name, config in configs.items():
        cells = [name, *(str(config.get(k)) for k in (*differ, "train.epochs"))]
        yield f"| {' | '.join(cells)} |"


def _titles() -> str:
    return " | ".join(metric.title for metric in METRICS.values())


def _spread(name: str, mean: float, low: float, high: float) -> str:
    """ "5.71 (5.60 to 5.83)" with the digits that a metric deserves."""
    form = {"kilobytes": ".2f", "retrieval": ".1%"}.get(name, ".3f")
    one = _known(mean, form)
    if np.isnan(mean) or low == high:
        return one
    return f"{one} ({low:{form}} to {high:{form}})"


def _known(value: float, form: str) -> str:
    return "not known" if np.isnan(value) else f"{value:{form}}"


def _reached(values: Sequence[float], seeds: int) -> str:
    if not values:
        return "not reached"
    text = _spread("retrieval", float(np.mean(values)), min(values), max(values))
    return text if len(values) == seeds else f"{text}, {len(values)} of {seeds}"


def _calls(ends: Sequence[int | None]) -> str:
    if all(end is None for end in ends):
        return "never"
    return ", ".join("never" if end is None else f"{end:,}" for end in ends)


def _word(held: bool | None) -> str:
    return {True: "**met**", False: "missed", None: "not decided"}[held]
