"""The kinds of values that a key of a configuration may hold."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from ddrl_jax.text import is_text

Bound = float | int | None


class Rule(NamedTuple):
    """What one key accepts: in words, as a test, and the names if it is a choice."""

    wanted: str
    accepts: Callable[[Any], bool]
    names: tuple[str, ...] = ()


def integer(least: int, most: int | None = None) -> Rule:
    """Returns the rule of a whole number in [least, most]; True is not a number."""
    wanted = f"a whole number >= {least}" + (f" and <= {most}" if most else "")

    def accepts(value: Any) -> bool:
        if not isinstance(value, int) or isinstance(value, bool):
            return False
        return value >= least and (most is None or value <= most)

    return Rule(wanted, accepts)


def number(
    least: Bound = None, *, above: Bound = None, most: Bound = None, below: Bound = None
) -> Rule:
    """Returns the rule of a finite number within the bounds that are given."""
    bounds = (
        (">=", least, lambda value, bound: value >= bound),
        (">", above, lambda value, bound: value > bound),
        ("<=", most, lambda value, bound: value <= bound),
        ("<", below, lambda value, bound: value < bound),
    )
    used = [row for row in bounds if row[1] is not None]
    words = " and ".join(f"{sign} {bound:g}" for sign, bound, _ in used)

    def accepts(value: Any) -> bool:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
        # neither inf nor NaN, nor a whole number beyond all floats
        finite = abs(value) <= sys.float_info.max
        return finite and all(test(value, b) for _, b, test in used)

    return Rule(f"a finite number {words}".rstrip(), accepts)


def choice(*names: str) -> Rule:
    """Returns the rule of one of the names."""
    return Rule(
        "one of " + ", ".join(f'"{n}"' for n in names), names.__contains__, names
    )


def text(*, empty: bool = True) -> Rule:
    """Returns the rule of a string of valid Unicode."""
    wanted = "a string" if empty else "a string that is not empty"

    return Rule(wanted, lambda v: is_text(v) and (empty or bool(v.strip())))


def folder(*, empty: bool = True) -> Rule:
    """Returns the rule of a place on this machine's file systems, "" for none."""
    wanted = "a path (mount a bucket, and name its folder)"

    def accepts(value: Any) -> bool:
        if not is_text(value) or "://" in value:
            return False
        return bool(value.strip()) or (empty and not value)  # a blank is no name

    return Rule(wanted, accepts)


def switch() -> Rule:
    """Returns the rule of True or False; 0 and 1 are not accepted."""
    return Rule("True or False", lambda value: isinstance(value, bool))


def sequence(item: Rule) -> Rule:
    """Returns the rule of a tuple whose items follow another rule, none twice."""

    def accepts(value: Any) -> bool:
        if not isinstance(value, (tuple, list)):
            return False
        return all(item.accepts(v) for v in value) and len(set(value)) == len(value)

    return Rule(f"a tuple, each {item.wanted}, none twice", accepts)


def table(item: Rule) -> Rule:
    """Returns the rule of a table from names to values that follow another rule."""

    def accepts(value: Any) -> bool:
        if not hasattr(value, "items"):
            return False
        return all(isinstance(n, str) and item.accepts(v) for n, v in value.items())

    return Rule(f"a table from names to {item.wanted}", accepts)
