"""From sys.argv to a Command: which mode, which workdir, which configuration."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict

from ddrl_jax.config_file import USAGE, load_config, override
from ddrl_jax.config_rules import flatten, near
from ddrl_jax.errors import UserError
from ddrl_jax.file_tree import spelt_out
from ddrl_jax.text import is_text

MODES = {
    "train": "the default: train, or go on where the workdir stopped",
    "evaluate": "judge the weights of the workdir on fixed prompts and noise",
    "sample": "write a data set of samples of the workdir's weights, or of the first",
    "export": "write the averaged weights of the workdir to a file",
    "report": "write report.html from what the workdir holds; needs no --config",
    "plan": "what the run needs on accelerators that are not here; needs no --workdir",
    "compare": "one table and figure of WORKDIR/ARM/seed_N; needs no --config",
}
PLACE = ("distributed.coordinator", "distributed.processes", "distributed.process")
PLAN = ("plan.devices", "plan.chip", "plan.efficiency", "plan.suggest", "plan.slices")
PLAN += ("plan.compiler",)


class Command(NamedTuple):
    """A command line that has been understood; `config` is None for mode report."""

    mode: str
    workdir: str
    config: ConfigDict | None
    place: dict[str, str | None]  # of this process; see ddrl_jax.distributed
    profile: tuple[int, int] | None = None  # first and last epoch to trace
    plan: dict[str, str | None] | None = None  # see ddrl_jax.plan


def help_text() -> str:
    """Returns what --help prints."""
    modes = "\n".join(f"  --mode={name:9s} {what}" for name, what in MODES.items())
    return (
        f"{USAGE}\n\n{modes}\n\n"
        "  --config=FILE:VARIANT  a variant of FILE, as :smoke; its header lists them\n"
        "  --config.KEY=VALUE     changes a key; configs/base.py lists and explains all"
        "\n"
        "  --profile=FIRST:LAST   a profiler trace of these epochs in WORKDIR/profile"
        "\n\n"
        "Several processes that no cluster starts (Slurm, Open MPI 4, TPU pods do):\n"
        "  --distributed.coordinator=HOST:PORT --distributed.processes=N\n"
        "  --distributed.process=I   of this one, 0..N-1\n\n"
        "--mode=plan:\n"
        "  --plan.devices=N --plan.chip=NAME   v5e, v5p, v6e, A100, H100 or H200\n"
        "  --plan.efficiency=0.4     share of the peak FLOP/s that products reach\n"
        "  --plan.slices=0           joined by the hosts' network; 0: as few as fit\n"
        "  --plan.suggest=true       search the smallest mesh that fits\n"
        "  --plan.compiler=NAME      tpu or cpu; unset: the TPU's own if libtpu is here"
    )


def parse(argv: Sequence[str]) -> Command:
    """Understands a command line and loads its configuration.

    Args:
      argv: as sys.argv, the program first.

    Raises:
      UserError: an unknown flag, key or mode, a value of the wrong type, a missing
        workdir, or a configuration that can not be loaded or is one of several.
    """
    values = flags.FlagValues()
    flags.DEFINE_multi_string("config", None, "one file", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_string("mode", "train", "what to do", flag_values=values)
    flags.DEFINE_string("profile", None, "epochs to trace", flag_values=values)
    for name in (*PLACE, *PLAN):
        flags.DEFINE_string(name, None, "see --help", flag_values=values)
    # What comes after an override of a key is to be seen too.
    values.set_gnu_getopt(True)
    try:
        rest = values(list(argv), known_only=True)
    except flags.Error as e:
        raise UserError(
            "the command line can not be understood",
            got=str(e),
            wanted=USAGE,
            way_out="--help lists the flags",
        ) from e
    _check_mode(values.mode)
    if not values.workdir and values.mode != "plan":
        raise UserError(
            "--workdir is missing",
            got="no folder",
            wanted="a folder for checkpoints, metrics and pictures",
            way_out="--workdir=runs/mine",
        )
    _check_folder(values.workdir or "")
    _check_flags(rest[1:])
    place = {name.removeprefix("distributed."): values[name].value for name in PLACE}
    workdir = spelt_out(values.workdir or "", "--workdir")
    file = _one_file(values.config or [""])
    if not file and values.mode in ("report", "compare"):
        return Command(values.mode, workdir, None, place)
    config = override(load_config(file), rest)
    profile = None
    if values.profile is not None:
        total = flatten(config).get("train.epochs")
        profile = _epochs(values.profile, values.mode, total)
    plan = {name.removeprefix("plan."): values[name].value for name in PLAN}
    return Command(values.mode, workdir, config, place, profile, plan)


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise UserError(
            "there is no such --mode",
            got=repr(mode),
            wanted="one of " + ", ".join(MODES),
            way_out=near(mode, tuple(MODES)) + "correct --mode",
        )


def _one_file(files: Sequence[str]) -> str:
    """The configuration file: a second one would replace the first, not change it."""
    if len(files) > 1:
        raise UserError(
            "--config is given more than once",
            got=" ".join(f"--config={file}" for file in files),
            wanted="one configuration file",
            way_out="leave out all but one; --config.KEY=VALUE changes its keys",
        )
    return files[0]


def _epochs(text: str, mode: str, total: object) -> tuple[int, int]:
    """The range of --profile; epochs count from 1, as in metrics.jsonl."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    epochs = (int(found[1]), int(found[2])) if found else (0, 0)
    # A wrong train.epochs has its own message, from check_config.
    last = total if isinstance(total, int) and total > 0 else max(epochs[1], 1)
    if mode != "train" or not 1 <= epochs[0] <= epochs[1] <= last:
        raise UserError(
            "--profile has no range of epochs to trace",
            got=f"--profile={text} with --mode={mode}",
            wanted=f"FIRST:LAST with 1 <= FIRST <= LAST <= {last}, in --mode=train",
            way_out=_instead(epochs, mode, last),
        )
    return epochs


def _instead(epochs: tuple[int, int], mode: str, last: int) -> str:
    """What helps; the first epoch compiles, so that the next ones show more."""
    if mode != "train":
        return "leave --profile away, or train"
    example = f"for example --profile={min(2, last)}:{min(3, last)}"
    more = f", or more epochs: --config.train.epochs={epochs[1]}"
    beyond = 1 <= epochs[0] <= epochs[1] and last < epochs[1]
    return example + (more if beyond else "")


def _check_folder(workdir: str) -> None:
    """Refuses what Path would take for a folder of that odd name."""
    if "://" in workdir or not is_text(workdir):
        raise UserError(
            "--workdir is no path",
            got=ascii(workdir),
            wanted="a folder of this machine, its name in UTF-8",
            way_out="mount a shared file system or the bucket, and name its folder",
        )


def _check_flags(rest: Sequence[str]) -> None:
    """Refuses flags that are neither ours nor an override of a key."""
    for argument in rest:
        name = argument.lstrip("-").split("=")[0]
        ours = name.removeprefix("no").startswith("config.")
        if not argument.startswith("-") or ours:
            continue
        raise UserError(
            f"there is no flag --{name}",
            got=argument,
            wanted="--config, --config.KEY, --workdir, --mode, --profile, --plan.* or "
            "--distributed.*",
            way_out=near(name, ("config", "workdir", "mode", "profile", *PLACE, *PLAN))
            + "--help lists them",
        )
