"""The transformer: its overlapping patches, and what its output may depend on."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_runs import perturbed

from configs.base import get_config
from ddrl_jax.models.dit import DiT, overlap_add, overlapping_patches
from ddrl_jax.models.emoji import LENGTH, read_vocabulary
from ddrl_jax.sharding import make_mesh, params_shardings, place_batch

RNG = np.random.default_rng(5)
SIZES = {"vocabulary": 12, "length": 3, "width": 16, "depth": 2, "heads": 2, "patch": 4}
Z = jnp.asarray(RNG.normal(size=(3, 8, 8, 3)), jnp.float32)
TIME = jnp.asarray([0.1, 0.5, 0.9])
TOKENS = jnp.asarray([[1, 2, 0], [3, 0, 0], [0, 0, 0]], jnp.int32)


# ---- patches


@pytest.mark.parametrize("patch", [2, 4])
def test_windows_by_hand(patch):
    x = RNG.normal(size=(2, 8, 12, 3)).astype(np.float32)
    found = np.asarray(overlapping_patches(jnp.asarray(x), patch))
    half, rows, columns = patch // 2, 8 // patch, 12 // patch
    padded = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    assert found.shape == (2, rows * columns, 4 * patch**2 * 3)
    for token in range(rows * columns):
        i, j = divmod(token, columns)
        window = padded[:, i * patch : (i + 2) * patch, j * patch : (j + 2) * patch]
        np.testing.assert_array_equal(  # the order inside a window is the layer's own
            np.sort(found[:, token]), np.sort(window.reshape(2, -1))
        )


@pytest.mark.parametrize("patch", [2, 4])
def test_overlap_add_is_the_transpose(patch):
    x = RNG.normal(size=(2, 8, 12, 3))
    tokens = RNG.normal(size=(2, (8 // patch) * (12 // patch), 4 * patch**2 * 3))
    there = np.asarray(overlapping_patches(jnp.asarray(x, jnp.float32), patch))
    back = np.asarray(overlap_add(jnp.asarray(tokens, jnp.float32), patch, (8, 12, 3)))
    np.testing.assert_allclose((there * tokens).sum(), (x * back).sum(), rtol=1e-4)
    assert back.shape == x.shape


def test_every_pixel_is_covered():
    ones = overlapping_patches(jnp.ones((1, 8, 12, 1)), 4)
    found = np.asarray(overlap_add(ones, 4, (8, 12, 1)))[0, ..., 0]
    rows, columns = [1, 1, *[2] * 4, 1, 1], [1, 1, *[2] * 8, 1, 1]
    np.testing.assert_array_equal(found, np.outer(rows, columns))


# ---- the network


def make(**changes):
    return DiT(**(SIZES | changes))


@pytest.fixture(scope="module")
def params():
    trees = jax.jit(make().init)(jax.random.key(0), Z, TIME, TOKENS)
    return perturbed(nn.meta.unbox(trees)["params"])


def run(params, z=Z, time=TIME, tokens=TOKENS, **changes):
    network = make(**changes)
    go = jax.jit(lambda p, *x: network.apply({"params": p}, *x))
    return np.asarray(go(params, z, time, tokens))


def test_a_new_network_says_0():
    new = jax.jit(make(dtype="bfloat16").init_with_output)
    out, _ = new(jax.random.key(0), Z, TIME, TOKENS)
    assert out.shape == Z.shape and out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0.0)


def test_the_output_depends_on_all_it_is_told(params):
    base = run(params)
    assert base.shape == Z.shape and np.abs(base).min(axis=(1, 2, 3)).max() < 10
    changes = {
        "picture": run(params, z=Z.at[:, 0, 0].add(1.0)),
        "time": run(params, time=TIME + 0.05),
        "words": run(params, tokens=TOKENS.at[:, 0].set(7)),
        "order of words": run(params, tokens=TOKENS[:, ::-1]),
    }
    for name, out in changes.items():
        rows = np.abs(out - base).max(axis=(1, 2, 3))
        assert (rows[:2] > 1e-4).all(), name
    far = np.abs(changes["picture"] - base)[:, 4:, 4:]
    assert far.max() > 1e-5  # attention carries it over the whole picture


def test_a_sample_does_not_depend_on_its_neighbours(params):
    base = run(params)
    other = run(params, z=Z.at[1].add(1.0), tokens=TOKENS.at[1].set(5))
    np.testing.assert_array_equal(other[[0, 2]], base[[0, 2]])
    assert np.abs(other[1] - base[1]).max() > 1e-3


def test_half_precision_is_close(params):
    exact, half = run(params), run(params, dtype="bfloat16")
    error = np.abs(half - exact).max() / np.abs(exact).max()
    assert half.dtype == np.float32 and 1e-5 < error < 0.05


def test_recomputed_blocks_change_nothing(params):
    def gradient(remat):
        network = make(remat=remat)
        loss = lambda p: jnp.mean(network.apply({"params": p}, Z, TIME, TOKENS) ** 2)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    (plain, g), (again, h) = gradient("none"), gradient("full")
    np.testing.assert_allclose(again, plain, rtol=1e-6)
    for name, (a, b) in enumerate(
        zip(jax.tree.leaves(g), jax.tree.leaves(h), strict=True)
    ):
        np.testing.assert_allclose(b, a, atol=1e-6, err_msg=str(name))
        assert np.abs(a).max() > 0  # every parameter matters


def test_the_default_network_has_at_most_five_million_parameters():
    c = get_config().model
    network = DiT(
        width=c.width,
        depth=c.depth,
        heads=c.heads,
        patch=c.patch,
        vocabulary=len(read_vocabulary()) + 1,
        length=LENGTH,
    )
    size = c.image_size
    inputs = (jnp.zeros((1, size, size, 3)), jnp.zeros(1), jnp.zeros((1, LENGTH), int))
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), *inputs))
    count = sum(a.size for a in jax.tree.leaves(shapes))
    assert 1e6 < count <= 5e6


# ---- tokens over several devices

AXES = ("data", "fsdp", "tensor", "context")
BATCH = (
    jnp.asarray(RNG.normal(size=(4, 16, 16, 3)), jnp.float32),
    jnp.linspace(0.1, 0.9, 4),
    jnp.asarray(RNG.integers(0, 12, (4, 3)), jnp.int32),
)


def mesh_of(*shape):
    return make_mesh(dict(zip(AXES, shape, strict=True)))


def slopes_of(**changes):
    """A jitted (params, batch) -> (value, gradients)."""
    network = make(**changes)

    def loss(params, *batch):
        return jnp.mean(jnp.sin(network.apply({"params": params}, *batch)))

    return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module")
def four_heads():
    """(parameters, their logical axes)"""
    trees = jax.jit(make(heads=4).init)(jax.random.key(0), *BATCH)["params"]
    specs = nn.get_partition_spec(trees)
    axes = jax.tree.map(tuple, specs, is_leaf=lambda s: isinstance(s, P))
    return perturbed(nn.meta.unbox(trees)), axes


# 16 patches and 3 words are padded to 20 or 24 tokens
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "impl", "collective"),
    [
        ((1, 1, 1, 4), "auto", "all-to-all"),
        ((1, 1, 1, 8), "auto", "collective-permute"),  # more shards than heads
        ((2, 1, 2, 2), "auto", "all-to-all"),
        pytest.param(
            (1, 1, 4, 2), "auto", "collective-permute", marks=pytest.mark.slow
        ),
        ((1, 2, 2, 2), "auto", "all-to-all"),
        ((1, 2, 1, 4), "ring", "collective-permute"),
        ((2, 1, 1, 2), "xla", "all-gather"),
    ],
)
def test_tokens_over_the_context_axis(shape, impl, collective, four_heads):
    mesh = mesh_of(*shape)
    params, axes = four_heads
    value, slopes = slopes_of(heads=4)(params, *BATCH)
    placed = jax.device_put(params, params_shardings(axes, params, mesh))
    inputs = (placed, *place_batch(mesh, BATCH))
    program = slopes_of(heads=4, mesh=mesh, impl=impl, remat="full").lower(*inputs)
    program = program.compile()
    found, others = program(*inputs)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max(), rtol=0)
    assert_tokens_are_divided(program.as_text(), shape, collective)


def assert_tokens_are_divided(text, shape, collective):
    """The collective is in the attention, and no array in a block has all tokens."""
    tokens, width = 19 + -19 % shape[3], SIZES["width"]
    samples = BATCH[0].shape[0] // (shape[0] * shape[1])
    inside = [line for line in text.splitlines() if "/blocks/" in line]
    assert any(f" {collective}" in line and "_mix/" in line for line in inside)
    assert any(f"[{samples},{tokens // shape[3]}," in line for line in inside)
    assert not any(f"[{samples},{tokens},{width}]" in line for line in inside)


@pytest.mark.parametrize("impl", ["xla", "auto"])
def test_a_mesh_without_context_changes_no_operation(impl, params):
    inputs = (params, Z, TIME, TOKENS)
    alone = slopes_of().lower(*inputs).as_text()
    assert slopes_of(mesh=mesh_of(4, 1, 2, 1), impl=impl).lower(*inputs).as_text() == (
        alone
    )
