"""The prompt sets of DDPO (arXiv 2305.13301) by name, and prompts of a TFDS data set.

Labels and word lists are text files in assets/prompts, one a line; sets that combine
words are composed here. Some sets come with questions about the picture and the word
that a right answer contains, for the strict reward of a vision-language model.
"""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ddrl_jax.errors import UserError
from ddrl_jax.text import parse_json

FOLDER = Path(__file__).parent.parent / "assets" / "prompts"
CHUNK = 256  # records of a data set read at once
ANIMALS = slice(398)  # of the 1,000 ILSVRC2012 labels
DOGS = slice(151, 269)  # the breeds among them, Chihuahua first
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight")
SAME_PLURAL = ("sheep", "deer", "fish")
PLURALS = {"mouse": "mice", "goose": "geese", "wolf": "wolves"}
# "an" goes by sound: a silent h, and a u or o that is said "you" or "won"
SILENT_H = ("hour", "honest", "honour", "honor", "heir")
CONSONANT_SOUND = ("uni", "use", "usu", "uti", "eu", "ewe", "one", "once")


class QuestionedPrompt(NamedTuple):
    """A prompt and its (question, word of a right answer) pairs."""

    prompt: str
    questions: tuple[tuple[str, str], ...]


def with_article(noun: str) -> str:
    """Puts "a" or "an" before a noun, by the sound of its first letters."""
    word = noun.lower()
    vowel = word.startswith(tuple("aeiou")) and not word.startswith(CONSONANT_SOUND)
    return f"{'an' if vowel or word.startswith(SILENT_H) else 'a'} {noun}"


def plural(noun: str) -> str:
    """Returns the plural of an animal's name."""
    if noun in SAME_PLURAL:
        return noun
    if noun in PLURALS:
        return PLURALS[noun]
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2:-1] not in tuple("aeiou"):
        return noun[:-1] + "ies"
    return noun + "s"


def counting(nouns: Sequence[str]) -> tuple[QuestionedPrompt, ...]:
    """Composes "two cats" to "eight cats" for each noun, with how many and what."""
    return tuple(
        QuestionedPrompt(
            f"{number} {plural(noun)}",
            (
                (f"How many {plural(noun)} are there in this image?", number),
                ("What animal is in this image?", noun),
            ),
        )
        for noun in nouns
        for number in NUMBERS
    )


def nouns_activities(
    nouns: Sequence[str], activities: Sequence[str]
) -> tuple[QuestionedPrompt, ...]:
    """Composes "a cat washing the dishes", with who, what it does and to what.

    An activity is a verb, perhaps an article, and an object.
    """
    found = []
    for activity in activities:
        verb, thing = activity.split()[0], activity.split()[-1]
        # the activity of the question is a known one: "riding the bike"
        known = activity.replace(" a ", " the ")
        for noun in nouns:
            questions = (
                (f"Who is {known}?", noun),
                (f"What is the {noun} doing?", verb),
                (f"What is the {noun} {verb}?", thing),
            )
            prompt = f"{with_article(noun)} {activity}"
            found.append(QuestionedPrompt(prompt, questions))
    return tuple(found)


# sets with questions; assets/prompts holds each as NAME.jsonl too, for the reward
QUESTIONED: Mapping[str, Callable[[], tuple[QuestionedPrompt, ...]]] = {
    "nouns_activities": lambda: nouns_activities(
        _lines("simple_animals"), _lines("activities")
    ),
    "counting": lambda: counting(_lines("very_simple_animals")),
}
SETS: Mapping[str, Callable[[], tuple[str, ...]]] = {
    # two of the labels are "crane", the bird and the machine: 999 prompts
    "imagenet_all": lambda: tuple(dict.fromkeys(_lines("imagenet"))),
    "imagenet_animals": lambda: _lines("imagenet")[ANIMALS],
    "imagenet_dogs": lambda: _lines("imagenet")[DOGS],
    "simple_animals": lambda: _lines("simple_animals"),
    "nouns_activities": lambda: _prompts_of("nouns_activities"),
    "counting": lambda: _prompts_of("counting"),
    "vqa_v0": lambda: _asked_about("vqa_v0"),
    "vqa_v1": lambda: _asked_about("vqa_v1"),
    "vqa_v2": lambda: _asked_about("vqa_v2"),
}


def prompt_set(name: str) -> tuple[str, ...]:
    """Returns the prompts of a named set, each once, in a fixed order.

    Args:
      name: imagenet_all (the ILSVRC2012 labels, 999 different ones), imagenet_animals
        (the first 398), imagenet_dogs (118 of those), simple_animals (45 nouns),
        nouns_activities (135), counting (154), vqa_v0, vqa_v1, vqa_v2 (14, 15, 15).

    Raises:
      UserError: there is no such set.
    """
    if name not in SETS:
        near = difflib.get_close_matches(name, SETS, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"there is no prompt set named {name!r}",
            got=repr(name),
            wanted=f"one of {', '.join(sorted(SETS))}",
            way_out=hint + "change --config.prompts.set; prompts of your own go in a"
            " text file: --config.prompts.source=file --config.prompts.path=FILE",
        )
    return SETS[name]()


