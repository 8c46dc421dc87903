"""Reading the JSON description of a network: what we can not honour is refused."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from ddrl_jax.errors import UserError

T = TypeVar("T")


def read_config(
    cls: type[T],
    what: str,
    given: Mapping[str, Any],
    *,
    only: Mapping[str, tuple] | None = None,
    ignored: Collection[str] = (),
) -> T:
    """Fills a dataclass from JSON, key by key.

    Args:
      cls: a dataclass whose every field has a default; its type is what we accept, and
        whole numbers must be positive.
      what: the network's name for messages.
      given: the JSON object. Keys that begin with "_" are a writer's own notes.
      only: keys that are no field, and the values of them that change nothing for us.
      ignored: keys that do not touch what the network computes.

    Raises:
      UserError: a key or value that the network can not honour; all are listed.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values, problems = {}, []
    for key, value in given.items():
        if key in defaults:
            values[key], wanted = _as(defaults[key], value)
        elif key in (only or {}):
            wanted = "" if _in(value, (only or {})[key]) else f"{(only or {})[key]}"
        else:
            skip = key.startswith("_") or key in ignored
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


def _in(value: Any, accepted: tuple) -> bool:
    """Membership that knows True from 1 and compares lists as tuples."""
    value = tuple(value) if isinstance(value, list) else value
    return any(type(value) is type(a) and value == a for a in accepted)


def _as(default: Any, value: Any) -> tuple[Any, str]:
    """(value in the type of the default, what would have been accepted or "")."""
    if isinstance(default, bool):
        return value, "" if isinstance(value, bool) else "true or false"
    if isinstance(default, str):
        return value, "" if isinstance(value, str) else "a string"
    if isinstance(default, int):
        return value, "" if _positive(value) else "a whole number above 0"
    if isinstance(default, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return (float(value), "") if number else (value, "a number")
    fine = isinstance(value, list | tuple) and value and all(map(_positive, value))
    return (tuple(value), "") if fine else (value, "a list of whole numbers above 0")


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
