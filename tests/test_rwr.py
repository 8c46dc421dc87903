"""Reward-weighted regression: rounds of collecting and fitting in the one program."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edited_config import configured, refused
from linear_runs import EMB, PARAMS, PICTURES, batch, objective, params, updated
from tiny_runs import TINY, flat_source, perturbed_state, tiny_program

from ddrl_jax.collect import collect
from ddrl_jax.draws import draw_chunks, draw_records
from ddrl_jax.interfaces import Prompts, Scores
from ddrl_jax.learner import make_advantages
from ddrl_jax.metrics import Timer
from ddrl_jax.objectives.advantages import PerPromptTracker
from ddrl_jax.preemption import Preemption
from ddrl_jax.rewards.pool import RewardPool
from ddrl_jax.rollout import initial_noise
from ddrl_jax.terms import FIT_STREAM, fit_loss
from ddrl_jax.train import train, update_epoch

RWR = {"policy.term": "rwr", "advantages.kind": "batch"}
REWARDS = np.asarray([1.0, 2.0, 3.0, 9.0, 0.5, 0.25, 4.0, 8.0], np.float32)
WEIGHTS = np.asarray([0.5, 0.0, 2.0, 1.5, 1.0, 0.25, 2.75, 0.0], np.float32)


def weights(valid=None, **edits):
    edits = {k.replace("__", "."): v for k, v in edits.items()}
    config = configured(
        RWR | {"prompts.per_epoch": 2, "rewards.weights": {"r": 1.0}} | edits
    )
    valid = np.ones(8, bool) if valid is None else valid
    group = np.repeat([0, 1], 4).astype(np.int32)
    found, _ = jax.jit(make_advantages(config))(
        {"r": REWARDS, "s": REWARDS[::-1]},
        valid,
        group,
        group,
        PerPromptTracker.init(2, 4),
    )
    return np.asarray(found)


def softmax(x):
    e = np.exp(x - x.max())
    return len(x) * e / e.sum()


def test_weights_of_the_round_and_of_each_prompt():
    want = softmax(0.2 * REWARDS.astype(np.float64))
    np.testing.assert_allclose(weights(), want, rtol=1e-5)
    each = np.concatenate([softmax(0.2 * REWARDS[:4]), softmax(0.2 * REWARDS[4:])])
    np.testing.assert_allclose(weights(advantages__kind="group"), each, rtol=1e-5)


def test_weights_are_of_the_weighted_sum_of_the_rewards():
    total = 3.0 * REWARDS.astype(np.float64) - 0.5 * REWARDS[::-1]
    edits = {"rewards__weights": {"r": 3.0, "s": -0.5}}
    np.testing.assert_allclose(weights(**edits), softmax(0.2 * total), rtol=1e-5)
    best = weights(policy__term="sparse_rwr", policy__rwr_percentile=0.75, **edits)
    np.testing.assert_array_equal(np.flatnonzero(best), np.sort(np.argsort(total)[-2:]))


def test_the_sparse_form_keeps_the_best_with_equal_weight():
    found = weights(policy__term="sparse_rwr", policy__rwr_percentile=0.75)
    np.testing.assert_allclose(found, [0, 0, 0, 4, 0, 0, 0, 4])


def test_a_sample_without_a_reward_weighs_nothing():
    valid = np.arange(8) != 3
    found = weights(valid)
    assert found[3] == 0
    np.testing.assert_allclose(
        found[valid], softmax(0.2 * REWARDS[valid]) * 8 / 7, rtol=1e-5
    )
    found = weights(valid, policy__rwr_inverse_temperature=0.0)
    np.testing.assert_allclose(found, valid * 8 / 7, rtol=1e-6)


def test_a_sample_without_a_reward_has_no_rank_in_the_sparse_form():
    """Four are left, of which the better half is kept, whatever is missing."""
    valid = np.asarray([1, 1, 0, 0, 1, 0, 1, 0], bool)  # 1, 2, 0.5 and 4
    found = weights(valid, policy__term="sparse_rwr", policy__rwr_percentile=0.5)
    np.testing.assert_allclose(found, [0, 4, 0, 0, 0, 0, 4, 0])
    edits = {"policy__term": "sparse_rwr", "policy__rwr_percentile": 0.9}
    found = weights(np.arange(8) < 1, **edits)
    np.testing.assert_allclose(found, [8, 0, 0, 0, 0, 0, 0, 0])


def test_the_loss_is_the_weighted_denoising_loss_on_the_samples():
    chunk = batch()._replace(
        x0=jnp.asarray(PICTURES), advantages=jnp.asarray(WEIGHTS), trajectory=None
    )
    loss = objective({"policy.term": "rwr", "policy.weight": 2.0})
    item = (chunk.data_keys, chunk.x0, chunk.advantages, chunk.cond)
    total, metrics = fit_loss(loss, params(), {}, item)
    split = lambda k: jax.random.split(jax.random.fold_in(k, FIT_STREAM))  # noqa: E731
    draw = jax.vmap(split)(chunk.data_keys)
    t = np.asarray(jax.vmap(jax.random.uniform)(draw[:, 0]), np.float64)[:, None, None]
    eps = np.asarray(initial_noise(draw[:, 1], PICTURES.shape[1:]), np.float64)
    z = (1 - t) * PICTURES + t * eps
    velocity = PARAMS["w"] * z + t * EMB[:, :, None] * PARAMS["b"]
    each = np.mean((velocity - (eps - PICTURES)) ** 2, axis=(1, 2))
    np.testing.assert_allclose(metrics["loss"], np.mean(WEIGHTS * each), rtol=1e-5)
    np.testing.assert_allclose(total, 2 * metrics["loss"], rtol=1e-6)


def test_only_weighted_samples_move_the_weights():
    start = batch()._replace(x0=jnp.asarray(PICTURES), trajectory=None)
    loss = objective({"policy.term": "rwr"})

    def moved(advantages, x0):
        chunk = start._replace(advantages=jnp.asarray(advantages), x0=jnp.asarray(x0))
        return updated(loss, (chunk,))[0].params["w"]

    other = PICTURES.copy()
    other[1] += 5.0  # a sample of weight 0
    assert moved(WEIGHTS, PICTURES) == moved(WEIGHTS, other)
    other[0] += 5.0
    assert moved(WEIGHTS, PICTURES) != moved(WEIGHTS, other)


class Judged(RewardPool):
    """A pool whose scores are already known."""

    def __init__(self, values):
        self.values, self.rewards = np.asarray(values, np.float32), {}

    def submit(self, images, prompts):
        return len(prompts)

    def collect(self, handles, numbers=None):
        return Scores({"compressibility": self.values}, np.isfinite(self.values))


def collected(program, state, values):
    """(what is fitted, all samples with their weights) of the first epoch."""
    tracker, pool = PerPromptTracker.init(4, 16), Judged(values)
    found = collect(program, state, 0, pool, tracker, Timer(), Preemption())
    scores, prompts = pool.collect([]), found.prompts
    every, _ = program.advantages(
        scores.values, scores.valid, prompts.group, prompts.index, tracker
    )
    steps = jnp.zeros((0, 4), jnp.int32)
    chunks = [
        chunk._replace(
            x0=program.rollout(
                state.params, program.frozen, chunk.keys, chunk.cond, steps
            ).x0,
            advantages=part,
        )
        for chunk, part in zip(
            draw_chunks(program, prompts, 0, 0), jnp.split(every, 4), strict=True
        )
    ]
    return found, found._replace(chunks=chunks, samples=None)


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_the_sparse_form_fits_the_kept_samples_alone(kind):
    """A quarter of the work, and the update of all samples with their weights."""
    program = tiny_program(
        {
            "policy.term": "sparse_rwr",
            "policy.rwr_percentile": 0.75 if kind == "batch" else 0.7,
            "advantages.kind": kind,
            "prompts.per_epoch": 4,
            "train.inner_epochs": 2,
            "train.minibatches": 1,
            "optimizer.lr": 1e-2,
        }
    )
    state = perturbed_state(program)
    values = np.random.default_rng(1).permutation(16).astype(np.float32)
    values[5] = np.nan  # without a reward: weighs nothing
    kept, every = collected(program, state, values)
    assert len(kept.chunks) == 1 and len(every.chunks) == 4
    valid = np.where(np.isnan(values), -1, values).reshape(
        1 if kind == "batch" else 4, -1
    )
    size = valid.shape[1]
    best = (
        np.argsort(-valid, axis=1)[:, : 4 * size // 16]
        + size * np.arange(len(valid))[:, None]
    )
    assert sorted(kept.samples) == sorted(best.reshape(-1))
    start = jax.device_get(state.params)
    first, told = update_epoch(program, jax.tree.map(jnp.copy, state), kept, 0)
    second, wanted = update_epoch(program, state, every, 0)
    assert told["policy/loss"] == pytest.approx(wanted["policy/loss"], rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        first.params,
        second.params,
    )
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), start, first.params)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_minibatches_share_the_best_and_whole_chunks_are_filled_up():
    program = tiny_program(
        {
            "policy.term": "sparse_rwr",
            "policy.rwr_percentile": 0.6,  # keeps 7 of 16: two chunks of four
            "advantages.kind": "batch",
            "prompts.per_epoch": 4,
            "train.minibatches": 2,
        }
    )
    kept, _ = collected(program, perturbed_state(program), np.arange(16.0))
    wanted = [[9, 11, 13, 15], [10, 12, 14, 0]]
    np.testing.assert_array_equal(kept.samples.reshape(2, 4), wanted)
    weights = np.concatenate([c.advantages for c in kept.chunks])
    np.testing.assert_allclose(weights, [8 / 7] * 7 + [0], rtol=1e-6)


@pytest.mark.slow
def test_the_mesh_and_the_microbatch_do_not_change_what_the_sparse_form_fits():
    """Chunks of 1 and of 8: one filler in 8, or 9 in 16; some rewards are the same."""
    edits = {
        "data_term.weight": 0.5,
        "policy.term": "sparse_rwr",
        "policy.rwr_percentile": 0.6,  # keeps 7, or with their like 8
        "advantages.kind": "batch",
        "prompts.per_epoch": 4,
        "train.minibatches": 2,
        "train.inner_epochs": 3,
        "optimizer.lr": 1e-2,
        "optimizer.eps": 1e-3,  # a gradient of nearly 0 has no direction
    }
    values = np.random.default_rng(2).permutation(16) // 2
    found = []
    for devices, microbatch in ((1, 1), (2, 4)):
        mesh = {"mesh.data": devices, "train.microbatch": microbatch}
        program = tiny_program(edits | mesh, flat_source())
        state, pool = perturbed_state(program), Judged(values)
        tracker = PerPromptTracker.init(4, 16)
        kept = collect(program, state, 0, pool, tracker, Timer(), Preemption())
        state, told = update_epoch(program, state, kept, 0)
        found.append((len(kept.samples), told, jax.device_get(state.params)))
    (size, told, params), (other, wanted, expected) = found
    assert (size, other) == (8, 16)
    for key in wanted:
        assert told[key] == pytest.approx(wanted[key], rel=1e-4)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)  # noqa: E731
    jax.tree.map(close, params, expected)


@pytest.mark.parametrize("term", ["rwr", "sparse_rwr"])
def test_rounds_run_from_the_first_sample_to_the_checkpoint(tmp_path, term):
    edits = {
        "policy.term": term,
        "advantages.kind": "batch",
        "train.inner_epochs": 2,
        "train.epochs": 2,
        "optimizer.fresh": True,
        "evaluate.solver": "ddim",
        "model.image_size": 32,
        "evaluate.data_samples": 0,
        "sampler.guidance_scale": 2.0,
    }
    train(configured(TINY | edits), str(tmp_path / "run"))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert all(np.isfinite(r["policy/loss"]) for r in rows[1:])
    assert "policy/ratio_max_deviation" not in rows[1]
    assert (tmp_path / "run" / "report.html").is_file()


def test_fresh_moments_and_schedule():
    program = tiny_program()
    state = program.new_state()
    moved = state._replace(
        opt_state=jax.tree.map(lambda a: a + 1, state.opt_state),
        params=jax.tree.map(lambda a: a + 1, state.params),
    )
    kept = jax.device_get(moved.params)
    found = program.refresh(moved)
    start = jax.device_get(program.new_state().opt_state)
    jax.tree.map(np.testing.assert_array_equal, found.opt_state, start)
    jax.tree.map(np.testing.assert_array_equal, found.params, kept)


@pytest.mark.parametrize(
    "edits, word",
    [
        ({"policy.kl_weight": 0.1}, "transition"),
        ({"policy.train_on": (1,)}, "transition"),
        ({"policy.beta": 0.1}, "policy.beta 0.1"),
        ({"policy.transform": "neg_exp"}, "inverse_temperature"),
        ({"policy.old_log_prob": "recompute"}, 'old_log_prob "recompute"'),
        ({"advantages.kind": "tracker"}, "tracker"),
        ({"data_term.weight": 1.0, "data_term.levels": "rollout"}, "noise levels"),
    ],
)
def test_what_rwr_can_not_be_combined_with(edits, word):
    assert word in str(refused(RWR | edits))


def test_data_under_its_own_captions_with_records_held_out():
    edits = {
        "data.source": "emoji",
        "data_term.weight": 0.5,
        "data_term.captions": "own",
        "data.heldout": 3,
    }
    captions = ("cat", "dog", "dog", "red apple", "cat", "dog", "cat")
    program = tiny_program(edits, flat_source(captions=captions))
    index = np.zeros(64, np.int32)
    records, rows = draw_records(program, index, 5)
    assert set(records) == {0, 1, 2, 3}
    assert [captions[r] for r in records] == [
        ("cat", "dog", "red apple")[i] for i in rows
    ]
    again, _ = draw_records(program, index, 5)
    other, _ = draw_records(program, index, 6)
    np.testing.assert_array_equal(records, again)
    assert (records != other).any()
    assert set(draw_records(program, index, 5, heldout=True)[0]) == {4, 5, 6}


def test_records_that_are_fetched_reach_the_loss_as_they_are():
    pages = np.arange(7, dtype=np.float32)
    source = flat_source()._replace(fetch=lambda records: {"page": pages[records]})
    edits = {"data.source": "emoji", "data_term.weight": 0.5}
    program = tiny_program(edits, source)
    prompts = Prompts(("dog",) * 8, np.ones(8, np.int32), np.zeros(8, np.int32))
    chunks = draw_chunks(program, prompts, 0, 0)
    for chunk in chunks:
        np.testing.assert_array_equal(chunk.records["page"], np.ones(4))


def test_nothing_is_fetched_that_no_term_reads():
    def fetch(records):
        raise AssertionError(f"read {records}")

    source = flat_source()._replace(fetch=fetch)
    program = tiny_program({"data.source": "emoji"}, source)
    prompts = Prompts(("dog",) * 8, np.ones(8, np.int32), np.zeros(8, np.int32))
    assert [c.records for c in draw_chunks(program, prompts, 0, 0)] == [None, None]
