"""A folder of pictures with captions: both forms, and everything wrong with them."""

import json
import os
import shutil

import numpy as np
import pytest
from drawn_pictures import drawing, write_drawing, write_folder

from ddrl_jax.data.images import decode_picture
from ddrl_jax.data.picture_folder import read_folder
from ddrl_jax.errors import UserError

CAPTIONS = ("a cat", "a Käse", "  two\n words ", "a cat")


def write_jsonl(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def good(tmp_path):
    write_folder(tmp_path / "set", CAPTIONS)
    return tmp_path / "set"


def test_captions_of_text_files_beside_the_pictures(good):
    pictures = read_folder(str(good), 16).checked()
    assert pictures.captions == ("a cat", "a Käse", "two words", "a cat")
    assert [row.name for row in pictures.rows] == [
        "000.png", "001.jpg", "002.webp", "003.png",
    ]  # fmt: skip
    np.testing.assert_array_equal(pictures[0][0], drawing(0, 20, 16)[:, 2:18])
    jpeg = decode_picture((good / "001.jpg").read_bytes(), 16)
    np.testing.assert_array_equal(pictures[1][0], jpeg)


def test_captions_of_metadata_in_nested_folders(tmp_path):
    write_drawing(tmp_path / "b.png", 0)
    write_drawing(tmp_path / "sub" / "a.webp", 1)
    write_drawing(tmp_path / "sub" / "deep" / "c.JPG", 2)
    write_drawing(tmp_path / "sub" / "d.png", 3)
    (tmp_path / "sub" / "d.txt").write_text("a text file beside it")
    write_jsonl(tmp_path / "metadata.jsonl", {"file_name": "b.png", "text": "one"})
    write_jsonl(
        tmp_path / "sub" / "metadata.jsonl",
        {"file_name": "deep/c.JPG", "caption": "two\u2028lines", "width": 3},
        "",
        {"file_name": "./a.webp", "text": "three"},
    )
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "blob").write_text("hidden")
    (tmp_path / "README.md").write_text("about the set")
    pictures = read_folder(str(tmp_path), 16).checked()
    assert {row.name: row.caption for row in pictures.rows} == {
        "b.png": "one",
        "sub/a.webp": "three",
        "sub/d.png": "a text file beside it",
        "sub/deep/c.JPG": "two lines",
    }


def remove_caption(root):
    (root / "001.txt").unlink()


def empty_caption(root):
    (root / "001.txt").write_text(" \n ")


def latin_caption(root):
    (root / "001.txt").write_bytes("Käse".encode("latin-1"))


