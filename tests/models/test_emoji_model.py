"""The embedded pipeline: words in, pixels out, weights in a file."""

import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edited_config import configured
from tiny_runs import perturbed

from configs import base, emoji_pretrain
from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Cond
from ddrl_jax.models.emoji import (
    BASE,
    BASE_HEADS,
    check_params,
    decode,
    emoji_pipeline,
    read_heads,
    read_params,
    tokenize,
    write_params,
)
from ddrl_jax.sharding import make_mesh, params_shardings, place_batch

VOCABULARY = {"banana": 1, "bandana": 2, "red": 3, "apple": 4}
TINY = {"model.width": 16, "model.depth": 1, "model.heads": 2}


def test_words_become_ids():
    found = tokenize(["Red apple", "banana"], VOCABULARY)
    np.testing.assert_array_equal(found, [[3, 4, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    assert found.dtype == np.int32


def test_an_unknown_word_lists_near_ones():
    with pytest.raises(UserError) as caught:
        tokenize(["red apple", "red bananna"], VOCABULARY)
    error = caught.value
    assert "'red bananna'" in error.what and error.got == "'bananna'"
    assert "banana, bandana" in error.wanted and "apple" not in error.wanted
    with pytest.raises(UserError) as caught:
        tokenize(["xyzzy"], VOCABULARY)
    assert caught.value.wanted == "one of the 4 words of the captions"


@pytest.mark.parametrize(
    ("prompt", "got"), [("", "0 words"), ("  ", "0 words"), ("red " * 7, "7 words")]
)
def test_a_prompt_without_words_or_with_too_many(prompt, got):
    with pytest.raises(UserError) as caught:
        tokenize([prompt], VOCABULARY)
    assert caught.value.got == got
    assert tokenize(["red " * 6], VOCABULARY).all()  # six are not too many


def test_pixels_are_rounded_to_nearest_and_clipped():
    x0 = np.asarray([-9.0, -1.0, -0.999, 0.0, 0.5, 1.0, 1.001, 9.0, np.inf], np.float32)
    found = np.asarray(decode(jnp.asarray(x0).reshape(1, 3, 3, 1))).ravel()
    np.testing.assert_array_equal(found, [0, 0, 0, 128, 191, 255, 255, 255, 255])
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    back = decode(jnp.asarray(every, jnp.float32) / 127.5 - 1.0)
    np.testing.assert_array_equal(back, every)


# ---- weights in a file

PARAMS = {
    "a": {"kernel": np.asarray([[1.0, 2.5]]), "bias": np.zeros(2)},
    "b": np.ones(3),
}


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])  # float16 ends at 65,504
def test_weights_that_have_diverged_are_not_written(tmp_path, value):
    path = tmp_path / "w.npz"
    with pytest.raises(UserError, match="float16") as error:
        write_params(path, PARAMS | {"b": np.asarray([1.0, value, 1.0])})
    assert error.value.got.startswith("b ") and not path.exists()


def test_weights_come_back_from_a_file(tmp_path):
    path = tmp_path / "w.npz"
    write_params(path, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), PARAMS))
    found = read_params(path)
    assert jax.tree.structure(found) == jax.tree.structure(PARAMS)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(PARAMS), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == np.float32
    with np.load(path) as file:
        assert {file[name].dtype for name in file.files} == {np.dtype("float16")}


@pytest.mark.parametrize("before", [None, b"earlier weights"])
def test_weights_are_written_whole_or_not_at_all(tmp_path, monkeypatch, before):
    path = tmp_path / "w.npz"
    if before is not None:
        path.write_bytes(before)
    write = np.savez_compressed

    def torn(file, **arrays):
        write(file, **{"b": arrays["b"]})
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", torn)
    with pytest.raises(OSError, match="No space left"):
        write_params(path, PARAMS)
    left = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert left == ({} if before is None else {"w.npz": before})


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 torn", b"no archive"])
def test_a_file_without_weights(content, tmp_path):
    path = tmp_path / "w.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_params(path)
    assert str(path) in caught.value.what
    assert caught.value.got == ("a file" if content is not None else "no such file")


def flipped(path):
    """A byte of the data is another one: the archive opens, its checksum does not."""
    np.savez_compressed(path, x=np.arange(1000.0))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def one_array(path):
    with path.open("wb") as file:
        np.save(file, np.ones(3))


