import shutil
from pathlib import Path

import pytest
from saved_states import bits, make_state, restore, save_epochs

from ddrl_jax.checkpoint import Checkpoints, abstract
from ddrl_jax.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_epochs(root, (1, 2, 3))
    return root


@pytest.fixture
def root(saved, tmp_path) -> Path:
    """Checkpoints of epochs 1, 2 and 3 that the test may break."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for i in range(0, len(content), 7):
        content[i] ^= 0x55
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [delete, truncate, flip])
def test_damage_of_any_file_is_an_error_or_harmless_but_never_another_state(
    saved, tmp_path, damage
):
    wanted, refused = bits(make_state(3)), set()
    files = [p.relative_to(saved) for p in (saved / "3").rglob("*") if p.is_file()]
    for i, name in enumerate(files):
        root = Path(shutil.copytree(saved, tmp_path / str(i)))
        damage(root / name)
        try:
            found = restore(root)
        except UserError as error:
            refused.add(str(name))
            assert str(root / "3") in str(error)
            assert "resume=last_good" in str(error) and "--workdir" in str(error)
        else:
            assert bits(found.state) == wanted and found.cursor == {"epoch": 3}
    assert "3/cursor/metadata" in refused
    assert "3/state/manifest.ocdbt" in refused


def test_a_key_that_comes_back_as_plain_numbers_is_refused(root):
    (root / "3" / "state" / "array_metadatas" / "process_0").unlink()
    with pytest.raises(UserError, match="key came back as shape .*uint32"):
        restore(root)


def test_losing_the_array_files_is_an_error_that_names_the_checkpoint(root):
    for path in (root / "3" / "state").rglob("d/*"):
        path.unlink()
    with pytest.raises(UserError, match=str(root / "3")):
        restore(root)


def test_whole_arrays_with_the_wrong_bytes_are_found_by_their_checksum(root):
    # Orbax itself is content with them: they are the intact arrays of epoch 2.
    shutil.rmtree(root / "3" / "state")
    shutil.copytree(root / "2" / "state", root / "3" / "state")
    with pytest.raises(UserError, match="bytes of step are not those that were saved"):
        restore(root)


def test_a_cursor_edited_by_hand_is_refused(root):
    path = root / "3" / "cursor" / "metadata"
    text = path.read_text()
    assert '"cursor": {"epoch": 3}' in text
    path.write_text(text.replace('"cursor": {"epoch": 3}', '"cursor": {"epoch": 4}'))
    with pytest.raises(UserError, match="not those that were saved"):
        restore(root)


def test_a_checkpoint_under_the_name_of_another_epoch_is_refused(root):
    (root / "3").rename(root / "8")
    with pytest.raises(UserError, match="record of epoch 3"):
        restore(root)


@pytest.mark.parametrize("content", [(), ("state",)])
def test_a_half_written_directory_with_the_final_name_is_refused(root, content):
    (root / "9").mkdir()
    for name in content:
        shutil.copytree(root / "3" / name, root / "9" / name)
    with pytest.raises(UserError, match=str(root / "9")):
        restore(root)


def test_what_a_killed_save_left_is_ignored_and_cleaned(root):
    left = root / "4.orbax-checkpoint-tmp"
    shutil.copytree(root / "3", left)
    checkpoints = Checkpoints(root, 1, 9)
    assert checkpoints.restore(abstract(make_state(0))).epoch == 3
    assert checkpoints.save(4, make_state(4), {"epoch": 4})
    checkpoints.close()
    assert not left.exists()
    assert restore(root).epoch == 4


# --- resume=last_good


def test_last_good_skips_says_so_and_moves_the_damaged_one_aside(root, capsys):
    flip(root / "3" / "cursor" / "metadata")
    damaged = (root / "3" / "cursor" / "metadata").read_bytes()
    checkpoints = Checkpoints(root, 1, 9)
    found = checkpoints.restore(abstract(make_state(0)), "last_good")
    assert found.epoch == 2 and bits(found.state) == bits(make_state(2))
    assert [epoch for epoch, _ in checkpoints.skipped] == [3]
    said = capsys.readouterr().err
    assert f"skipped the damaged checkpoint {root / '3'}" in said
    assert f"resuming from {root / '2'}" in said
    moved = root / "damaged" / "3" / "cursor" / "metadata"
    assert moved.read_bytes() == damaged
    # The run goes on and writes epoch 3 anew.
    assert checkpoints.save(3, make_state(33), {"epoch": 3})
    checkpoints.close()
    again = restore(root)
    assert again.epoch == 3 and bits(again.state) == bits(make_state(33))


def test_a_reader_moves_nothing(root):
    flip(root / "3" / "cursor" / "metadata")
    checkpoints = Checkpoints(root, 1, 9, read_only=True)
    assert checkpoints.restore(abstract(make_state(0)), "last_good").epoch == 2
    checkpoints.close()
    assert checkpoints.epochs() == [1, 2, 3]


def test_last_good_takes_the_newest_where_it_is_whole(root, capsys):
    assert restore(root, "last_good").epoch == 3
    assert capsys.readouterr().err == ""


def test_where_none_is_whole_the_error_lists_them_all(root):
    for epoch in (1, 2, 3):
        truncate(root / str(epoch) / "cursor" / "metadata")
    with pytest.raises(UserError, match="(?s)epoch 3.*epoch 2.*epoch 1"):
        restore(root, "last_good")
