import json
import shutil
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from saved_states import State, bits, make_state, restore, save_epochs

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


def test_every_leaf_and_the_cursor_come_back_to_the_bit(root):
    found = restore(root)
    assert found.epoch == 3 and found.cursor == {"epoch": 3}
    assert bits(found.state) == bits(make_state(3))
    wanted = jax.tree.structure(make_state(3))
    assert jax.tree.structure(found.state) == wanted


def test_host_arrays_and_numbers_come_back_as_they_were(tmp_path):
    state = {"wide": np.arange(3, dtype=np.float64) / 3, "count": np.int64(2**40)}
    cursor = {"order": [3, 1, 2], "text": "é", "share": 0.1, "none": None}
    checkpoints = Checkpoints(tmp_path, 1, 1)
    checkpoints.save(1, state, cursor)
    checkpoints.wait()
    found = checkpoints.restore(abstract(state))
    checkpoints.close()
    assert bits(found.state) == bits(state)
    assert all(isinstance(leaf, np.ndarray) for leaf in found.state.values())
    assert found.cursor == cursor


def test_saves_on_every_kth_epoch_or_when_forced_and_never_twice(tmp_path):
    checkpoints = Checkpoints(tmp_path, 3, 9)
    state = make_state(0)
    started = [checkpoints.save(epoch, state, {}) for epoch in range(1, 8)]
    assert started == [False, False, True, False, False, True, False]
    assert checkpoints.save(7, state, {}, force=True)
    assert not checkpoints.save(7, state, {}, force=True)
    checkpoints.close()
    assert checkpoints.epochs() == [3, 6, 7] and checkpoints.latest() == 7


