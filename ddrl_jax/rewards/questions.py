"""Questions about a picture and the words that a right answer contains.

The strict variant of DDPO's alignment reward: the reward is the share of questions
whose answer contains the expected word. A question file holds one JSON object a line:
{"prompt": "two cats", "questions": [["How many cats are there?", "two"]]}; in place of
the word there may be a list of words, of which one is enough.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ddrl_jax.errors import UserError
from ddrl_jax.text import parse_json

FOLDER = Path(__file__).parent.parent / "assets" / "prompts"
SHOWN = 5  # prompts in a message


class Question(NamedTuple):
    """A question and the words of which a right answer contains one."""

    text: str
    words: tuple[str, ...]


def read_questions(name_or_path: str) -> dict[str, tuple[Question, ...]]:
    """Reads a question file: prompt -> its questions.

    Args:
      name_or_path: a path, or the name of a set that is shipped ("counting",
        "nouns_activities", "vqa_v0", "vqa_v1", "vqa_v2").

    Raises:
      UserError: the file is missing or empty, a line is malformed, or two lines give
        one prompt different questions.
    """
    shipped = sorted(path.stem for path in FOLDER.glob("*.jsonl"))
    path = Path(name_or_path)
    if name_or_path in shipped:
        path = FOLDER / f"{name_or_path}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        got = f"{type(e).__name__}: {e}"
        raise _bad_file(name_or_path, f"{got}; shipped: {', '.join(shipped)}") from e
    table: dict[str, tuple[Question, ...]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _parse(line)
        if row is None or table.get(row[0], row[1]) != row[1]:
            why = "twice, with other questions" if row else "malformed"
            raise _bad_file(name_or_path, f"line {number} ({why}): {line[:120]}")
        table[row[0]] = row[1]
    if not table:
        raise _bad_file(name_or_path, "no line with a prompt")
    return table


def questions_of(
    table: Mapping[str, tuple[Question, ...]], prompts: Sequence[str]
) -> list[tuple[Question, ...]]:
    """Looks up the questions of each prompt.

    Raises:
      UserError: prompts without questions.
    """
    missing = list(dict.fromkeys(p for p in prompts if p not in table))
    if missing:
        raise UserError(
            f"{len(missing)} prompts have no questions",
            got=", ".join(repr(p) for p in missing[:SHOWN]),
            wanted="a line with the same prompt in the question file for each",
            way_out="add them to the file of --config.rewards.vlm.questions, or draw"
            " the prompts from it",
        )
    return [table[p] for p in prompts]


def is_right(answer: str, words: Sequence[str], match: str = "substring") -> bool:
    """Says whether an answer contains one of the words, see `folded`.

    Args:
      answer: of the model.
      words: expected ones.
      match: "substring" as in DDPO ("cats" contains "cat", and so does
        "caterpillar"), or "word" (whole words only).
    """
    text = folded(answer)
    if match == "word":
        return any(
            re.search(rf"(?<!\w){re.escape(folded(w))}(?!\w)", text) for w in words
        )
    return any(folded(w) in text for w in words)


def folded(text: str) -> str:
    """Returns a text as texts are compared, whatever its case and its composition.

    "é" is one character or two, "ﬁ" one or two letters: a prompt and an answer need
    not agree on it.
    """
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _parse(line: str) -> tuple[str, tuple[Question, ...]] | None:
    """Returns the prompt and questions of a line, or None if it is malformed."""
    try:
        row = parse_json(line)
        prompt, pairs = " ".join(row["prompt"].split()), row["questions"]
        questions = tuple(_question(pair) for pair in pairs)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return (prompt, questions) if prompt and questions else None


def _question(pair: Any) -> Question:
    text, words = pair
    words = (words,) if isinstance(words, str) else tuple(words)
    if not words or not all(isinstance(w, str) and w.strip() for w in (text, *words)):
        raise ValueError(f"not a question and its word: {pair!r}")
    return Question(text.strip(), tuple(w.strip() for w in words))


def _bad_file(path: str, got: str) -> UserError:
    return UserError(
        f"the question file {path!r} can not be read",
        got=got,
        wanted='one JSON object a line: {"prompt": "two cats", "questions":'
        ' [["How many cats are there?", "two"]]}',
        way_out="mend the file, or correct --config.rewards.vlm.questions",
    )
