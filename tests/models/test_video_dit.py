"""The video transformer: patches, positions, what depends on what, and any mesh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import perturbed

from configs import video_14b
from ddrl_jax.check_config import check_config
from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Cond
from ddrl_jax.models.attention import implementations
from ddrl_jax.models.video_dit import from_patches, rotary_angles, rotate, to_patches
from ddrl_jax.models.video_pipeline import (
    first_frame,
    video_dit_pipeline,
    word_vectors,
)
from ddrl_jax.sharding import make_mesh, params_shardings, place_batch

RNG = np.random.default_rng(3)


def config(**model):
    c = video_14b.get_config("smoke")
    c.model.update(model)
    return c


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


# ---- tokens


def test_patches_by_hand_and_back():
    z = np.arange(2 * 3 * 4 * 6 * 5, dtype=np.float32).reshape(2, 3, 4, 6, 5)
    tokens = np.asarray(to_patches(jnp.asarray(z), 2))
    assert tokens.shape == (2, 3 * 2 * 3, 20)
    places = itertools.product(range(3), range(2), range(3))
    for token, (f, i, j) in enumerate(places):
        window = z[:, f, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        np.testing.assert_array_equal(tokens[:, token], window.reshape(2, -1))
    back = from_patches(jnp.asarray(tokens), 2, z.shape[1:])
    np.testing.assert_array_equal(back, z)


def test_angles_by_hand():
    """Of a head of 16: 4 pairs turn by frame, 2 by row, 2 by column."""
    found = np.asarray(rotary_angles((3, 2, 5), 16))
    assert found.shape == (30, 8)
    token = 2 * 10 + 1 * 5 + 4  # frame 2, row 1, column 4
    expected = [2.0, 0.2, 0.02, 0.002, 1.0, 0.01, 4.0, 0.04]
    np.testing.assert_allclose(found[token], expected, rtol=1e-5)


def test_rotary_products_depend_on_the_offset_alone():
    q, k = normal(16), normal(16)
    grid = (3, 4, 5)
    angles = rotary_angles(grid, 16)
    turned = [
        np.asarray(rotate(jnp.broadcast_to(a, (1, 60, 1, 16)), angles))[0, :, 0]
        for a in (q, k)
    ]
    products = (turned[0] @ turned[1].T).reshape(*grid, *grid)
    np.testing.assert_allclose(
        products[0, 1, 0, 1, 3, 2], products[1, 0, 2, 2, 2, 4], rtol=1e-4, atol=1e-5
    )
    assert abs(products[0, 1, 0, 1, 3, 2] - products[0, 1, 0, 1, 3, 3]) > 1e-3
    lengths = np.linalg.norm(turned[0], axis=1)
    np.testing.assert_allclose(lengths, np.linalg.norm(q), rtol=1e-5)


# ---- size


def test_the_14b_has_14_337_295_424_weights():
    """By hand, from the widths: blocks, time, text, patches, output."""
    pipeline = video_dit_pipeline(video_14b.get_config())
    shapes = jax.eval_shape(pipeline.init, jax.random.key(0))
    found = sum(a.size for a in jax.tree.leaves(shapes["params"]))
    d, mlp = 5120, 13824
    blocks = 40 * (8 * d * d + 2 * d * mlp + 6 * d)
    time = (256 + 1) * d + (d + 1) * d + (d + 1) * 6 * d
    text = (4096 + 1) * d + (d + 1) * d
    ends = (64 + 1) * d + (d + 1) * 64 + (d + 1) * 2 * d
    assert found == blocks + time + text + ends == 14_337_295_424
    assert np.prod(pipeline.latent_shape[:3]) // 4 == 32_760
    assert shapes["lora"] is None


def test_the_lora_of_the_14b():
    pipeline = video_dit_pipeline(video_14b.get_config("lora"))
    shapes = jax.eval_shape(pipeline.init, jax.random.key(0))
    found = sum(a.size for a in jax.tree.leaves(shapes["lora"]))
    assert found == 40 * 32 * (8 * (5120 + 5120) + 2 * (5120 + 13824))


# ---- the network at a tiny size


@pytest.fixture(scope="module")
def tiny():
    pipeline = video_dit_pipeline(config())
    params = perturbed(jax.jit(pipeline.init)(jax.random.key(0))["params"], 0.1)
    batch = (normal(8, *pipeline.latent_shape), jnp.linspace(0.1, 0.9, 8))
    return pipeline, params, (*batch, Cond(normal(8, 4, 16)))


def loss_of(pipeline):
    def loss(params, z, time, cond):
        return jnp.mean(pipeline.denoise(params, None, z, time, cond) ** 2)

    return jax.jit(jax.value_and_grad(loss))


def test_the_output_depends_on_everything(tiny):
    pipeline, params, (z, time, cond) = tiny
    run = jax.jit(lambda *x: pipeline.denoise(params, None, *x))
    out = run(z, time, cond)
    assert out.shape == z.shape and out.dtype == jnp.float32
    other_text = Cond(cond.emb.at[0].add(1.0))
    for changed in ((z, time + 0.1, cond), (z, time, other_text)):
        assert jnp.abs(run(*changed) - out)[0].max() > 1e-4
    # A latent of the first frame reaches the last one, and no other sample.
    moved = jnp.abs(run(z.at[0, 0, 0, 0].add(1.0), time, cond) - out)
    assert moved[0, -1].max() > 1e-6 and moved[1:].max() == 0


def test_a_new_network_says_0_and_every_weight_gets_a_gradient(tiny):
    pipeline, params, batch = tiny
    new = jax.jit(pipeline.init)(jax.random.key(0))["params"]
    np.testing.assert_array_equal(pipeline.denoise(new, None, *batch), 0.0)
    _, grads = loss_of(pipeline)(params, *batch)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    "sizes",
    [{"tensor": 4}, {"context": 4}, {"fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]
    + [{"data": 2, "tensor": 2, "context": 2}, {"fsdp": 2, "tensor": 2, "context": 2}],
)
def test_any_mesh_gives_the_numbers_of_one_device(tiny, sizes):
    pipeline, params, batch = tiny
    value, grads = loss_of(pipeline)(params, *batch)
    whole = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | sizes
    mesh = make_mesh(whole)
    split = video_dit_pipeline(config(), mesh)
    placed = jax.device_put(
        params, params_shardings(split.axes["params"], params, mesh)
    )
    found, other = loss_of(split)(placed, *place_batch(mesh, batch))
    np.testing.assert_allclose(found, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * jnp.abs(a).max())


@pytest.mark.parametrize("impl", ["xla", "chunked"])
def test_both_attentions_are_the_one_that_was_asked_for(tiny, impl):
    _, params, batch = tiny
    denoise = video_dit_pipeline(config(attention=impl)).denoise
    found = implementations(lambda *x: denoise(params, None, *x), *batch)
    assert found == (impl,)


# What the attention of divided tokens sends; nothing else in a block sends tokens.
SENDS = {"ulysses": "all-to-all", "ring": "collective-permute"}


@pytest.mark.slow
@pytest.mark.parametrize("impl", SENDS)
@pytest.mark.parametrize("sizes", [{"context": 2}, {"data": 2, "context": 4}])
def test_divided_tokens_give_the_numbers_of_one_device(tiny, sizes, impl):
    pipeline, params, batch = tiny
    (_, out), grads = with_output(pipeline)(params, *batch)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | sizes)
    split = video_dit_pipeline(config(attention=impl), mesh)
    placed = jax.device_put(
        params, params_shardings(split.axes["params"], params, mesh)
    )
    inputs = (placed, *place_batch(mesh, batch))
    program = with_output(split).lower(*inputs).compile()
    (_, found), others = program(*inputs)
    np.testing.assert_allclose(found, out, rtol=0, atol=2e-6 * jnp.abs(out).max())
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * jnp.abs(a).max())
    inside = [line for line in program.as_text().splitlines() if "/blocks/" in line]
    assert any(f" {SENDS[impl]}" in line and "_among_tokens" in line for line in inside)
    assert not any(" all-gather" in line for line in inside)


def with_output(pipeline):
    """A jitted (params, batch) -> ((loss, output), gradients)."""

    def loss(params, *batch):
        out = pipeline.denoise(params, None, *batch)
        return jnp.mean(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_recomputing_changes_nothing(tiny):
    pipeline, params, batch = tiny
    none = video_dit_pipeline(config(remat="none"))
    a, b = (loss_of(p)(params, *batch) for p in (pipeline, none))
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    for x, y in zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


# ---- what stands in, and what is refused


def test_words_and_pictures():
    a, b = word_vectors(["a cat", "a dog sits there now"], 4, 16)
    np.testing.assert_array_equal(a[0], b[0])
    assert (a[1] != b[1]).all() and not a[2:].any() and b.all()
    x0 = jnp.full((1, 2, 2, 2, 4), -1.0).at[0, 0, 0, 0].set(1.0)
    assert first_frame(x0)[0, :, :, 0].tolist() == [[255, 0], [0, 0]]


def test_there_are_no_weights():
    assert video_dit_pipeline(config()).load() is None
    with pytest.raises(UserError, match="no weights of the text-to-video"):
        video_dit_pipeline(config(init="assets")).load()


@pytest.mark.parametrize(
    ("edits", "named"),
    [
        ({"model": {"width": 36}}, "model.width"),
        ({"video": {"height": 7}}, "model.video.height"),
        ({"data": {"source": "emoji"}}, "video_dit"),
    ],
)
def test_what_does_not_fit_is_named(edits, named):
    c = config(**edits.get("model", {}))
    c.model.video.update(edits.get("video", {}))
    c.data.update(edits.get("data", {}))
    with pytest.raises(UserError, match=named):
        check_config(c, 1)
    check_config(config(), 1)