def truncated(root):
    content = (root / "001.jpg").read_bytes()
    (root / "001.jpg").write_bytes(content[: len(content) // 2])


def no_picture_at_all(root):
    (root / "001.jpg").write_bytes(b"<html>not found</html>")


def orphan_text(root):
    (root / "lost.txt").write_text("of nothing")


def orphan_row(root):
    write_jsonl(root / "metadata.jsonl", {"file_name": "lost.png", "text": "a"})


def outside(root):
    write_drawing(root.parent / "outside.png", 1)
    write_jsonl(root / "metadata.jsonl", {"file_name": "../outside.png", "text": "a"})


def broken_line(root):
    write_jsonl(root / "metadata.jsonl", "", '{"file_name": "000.png", "te')


def deep_line(root):
    write_jsonl(root / "metadata.jsonl", '{"file_name": ' + "[" * 100_000)


def row_without_a_name(root):
    write_jsonl(root / "metadata.jsonl", {"text": "of what?"}, ["list"])


def caption_is_a_number(root):
    (root / "001.txt").unlink()
    write_jsonl(root / "metadata.jsonl", {"file_name": "001.jpg", "text": 7})


def caption_is_half_an_emoji(root):
    (root / "001.txt").unlink()
    row = '{"file_name": "001.jpg", "text": "a \\ud83d"}'
    (root / "metadata.jsonl").write_text(row)


def row_without_a_text(root):
    (root / "001.txt").unlink()
    write_jsonl(root / "metadata.jsonl", {"file_name": "001.jpg", "label": 3})


def listed_twice(root):
    row = {"file_name": "001.jpg", "text": "x"}
    (root / "001.txt").unlink()
    write_jsonl(root / "metadata.jsonl", row, row)


def both_forms(root):
    write_jsonl(root / "metadata.jsonl", {"file_name": "001.jpg", "text": "x"})


def same_name(root):
    write_drawing(root / "001.png", 8)


def gif(root):
    (root / "moving.gif").write_bytes(b"GIF89a")


def table(root):
    (root / "metadata.csv").write_text("file_name,text\n")


def dangling_link(root):
    (root / "001.jpg").unlink()
    (root / "001.jpg").symlink_to("nowhere.jpg")


BAD = {
    remove_caption: ("1 pictures without a caption: 001.jpg", {"001.jpg"}),
    empty_caption: ("1 empty captions: 001.jpg", {"001.jpg"}),
    latin_caption: ("captions that are not UTF-8: 001.txt", {"001.jpg"}),
    truncated: ("can not be decoded: 001.jpg (OSError", {"001.jpg"}),
    no_picture_at_all: ("can not be decoded: 001.jpg (not a PNG", {"001.jpg"}),
    orphan_text: ("1 captions without a picture: lost.txt", set()),
    orphan_row: ("captions without a picture: metadata.jsonl:1 (lost.png)", set()),
    outside: ("without a picture: metadata.jsonl:1 (../outside.png)", set()),
    broken_line: ("1 broken lines of metadata.jsonl: metadata.jsonl:2 (", set()),
    deep_line: ("1 broken lines of metadata.jsonl: metadata.jsonl:1 (nested", set()),
    row_without_a_name: ('metadata.jsonl:1 (no "file_name"), metadata.jsonl:2', set()),
    caption_is_a_number: ("metadata.jsonl:1 (the caption is no text)", {"001.jpg"}),
    caption_is_half_an_emoji: ("metadata.jsonl:1 (the caption is not U", {"001.jpg"}),
    row_without_a_text: ("1 pictures without a caption: 001.jpg", {"001.jpg"}),
    listed_twice: ("1 pictures with more than one caption: 001.jpg", {"001.jpg"}),
    both_forms: ("1 pictures with more than one caption: 001.jpg", {"001.jpg"}),
    same_name: ("share one caption file: 001.jpg + 001.png", {"001.jpg"}),
    gif: ("1 files of an unsupported kind: moving.gif", set()),
    table: ("1 files of an unsupported kind: metadata.csv", set()),
    dangling_link: ("can not be read: 001.jpg (No such file", {"001.jpg"}),
}


def test_a_picture_may_be_called_as_the_papers_of_a_folder(tmp_path):
    for name in ("license_plate", "readme"):
        write_drawing(tmp_path / f"{name}.png", 1)
        (tmp_path / f"{name}.txt").write_text(f"a {name}")
    for paper in ("LICENSE.txt", "README.md", "License"):
        (tmp_path / paper).write_text("whose these are")
    pictures = read_folder(str(tmp_path), 16).checked()
    assert {row.caption for row in pictures.rows} == {"a license_plate", "a readme"}


@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__)
def test_a_bad_folder_is_refused_or_the_fault_left_out_and_counted(good, spoil, capsys):
    wanted, lost = BAD[spoil]
    spoil(good)
    with pytest.raises(UserError) as e:
        read_folder(str(good), 16).checked()
    assert wanted in str(e.value.got), str(e.value)
    assert str(e.value).count("\n  got:     ") == 1
    assert "on_bad=skip" in e.value.way_out
    pictures = read_folder(str(good), 16, on_bad="skip").checked()
    assert wanted in capsys.readouterr().err
    left = [f"00{i}.{kind}" for i, kind in enumerate(("png", "jpg", "webp", "png"))]
    names = [row.name for row in pictures.rows]
    assert names == [n for n in left if n not in lost]
    assert sum(pictures.skipped.values()) >= 1
    assert [pictures[i][0].shape for i in range(len(names))] == [(16, 16, 3)] * len(
        names
    )


def test_all_faults_are_told_at_once_with_their_counts(good):
    for i in range(7):
        write_drawing(good / f"bare{i}.png", i)
    truncated(good)
    gif(good)
    broken_line(good)
    with pytest.raises(UserError) as e:
        read_folder(str(good), 16)
    got = str(e.value.got)
    assert e.value.what.startswith("10 faults") and "usable pictures: 3" in got
    assert "7 pictures without a caption: bare0.png" in got and "and 2 more" in got
    for part in ("1 files of an unsupported", "1 broken lines", "1 pictures that can"):
        assert part in got


def test_a_folder_that_can_not_be_listed_is_a_fault(good, monkeypatch):
    (good / "locked").mkdir()
    real = os.scandir

    def scandir(path="."):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"can not be read: locked \(Permission"):
        read_folder(str(good), 16)


@pytest.mark.parametrize("where", ["nothing", "file", "empty"])
def test_no_folder_and_no_picture_are_errors_that_name_the_key(tmp_path, where):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for on_bad in ("error", "skip"):
        with pytest.raises(UserError, match="data.path"):
            read_folder(str(tmp_path / where), 16, on_bad=on_bad)


def test_a_link_to_the_folder_above_does_not_go_round_for_ever(good):
    (good / "again").symlink_to(good, target_is_directory=True)
    assert len(read_folder(str(good), 16)) == 4


def test_the_fingerprint_is_of_bytes_names_and_captions_only(good, tmp_path):
    first = read_folder(str(good), 16).fingerprint
    copy = shutil.copytree(good, tmp_path / "copy")
    os.utime(copy / "000.png", (1, 1))
    assert read_folder(str(copy), 32).fingerprint == first
    (copy / "000.txt").write_text("a dog")
    other = read_folder(str(copy), 16).fingerprint
    (copy / "000.txt").write_text(CAPTIONS[0])
    write_drawing(copy / "000.png", 5, width=20)
    third = read_folder(str(copy), 16).fingerprint
    assert len({first, other, third}) == 3
