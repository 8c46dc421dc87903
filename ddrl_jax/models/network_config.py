"""Reading the JSON description of a network: what we can not honour is refused."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from ddrl_jax.errors import UserError

T = TypeVar("T")
# Whether a value is accepted, and what is.
Check = tuple[Callable[[Any], bool], str]


def read_config(
    cls: type[T],
    what: str,
    given: Mapping[str, Any],
    *,
    only: Mapping[str, tuple] | None = None,
    ignored: Collection[str] = (),
    checks: Mapping[str, Check] | None = None,
    off: tuple = (),
) -> T:
    """Fills a dataclass from JSON, key by key.

    Args:
      cls: a dataclass whose every field has a default; its type is what we accept, and
        whole numbers must be positive.
      what: the network's name for messages.
      given: the JSON object. Keys that begin with "_" are a writer's own notes.
      only: keys that are no field, and the values of them that change nothing for us.
      ignored: keys that do not touch what the network computes.
      checks: fields whose default does not tell what we accept; lists come as tuples.
      off: values with which a key that nobody knows asks for nothing.

    Raises:
      UserError: a key or value that the network can not honour; all are listed.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values, problems, checks = {}, [], checks or {}
    for key, value in given.items():
        if key in checks:
            values[key] = as_tuple(value)
            wanted = "" if checks[key][0](values[key]) else checks[key][1]
        elif key in defaults:
            values[key], wanted = _as(defaults[key], value)
        elif key in (only or {}):
            wanted = "" if _in(value, (only or {})[key]) else f"{(only or {})[key]}"
        else:
            skip = key.startswith("_") or key in ignored or _in(value, off)
            wanted = "" if skip else "no such key"
        if wanted:
            problems.append(f"{key} = {value!r} ({wanted})")
    refuse(what, problems)
    return cls(**values)


def refuse(what: str, problems: Collection[str]) -> None:
    """Raises UserError if there are problems; they name the key and what we accept."""
    if problems:
        raise UserError(
            f"the configuration of the {what} asks for what this program does not have",
            got="; ".join(problems),
            wanted="the values in brackets",
            way_out="use a checkpoint of another architecture, or correct its "
            "config.json",
        )


def as_tuple(value: Any) -> Any:
    """A list as a tuple, anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def positive(value: Any) -> bool:
    """Whether a value of JSON is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def number(value: Any) -> bool:
    """Whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _in(value: Any, accepted: tuple) -> bool:
    """Membership that knows True from 1 and compares lists as tuples."""
    value = as_tuple(value)
    return any(type(value) is type(a) and value == a for a in accepted)


def _as(default: Any, value: Any) -> tuple[Any, str]:
    """(value in the type of the default, what would have been accepted or "")."""
    if isinstance(default, bool):
        return value, "" if isinstance(value, bool) else "true or false"
    if isinstance(default, str):
        return value, "" if isinstance(value, str) else "a string"
    if isinstance(default, int):
        return value, "" if positive(value) else "a whole number above 0"
    if isinstance(default, float):
        return (float(value), "") if number(value) else (value, "a number")
    fine = isinstance(value, list | tuple) and value and all(map(positive, value))
    return (tuple(value), "") if fine else (value, "a list of whole numbers above 0")
