"""What counts as text, and what a JSON text says."""

import json
from typing import Any

DEPTH = 100  # of JSON: no file of ours or of a model comes near it


def is_text(value: object) -> bool:
    """Whether it is a string of valid Unicode.

    Half a surrogate pair is none, which cut JSON may have, and which Python makes of
    bytes on a command line that are not UTF-8.
    """
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def parse_json(content: str | bytes) -> Any:
    """The value of a JSON text that somebody else may have written.

    Raises:
      ValueError: it is none, or its lists and objects are nested deeper than DEPTH:
        Python would read some more, and then fail where they are walked or printed.
    """
    too_deep = f"nested deeper than {DEPTH} lists and objects"
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError(too_deep) from None
    level = _nested([found])
    for _ in range(DEPTH):
        if not level:
            return found
        level = [inner for value in level for inner in _nested(value)]
    if level:
        raise ValueError(too_deep)
    return found


def _nested(value: Any) -> list[Any]:
    """The lists and objects right inside a list or an object."""
    values = value.values() if isinstance(value, dict) else value
    return [inner for inner in values if isinstance(inner, dict | list)]
