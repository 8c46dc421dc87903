"""JSON of files and answers: a value that can be walked, or ValueError."""

import json

import pytest

from ddrl_jax.text import DEPTH, parse_json


@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"a": ', "}"), ("[", "")])
@pytest.mark.parametrize("depth", [DEPTH, 950, 100_000])
def test_what_is_nested_too_deep_is_no_json(begin, end, depth):
    content = begin * depth + ("[]" if end else "") + end * depth
    for form in (content, content.encode()):
        with pytest.raises(ValueError):
            parse_json(form)


@pytest.mark.parametrize(
    "value",
    [None, 3, "[" * 1000, {}, [[], [1, {"a": "ä"}]], {"a": [{"b": {}}, 2]}],
)
def test_other_values_are_those_of_the_text(value):
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json("[" * DEPTH + "]" * DEPTH)
