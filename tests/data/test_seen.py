"""Data that have not changed are known by their files, without being read."""

import os

import pytest

from ddrl_jax.data import record_table
from ddrl_jax.data.seen import files_digest, recall, remember


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    (folder / "a.png").write_bytes(b"one")
    (folder / "more" / "b.png").write_bytes(b"two")
    return folder


def test_the_digest_changes_with_every_file(data):
    found = [files_digest(data)]
    assert files_digest(data) == found[0]
    (data / "a.png").write_bytes(b"longer")
    found.append(files_digest(data))
    os.utime(data / "a.png", ns=(1, 1))  # the same bytes at another time
    found.append(files_digest(data))
    (data / "more" / "b.png").rename(data / "more" / "c.png")
    found.append(files_digest(data))
    (data / "more" / "new.txt").touch()
    found.append(files_digest(data))
    assert len(set(found)) == len(found)


def test_where_no_file_is_seen_nothing_is_known(tmp_path):
    (tmp_path / "empty").mkdir()
    assert files_digest(tmp_path / "empty") == ""
    assert files_digest(tmp_path / "gs:" / "bucket" / "set") == ""


def test_links_are_followed_and_may_go_round_or_nowhere(data, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "c.png").write_bytes(b"three")
    (data / "far").symlink_to(tmp_path / "far")
    (data / "round").symlink_to(data)
    (data / "nowhere").symlink_to(tmp_path / "none")
    before = files_digest(data)
    (tmp_path / "far" / "c.png").write_bytes(b"four")
    assert files_digest(data) != before


def test_a_cache_is_recalled_by_its_whole_key_while_it_is_complete(tmp_path):
    key = {"files": "abc", "dtypes": ["float16", "float32"]}
    cache = tmp_path / "latents-0"
    assert recall(tmp_path, key) is None
    remember(tmp_path, key, cache)
    assert recall(tmp_path, key) is None  # it was deleted since
    cache.mkdir()
    (cache / "cache.json").write_text("{}")
    assert recall(tmp_path, key) == cache
    assert recall(tmp_path, key | {"files": "abd"}) is None
    assert recall(tmp_path, {"files": "abc"}) is None
    [note] = (tmp_path / "seen").iterdir()
    note.write_text('{"cache"')
    assert recall(tmp_path, key) is None


def test_two_runs_may_note_the_same_cache_at_once(tmp_path, monkeypatch):
    cache, settle, beside = tmp_path / "latents-0", record_table._settle, []
    cache.mkdir()
    (cache / "cache.json").write_text("{}")

    def meanwhile(scratch, path):  # another process writes the same line
        if not beside:
            beside.append(scratch)
            monkeypatch.setattr(os, "getpid", lambda: -1)
            remember(tmp_path, {"data": 1}, cache)
        settle(scratch, path)

    monkeypatch.setattr(record_table, "_settle", meanwhile)
    remember(tmp_path, {"data": 1}, cache)
    assert beside and recall(tmp_path, {"data": 1}) == cache
    assert [path.suffix for path in (tmp_path / "seen").iterdir()] == [".json"]
