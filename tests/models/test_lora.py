"""LoRA beside a frozen base: off, merged and counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edited_config import configured
from tiny_runs import perturbed

from ddrl_jax.models.emoji import emoji_pipeline
from ddrl_jax.models.lora import merge_lora

RNG = np.random.default_rng(7)
Z = jnp.asarray(RNG.normal(size=(2, 16, 16, 3)), jnp.float32)
TIME = jnp.asarray([0.2, 0.7])
EDITS = {
    "model.init": "random",
    "model.width": 16,
    "model.depth": 2,
    "model.heads": 2,
    "model.image_size": 16,
    "lora.rank": 3,
}


@pytest.fixture(scope="module", params=[0.0, 6.0], ids=["alpha 0", "alpha 6"])
def run(request):
    """(config, base, lora, denoise) with a base that says something."""
    config = configured(EDITS | {"lora.alpha": request.param})
    pipeline = emoji_pipeline(config)
    trees = jax.jit(pipeline.init)(jax.random.key(0))
    cond = pipeline.encode(["cat", "red apple"])
    go = jax.jit(lambda base, lora: pipeline.denoise(base, lora, Z, TIME, cond))
    return config.lora, perturbed(trees["params"]), trees["lora"], go


def test_a_new_lora_changes_nothing(run):
    _, base, lora, denoise = run
    found = denoise(base, lora)
    np.testing.assert_allclose(found, denoise(base, None), atol=1e-6)
    assert np.abs(found).max() > 0.1


def test_a_merged_lora_is_the_lora(run):
    config, base, lora, denoise = run
    trained = perturbed(lora, 0.3)
    found = denoise(base, trained)
    merged = merge_lora(base, trained, config)
    np.testing.assert_allclose(denoise(merged, None), found, atol=1e-4)
    assert np.abs(found - denoise(base, None)).max() > 0.01
    assert jax.tree.structure(merged) == jax.tree.structure(base)


def test_merging_by_hand():
    base = {"x": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "y": jnp.ones(1)}
    a, b = RNG.normal(size=(2, 2)), RNG.normal(size=(2, 3))
    lora = {"x": {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}}
    found = merge_lora(base, lora, configured({"lora.rank": 2, "lora.alpha": 5.0}).lora)
    np.testing.assert_allclose(found["x"]["kernel"], 1 + 2.5 * a @ b, rtol=1e-5)
    assert found["x"]["bias"] is base["x"]["bias"] and found["y"] is base["y"]


def test_gradients_reach_every_factor(run):
    _, base, lora, denoise = run
    trained = perturbed(lora, 0.3)
    slope = jax.jit(jax.grad(lambda tree: jnp.sum(denoise(base, tree) ** 2)))
    gradient = slope(trained)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))


def test_its_size_is_rank_times_the_sides_of_each_matrix(run):
    _, _, lora, _ = run
    d, depth, rank = 16, 2, 3
    sides = (d + 3 * d) + (d + d) + (d + 4 * d) + (4 * d + d)  # qkv, out, up, down
    assert sum(a.size for a in jax.tree.leaves(lora)) == depth * rank * sides
