"""A data set of samples: what is written is what is read, to the byte."""

import resource
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.data.emoji import read_emoji
from ddrl_jax.data.samples import refuse_existing, sample_source, write_samples
from ddrl_jax.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 32, 32, 3), np.uint8)
CAPTIONS = ("cat", "dog", "cat", "a Käse", "dog", "cat", "x" * 200)


def batches():
    yield IMAGES[:4], CAPTIONS[:4]
    yield IMAGES[4:], CAPTIONS[4:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # A parent that is not there yet, as in WORKDIR/dataset of a new run.
    path = tmp_path_factory.mktemp("samples") / "deep" / "set"
    assert write_samples(path, batches()) == 7
    return path


def test_comes_back_to_the_byte_and_in_order(folder):
    images, captions = read_emoji(folder)
    np.testing.assert_array_equal(images, IMAGES)
    assert captions == CAPTIONS


def test_is_a_source_of_the_pictures_as_they_are(folder):
    source = sample_source(str(folder), (32, 32, 3))
    records = jnp.asarray([6, 0, 3], jnp.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    found = source.latents(records, keys)
    expected = IMAGES[[6, 0, 3]].astype(np.float64) / 127.5 - 1.0
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(found, source.latents(records, keys[::-1]))
    assert source.captions == CAPTIONS and found.dtype == np.float32


def test_is_never_overwritten(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(UserError, match="already there"):
        write_samples(folder, iter([(IMAGES[:1], ("other",))]))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["file/set", "file/deeper/set"])
def test_does_not_begin_below_a_file(name, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can not lie there") as error:
        write_samples(tmp_path / name, (pytest.fail("drained") for _ in "1"))
    assert f"{tmp_path / 'file'}, which is a file" in error.value.got


def test_leaves_nothing_beside_it(folder):
    assert [p.name for p in folder.parent.iterdir()] == ["set"]


@pytest.fixture
def killed(tmp_path):
    """What a kill has left of an earlier writing of tmp_path / "set"."""
    part = tmp_path / ".set.part" / "samples" / "1.0.0.incompleteXY"
    part.mkdir(parents=True)
    (part / "samples-train.array_record").write_bytes(b"half")


def test_what_a_kill_has_left_is_cleared(tmp_path, killed, capsys):
    assert write_samples(tmp_path / "set", batches()) == 7
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    assert read_emoji(tmp_path / "set")[1] == CAPTIONS
    assert capsys.readouterr().out == ""  # TFDS would name the scratch folder


def test_a_failure_leaves_nothing_and_can_be_tried_again(tmp_path, killed):
    def broken():
        yield IMAGES[:4], CAPTIONS[:4]
        raise RuntimeError("the sampler failed")

    with pytest.raises(RuntimeError, match="the sampler failed"):
        write_samples(tmp_path / "set", broken())
    assert list(tmp_path.iterdir()) == []
    assert write_samples(tmp_path / "set", batches()) == 7
    np.testing.assert_array_equal(read_emoji(tmp_path / "set")[0], IMAGES)


@contextmanager
def full_disk(limit):
    """No file of this process may grow beyond the limit, in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_error_that_names_the_folder(tmp_path):
    path = tmp_path / "set"
    with pytest.raises(UserError, match="can not be written") as error, full_disk(8192):
        write_samples(path, batches())
    assert str(path) in error.value.what
    assert "--config.sample.output" in error.value.way_out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["/", "."])
def test_a_folder_that_is_always_there_can_not_be_the_set(place):
    with pytest.raises(UserError, match="already there"):
        refuse_existing(Path(place))


def test_a_missing_set_names_the_key_that_would_find_it(tmp_path):
    with pytest.raises(UserError, match="data.path"):
        sample_source(str(tmp_path / "none"), (32, 32, 3))


def test_pictures_of_another_size_are_one_error_that_names_both(folder, tmp_path):
    with pytest.raises(UserError, match="not of the model's size") as error:
        sample_source(str(folder), (16, 16, 3))
    assert (error.value.got, error.value.wanted) == ("32 x 32 x 3", "16 x 16 x 3")
    assert "config.model.image_size" in error.value.way_out
    mixed = iter([(IMAGES[:1], ("cat",)), (IMAGES[:1, :16, :16], ("dog",))])
    write_samples(tmp_path / "mixed", mixed)
    with pytest.raises(UserError, match="not of one size") as error:
        sample_source(str(tmp_path / "mixed"), (32, 32, 3))
    assert error.value.got == "16 x 16 x 3, 32 x 32 x 3"
