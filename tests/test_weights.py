"""The dtypes in which a run keeps its weights: fewer bytes, the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edited_config import configured
from tiny_runs import (
    TINY,
    chunks_with_trajectories,
    perturbed,
    same_bits,
    tiny_program,
)

from ddrl_jax.data.prompts import draw_prompts
from ddrl_jax.learner import init_state
from ddrl_jax.models.pipelines import PIPELINES
from ddrl_jax.optim import make_optimizer
from ddrl_jax.sharding import make_mesh
from ddrl_jax.weights import Weights, describe_weights, rollout_rules

LORA = {"lora.rank": 2, "model.dtype": "bfloat16"}
MODELS = {
    "emoji": {},
    "stable_diffusion": {"model.init": "assets", "model.image_size": 0},
    "video_dit": {
        "model.patch": 2,
        "model.video.frames": 2,
        "model.video.height": 8,
        "model.video.width": 8,
        "model.video.channels": 4,
        "model.video.mlp": 64,
        "model.video.text_tokens": 4,
        "model.video.text_width": 16,
    },
}


def described(edits) -> Weights:
    config = configured(TINY | edits)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1})
    pipeline = PIPELINES[config.model.name](config, None)
    tx = make_optimizer(config.optimizer, 10)
    return describe_weights(config, pipeline, tx, mesh)


def dtypes(tree) -> set[str]:
    return {str(a.dtype) for a in jax.tree.leaves(tree)}


@pytest.mark.optimised
@pytest.mark.parametrize("name", MODELS)
def test_a_base_in_the_compute_dtype_predicts_the_same_bits(name):
    edits = LORA | MODELS[name] | {"model.name": name}
    weights = described(edits)
    wide = perturbed(described(edits | {"lora.base_dtype": "float32"}).frozen())
    assert dtypes(wide) == {"float32"}
    # Rounded where the run rounds, from the same perturbed numbers.
    kept = weights.shapes["params"]
    narrow = jax.tree.map(lambda a, like: a.astype(like.dtype), wide, kept)
    assert dtypes(narrow) == dtypes(weights.frozen()) == {"float32", "bfloat16"}
    share = sum(a.size for a in jax.tree.leaves(narrow) if a.dtype == jnp.bfloat16)
    assert share > 0.7 * sum(a.size for a in jax.tree.leaves(narrow))
    lora = perturbed(weights.new_state().params)
    z = jax.random.normal(jax.random.key(1), (2, *weights.pipeline.latent_shape))
    cond = jax.tree.map(lambda u: jnp.repeat(u, 2, 0), weights.pipeline.uncond)
    cond = perturbed(cond) if name != "emoji" else cond
    go = jax.jit(lambda base, z: weights.pipeline.denoise(base, lora, z, TIMES, cond))
    found, expected = go(narrow, z), go(wide, z)
    assert found.dtype == jnp.float32 and np.abs(expected).max() > 1e-3
    assert same_bits(found, expected)
    spoilt = jax.tree.map(lambda a: a.astype(jnp.bfloat16), wide)
    assert not same_bits(go(spoilt, z), expected)


TIMES = jnp.asarray([0.3, 0.9])


def test_what_is_trained_is_never_narrowed_by_the_base():
    weights = described(LORA)
    assert dtypes(weights.shapes["lora"]) == {"float32"}
    assert dtypes(described({"model.dtype": "bfloat16"}).base()) == {"float32"}


def test_loaded_weights_arrive_in_their_dtype():
    base = {"model.init": "assets", "model.width": 192, "model.depth": 6}
    base |= {"model.heads": 6, "model.image_size": 32}
    narrow = described(LORA | base).frozen()
    wide = described(base).base()
    kernel = wide["blocks"]["up"]["kernel"]
    assert same_bits(narrow["blocks"]["up"]["kernel"], kernel.astype(jnp.bfloat16))
    assert same_bits(narrow["words"], wide["words"])


@pytest.mark.parametrize("lora", [0, 2])
def test_narrow_master_weights(lora):
    edits = {"optimizer.master": "bfloat16", "lora.rank": lora}
    weights = described(edits | {"optimizer.ema_decay": 0.9})
    state = weights.new_state()
    assert dtypes(state.params) == {"bfloat16"} and dtypes(state.ema) == {"float32"}
    moments = [a for a in jax.tree.leaves(state.opt_state) if a.ndim]
    assert dtypes(moments) == {"float32"}
    both = described(edits | {"optimizer.state_dtype": "bfloat16"}).new_state()
    moments = [a for a in jax.tree.leaves(both.opt_state) if a.ndim]
    assert dtypes(moments) == {"bfloat16"} and both.ema is not None
    wide = described({"lora.rank": lora}).new_state().params
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), wide)
    assert same_bits(state.params, rounded)


@pytest.mark.slow
def test_an_update_of_narrow_weights_follows_the_wide_one():
    """Same gradient, same moments: the difference is one rounding of the weights."""
    edits = {"optimizer.lr": 1e-2, "optimizer.ema_decay": 0.0}
    narrow = {"optimizer.master": "bfloat16", "optimizer.state_dtype": "bfloat16"}
    program = tiny_program(edits | narrow)
    state = program.new_state()
    params = perturbed(state.params)
    tx = make_optimizer(program.config.optimizer, 10)
    state = init_state(params, tx, 0.0)
    before = jax.tree.map(lambda a: np.asarray(a, np.float32), params)
    wide = tiny_program(edits)
    wide_tx = make_optimizer(wide.config.optimizer, 10)
    begin = init_state(jax.tree.map(jnp.asarray, before), wide_tx, 0.0)
    prompts = draw_prompts(program.prompts, 0, 0, 2, 4)
    chunks = tuple(chunks_with_trajectories(program, state, prompts))
    exact, _ = wide.update(begin, wide.frozen, wide.reference, chunks)
    state, metrics = program.update(state, program.frozen, program.reference, chunks)
    assert dtypes(state.params) == {"bfloat16"} and np.isfinite(metrics["grad_norm"])

    def step(params) -> np.ndarray:
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True)
        return np.concatenate(
            [(np.asarray(a, np.float32) - b).ravel() for a, b in pairs]
        )

    found, wanted = step(state.params), step(exact.params)
    assert 5e-3 < np.abs(wanted).mean() < 2e-2  # Adam's first step is the rate
    moved = wanted != 0
    assert moved.mean() > 0.5
    assert np.corrcoef(found[moved], wanted[moved])[0, 1] > 0.9


@pytest.mark.parametrize(
    ("layout", "axes"),
    [
        ("train", {"data", "fsdp", "tensor", "context"}),
        ("tensor", {"tensor"}),
        ("replicated", set()),
    ],
)
def test_a_copy_is_split_over_what_its_layout_says_whatever_the_table(layout, axes):
    edits = {"sharding.embed": ("data", "fsdp"), "sharding.layers": ("context",)}
    edits |= {"rollout.layout": layout, "rollout.dtype": "bfloat16"}
    rules = rollout_rules(configured(edits))
    assert rules is not None
    assert {a for name in rules if name != "batch" for a in rules[name]} == axes
