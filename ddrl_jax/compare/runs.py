"""Runs of several algorithms as curves over reward calls, and numbers over seeds."""

import os
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ddrl_jax.config_difference import flattened
from ddrl_jax.errors import UserError
from ddrl_jax.text import parse_json

# The base judged twice on equal prompts and noise differs by rounding only; another
# network, prompt or noise differs by more. Means of votes, such as the retrieval, are
# left out: there rounding can turn a vote.
SAME = 2e-3
COMPARED = ("kilobytes", "data_loss")


class Metric(NamedTuple):
    """A column of an evaluation: its key in metrics.jsonl, title and sign."""

    key: str
    title: str
    sign: float = 1.0


METRICS: dict[str, Metric] = {
    "kilobytes": Metric("evaluation/compressibility/mean", "JPEG size (kB)", -1.0),
    "retrieval": Metric("heldout/retrieval/mean", "held-out retrieval"),
    "within_prompt": Metric("diversity/within_prompt", "diversity within a prompt"),
    "across_prompts": Metric("diversity/across_prompts", "diversity across prompts"),
    "data_loss": Metric("data/heldout_loss", "held-out data loss"),
}
ROLES = ("DDPO", "KL", "DDRL", "data only")


class Run(NamedTuple):
    """A workdir; `e` are its evaluations, of which the first is of the base."""

    arm: str
    root: Path
    seed: int
    config: dict[str, Any]  # flat dotted keys
    steps: Int[np.ndarray, " e"]  # epochs done
    calls: Int[np.ndarray, " e"]  # samples judged for training so far
    values: dict[
        str, Float[np.ndarray, " e"]
    ]  # by the names of METRICS; NaN: not known
    seconds: float  # of the epochs; evaluation and saving are not in it

    @property
    def epochs_left(self) -> int:
        """Epochs that its configuration has and its metrics do not."""
        return max(0, self.config["train.epochs"] - int(self.steps[-1]))

    def relative(self, metric: str) -> Float[np.ndarray, " e"]:
        """The values of a metric as multiples of the base's."""
        value = self.values[metric]
        with np.errstate(divide="ignore", invalid="ignore"):
            return value / value[0]


Runs = Mapping[str, Sequence[Run]]


class Summary(NamedTuple):
    """An arm over its seeds; `e` are the evaluations that all of them have."""

    label: str
    role: str  # one of ROLES
    seeds: tuple[int, ...]
    calls: Int[np.ndarray, " e"]
    mean: dict[str, Float[np.ndarray, " e"]]
    low: dict[str, Float[np.ndarray, " e"]]  # the smallest over seeds
    high: dict[str, Float[np.ndarray, " e"]]
    std: dict[str, Float[np.ndarray, " e"]]  # of the seeds themselves, ddof 0


def load_runs(
    workdirs: Mapping[str, Sequence[str | os.PathLike]],
) -> dict[str, list[Run]]:
    """Reads the workdirs of several arms, finished or not.

    Args:
      workdirs: for each arm one workdir a seed.

    Returns:
      {arm: runs by seed}; arms without an anchor first, then KL, DDRL and data only,
      each by weight.

    Raises:
      UserError: workdirs are missing or empty (all of them are named), an arm has a
        seed twice, or runs of one seed do not start from the same evaluation.
    """
    found = [_read(arm, Path(path)) for arm in workdirs for path in workdirs[arm]]
    missing = [item for item in found if isinstance(item, str)]
    if missing or not found:
        raise UserError(
            f"{len(missing)} of {len(found)} runs can not be compared",
            got="\n           ".join(missing) or "no workdir",
            wanted="workdirs with config.json and the evaluation of the base (step 0) "
            "in metrics.jsonl",
            way_out="train with rewards.weights compressibility, or leave them out",
        )
    runs = [item for item in found if isinstance(item, Run)]
    _check_seeds(runs)
    for seed in dict.fromkeys(run.seed for run in runs):
        _check_bases([run for run in runs if run.seed == seed])
    arms = sorted(workdirs, key=lambda arm: _rank(runs, arm))
    return {
        arm: sorted((r for r in runs if r.arm == arm), key=lambda r: r.seed)
        for arm in arms
    }


def find_runs(root: str | os.PathLike) -> dict[str, list[Path]]:
    """Finds the workdirs below a folder that holds ARM/seed_N.

    Raises:
      UserError: there are none.
    """
    root = Path(root)
    found: dict[str, list[Path]] = {}
    for path in sorted(root.glob("*/seed_*")):
        if path.is_dir():
            found.setdefault(path.parent.name, []).append(path)
    if not found:
        raise UserError(
            f"{root} holds no runs to compare",
            got="no folder ARM/seed_N in it" if root.is_dir() else "no such folder",
            wanted="workdirs such as ddpo/seed_0 and ddrl/seed_0",
            way_out="train each arm with --workdir=FOLDER/ARM/seed_N, then "
            "--mode=compare --workdir=FOLDER",
        )
    return found


def role(config: Mapping[str, Any]) -> str:
    """What holds a run back, one of ROLES, by its weights."""
    if not config["policy.weight"]:
        return "data only"
    if config["data_term.weight"]:
        return "DDRL"
    return "KL" if config["policy.kl_weight"] else "DDPO"


