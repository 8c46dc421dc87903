"""Prompt sets against published facts; prompts of question files and of TFDS sets."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from ddrl_jax.data import prompt_sets
from ddrl_jax.data.prompt_sets import (
    plural,
    prompt_set,
    read_question_prompts,
    tfds_prompts,
    with_article,
)
from ddrl_jax.data.samples import write_samples
from ddrl_jax.errors import UserError
from ddrl_jax.rewards.questions import questions_of, read_questions

EMOJI = Path(prompt_sets.__file__).parent.parent / "assets" / "emoji" / "1.0.0"
ANIMALS = (
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger"
    " bear raccoon fox wolf lizard beetle ant butterfly fish shark whale dolphin"
    " squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly"
    " llama camel bat gorilla hedgehog kangaroo"
)
PLURALS = (
    "cats dogs horses monkeys rabbits spiders birds sheep cows lions tigers bears"
    " raccoons foxes wolves ants fish squirrels turtles frogs chickens pigs"
)
SIZES = {
    "imagenet_all": 999,  # of 1,000 labels, two of which are "crane"
    "imagenet_animals": 398,
    "imagenet_dogs": 118,
    "simple_animals": 45,
    "nouns_activities": 135,
    "counting": 154,
    "vqa_v0": 14,
    "vqa_v1": 15,
    "vqa_v2": 15,
}
# of assets/vqa_v*.txt in DDPO's JAX repository, as they are published
VQA_FILES = {
    "vqa_v0": "906cb5530b906fc472c6b22f26d7e90b2cb9a308edb15a69746045f429624fb8",
    "vqa_v1": "69140f3a607c3b255f514215d8a7edf15c7ea1d26ad4292e4650dc88d8e820bb",
    "vqa_v2": "5703e155cafb5cee9376ba798958373e220e9c4fe68ff628e9c780f372748941",
}


@pytest.mark.parametrize("name", sorted(SIZES))
def test_a_set_has_its_size_and_no_prompt_twice(name):
    prompts = prompt_set(name)
    assert len(prompts) == len(set(prompts)) == SIZES[name]
    assert all(p == p.strip() and p for p in prompts)


def test_every_set_has_a_test_of_its_size():
    assert set(prompt_sets.SETS) == set(SIZES)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_labels_are_those_of_ilsvrc2012():
    # Of the published list of labels in the order of the synset numbers, whole and its
    # first 398 lines, each ended by a line feed.
    text = (prompt_sets.FOLDER / "imagenet.txt").read_text()
    whole = "4eb3da435cf544e4a6f390f62c84cb9c9bb68cf8b14e97f8a063452382e5efd2"
    animals = "8d356a5fcbea73e8a0cd6854ac02ada9c286c048a34cdcfadd6a1cbcad06224d"
    labels = prompt_set("imagenet_animals")
    assert digest(text) == whole
    assert digest("".join(f"{x}\n" for x in labels)) == animals
    assert set(prompt_set("imagenet_all")) == set(text.splitlines())
    known = {
        0: "tench, Tinca tinca",
        1: "goldfish, Carassius auratus",
        134: "crane",
        150: "sea lion",
        207: "golden retriever",
        281: "tabby, tabby cat",
        340: "zebra",
        388: "giant panda, panda, panda bear, coon bear, Ailuropoda melanoleuca",
        397: "puffer, pufferfish, blowfish, globefish",
    }
    assert {i: labels[i] for i in known} == known


def test_the_dogs_are_labels_151_to_268():
    dogs = prompt_set("imagenet_dogs")
    assert (dogs[0], dogs[-1]) == ("Chihuahua", "Mexican hairless")
    assert dogs == prompt_set("imagenet_animals")[151:269]


def test_the_animals_are_those_of_ddpo_in_its_order():
    assert prompt_set("simple_animals") == tuple(ANIMALS.split())


def test_nouns_and_activities_are_all_pairs():
    activities = ("washing the dishes", "riding a bike", "playing chess")
    wanted = {
        f"{'an' if noun == 'ant' else 'a'} {noun} {activity}"
        for noun in ANIMALS.split()
        for activity in activities
    }
    assert set(prompt_set("nouns_activities")) == wanted


def test_counting_says_how_many_of_what():
    first, *_, last = prompt_sets.QUESTIONED["counting"]()
    assert first == (
        "two cats",
        (
            ("How many cats are there in this image?", "two"),
            ("What animal is in this image?", "cat"),
        ),
    )
    assert last.prompt == "eight pigs" and last.questions[1][1] == "pig"
    plurals = [p.removeprefix("two ") for p in prompt_set("counting") if "two " in p]
    assert plurals == PLURALS.split()


def test_questions_about_an_activity():
    rows = {p.prompt: p.questions for p in prompt_sets.QUESTIONED["nouns_activities"]()}
    assert rows["an ant riding a bike"] == (
        ("Who is riding the bike?", "ant"),
        ("What is the ant doing?", "riding"),
        ("What is the ant riding?", "bike"),
    )
    assert rows["a cat washing the dishes"][0] == ("Who is washing the dishes?", "cat")
    assert rows["a cat playing chess"][2] == ("What is the cat playing?", "chess")


@pytest.mark.parametrize("name", VQA_FILES)
def test_the_vqa_sets_are_those_of_ddpo(name):
    """Written out in its layout, they are its files."""
    blocks = []
    for prompt, questions in read_questions(name).items():
        lines = [f"PROMPT: {prompt}"]
        for part, question in zip(("SUB", "VERB", "OBJ"), questions, strict=True):
            (word,) = question.words
            lines += [f"{part} Q: {question.text}", f"{part} A: {word}"]
        blocks.append("\n".join(lines))
    end = "\n" if name == "vqa_v0" else ""
    assert digest("\n\n".join(blocks) + end) == VQA_FILES[name]
    assert prompt_set(name) == tuple(read_questions(name))


@pytest.mark.parametrize(
    ("noun", "wanted"),
    [
        ("ant", "an ant"),
        ("cat", "a cat"),
        ("Owl", "an Owl"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("hour", "an hour"),
        ("horse", "a horse"),
        ("one-eyed cat", "a one-eyed cat"),
    ],
)
def test_articles_go_by_sound(noun, wanted):
    assert with_article(noun) == wanted


@pytest.mark.parametrize(
    ("noun", "wanted"),
    [
        ("mouse", "mice"),
        ("goose", "geese"),
        ("wolf", "wolves"),
        ("deer", "deer"),
        ("butterfly", "butterflies"),
        ("monkey", "monkeys"),
        ("fox", "foxes"),
        ("ostrich", "ostriches"),
        ("bus", "buses"),
    ],
)
def test_plurals(noun, wanted):
    assert plural(noun) == wanted


def test_a_misspelt_set_lists_near_ones():
    with pytest.raises(UserError) as error:
        prompt_set("imagnet_animals")
    assert "did you mean imagenet_animals" in error.value.way_out
    assert "counting" in error.value.wanted


# ---- question files ----


def test_prompts_of_a_question_file(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = prompt_sets.QUESTIONED["counting"]()
    path.write_text("\n" + prompt_sets.question_lines((*rows, *rows)))
    assert read_question_prompts(str(path)) == prompt_set("counting")


def test_a_question_file_may_begin_with_a_mark_and_have_any_character(tmp_path):
    path = tmp_path / "q.jsonl"
    text = '{"prompt": "a\u2028cat", "questions": [["What?", "cat"]]}\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = read_question_prompts(str(path))
    assert [p.split() for p in found] == [["a", "cat"]]
    assert questions_of(read_questions(str(path)), ["a cat"])[0][0].text == "What?"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "two cats",
        '{"text": "a"}',
        '{"prompt": 3}',
        pytest.param("[" * 10**5, id="nested"),
    ],
)
def test_a_question_file_without_prompts(tmp_path, text):
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="can not be read"):
        read_question_prompts(str(path))


def test_a_missing_question_file(tmp_path):
    with pytest.raises(UserError, match="can not be read"):
        read_question_prompts(str(tmp_path / "none.jsonl"))


# ---- TFDS ----


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A prepared set with repeated, padded and empty captions."""
    folder = tmp_path_factory.mktemp("tfds") / "captioned"
    captions = ("a cat", " a dog ", "", "a cat", "an ünt")
    write_samples(folder, [(np.zeros((5, 4, 4, 3), np.uint8), captions)])
    return str(folder)


