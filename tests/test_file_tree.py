"""Links are followed, twice to one folder but never in a circle; a home is found."""

import pwd
from pathlib import Path

import pytest

from ddrl_jax.errors import UserError
from ddrl_jax.file_tree import spelt_out, walk


def _files(root: Path) -> list[str]:
    found = [Path(top) / name for top, _, files in walk(root) for name in files]
    return [path.relative_to(root).as_posix() for path in found]


def test_two_links_to_one_folder_are_two_folders(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b").touch()
    (tmp_path / "far" / "a").touch()
    root = tmp_path / "root"
    root.mkdir()
    for name in ("y", "x"):
        (root / name).symlink_to(tmp_path / "far")
    assert _files(root) == ["x/a", "x/b", "y/a", "y/b"]


def test_a_circle_of_links_over_two_folders_has_an_end(tmp_path):
    for name, other in (("one", "two"), ("two", "one")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        (tmp_path / name / "on").symlink_to(tmp_path / other)
    assert _files(tmp_path / "one") == ["file", "on/file"]
    assert _files(tmp_path) == ["one/file", "one/on/file", "two/file", "two/on/file"]


def test_what_is_taken_out_of_the_folders_is_not_entered(tmp_path):
    for name in (".hidden", "seen"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    found = []
    for _, folders, files in walk(tmp_path):
        folders[:] = [name for name in folders if name[0] != "."]
        found += files
    assert found == ["file"]


def test_a_home_is_spelt_out(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert spelt_out("~/x/", "--key") == "/somewhere/x/"
    for path in ("", "a/~x", "./~no-such-user"):
        assert spelt_out(path, "--key") == path


@pytest.mark.parametrize(
    "path", ["~/x", "~no-such-user/x", "~", "~-", "~a\0", "~\ud83d"]
)
def test_a_home_that_is_not_known_is_an_error_with_its_key(path, monkeypatch):
    def unknown(_):
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)  # as in a container with a foreign user
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(UserError, match="--key begins with a home") as error:
        spelt_out(path, "--key")
    assert error.value.got == path
    way_out = error.value.way_out
    assert way_out.startswith(f"write the folder in place of {path.split('/')[0]} in")
    assert ("HOME" in way_out) == (path in ("~", "~/x"))
