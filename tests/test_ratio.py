"""On policy the ratio is exactly 1: the log-probs of the rollout, of the replay and of
the update are the same bits, for every sampler, dtype and guidance.
"""

import numpy as np
import pytest
from tiny_runs import (
    assert_the_network_speaks,
    chunks_with_trajectories,
    flat_source,
    perturbed,
    perturbed_state,
    tiny_program,
)

from configs import quickstart
from ddrl_jax.collect import Collected, collect
from ddrl_jax.data.prompts import draw_prompts
from ddrl_jax.diffusion.kernels import KERNELS
from ddrl_jax.draws import draw_chunks
from ddrl_jax.errors import UserError
from ddrl_jax.metrics import Timer
from ddrl_jax.objectives.advantages import PerPromptTracker
from ddrl_jax.preemption import Preemption
from ddrl_jax.program import build
from ddrl_jax.rewards.pool import RewardPool
from ddrl_jax.self_test import check_ratio, ratio_deviations
from ddrl_jax.train import update_epoch

pytestmark = pytest.mark.optimised

SIZE = 32  # pixels, as shipped: how a program rounds depends on its shapes
SLOW = [pytest.mark.slow]
FAST = ("flow_grpo-float32-3.0", "flow_grpo-bfloat16-3.0", "ddim-float32-3.0")
CASES = [
    pytest.param(
        kernel, dtype, scale, id=name, marks=[pytest.mark.slow][name in FAST :]
    )
    for kernel in KERNELS
    for dtype in ("float32", "bfloat16")
    for scale in (1.0, 3.0)
    for name in [f"{kernel}-{dtype}-{scale}"]
]


def make(kernel, dtype="float32", scale=1.0, source=None, **edits):
    row = {
        "sampler.kernel": kernel,
        "sampler.guidance_scale": scale,
        "model.dtype": dtype,
        "model.image_size": SIZE,
        "train.minibatches": 1,
    }
    program = tiny_program(row | edits, source)
    if program.config.lora.rank:  # the base's zero output layer is not trained here
        spoken = perturbed(program.frozen, 0.05)
        reference = (None, spoken) if program.reference else None
        program = program._replace(frozen=spoken, reference=reference)
    return program, perturbed_state(program)


def prompts_of(program):
    c = program.config.prompts
    return draw_prompts(program.prompts, 0, 0, c.per_epoch, c.group_size)


def assert_exactly_one(program, state):
    """Three programs - rollout, replay, gradient - give one set of bits."""
    assert_the_network_speaks(program, state)
    steps = int(program.kernel.stochastic.sum())
    found = ratio_deviations(program, state)
    assert set(found) == {"replay", "update"}  # without gradients and with them
    for where, deviation in found.items():
        assert deviation.shape == (steps,)
        np.testing.assert_array_equal(deviation, 0.0, err_msg=where)
    chunks = chunks_with_trajectories(program, state, prompts_of(program))
    stored = [chunk.old_log_prob for chunk in chunks]
    assert np.isfinite(stored).all() and np.unique(stored).size > steps
    for chunk, kept in zip(chunks, stored, strict=True):
        replayed = program.recompute(state.params, program.frozen, chunk)
        np.testing.assert_array_equal(replayed, kept)
    return chunks


def assert_exactly_one_in_the_update(program, state, chunks):
    """The update itself, with everything else it computes, gives them too."""
    _, metrics = program.update(state, program.frozen, program.reference, tuple(chunks))
    # 0.5 mean (difference of log-probs)^2: 0 only if every one of them is equal.
    assert float(metrics["policy/approx_kl"]) == 0.0
    assert float(metrics["policy/ratio_max_deviation"]) == 0.0
    assert np.isfinite(float(metrics["grad_norm"])) and metrics["grad_norm"] > 0


