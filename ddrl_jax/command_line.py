"""From sys.argv to a Command: which mode, which workdir, which configuration."""

import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from ddrl_jax.config_rules import RULES, flatten, near, plain
from ddrl_jax.errors import UserError

MODES = {
    "train": "train, or go on where the workdir stopped",
    "evaluate": "judge the weights of the workdir on fixed prompts and noise",
    "sample": "write a data set of samples of the workdir's weights, or of the first",
    "export": "write the averaged weights of the workdir to a file",
    "report": "write report.html from what the workdir holds; needs no --config",
    "plan": "what the run needs on accelerators that are not here; needs no --workdir",
    "compare": "one table and figure of WORKDIR/ARM/seed_N; needs no --config",
}
PLACE = ("distributed.coordinator", "distributed.processes", "distributed.process")
PLAN = ("plan.devices", "plan.chip", "plan.efficiency", "plan.suggest")
USAGE = "python -m ddrl_jax.main --config=configs/quickstart.py --workdir=runs/mine"


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
        "  --config=FILE:VARIANT  passes VARIANT to get_config of FILE, as in :smoke\n"
        "  --config.KEY=VALUE     changes a key; configs/base.py lists and explains all"
        "\n"
        "  --profile=FIRST:LAST   a profiler trace of these epochs in WORKDIR/profile"
        "\n\n"
        "Several processes that no cluster starts (Slurm, Open MPI, TPU and GKE do):\n"
        "  --distributed.coordinator=HOST:PORT --distributed.processes=N\n"
        "  --distributed.process=I   of this one, 0..N-1\n\n"
        "--mode=plan:\n"
        "  --plan.devices=N --plan.chip=NAME   v5e, v5p, v6e, A100, H100 or H200\n"
        "  --plan.efficiency=0.4     share of the peak FLOP/s that products reach\n"
        "  --plan.suggest=true       search the smallest mesh that fits"
    )


def parse(argv: Sequence[str]) -> Command:
    """Understands a command line and loads its configuration.

    Args:
      argv: as sys.argv, the program first.

    Raises:
      UserError: an unknown flag, key or mode, a value of the wrong type, a missing
        workdir, or a configuration that can not be loaded.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "configuration file", flag_values=values)
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
    _check_flags(rest[1:])
    place = {name.removeprefix("distributed."): values[name].value for name in PLACE}
    if not values.config and values.mode in ("report", "compare"):
        return Command(values.mode, values.workdir, None, place)
    config = override(load_config(values.config or ""), rest)
    profile = None
    if values.profile is not None:
        total = flatten(config).get("train.epochs")
        profile = _epochs(values.profile, values.mode, total)
    plan = {name.removeprefix("plan."): values[name].value for name in PLAN}
    workdir = values.workdir or ""
    return Command(values.mode, workdir, config, place, profile, plan)


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise UserError(
            "there is no such --mode",
            got=repr(mode),
            wanted="one of " + ", ".join(MODES),
            way_out=near(mode, tuple(MODES)) + "correct --mode",
        )


def _epochs(text: str, mode: str, total: object) -> tuple[int, int]:
    """The range of --profile; epochs count from 1, as in metrics.jsonl."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    epochs = (int(found[1]), int(found[2])) if found else (0, 0)
    # A wrong train.epochs has its own message, from check_config.
    last = total if isinstance(total, int) else epochs[1]
    if mode != "train" or not 1 <= epochs[0] <= epochs[1] <= last:
        raise UserError(
            "--profile has no range of epochs to trace",
            got=f"--profile={text} with --mode={mode}",
            wanted=f"FIRST:LAST with 1 <= FIRST <= LAST <= {last}, in --mode=train",
            way_out=f"for example --profile=2:{min(3, max(2, last))}",
        )
    return epochs


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
            wanted="--config, --config.KEY, --workdir, --mode or --profile",
            way_out=near(name, ("config", "workdir", "mode", "profile", *PLACE, *PLAN))
            + "--help lists them",
        )


def load_config(spec: str) -> ConfigDict:
    """Runs get_config of a configuration file.

    Args:
      spec: FILE or FILE:variant.

    Returns:
      The configuration, locked: keys can be changed and not added.

    Raises:
      UserError: no such file, or one whose get_config() gives no ConfigDict.
    """
    name, _, variant = spec.partition(":")
    path = Path(name).expanduser()
    if not name:
        raise UserError(
            "--config is missing",
            got="no file",
            wanted="a Python file with get_config(), as those in configs/",
            way_out=f"for example {USAGE}",
        )
    if not path.is_file():
        known = [str(p) for p in path.parent.glob("*.py")]
        raise UserError(
            "there is no such configuration file",
            got=f"{name}, which is a folder" if path.is_dir() else name,
            wanted="a Python file with get_config(), as those in configs/",
            way_out=near(name, known) + f"for example {USAGE}",
        )
    with _config_errors(name):
        config = _run_get_config(path, variant)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config() of {name} returned no configuration",
            got=f"{type(config).__name__}: {str(config)[:80]}",
            wanted="an ml_collections.ConfigDict",
            way_out="return what get_config() of configs/base.py gave, edited",
        )
    return config.lock()