def labels(runs: Runs) -> dict[str, str]:
    """Short names: role and weight, or the arm's own name where two agree."""
    short = {arm: _label(of_arm[0].config) for arm, of_arm in runs.items()}
    names = list(short.values())
    return {arm: s if names.count(s) == 1 else arm for arm, s in short.items()}


def summarise(runs: Runs) -> dict[str, Summary]:
    """Mean and spread over seeds of every metric at every number of reward calls.

    Args:
      runs: of `load_runs`.

    Returns:
      For each arm the evaluations that all of its seeds have. A value that one seed
      lacks is NaN in the mean too.
    """
    names = labels(runs)
    return {arm: _summary(names[arm], of_arm) for arm, of_arm in runs.items()}


def at_matched_size(
    run: Run, kilobytes: float, metric: str = "retrieval"
) -> float | None:
    """The value of a metric where a run first comes down to a JPEG size.

    Linear between the last evaluation above the size and the first at or below it.

    Args:
      run: one seed of one arm.
      kilobytes: the size, kB.
      metric: one of METRICS.

    Returns:
      The value, or None where the run never gets so small.
    """
    size, value = run.values["kilobytes"], run.values[metric]
    below = np.flatnonzero(size <= kilobytes)
    if not below.size:
        return None
    i = int(below[0])
    if i == 0:
        return float(value[0])
    share = (size[i - 1] - kilobytes) / (size[i - 1] - size[i])
    return float(value[i - 1] + share * (value[i] - value[i - 1]))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a .jsonl file; a line cut short by a kill is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            rows.append(dict(parse_json(line)))
        except (ValueError, TypeError):
            continue
    return rows


def _read(arm: str, root: Path) -> Run | str:
    """The run of a workdir, or in words what it lacks."""
    try:
        config = flattened(parse_json((root / "config.json").read_text()))
    except (OSError, ValueError, AttributeError) as error:
        reason = "no config.json" if root.is_dir() else "no such folder"
        return f"{root}: {reason if isinstance(error, OSError) else error}"
    rows = read_lines(root / "metrics.jsonl")
    size = METRICS["kilobytes"].key
    judged = {row["step"]: row for row in rows if size in row}
    if 0 not in judged:
        return f"{root}: no {size} of step 0 in metrics.jsonl"
    ordered = [judged[step] for step in sorted(judged)]
    return Run(
        arm=arm,
        root=root,
        seed=config["seed"],
        config=config,
        steps=np.array([row["step"] for row in ordered], np.int64),
        calls=np.array([row.get("samples_seen", 0) for row in ordered], np.int64),
        values={name: _column(ordered, metric) for name, metric in METRICS.items()},
        seconds=float(sum(row.get("time/epoch") or 0.0 for row in rows)),
    )


def _column(rows: Sequence[Mapping], metric: Metric) -> Float[np.ndarray, " e"]:
    values = [row.get(metric.key) for row in rows]
    return metric.sign * np.array([np.nan if v is None else v for v in values], float)


def _check_seeds(runs: Sequence[Run]) -> None:
    names = [(run.arm, run.seed) for run in runs]
    twice = [run for run in runs if names.count((run.arm, run.seed)) > 1]
    if twice:
        raise UserError(
            "an arm has the same seed twice, so its spread would be too small",
            got=", ".join(f"{run.root}: seed {run.seed}" for run in twice),
            wanted="one run a seed",
            way_out="train them with different --config.seed",
        )


def _check_bases(runs: Sequence[Run]) -> None:
    """Runs of a seed have judged the same base on the same prompts and noise."""
    first = runs[0]
    for run in runs[1:]:
        for name in COMPARED:
            here, there = run.values[name][0], first.values[name][0]
            if np.isclose(here, there, rtol=SAME, atol=0.0, equal_nan=True):
                continue
            raise UserError(
                f"runs of seed {run.seed} do not start from the same evaluation",
                got=f"{METRICS[name].title} of the base {there:g} in {first.root} and "
                f"{here:g} in {run.root}",
                wanted="the same starting weights, prompts, noise and evaluate keys",
                way_out="train the arms again with one recipe and one --config.seed",
            )


def _rank(runs: Sequence[Run], arm: str) -> tuple:
    config = next(run.config for run in runs if run.arm == arm)
    weights = (config["policy.kl_weight"], config["data_term.weight"])
    return (ROLES.index(role(config)), *weights)


def _label(config: Mapping[str, Any]) -> str:
    name, kl = role(config), config["policy.kl_weight"]
    if name == "KL":
        return f"KL {kl:g}"
    if name == "DDRL":
        return f"DDRL {config['data_term.weight']:g}" + (f" + KL {kl:g}" if kl else "")
    return name


def _summary(label: str, runs: Sequence[Run]) -> Summary:
    calls = reduce(np.intersect1d, [run.calls for run in runs])
    table = {
        name: np.stack([r.values[name][np.isin(r.calls, calls)] for r in runs])
        for name in METRICS
    }
    return Summary(
        label=label,
        role=role(runs[0].config),
        seeds=tuple(run.seed for run in runs),
        calls=calls,
        mean={name: rows.mean(0) for name, rows in table.items()},
        low={name: rows.min(0) for name, rows in table.items()},
        high={name: rows.max(0) for name, rows in table.items()},
        std={name: rows.std(0) for name, rows in table.items()},
    )
