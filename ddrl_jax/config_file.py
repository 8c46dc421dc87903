"""A configuration file and its overrides -> a ConfigDict, with paths spelt out."""

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference, FrozenConfigDict, config_flags
from ml_collections.config_dict import placeholder

from ddrl_jax.config_rules import RULES, flatten, near, plain
from ddrl_jax.errors import UserError
from ddrl_jax.file_tree import spelt_out, with_home

USAGE = "python -m ddrl_jax.main --config=configs/quickstart.py --workdir=runs/mine"
# Keys whose value may be a path. Not data.cache, which is no part of what a run is:
# it keeps its "~" in config.json, and each machine of a run has a cache of its own.
PATHS = (
    "model.init",
    "data.path",
    "data.tfds_dir",
    "prompts.path",
    "rewards.clip",
    "rewards.clip_h",
    "rewards.aesthetic_head",
    "rewards.pickscore",
    "rewards.hpsv2",
    "rewards.vlm.bertscore_model",
    "rewards.vlm.questions",
    "sample.output",
)


def load_config(spec: str) -> ConfigDict:
    """Runs get_config of a configuration file.

    Args:
      spec: FILE or FILE:variant.

    Returns:
      The configuration, locked: keys can be changed and not added; "~" in its paths
      is spelt out where that home is known (`override` refuses what is left), and a
      placeholder without a value is None.

    Raises:
      UserError: no such file, or one whose get_config() gives no ConfigDict.
    """
    name, _, variant = spec.partition(":")
    path = Path(spelt_out(name, "--config"))
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
    with _config_errors(name), _importable(path.resolve().parent.parent):
        config: Any = _run_get_config(path, name, variant)
        if isinstance(config, FrozenConfigDict):
            config = config.as_configdict()  # overrides have to change it
        if isinstance(config, ConfigDict):
            _open_placeholders(config)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config() of {name} returned no configuration",
            got=f"{type(config).__name__}: {str(config)[:80]}",
            wanted="an ml_collections.ConfigDict",
            way_out="return what get_config() of configs/base.py gave, edited",
        )
    _spell_out(config, lambda value, _: with_home(value))
    return config.lock()


def _open_placeholders(config: ConfigDict) -> None:
    """Lets required placeholders be read before their values are given: as None.

    `override` refuses one that stays empty.
    """
    for _, value in config.items(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            _open_placeholders(value)
        elif isinstance(value, FieldReference) and value.empty():
            value.set(placeholder(value.get_type()))


@contextmanager
def _importable(root: Path) -> Iterator[None]:
    """`from configs import base` works from anywhere."""
    sys.path.append(str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))


def _run_get_config(path: Path, name: str, variant: str) -> object:
    """Imports the file as a module and calls its get_config."""
    spec = importlib.util.spec_from_file_location("ddrl_jax_config", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is not a .py file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(
            f"{name} is no experiment",
            got="a file without a function get_config",
            wanted="a Python file with get_config(), as most of those in configs/",
            way_out=f"its header may name those that use it; for example {USAGE}",
        )
    if variant and not inspect.signature(get_config).parameters:
        raise UserError(
            f"{name} has no variants",
            got=f":{variant}",
            wanted='get_config(variant="")',
            way_out=f"write --config={name}, or give its get_config that argument",
        )
    return get_config(variant) if variant else get_config()


def _variant_error(name: str, variant: str, known: Sequence[str]) -> UserError:
    """Of a variant that a file says it does not have (configs/smoke.py)."""
    return UserError(
        f"{name} has no such variant",
        got=f":{variant}",
        wanted=", ".join(f":{one}" for one in known) + ", or none",
        way_out=near(variant, known) + "its header says what they are",
    )


@contextmanager
def _config_errors(name: str) -> Iterator[None]:
    """Turns whatever a configuration file raises into one message with its line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as e:
        if known := getattr(e, "known", ()):
            raise _variant_error(name, getattr(e, "variant", ""), known) from e
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
      UserError: an unknown key, a value of another type than the default's, a
        placeholder that has no value yet, or a path in a home that is not known.
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
    _check_placeholders(values.config)
    _spell_out(values.config, spelt_out)
    return values.config


def _spell_out(config: ConfigDict, spell: Callable[[str, str], str]) -> None:
    """Puts the home in place of a leading "~" in the values of PATHS."""
    values = flatten(config)
    for path in PATHS:
        value = values.get(path)
        if isinstance(value, str) and value.startswith("~"):
            home = {path: spell(value, f"--config.{path}")}
            config.update_from_flattened_dict(home)


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


def _check_placeholders(config: ConfigDict) -> None:
    for key, value in flatten(config).items():
        if value is None and key in RULES:
            raise UserError(
                f"{key} has no value",
                got="the configuration file leaves it open, and so do the arguments",
                wanted=RULES[key].wanted,
                way_out=f"give it: --config.{key}=VALUE",
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
