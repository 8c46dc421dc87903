"""Samples that are NaN or infinite have no picture, and so no score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import perturbed_state, tiny_program

from ddrl_jax.collect import collect
from ddrl_jax.draws import draw_chunks, prompts_of
from ddrl_jax.errors import UserError
from ddrl_jax.evaluate import Evaluation
from ddrl_jax.finite import finite_rows, leave_out, stand_ins
from ddrl_jax.interfaces import Scores
from ddrl_jax.metrics import Timer
from ddrl_jax.objectives.advantages import PerPromptTracker
from ddrl_jax.preemption import Preemption
from ddrl_jax.rewards.pool import RewardPool
from ddrl_jax.sample import _draw
from ddrl_jax.train import update_epoch

FINITE = np.array([True, False, True, False])


def test_one_number_is_enough():
    x0 = np.ones((4, 3, 2), np.float32)
    x0[1, 2, 0], x0[3, 0, 1] = np.nan, -np.inf
    np.testing.assert_array_equal(finite_rows(jnp.asarray(x0)), FINITE)


def test_scores_are_taken_away_or_refused():
    scores = Scores(
        {"r": np.arange(4, dtype=np.float32)}, np.array([True, True, False, True])
    )
    found = leave_out(scores, FINITE, "mask")
    np.testing.assert_array_equal(found.values["r"], [0, np.nan, 2, np.nan])
    assert found.values["r"].dtype == np.float32
    assert found.valid.tolist() == [True, False, False, False]
    with pytest.raises(UserError, match="NaN or infinite") as error:
        leave_out(scores, FINITE, "error")
    assert error.value.got == "2 of 4: 1, 3"
    assert leave_out(scores, np.ones(4, bool), "error") is scores


@pytest.fixture(scope="module")
def run():
    """A program whose rollouts are broken for the second sample of each chunk."""
    program = tiny_program({"rewards.weights": {"brightness": 1.0}})

    def rollout(*inputs):
        found = program.rollout(*inputs)
        kept = found.trajectory
        kept = kept._replace(
            states=kept.states.at[2:, 1].set(jnp.nan),
            log_prob=kept.log_prob.at[1:, 1].set(jnp.nan),
        )
        return found._replace(x0=found.x0.at[1].set(jnp.nan), trajectory=kept)

    return program._replace(rollout=rollout), perturbed_state(program)


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def epoch(run, on_failure):
    program, state = run
    config = program.config.copy_and_resolve_references()
    config.rewards.on_failure = on_failure
    tracker = PerPromptTracker.init(len(program.prompts), 16)
    with RewardPool({"brightness": brightness}, 2, 60.0, on_failure) as pool:
        program = program._replace(config=config)
        return collect(program, state, 0, pool, tracker, Timer(), Preemption())


def test_an_epoch_stops_or_counts_them(run):
    with pytest.raises(UserError) as error:
        epoch(run, "error")
    assert error.value.got == "2 of 8: 1, 5"
    found = epoch(run, "mask")
    assert found.metrics["reward/not_finite"] == 2.0
    assert found.metrics["reward/brightness/missing"] == 2.0
    assert found.metrics["reward/valid"] == 0.75
    advantages = np.concatenate([c.advantages for c in found.chunks])
    np.testing.assert_array_equal(advantages[[1, 5]], 0.0)
    assert np.count_nonzero(advantages) == 6


def test_where_no_sample_is_finite_the_judges_are_not_blamed(run):
    program, state = run

    def rollout(*inputs):
        found = program.rollout(*inputs)
        return found._replace(x0=jnp.full_like(found.x0, jnp.nan))

    with pytest.raises(UserError, match="NaN or infinite") as error:
        epoch((program._replace(rollout=rollout), state), "mask")
    assert error.value.got.startswith("8 of 8: 0, 1")


def test_the_stand_in_of_a_sample_has_its_place():
    finite = np.array([True, False, False, True] + [True, True, False, False])
    assert stand_ins(finite, 4).tolist() == [0, 5, 0, 3, 4, 5, 0, 3]


def test_the_others_are_trained_as_if_it_had_no_score(run):
    """The update of an epoch with broken samples against the one of the whole rollouts
    where the same samples have an advantage of 0."""
    program, state = run
    broken, whole = (
        epoch(run, "mask"),
        draw_chunks(program, prompts_of(program, 0), 0, 0),
    )
    intact = tiny_program({"rewards.weights": {"brightness": 1.0}})
    kept = broken.chunks[0].trajectory.index
    chunks = []
    for chunk, other in zip(whole, broken.chunks, strict=True):
        found = intact.rollout(
            state.params, program.frozen, chunk.keys, chunk.cond, kept
        ).trajectory
        chunk = chunk._replace(trajectory=found, old_log_prob=found.log_prob)
        chunks.append(chunk._replace(advantages=other.advantages))
    copy = lambda: jax.tree.map(jnp.copy, state)  # noqa: E731
    one, told = update_epoch(program, copy(), broken, 0)
    two, wanted = update_epoch(program, copy(), broken._replace(chunks=chunks), 0)
    assert told["bad_updates"] == 0 and told["policy/ratio_max_deviation"] == 0
    assert told["policy/loss"] == pytest.approx(wanted["policy/loss"], abs=1e-7)
    for a, b, start in zip(*map(jax.tree.leaves, (one, two, state)), strict=True):
        if jnp.ndim(a) > 1:
            moved = np.abs(np.asarray(b) - np.asarray(start)).max()
            np.testing.assert_allclose(a, b, atol=1e-3 * moved + 1e-9)


def test_the_prompt_of_a_stand_in_stays_with_it_in_every_pass(run):
    """The KL of a later pass is along the stand-in's transitions, so of its prompt."""
    program, state = run
    config = program.config.copy_and_resolve_references()
    config.train.inner_epochs = 3
    program = program._replace(config=config)
    broken, passes = epoch((program, state), "mask"), []

    def update(state, frozen, reference, chunks):
        passes.extend(chunks)
        return state, {"bad_leaf": np.int32(-1), "bad_updates": np.int32(0)}

    update_epoch(program._replace(update=update), state, broken, 0)
    prompt_of = {}
    for number, chunk in enumerate(passes):
        states, told = chunk.trajectory.states, np.asarray(chunk.cond.emb)
        rows = [np.asarray(states[:, i]).tobytes() for i in range(4)]
        if number < 2:  # the first pass: as collected
            prompt_of |= {row: told[i].tobytes() for i, row in enumerate(rows)}
        assert [prompt_of[row] for row in rows] == [t.tobytes() for t in told], number
    assert len(passes) == 6 and len(set(prompt_of.values())) == 2


def test_a_policy_that_is_nan_is_not_evaluated_and_writes_no_data():
    program = tiny_program({"evaluate.pictures": 0})
    state = program.new_state()
    nan = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), state.average)
    broken = state._replace(params=nan, ema=nan)
    evaluation = Evaluation(program, {"brightness": brightness})
    with pytest.raises(UserError, match="NaN or infinite"):
        evaluation.judge(broken)
    program.config.rewards.on_failure = "mask"
    values, _ = Evaluation(program, {"brightness": brightness}).judge(broken)
    found = {name: n for name, n in values.items() if "brightness" in name}
    assert found == {"heldout/brightness/valid": 0.0}
    assert not [name for name in values if "diversity" in name]
    with pytest.raises(UserError, match="NaN or infinite"):
        list(_draw(program, broken))