def test_prompts_are_the_different_texts_of_a_feature(captioned):
    assert tfds_prompts(captioned, "caption", "train") == ("a cat", "a dog", "an ünt")
    assert tfds_prompts(captioned, "caption", "train[3:]") == ("a cat", "an ünt")


def test_a_long_set_is_read_in_chunks(captioned, monkeypatch):
    whole = tfds_prompts(captioned, "caption", "train")
    monkeypatch.setattr(prompt_sets, "CHUNK", 2)
    assert tfds_prompts(captioned, "caption", "train") == whole


def test_any_text_feature_of_the_shipped_set():
    categories = tfds_prompts(str(EMOJI), "category", "train")
    assert 1 < len(categories) < len(tfds_prompts(str(EMOJI), "caption", "train"))


def test_a_text_within_a_feature(tmp_path):
    """Several captions a picture, as in COCO."""
    import tensorflow_datasets as tfds

    captions = tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64})
    rows = [("a cat", "one cat"), (), ("a dog", "a cat")]

    class Several(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Rows of captions."""

        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            features = tfds.features.FeaturesDict({"captions": captions})
            return tfds.core.DatasetInfo(
                builder=self, features=features, disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, row in enumerate(rows):
                yield i, {"captions": [{"text": t, "id": i} for t in row]}

    builder = Several(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    found = tfds_prompts(str(builder.data_dir), "captions/text", "train")
    assert found == ("a cat", "one cat", "a dog")
    for feature in ("captions/id", "captions", "captions/none", "captions/text/x"):
        with pytest.raises(UserError, match="holds no text"):
            tfds_prompts(str(builder.data_dir), feature, "train")


@pytest.mark.parametrize("feature", ["captoin", "image", "", "caption/text"])
def test_a_feature_that_is_no_text(captioned, feature):
    with pytest.raises(UserError, match="holds no text") as error:
        tfds_prompts(captioned, feature, "train")
    assert "caption, image" in error.value.got


def test_a_split_without_text(captioned):
    with pytest.raises(UserError, match="holds no prompt"):
        tfds_prompts(captioned, "caption", "train[2:3]")


@pytest.mark.parametrize(
    ("source", "split"),
    [
        ("captioned", "trian"),
        ("/nowhere/at/all", "train"),
        ("no_such_data_set", "train"),
        ("", "train"),
    ],
)
def test_a_set_that_can_not_be_read(captioned, source, split):
    source = captioned if source == "captioned" else source
    with pytest.raises(UserError, match="no prompts can be read") as error:
        tfds_prompts(source, "caption", split)
    assert "\n" not in error.value.got
