"""Prompts and records of an epoch: fair, paired by caption, a function of the seed."""

from collections import Counter

import numpy as np
import pytest
from edited_config import configured

from ddrl_jax.data.prompts import (
    choose_records,
    draw_prompts,
    prompt_list,
    read_prompt_file,
    records_by_prompt,
)
from ddrl_jax.errors import UserError

NAMES = tuple("abcdefg")  # 7 and 3 have no common divisor: passes end inside epochs


def chosen(seed, epoch, per_epoch=3, names=NAMES):
    return draw_prompts(names, seed, epoch, per_epoch, 1).text


def test_a_group_is_one_prompt():
    drawn = draw_prompts(NAMES, 0, 2, 3, 4)
    np.testing.assert_array_equal(drawn.group, np.repeat([0, 1, 2], 4))
    assert drawn.index.dtype == drawn.group.dtype == np.int32
    assert drawn.text == tuple(NAMES[i] for i in drawn.index)
    for g in range(3):
        assert len(set(drawn.index[drawn.group == g])) == 1
    assert drawn.text[::4] == chosen(0, 2)


def test_every_prompt_comes_up_once_a_pass():
    drawn = [name for epoch in range(7 * 4) for name in chosen(0, epoch)]
    for start in range(0, len(drawn), 7):
        assert sorted(drawn[start : start + 7]) == sorted(NAMES)
    passes = {tuple(drawn[start : start + 7]) for start in range(0, len(drawn), 7)}
    assert len(passes) > 8  # each in an order of its own


def test_an_epoch_longer_than_the_list_repeats_evenly():
    counts = Counter(draw_prompts(NAMES, 0, 0, 17, 1).text)
    assert set(counts) == set(NAMES) and set(counts.values()) == {2, 3}


def test_the_draw_is_a_function_of_seed_and_epoch():
    assert chosen(0, 5) == chosen(0, 5)  # whatever was drawn before
    others = {tuple(chosen(seed, 5)) for seed in range(20)}
    assert len(others) > 10


# ---- which prompts there are


def section(**changes):
    return configured({f"prompts.{k}": v for k, v in changes.items()}).prompts


def test_prompts_of_the_data_are_its_captions_without_repeats():
    assert prompt_list(section(), ("b", "a", "b", "c"), 0) == ("b", "a", "c")


def test_prompts_of_a_list_and_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("  a fox\n\n\nein Käse \n", encoding="utf-8")
    file = section(source="file", path=str(path))
    assert prompt_list(file, ("x",), 0) == ("a fox", "ein Käse")
    assert prompt_list(section(source="list", list=("y", "z")), ("x",), 0) == ("y", "z")


def test_a_prompt_is_one_line_as_a_caption_is(tmp_path):
    """Else samples of it have another caption, and no picture of it can be named."""
    said = section(source="list", list=("two\ncats", " a  red\tcat "))
    assert prompt_list(said, ("x",), 0) == ("two cats", "a red cat")
    path = tmp_path / "prompts.txt"
    # As Windows writes it; a next-line and a line separator are no ends of a line.
    path.write_bytes("\ufeffa fox\r\na\x85dog\r\na\u2028cat\r\n".encode())
    file = section(source="file", path=str(path))
    assert prompt_list(file, ("x",), 0) == ("a fox", "a dog", "a cat")


@pytest.mark.parametrize("bad", ["caf\udce9", "\ud83d", "  "])
def test_a_prompt_that_is_no_text_is_named(bad):
    with pytest.raises(UserError) as error:
        prompt_list(section(source="list", list=("a fox", bad)), ("x",), 0)
    assert "prompt 1 is" in error.value.what
    str(error.value).encode()  # what is wrong with it can be printed


def test_a_limit_keeps_a_seeded_choice_in_order():
    names = tuple(f"{i:03d}" for i in range(100))
    kept = prompt_list(section(limit=10), names, 3)
    assert kept == prompt_list(section(limit=10), names, 3)
    assert len(set(kept)) == 10 and list(kept) == sorted(kept)
    assert kept != prompt_list(section(limit=10), names, 4) and kept != names[:10]
    assert prompt_list(section(limit=100), names, 3) == names


def test_a_limit_above_what_there_is():
    with pytest.raises(UserError, match="limit"):
        prompt_list(section(limit=4), ("a", "b", "a"), 0)


@pytest.mark.parametrize(
    ("content", "word"),
    [(None, "FileNotFound"), (b"\xff\xfe\x00", "Unicode"), (b"", "an empty file"),
     (b"  \n\n", "only blank lines")],
)  # fmt: skip
def test_a_file_without_prompts(content, word, tmp_path):
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_prompt_file(str(path))
    assert word in str(caught.value) and str(path) in str(caught.value)


# ---- records of the same caption


def test_records_are_grouped_by_caption():
    found = records_by_prompt(("b", "a"), ("a", "b", "c", "a"))
    assert [list(r) for r in found] == [[1], [0, 3]]


def test_a_prompt_without_a_picture():
    with pytest.raises(UserError) as caught:
        records_by_prompt(("a", "nobody", "neither"), ("a",))
    assert "2 prompts" in str(caught.value) and "'nobody', 'neither'" in str(
        caught.value
    )


def test_each_sample_gets_a_picture_of_its_caption():
    captions = ("a", "b", "a", "c", "a", "b")
    records = records_by_prompt(("c", "a", "b"), captions)
    index = np.tile([0, 1, 1, 2], 100)
    found = choose_records(index, records, 0, 0)
    assert found.dtype == np.int32
    assert [captions[r] for r in found] == [("c", "a", "b")[i] for i in index]
    share = Counter(found[index == 1])
    assert set(share) == {0, 2, 4} and min(share.values()) > 200 / 3 - 30
    np.testing.assert_array_equal(found, choose_records(index, records, 0, 0))
    assert (found != choose_records(index, records, 0, 1)).any()
    assert (found != choose_records(index, records, 1, 0)).any()
