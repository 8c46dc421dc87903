"""Question files and what counts as a right answer."""

import json

import pytest

from ddrl_jax.data import prompt_sets
from ddrl_jax.errors import UserError
from ddrl_jax.rewards.questions import (
    Question,
    is_right,
    questions_of,
    read_questions,
)

GOOD = {"prompt": "two cats", "questions": [["How many?", "two"], ["What?", "cat"]]}


def write(tmp_path, *lines):
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_a_file_becomes_a_table(tmp_path):
    other = {"prompt": " a bike ", "questions": [["What?", ["bike", "bicycle"]]]}
    path = write(tmp_path, json.dumps(GOOD), "", json.dumps(other), json.dumps(GOOD))
    assert read_questions(path) == {
        "two cats": (Question("How many?", ("two",)), Question("What?", ("cat",))),
        "a bike": (Question("What?", ("bike", "bicycle")),),
    }


@pytest.mark.parametrize("name", sorted(prompt_sets.QUESTIONED))
def test_shipped_files_are_what_the_prompt_sets_compose(name):
    composed = {
        row.prompt: tuple(Question(text, (word,)) for text, word in row.questions)
        for row in prompt_sets.QUESTIONED[name]()
    }
    assert read_questions(name) == composed
    assert tuple(composed) == prompt_sets.prompt_set(name)


@pytest.mark.parametrize(
    "line",
    [
        "two cats",
        "[]",
        '{"prompt": "two cats"}',
        '{"prompt": "", "questions": [["a", "b"]]}',
        '{"prompt": 3, "questions": [["a", "b"]]}',
        '{"prompt": "a", "questions": []}',
        '{"prompt": "a", "questions": [["a"]]}',
        '{"prompt": "a", "questions": [["a", ""]]}',
        '{"prompt": "a", "questions": [["a", []]]}',
        '{"prompt": "a", "questions": [["a", 2]]}',
        '{"prompt": "a", "questions": [["", "b"]]}',
        '{"prompt": "a", "questions": "ab"}',
        pytest.param('{"prompt": "a", "questions": ' + "[" * 10**5, id="nested"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line):
    with pytest.raises(UserError, match="can not be read") as error:
        read_questions(write(tmp_path, json.dumps(GOOD), line))
    assert "line 2 (malformed)" in error.value.got and line[:120] in error.value.got


def test_a_prompt_with_two_lists_is_an_error(tmp_path):
    other = {**GOOD, "questions": [["What?", "dog"]]}
    with pytest.raises(UserError) as error:
        read_questions(write(tmp_path, json.dumps(GOOD), json.dumps(other)))
    assert "line 2 (twice" in error.value.got


def test_a_missing_file_lists_what_is_shipped():
    with pytest.raises(UserError) as error:
        read_questions("/nowhere/q.jsonl")
    assert "counting, nouns_activities" in error.value.got


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="can not be read"):
        read_questions(write(tmp_path, "", " "))


def test_prompts_without_questions_are_listed():
    table = read_questions("counting")
    assert questions_of(table, ["two cats"]) == [table["two cats"]]
    with pytest.raises(UserError) as error:
        questions_of(table, ["two cats", "nine cats", "a dog", "nine cats"])
    assert error.value.got == "'nine cats', 'a dog'"
    assert error.value.what.startswith("2 prompts")


@pytest.mark.parametrize(
    ("answer", "words", "substring", "word"),
    [
        ("Two cats.", ("cat",), True, False),
        ("A CAT!", ("cat",), True, True),
        ("a cat", ("Cat",), True, True),
        ("an elephant", ("ant",), True, False),
        ("a dog", ("cat",), False, False),
        ("on a bicycle", ("bike", "bicycle"), True, True),
        ("a sea-lion", ("lion",), True, True),
        ("a c.t", ("c.t",), True, True),
        ("a cat", ("c.t",), False, False),
        ("a caf\u00e9", ("cafe\u0301",), True, True),  # composed or not, it is one word
        ("A CAFE\u0301", ("caf\u00e9",), True, True),
        ("a \ufb01sh", ("fish",), True, True),
    ],
)
def test_right_answers(answer, words, substring, word):
    assert is_right(answer, words) is substring
    assert is_right(answer, words, "word") is word