def _run_get_config(path: Path, variant: str) -> object:
    """Imports the file as a module; its folder's parent can be imported from too."""
    spec = importlib.util.spec_from_file_location("ddrl_jax_config", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is not a .py file")
    module = importlib.util.module_from_spec(spec)
    root = str(path.resolve().parent.parent)  # `from configs import base` from anywhere
    sys.path.append(root)
    try:
        spec.loader.exec_module(module)
        return module.get_config(variant) if variant else module.get_config()
    finally:
        sys.path.remove(root)


@contextmanager
def _config_errors(name: str) -> Iterator[None]:
    """Turns whatever a configuration file raises into one message with its line."""
    try:
        yield
    except (Exception, SystemExit) as e:
        frames = traceback.extract_tb(e.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename).name == Path(name).name]
        line = getattr(e, "lineno", None) or (lines[-1] if lines else None)
        where = f" (line {line})" if line else ""
        raise UserError(
            f"the configuration {name} can not be loaded",
            got=f"{type(e).__name__}: {' '.join(str(e).split())}{where}",
            wanted='a Python file with get_config(variant="") -> ConfigDict',
            way_out="correct the file; configs/quickstart.py is an example",
        ) from e


def override(config: ConfigDict, argv: Sequence[str]) -> ConfigDict:
    """Applies the --config.KEY=VALUE arguments of a command line.

    Args:
      config: locked; changed in place.
      argv: the program first, then overrides only.

    Raises:
      UserError: an unknown key, or a value of another type than the default's.
    """
    _check_keys(config, argv[1:])
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=list(argv)
        )
        left = values(list(argv))[1:]
    except (flags.Error, TypeError, ValueError, KeyError, AttributeError) as e:
        raise _override_error(config, str(e)) from e
    if left:
        raise UserError(
            "an argument belongs to no flag",
            got=left[0],
            wanted=USAGE,
            way_out=f"write --config.KEY={left[0]}, or quote values with spaces",
        )
    return values.config


def _check_keys(config: Any, argv: Sequence[str]) -> None:
    keys = tuple(flatten(config))
    sections = {key.rsplit(".", 1)[0] for key in keys if "." in key}
    for argument in argv:
        found = re.match(r"--?(?:no)?config\.([^=]*)", argument)
        if not found or found[1] in keys or found[1] in sections:
            continue
        if found[1].startswith("rewards.weights."):
            _check_reward_key(config.rewards.weights, found[1])
            continue
        raise UserError(
            f"the configuration has no key {found[1]}",
            got=argument,
            wanted="a key of configs/base.py",
            way_out=near(found[1], keys) + "correct the name",
        )


def _check_reward_key(weights: Any, key: str) -> None:
    """A reward that the table has can be weighed; another one needs a new table."""
    name = key.removeprefix("rewards.weights.")
    if name in weights:
        return
    from ddrl_jax.rewards.registry import REWARDS  # slow import, only for this message

    hint = near(name, tuple(REWARDS)) + f"there are {', '.join(REWARDS)}"
    if name in REWARDS:
        hint = f"replace the table: --config.rewards.weights=\"{{'{name}': 1.0}}\""
    raise UserError(
        f"rewards.weights has no reward {name!r} to change",
        got=f"rewards.weights {plain(weights)}",
        wanted="a name of this table",
        way_out=hint,
    )


def _override_error(config: ConfigDict, message: str) -> UserError:
    """What absl says of a value that does not fit, as got, wanted and way out."""
    found = re.search(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
    if found and found[1] in RULES:
        default = plain(flatten(config)[found[1]])
        return UserError(
            f"{found[1]} has a value of the wrong type",
            got=repr(found[2]),
            wanted=f"{RULES[found[1]].wanted} (here it is {default!r})",
            way_out=f"correct --config.{found[1]}",
        )
    return UserError(
        "an override of the configuration can not be applied",
        got=" ".join(message.split()),
        wanted="--config.KEY=VALUE, with a value like the default of the key",
        way_out="configs/base.py shows every key with its default",
    )