def test_what_was_restored_is_not_saved_again(root):
    """A run that ends where it began, as one that is stopped in its first epoch."""
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    checkpoints = Checkpoints(root, 1, 9)
    found = checkpoints.restore(abstract(make_state(0)))
    assert not checkpoints.save(3, found.state, {}, force=True)
    assert before == {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert checkpoints.save(4, found.state, {})
    checkpoints.close()
    assert checkpoints.epochs() == [1, 2, 3, 4]


def test_keeps_the_newest(tmp_path):
    save_epochs(tmp_path, range(1, 6), keep=2)
    assert Checkpoints(tmp_path, 1, 2).epochs() == [4, 5]


def test_an_empty_or_absent_directory_is_a_fresh_start(tmp_path):
    assert restore(tmp_path) is None
    assert restore(tmp_path / "absent") is None
    assert not (tmp_path / "absent").exists()


def test_a_checkpoint_of_somebody_else_is_not_overwritten(root):
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    checkpoints = Checkpoints(root, 1, 9)
    with pytest.raises(UserError, match="exists already"):
        checkpoints.save(3, make_state(77), {})
    checkpoints.close()
    assert before == {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    state = {"w": jnp.arange(500_000, dtype=jnp.float32)}
    wanted = np.arange(500_000, dtype=np.float32)
    overwrite = jax.jit(
        lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0
    )
    jax.block_until_ready(overwrite({"w": jnp.zeros(500_000)}))  # compiled before
    checkpoints = Checkpoints(tmp_path, 1, 1)
    like = abstract(state)
    checkpoints.save(1, state, {})
    for _ in range(3):
        state = overwrite(state)
    checkpoints.wait()
    found = checkpoints.restore(like)
    checkpoints.close()
    np.testing.assert_array_equal(np.asarray(found.state["w"]), wanted)


def test_a_state_saved_on_one_mesh_comes_back_on_another(tmp_path):
    devices = np.array(jax.devices())
    eight = NamedSharding(Mesh(devices, ("data",)), PartitionSpec("data"))
    four = Mesh(devices[:4].reshape(2, 2), ("a", "b"))
    two_by_two = NamedSharding(four, PartitionSpec("b", "a"))
    values = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    checkpoints = Checkpoints(tmp_path, 1, 1)
    checkpoints.save(1, {"w": jax.device_put(values, eight)}, {})
    checkpoints.wait()
    like = {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=two_by_two)}
    found = checkpoints.restore(like)
    checkpoints.close()
    assert found.state["w"].sharding == two_by_two
    np.testing.assert_array_equal(np.asarray(found.state["w"]), values)


# --- Foreign checkpoints


def without_half(state: State) -> State:
    return state._replace(params={"dense": state.params["dense"]})


def with_more(state: State) -> State:
    return state._replace(params=state.params | {"zeta": jnp.zeros(2)})


def with_other_type(state: State) -> State:
    half = state.params["half"].astype(jnp.float32)
    return state._replace(params=state.params | {"half": half})


@pytest.mark.parametrize("which", ["latest", "last_good"])
@pytest.mark.parametrize(
    ("wanted", "leaf", "got", "want"),
    [
        (make_state(0, width=6), "params/dense/kernel", "(4, 5)", "(4, 6)"),
        (with_other_type(make_state(0)), "params/half", "bfloat16", "float32"),
        (with_more(make_state(0)), "params/zeta", "no such leaf", "(2,)"),
        (without_half(make_state(0)), "params/half", "(3,)", "no such leaf"),
    ],
    ids=["shape", "dtype", "leaf missing there", "leaf missing here"],
)
def test_another_model_is_refused_at_the_first_leaf(
    root, which, wanted, leaf, got, want
):
    with pytest.raises(UserError) as error:
        restore(root, which, wanted)
    assert str(root / "3") in error.value.what and leaf in error.value.what
    assert got in error.value.got and want in error.value.wanted
    assert "--workdir" in error.value.way_out
    assert Checkpoints(root, 1, 9).epochs() == [1, 2, 3]


def test_a_checkpoint_of_the_first_format_is_read_and_said_to_be_unchecked(
    root, capsys
):
    path = root / "3" / "cursor" / "metadata"
    record = json.loads(path.read_text())
    del record["checksum"]
    record["program"] = "ddrl_jax checkpoint, format 1"
    for leaf in record["leaves"].values():
        leaf[2] = 7  # a CRC-32 in that format
    text = json.dumps(record, sort_keys=True).encode()
    path.write_text(json.dumps(record | {"checksum": zlib.crc32(text)}))
    found = restore(root)
    assert bits(found.state) == bits(make_state(3)) and found.cursor == {"epoch": 3}
    assert "saved by an older version" in capsys.readouterr().err


def test_the_checkpoint_of_another_program_is_refused(tmp_path):
    with ocp.StandardCheckpointer() as other:
        other.save(tmp_path / "5", {"w": jnp.zeros(3)})
    with pytest.raises(UserError, match="of another program"):
        restore(tmp_path)


def test_a_directory_of_other_files_is_no_fresh_start(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="model.safetensors"):
        restore(tmp_path)


def test_an_average_that_is_not_wanted_is_named(tmp_path):
    weights = {"w": jnp.ones(3)}
    checkpoints = Checkpoints(tmp_path / "c", 1, 9)
    checkpoints.save(1, {"train": {"ema": weights, "params": weights}}, {})
    checkpoints.wait()
    wanted = abstract({"train": {"ema": None, "params": weights}})
    with pytest.raises(UserError, match=r"holds an average.*\n.*train/ema/w"):
        checkpoints.restore(wanted)
    checkpoints.close()


@pytest.mark.parametrize("which", ["latest", "last_good"])
def test_a_reader_takes_what_a_run_beside_it_has_saved_meanwhile(tmp_path, which):
    """With checkpoint.keep 1 the run deletes what the reader is about to read."""
    root = tmp_path / "checkpoints"
    save_epochs(root, (1,))
    reader = Checkpoints(root, 1, 1, read_only=True)
    read, calls = reader._read_everywhere, []

    def late(epoch, *rest):
        calls.append(epoch)
        if len(calls) == 1:
            save_epochs(root, (2,), keep=1)
            assert reader.epochs() == [2]
        return read(epoch, *rest)

    reader._read_everywhere = late
    found = reader.restore(abstract(make_state(0)), which)
    assert calls == [1, 2] and found.epoch == 2
    assert bits(found.state) == bits(make_state(2))