FOREIGN = {
    "empty": np.savez,
    "would run code": lambda path: np.savez(path, x=np.asarray([{"a": 1}], object)),
    "text": lambda path: np.savez(path, x=np.asarray("weights")),
    "an array": one_array,
    "a flipped byte": flipped,
    "a leaf inside a leaf": lambda path: np.savez(path, **{"a": 1.0, "a/b": 2.0}),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_an_archive_of_something_else(kind, tmp_path):
    FOREIGN[kind](tmp_path / "w.npz")
    with pytest.raises(UserError, match=r"w\.npz can not be read"):
        read_params(tmp_path / "w.npz")


@pytest.mark.parametrize(
    ("change", "got", "wanted"),
    [
        ({"b": np.ones(4)}, "b: (4,)", "b: (3,)"),
        ({"c": np.ones(1)}, "c: (1,)", "c: no such leaf"),
        ({"a": {"kernel": np.ones((1, 2))}}, "a/bias: missing", "a/bias: (2,)"),
    ],
)
def test_weights_of_another_model(change, got, wanted, tmp_path):
    check_params(PARAMS, PARAMS, tmp_path)
    with pytest.raises(UserError) as caught:
        check_params(PARAMS | change, PARAMS, tmp_path)
    assert (caught.value.got, caught.value.wanted) == (got, wanted)


# ---- the pipeline


def pipeline(**edits):
    return emoji_pipeline(configured(TINY | {"model.init": "random"} | edits))


def test_the_pipeline_knows_its_shapes():
    found = pipeline()
    assert found.latent_shape == (32, 32, 3) and found.prediction == "velocity"
    assert found.load() is None and found.fingerprint == "random"
    np.testing.assert_array_equal(found.uncond.emb, np.zeros((1, 6)))
    assert found.encode(["red apple"]).emb.shape == (1, 6)
    shapes = jax.eval_shape(found.init, jax.random.key(0))
    assert shapes["lora"] is None
    names = jax.tree.map(
        lambda a, axes: len(axes) == a.ndim, shapes["params"], found.axes["params"]
    )
    assert all(jax.tree.leaves(names))  # one logical name for every axis


def test_it_starts_from_a_file_of_its_own_shapes(tmp_path):
    random = jax.jit(pipeline().init)(jax.random.key(1))["params"]
    path = tmp_path / "w.npz"
    write_params(path, random)
    found = pipeline(**{"model.init": str(path)})
    for a, b in zip(
        jax.tree.leaves(found.load()), jax.tree.leaves(random), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3)
    assert len(found.fingerprint) == 16
    write_params(path, jax.tree.map(lambda a: a + 1, random))
    assert pipeline(**{"model.init": str(path)}).fingerprint != found.fingerprint
    with pytest.raises(UserError, match="another model"):
        pipeline(**{"model.init": str(path), "model.width": 32})
    with pytest.raises(UserError, match="another model") as caught:
        pipeline(**{"model.init": str(path), "model.image_size": 64})
    assert caught.value.got.startswith("position: ")
    assert "image_size" in caught.value.way_out


def test_heads_are_those_that_the_weights_were_trained_with(tmp_path):
    """No shape tells them; a file of an earlier version says nothing of them."""
    random = jax.jit(pipeline().init)(jax.random.key(1))["params"]
    path = tmp_path / "w.npz"
    write_params(path, random, heads=2)
    assert jax.tree.structure(read_params(path)) == jax.tree.structure(random)
    edits = {"model.init": str(path)}
    assert pipeline(**edits).load() is not None
    with pytest.raises(UserError, match="other heads") as caught:
        pipeline(**edits, **{"model.heads": 4})
    assert (caught.value.got, caught.value.wanted) == ("model.heads 4", "2 heads")
    write_params(path, random)
    assert pipeline(**edits, **{"model.heads": 4}).load() is not None


def test_heads_of_the_shipped_base_are_those_of_its_config():
    """Its file is older than the comment that says them."""
    assert read_heads(BASE) is None
    assert emoji_pretrain.get_config().model.heads == BASE_HEADS
    assert base.get_config().model.heads == BASE_HEADS
    with pytest.raises(UserError, match="other heads") as caught:
        emoji_pipeline(configured({"model.heads": 4}))
    assert (caught.value.got, caught.value.wanted) == (
        "model.heads 4",
        f"{BASE_HEADS} heads",
    )


def test_missing_weights_are_named_before_anything_is_built(tmp_path):
    with pytest.raises(UserError, match=r"gone\.npz"):
        pipeline(**{"model.init": str(tmp_path / "gone.npz")})


def test_data_tensor_and_context_together():
    """22 tokens, words split over tensor: XLA joined wrong rows here (0.44 off)."""
    sizes = {"data": 2, "fsdp": 1, "tensor": 2, "context": 2}
    mesh = make_mesh(sizes)
    edits = TINY | {"model.init": "random", "model.image_size": 16}
    alone, split = (emoji_pipeline(configured(edits), m) for m in (None, mesh))
    params = perturbed(jax.jit(alone.init)(jax.random.key(0))["params"])
    random = np.random.default_rng(0)
    z = jnp.asarray(random.normal(size=(16, 16, 16, 3)), jnp.float32)
    words = Cond(jnp.asarray(random.integers(0, 12, (16, 6)), jnp.int32))
    inputs = (z, jnp.linspace(0.1, 0.9, 16), words)
    expected = jax.jit(alone.denoise)(params, None, *inputs)
    axes = split.axes["params"]
    params = jax.device_put(params, params_shardings(axes, params, mesh))
    found = jax.jit(split.denoise)(params, None, *place_batch(mesh, inputs))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5)
