"""The cache of latents as it is read: any order, ahead of time, and never damaged."""

import resource
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_pictures import write_folder
from fake_encoders import WEIGHTS, FakeImages, FakeTexts

from ddrl_jax.data.latent_writer import write_latents
from ddrl_jax.data.latents import draw_latents, latent_source
from ddrl_jax.data.picture_folder import read_folder
from ddrl_jax.data.read_ahead import ReadAhead
from ddrl_jax.errors import UserError

COUNT = 11
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    write_folder(root / "set", tuple(f"picture {i % 4}" for i in range(COUNT)))
    pictures = read_folder(str(root / "set"), 16)
    encoders = FakeImages(), FakeTexts()
    return write_latents(root, pictures, *encoders, 4, WEIGHTS, shard=4)


@pytest.fixture
def source(folder):
    return latent_source(folder)


def assert_equal(found, expected):
    assert found.keys() == expected.keys() == {"mean", "logvar"}
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name])


def test_any_order_and_repeats_give_the_same_records(source):
    all_of_it = source.fetch(np.arange(COUNT))
    assert len(np.unique(all_of_it["mean"][:, 0, 0, 0])) == COUNT
    for records in (RNG.permutation(COUNT), np.array([10]), np.array([3, 9, 3, 0, 3])):
        found = source.fetch(records.astype(np.int32))
        assert_equal(found, {k: v[records] for k, v in all_of_it.items()})


def test_a_latent_is_mean_plus_std_times_the_noise_of_its_key(source):
    fetched = source.fetch(np.array([4, 0, 7]))
    keys = jax.random.split(jax.random.key(3), 3)
    found = jax.jit(source.latents)(fetched, keys)
    for i in range(3):
        eps = np.asarray(jax.random.normal(keys[i], (2, 2, 4)), np.float64)
        std = np.exp(fetched["logvar"][i].astype(np.float64) / 2)
        expected = fetched["mean"][i] + std * eps
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-6)


def test_a_record_and_its_key_give_the_same_latent_in_any_batch(source):
    records = np.array([1, 5, 2, 8])
    keys = jax.random.split(jax.random.key(4), 4)
    fetched = jax.device_put(source.fetch(records))
    draw = jax.jit(draw_latents)  # as in the update
    found = draw(fetched, keys)
    order = np.array([2, 0])
    part = jax.device_put(source.fetch(records[order]))
    np.testing.assert_array_equal(draw(part, keys[order]), found[order])
    other = draw(fetched, keys[::-1])
    assert not np.array_equal(other, found)


def test_draws_have_the_spread_of_the_posterior():
    n = 4000
    fetched = {
        "mean": jnp.full((n, 1, 1, 1), 0.7),
        "logvar": jnp.full((n, 1, 1, 1), jnp.log(0.25)),
    }
    keys = jax.random.split(jax.random.key(0), n)
    draws = np.asarray(jax.jit(draw_latents)(fetched, keys))
    assert abs(draws.mean() - 0.7) < 4 * 0.5 / np.sqrt(n)
    assert abs(draws.std() - 0.5) < 4 * 0.5 / np.sqrt(2 * n)


def test_a_caption_that_is_not_cached_is_an_error(source):
    assert source.encode(["picture 2"]).emb.shape == (1, 3, 5)
    with pytest.raises(UserError, match="1 captions are not in the cache"):
        source.encode(["picture 2", "a dog"])


def test_what_is_read_stays_on_the_host(source):
    """Until a batch is placed: batches that are read ahead would fill one device."""
    leaves = jax.tree.leaves([source.encode(["picture 2"]), source.fetch(np.arange(2))])
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)


def test_more_shards_than_open_files_is_no_damage(folder):
    source = latent_source(folder)

    def refuse(_):
        raise RuntimeError("open() failed: Too many open files; x.array_record")

    source._latents._records = SimpleNamespace(__getitems__=refuse)
    with pytest.raises(UserError, match="more shards than this process may") as e:
        source.fetch(np.array([0]))
    assert "ulimit -Hn" in e.value.way_out and "delete" not in e.value.way_out
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY in (soft, hard)
    assert unlimited or soft == hard  # raised when the table was opened


def test_another_fingerprint_is_refused_with_both_values(folder):
    latent_source(folder, {**WEIGHTS, "resolution": 16, "dtype": "float16"})
    with pytest.raises(UserError, match="written with another vae, resolution") as e:
        latent_source(folder, {**WEIGHTS, "vae": "other", "resolution": 512})
    assert "'vae-hash'" in str(e.value.got) and "resolution 16" in str(e.value.got)
    assert "'other'" in e.value.wanted and "resolution 512" in e.value.wanted
    with pytest.raises(UserError, match="written with another judge"):
        latent_source(folder, {"judge": None})


def test_no_cache_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="no cache of latents"):
            latent_source(path)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / folder.name)


@pytest.mark.parametrize("name", [
    "latents-00001.array_record", "texts-00000.array_record", "latents.json",
    "captions.json",
])  # fmt: skip
@pytest.mark.parametrize("how", ["missing", "cut", "empty", "nested"])
def test_a_file_that_is_missing_or_cut_off_is_found_at_the_start(copy, name, how):
    path = copy / name
    content = path.read_bytes()
    path.unlink()
    if how != "missing":
        cut, nested = content[: len(content) // 2], b"[" * 100_000
        path.write_bytes({"cut": cut, "empty": b"", "nested": nested}[how])
    with pytest.raises(UserError, match="is damaged") as e:
        latent_source(copy)
    assert "delete this folder" in e.value.way_out


def test_a_changed_byte_is_an_error_and_never_a_latent(copy, source):
    path = copy / "latents-00001.array_record"
    content = bytearray(path.read_bytes())
    row = np.float16(source.fetch(np.array([5]))["mean"]).tobytes()
    content[content.index(row) + 7] ^= 1
    path.write_bytes(content)
    damaged = latent_source(copy)
    good = np.array([0, 3, 8, 10])
    assert_equal(damaged.fetch(good), source.fetch(good))
    with pytest.raises(UserError, match="is damaged"):
        damaged.fetch(np.array([5]))
    ahead = ReadAhead(damaged.fetch)
    ahead.announce([np.array([5])])  # also where a thread found it
    with pytest.raises(UserError, match="is damaged"):
        ahead(np.array([5]))


def test_captions_of_another_cache_are_noticed(copy):
    text = (copy / "captions.json").read_text()
    (copy / "captions.json").write_text(text.replace('"record": [', '"record": [0,'))
    with pytest.raises(UserError, match="another length"):
        latent_source(copy)