@pytest.mark.parametrize(("kernel", "dtype", "scale"), CASES)
def test_rollout_replay_and_gradient_agree_to_the_bit(kernel, dtype, scale):
    program, state = make(kernel, dtype, scale)
    chunks = assert_exactly_one(program, state)
    if (dtype, scale) == ("bfloat16", 3.0):  # the whole update of each kernel once
        assert_exactly_one_in_the_update(program, state, chunks)


KL_AND_DATA = {
    "policy.kl_weight": 0.1,
    "data_term.weight": 0.5,
    "data_term.every_step": True,
}
OTHER_TERMS = {
    "kl and data": ("float32", KL_AND_DATA),
    "kl and data in half": ("bfloat16", KL_AND_DATA),
    "lora": ("bfloat16", {"lora.rank": 2, "policy.kl_weight": 0.1}),
    "squared error": (
        "float32",
        {
            "sampler.kernel": "edm",
            "policy.log_prob": "squared_error",
            "policy.reduction": "sum",
            "data_term.weight": 0.5,
            "data_term.levels": "rollout",
        },
    ),
    # Two of four steps: states are kept in pairs, those of the ODE in between are not.
    "a window": ("float32", {"sampler.window": (1, 3), "policy.kl_weight": 0.1}),
    "a window of a lora": ("bfloat16", {"sampler.window": (0, 2), "lora.rank": 2}),
    "a window of dance": (
        "bfloat16",
        {"sampler.kernel": "dance", "sampler.window": (1, 3), "policy.weight": 0.5},
    ),
    "a window of cps": (
        "float32",
        {"sampler.kernel": "cps", "sampler.window": (2, 4), "data_term.weight": 0.5},
    ),
    "recomputed blocks": ("bfloat16", {"model.remat": "full"}),
    "two blocks of other widths": (
        "float32",
        {
            "model.depth": 2,
            "model.width": 24,
            "model.heads": 3,
            "policy.term": "reinforce",
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHER_TERMS)
def test_no_other_term_of_the_update_changes_a_bit(case):
    dtype, edits = OTHER_TERMS[case]
    program, state = make("flow_grpo", dtype, 3.0, flat_source(SIZE), **edits)
    chunks = assert_exactly_one(program, state)
    assert_exactly_one_in_the_update(program, state, chunks)


SOME_STEPS = {
    "each sample its own": {"sampler.kernel": "edm", "policy.per_sample_steps": True},
    "in a window": {"sampler.window": (1, 3)},
    "of a lora": {"sampler.kernel": "cps", "lora.rank": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SOME_STEPS)
def test_epochs_that_train_some_of_the_steps_are_on_policy(case):
    """What metrics.jsonl says, of the first epoch and of one after an update."""
    edits = SOME_STEPS[case] | {"policy.train_steps": 1, "train.inner_epochs": 2}
    edits |= {"rewards.weights": {"brightness": 1.0}, "optimizer.lr": 1e-3}
    program, state = make("flow_grpo", "bfloat16", 3.0, **edits)
    assert_the_network_speaks(program, state)
    tracker = PerPromptTracker.init(len(program.prompts), 16)
    judge = {"brightness": lambda images, prompts: images.mean((1, 2, 3))}
    moved = []
    with RewardPool(judge, 2, 60.0, "error") as pool:
        for epoch in range(2):
            rest = (pool, tracker, Timer(), Preemption())
            batch = collect(program, state, epoch, *rest)
            assert batch is not None
            assert len(batch.chunks[0].trajectory.log_prob) == 1  # of three or two
            state, values = update_epoch(program, state, batch, epoch)
            assert values["policy/ratio_max_deviation"] == 0.0
            moved.append(values["policy/approx_kl"])  # of the second pass
    assert min(moved) > 0.0


# ---- the self-test at start-up


@pytest.fixture(scope="module")
def small():
    return make("flow_grpo", **{"model.image_size": 8, "sampler.steps": 5})


def with_recompute(program, change):
    """The program with other log-probs in the replay."""
    return program._replace(recompute=lambda *a: change(program.recompute(*a)))


def test_self_test_passes_at_tolerance_0(small):
    check_ratio(*small)


def test_self_test_fetches_the_data_of_the_one_chunk_it_uses():
    asked = []

    def fetch(records):
        asked.append(len(records))
        return records

    def reached(*_):
        raise ConnectionAbortedError("the chunk is drawn")

    source = flat_source()._replace(fetch=fetch)
    program = tiny_program({"data_term.weight": 0.5}, source)
    assert program.config.prompts.per_epoch * program.config.prompts.group_size == 8
    state = program.new_state()
    with pytest.raises(ConnectionAbortedError):
        ratio_deviations(program._replace(rollout=reached), state)
    assert asked == [4]


def test_self_test_refuses_a_replay_with_other_weights(small):
    program, state = small
    moved = perturbed(state.params, 0.01, seed=9)
    other = program._replace(
        recompute=lambda _, frozen, chunk: program.recompute(moved, frozen, chunk)
    )
    with pytest.raises(UserError, match=r"step \d of flow_grpo.*\(replay\)"):
        check_ratio(other, state)


@pytest.mark.parametrize("broken", [1e-3, np.nan])
def test_self_test_names_the_step(small, broken):
    program, state = small
    other = with_recompute(program, lambda lp: lp.at[2, 1].add(broken))
    with pytest.raises(UserError) as caught:
        check_ratio(other, state)
    assert "step 2 of flow_grpo" in str(caught.value)
    assert "config.policy.ratio_tolerance" in str(caught.value)


def test_tolerance_is_what_the_config_says(small):
    program, state = small
    other = with_recompute(program, lambda lp: lp.at[2, 1].add(1e-3))
    config = program.config.copy_and_resolve_references()
    config.policy.ratio_tolerance = 1e-2
    check_ratio(other._replace(config=config), state)
    config.policy.ratio_tolerance = 1e-4
    with pytest.raises(UserError, match="0.0001"):
        check_ratio(other._replace(config=config), state)


# ---- the first update of every epoch


def told(program, deviations, tolerance=0.0, metrics=None):
    """What an epoch of such updates says of itself, without computing any."""
    config = program.config.copy_and_resolve_references()
    config.policy.ratio_tolerance = tolerance
    config.train.update(minibatches=2, inner_epochs=1)
    found = iter(deviations)

    def update(state, *_):
        skipped = {"bad_leaf": np.int32(-1), "bad_updates": np.int32(0)}
        return state, skipped | {"policy/ratio_max_deviation": np.float32(next(found))}

    chunks = draw_chunks(program, prompts_of(program), 0, 0)
    tracker = PerPromptTracker.init(4, 3)
    batch = Collected(prompts_of(program), chunks, tracker, metrics or {})
    program = program._replace(config=config, update=update)
    return update_epoch(program, program.new_state(), batch, 6)[1]


def test_an_epoch_that_was_not_on_policy_ends_the_run(small):
    program, _ = small
    assert told(program, (0.0, 0.5))["policy/ratio_max_deviation"] == 0.0
    with pytest.raises(UserError, match="epoch 7: the policy ratio was not 1") as error:
        told(program, (2e-3, 0.5))
    assert "0.002" in error.value.got and "ratio_tolerance" in error.value.wanted
    with pytest.raises(UserError, match="epoch 7"):
        told(program, (2e-3, 0.5), tolerance=1e-3)
    told(program, (2e-3, 0.5), tolerance=1e-2)
    told(program, (np.nan, 0.5))  # was skipped, which is counted
    told(program, (2e-3, 0.5), metrics={"reward/not_finite": 1.0})


@pytest.mark.slow
def test_the_quickstart_as_shipped_is_on_policy():
    """Full size: sums compile differently in a network of another width."""
    config = quickstart.get_config()
    config.mesh.data = 1  # of the eight of the tests
    program = build(config)
    check_ratio(program, program.new_state())