def question_lines(prompts: Sequence[QuestionedPrompt]) -> str:
    """Returns the question file of the prompts: one JSON object a line."""
    rows = ({"prompt": p.prompt, "questions": p.questions} for p in prompts)
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_question_prompts(path: str) -> tuple[str, ...]:
    """Returns the prompts of a question file (JSON lines), each once.

    Raises:
      UserError: the file can not be read, or a line has no text under "prompt".
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise _bad_question_file(path, f"{type(e).__name__}: {e}") from e
    found = [_prompt_of(path, i, line) for i, line in enumerate(lines) if line.strip()]
    if not found:
        raise _bad_question_file(path, "no line with a prompt")
    return tuple(dict.fromkeys(found))


def tfds_prompts(name_or_dir: str, feature: str, split: str) -> tuple[str, ...]:
    """Reads the different texts of a feature of a prepared TFDS data set.

    Args:
      name_or_dir: a folder that holds dataset_info.json, or a name TFDS knows
        ("coco_captions:1.1.0"), prepared over array_record; nothing is downloaded.
      feature: "caption", or "captions/text" for one within a feature.
      split: "train", "validation[:1000]" and the like.

    Returns:
      The texts in the order of their first record, stripped, without empty ones.

    Raises:
      UserError: no such data set, split or feature, or the feature is not a text.
    """
    import tensorflow_datasets as tfds  # slow import, only where data is read

    try:
        folder = Path(name_or_dir)
        if (folder / "dataset_info.json").is_file():
            builder = cast(Any, tfds.builder_from_directory(str(folder)))
        else:
            builder = cast(Any, tfds.builder(name_or_dir))
        features = builder.info.features
        # Pictures stay undecoded: TFDS would ask every user to install OpenCV.
        kinds = (tfds.features.Image, tfds.features.Video)
        heavy = [k for k, f in features.items() if isinstance(f, kinds)]
        skip = {key: tfds.decode.SkipDecoding() for key in heavy}
        records = builder.as_data_source(split, decoders=skip)
        values = _values(records, feature.split("/"))
    except Exception as e:
        raise UserError(
            f"no prompts can be read from the TFDS data set {name_or_dir!r}",
            got=f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else e!r}",
            wanted="a prepared data set over array_record: a folder with"
            " dataset_info.json or a name in $TFDS_DATA_DIR, and one of its splits",
            way_out="prepare it once with download_and_prepare(file_format="
            "'array_record'), and correct --config.prompts.path or .split",
        ) from e
    where = f"{name_or_dir} ({', '.join(sorted(features))})"
    texts = [text.strip() for value in values for text in _texts(value, feature, where)]
    found = tuple(dict.fromkeys(filter(None, texts)))
    if not found:
        raise UserError(
            f"the feature {feature!r} holds no prompt",
            got=f"{len(values)} records of {where}, none with text",
            wanted="at least one text that is not blank",
            way_out="correct --config.prompts.feature or .split",
        )
    return found


def _lines(name: str) -> tuple[str, ...]:
    return tuple((FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines())


def _prompts_of(name: str) -> tuple[str, ...]:
    return tuple(p.prompt for p in QUESTIONED[name]())


def _asked_about(name: str) -> tuple[str, ...]:
    return read_question_prompts(str(FOLDER / f"{name}.jsonl"))


def _prompt_of(path: str, index: int, line: str) -> str:
    try:
        prompt = parse_json(line)["prompt"]
    except (ValueError, KeyError, TypeError) as e:
        raise _bad_question_file(path, f"line {index + 1}: {line[:80]}") from e
    if not isinstance(prompt, str) or not prompt.strip():
        raise _bad_question_file(path, f"line {index + 1}: prompt {prompt!r}")
    return prompt.strip()


def _bad_question_file(path: str, got: str) -> UserError:
    return UserError(
        f"the question file {path!r} can not be read",
        got=got,
        wanted='one JSON object a line: {"prompt": "two cats", "questions":'
        ' [["How many cats are there?", "two"]]}',
        way_out="mend the file, or correct --config.prompts.path",
    )


def _values(records: Any, path: Sequence[str]) -> list[Any]:
    """What each record has at a path of keys, None where it ends early.

    Read in chunks, of which only the values are kept: pictures fill the memory.
    """
    values = []
    for start in range(0, len(records), CHUNK):
        rows = range(start, min(start + CHUNK, len(records)))
        for value in records.__getitems__(list(rows)):
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            values.append(value)
    return values


def _texts(value: Any, feature: str, where: str) -> list[str]:
    """The texts of one record: a value of a Text feature, or a sequence of them."""
    parts = np.ravel(np.asarray(value, object)).tolist()
    texts = [_decoded(part) for part in parts]
    if None in texts:
        raise UserError(
            f"the feature {feature!r} holds no text",
            got=f"{type(value).__name__} in {where}",
            wanted="the name of a text feature, 'caption' or 'captions/text'",
            way_out="correct --config.prompts.feature",
        )
    return [text for text in texts if text is not None]


def _decoded(part: Any) -> str | None:
    try:
        return part.decode() if isinstance(part, bytes) else None
    except UnicodeDecodeError:  # a picture, for instance
        return None
