"""The part of JSON Schema that tests/launch_schemas.json needs."""

import re
from collections.abc import Iterator
from typing import Any

TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "boolean": bool,
}


def violations(schema: dict, value: Any, where: str = "") -> Iterator[str]:
    """What of `value` the schema does not allow, each with its place."""
    wanted = schema.get("type")
    if wanted and not _is(wanted, value):
        yield f"{where}: {value!r} is no {wanted}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is not one of {schema['enum']}"
    pattern = schema.get("pattern")  # JSON Schema holds it against strings only
    if pattern and isinstance(value, str) and not re.fullmatch(pattern, value):
        yield f"{where}: {value!r} does not look like {pattern}"
    if isinstance(value, dict):
        yield from _of_object(schema, value, where)
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from violations(schema.get("items", {}), item, f"{where}[{i}]")


def _is(wanted: str, value: Any) -> bool:
    if wanted == "integer" and isinstance(value, bool):
        return False
    return isinstance(value, TYPES.get(wanted, object))


def _of_object(schema: dict, value: dict, where: str) -> Iterator[str]:
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{where}: {name} is missing"
    known, other = schema.get("properties", {}), schema.get("additionalProperties", {})
    for name, item in value.items():
        if name in known:
            yield from violations(known[name], item, f"{where}.{name}")
        elif other is False:
            yield f"{where}: there is no field {name}"
        elif isinstance(other, dict):
            yield from violations(other, item, f"{where}.{name}")
