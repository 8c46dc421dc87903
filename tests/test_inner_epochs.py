"""Passes over an epoch's samples: each its minibatches, the same on any mesh."""

import gc

import jax
import numpy as np
import pytest
from edited_config import configured
from tiny_runs import (
    chunks_with_trajectories,
    flat_source,
    perturbed_state,
    same_bits,
    tiny_program,
)

from ddrl_jax.collect import Collected, collect
from ddrl_jax.draws import data_weights, draw_chunks, prompts_of, sample_order
from ddrl_jax.metrics import Timer
from ddrl_jax.objectives.advantages import PerPromptTracker
from ddrl_jax.preemption import Preemption
from ddrl_jax.rewards.pool import RewardPool
from ddrl_jax.sharding import (
    AXES,
    fill_rows,
    make_mesh,
    place_batch,
    take_rows,
    to_host,
)
from ddrl_jax.train import update_epoch


def test_the_first_pass_keeps_the_samples_and_each_later_one_has_its_order():
    config = configured({"train.minibatches": 2, "train.inner_epochs": 3})
    draws = [
        sample_order(config, epoch, inner, 64) for epoch in (0, 1) for inner in range(3)
    ]
    assert all(sorted(order) == [*range(64)] for order in draws)
    np.testing.assert_array_equal(draws[0], np.arange(64))
    np.testing.assert_array_equal(draws[3], np.arange(64))
    assert len({order.tobytes() for order in draws}) == 5
    again = sample_order(config, 1, 2, 64)
    np.testing.assert_array_equal(again, draws[5])


@pytest.mark.parametrize("chunk", [1, 4, 8])
def test_what_fills_up_the_chunks_of_sparse_rwr_stays_and_counts_nothing(chunk):
    config = configured(
        {
            "policy.term": "sparse_rwr",
            "policy.rwr_percentile": 0.6,  # keeps 7 of 16
            "advantages.kind": "batch",
            "train.minibatches": 3,
            "train.inner_epochs": 3,
            "prompts.per_epoch": 4,
            "prompts.group_size": 4,
        }
    )
    size = -(-3 // chunk) * chunk  # of a minibatch
    dealt = [[0, 3, 6], [1, 4], [2, 5]]  # the kept ones by rank
    places = [m * size + i for m, part in enumerate(dealt) for i in range(len(part))]
    rank = dict(zip(places, sum(dealt, []), strict=True))
    orders = [sample_order(config, 0, inner, 3 * size) for inner in range(3)]
    np.testing.assert_array_equal(orders[0], np.arange(3 * size))
    for inner, order in enumerate(orders):
        fillers = np.setdiff1d(np.arange(3 * size), places)
        np.testing.assert_array_equal(order[fillers], fillers)
        taken = [rank[place] for place in order[places]]
        # the same of any chunk: ranks 0 to 6 at the places of ranks 0, 3, 6, 1, ...
        alone = sample_order(config, 0, inner, 9)
        assert taken == [{0: 0, 1: 3, 2: 6, 3: 1, 4: 4, 6: 2, 7: 5}[i]
                         for i in alone[[0, 1, 2, 3, 4, 6, 7]]]  # fmt: skip
        assert sorted(taken) == [*range(7)]
    assert orders[1].tolist() != orders[2].tolist()
    weights = data_weights(config, 3 * size).reshape(3, size)
    np.testing.assert_allclose(weights.mean(axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal((weights > 0).sum(axis=1), [3, 2, 2])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (8, 1, 1, 1), (2, 2, 2, 1)])
def test_rows_change_places_across_batches_and_devices(axis, sizes):
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
    random = np.random.default_rng(0)
    shape = (24, 5, 2) if axis == 0 else (5, 24, 2)
    whole = random.normal(size=shape).astype(np.float32)
    parts = [place_batch(mesh, a, axis) for a in np.split(whole, 3, axis)]
    order = random.permutation(24).astype(np.int32)
    batches = [{"x": part, "no": None} for part in parts]
    found = [take_rows(mesh, batches, rows, axis) for rows in np.split(order, 3)]
    for batch, part in zip(found, parts, strict=True):
        assert batch["no"] is None and batch["x"].sharding == part.sharding
    joined = np.concatenate([to_host(batch["x"]) for batch in found], axis)
    assert joined.tobytes() == whole.take(order, axis).tobytes()


def updates(devices: int):
    """(minibatch of each update, weights after the last) of an epoch of two passes."""
    edits = {
        "mesh.data": devices,
        "train.microbatch": 1,
        "train.minibatches": 2,
        "train.inner_epochs": 2,
        "prompts.group_size": 8,
        "data_term.weight": 0.5,
    }
    program, seen = tiny_program(edits, flat_source()), []
    update = program.update

    def recorded(state, frozen, reference, chunks):
        rows = [
            to_host(
                chunk._replace(
                    keys=jax.random.key_data(chunk.keys),
                    data_keys=jax.random.key_data(chunk.data_keys),
                    trajectory=jax.tree.map(
                        lambda a: a.swapaxes(0, 1), chunk.trajectory
                    ),
                    old_log_prob=chunk.old_log_prob.T,
                )
            )
            for chunk in chunks
        ]
        seen.append(jax.tree.map(lambda *a: np.concatenate(a), *rows))
        return update(state, frozen, reference, chunks)

    program = program._replace(update=recorded)
    state, prompts = perturbed_state(program), prompts_of(program, 0)
    chunks = chunks_with_trajectories(program, state, prompts)
    put = lambda a: place_batch(program.mesh, np.asarray(a))  # noqa: E731
    chunks = [c._replace(advantages=put(c.advantages)) for c in chunks]
    batch = Collected(prompts, chunks, PerPromptTracker.init(4, 3), {})
    state, _ = update_epoch(program, state, batch, 0)
    return seen, to_host(state.params)


@pytest.mark.slow
@pytest.mark.optimised
def test_eight_devices_have_the_minibatches_of_one():
    (alone, after), (found, other) = updates(1), updates(8)
    assert len(alone) == len(found) == 4
    for a, b in zip(alone, found, strict=True):
        assert same_bits(a, b)
    # The passes see the same samples, in other minibatches and with other data.
    sets = [{key.tobytes() for key in minibatch.keys} for minibatch in alone]
    assert sets[0] | sets[1] == sets[2] | sets[3] and len(sets[0] | sets[1]) == 16
    assert sets[2] not in (sets[0], sets[1])
    rollouts = [
        {(m.keys[i].tobytes(), m.trajectory.states[i].tobytes()) for i in range(8)}
        for m in alone
    ]
    assert rollouts[0] | rollouts[1] == rollouts[2] | rollouts[3]
    data = [{key.tobytes() for key in minibatch.data_keys} for minibatch in alone]
    assert not (data[0] | data[1]) & (data[2] | data[3])
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_many_batches_are_read_in_portions(count):
    """Of 40 batches of 12 rows, rows of one, of eight and of twelve."""
    mesh = make_mesh(dict(zip(AXES, (1, 1, 1, 1), strict=True)))
    whole = np.arange(12.0 * count, dtype=np.float32) - 3.0
    whole[0] = -0.0  # every bit comes along
    parts = [place_batch(mesh, a) for a in np.split(whole, count)]
    spread = np.arange(12) * max(len(whole) // 12, 1) % len(whole)
    for rows in (np.arange(12)[::-1], np.zeros(12, int), spread, spread // 5 * 4):
        found = take_rows(mesh, parts, rows)
        assert np.asarray(found).tobytes() == whole[rows].tobytes()


@pytest.mark.parametrize("devices", [1, 8])
def test_reading_rows_needs_no_room_for_all_batches(devices):
    """On several devices each holds one whole batch meanwhile, and no more."""
    mesh = make_mesh(dict(zip(AXES, (devices, 1, 1, 1), strict=True)))
    at_once = 8 if devices == 1 else 1
    part = place_batch(mesh, np.zeros((8, 1000), np.float32))
    rows, numbers = np.arange(8, dtype=np.int32), np.arange(at_once)
    compiled = fill_rows.lower(
        part, (part,) * at_once, rows, numbers, axis=0, place=part.sharding
    ).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2.1 * part.nbytes


def bytes_of(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("term", ["clipped", "rwr"])
def test_a_later_pass_holds_one_minibatch_more(term):
    """Bytes on the device at every update of three passes over 32 samples."""
    edits = {
        "policy.term": term,
        "advantages.kind": "batch",
        "train.microbatch": 2,
        "train.minibatches": 8,
        "train.inner_epochs": 3,
        "prompts.group_size": 16,
        "rewards.weights": {"brightness": 1.0},
    }
    program, held = tiny_program(edits), []
    judge = {"brightness": lambda images, prompts: images.mean((1, 2, 3))}
    tracker, state = PerPromptTracker.init(4, 3), program.new_state()
    with RewardPool(judge, 2, 60.0, "error") as pool:
        batch = collect(program, state, 0, pool, tracker, Timer(), Preemption())
    assert batch is not None and len(batch.chunks) == 16

    live = lambda: sum(array.nbytes for array in jax.live_arrays())  # noqa: E731

    def update(state, frozen, reference, chunks):
        held.append(live())
        return program.update(state, frozen, reference, chunks)

    gc.collect()  # of earlier tests
    begun = live()
    update_epoch(program._replace(update=update), state, batch, 0)
    minibatch, epoch = bytes_of(batch.chunks[:2]), bytes_of(batch.chunks)
    assert len(held) == 24 and epoch == 8 * minibatch
    as_drawn = 0 if term == "rwr" else 8  # updates of a pass that changes no places
    assert all(np.array(held[:as_drawn]) < begun + minibatch / 2)
    more = np.array(held[as_drawn:]) - begun
    assert minibatch <= more.min()
    assert more.max() < 1.6 * minibatch  # the last chunk of the one before, and metrics


def fitted(devices: int, **edits):
    """(prompts, the samples in order, those of each update) of an epoch, on the host.

    Sample i is a page of the one value i and weighs i.
    """
    shape = {
        "policy.term": "rwr",
        "mesh.data": devices,
        "train.microbatch": 1,
        "train.minibatches": 4,
        "train.inner_epochs": 2,
        "prompts.per_epoch": 4,
        "prompts.group_size": 8,
        "advantages.kind": "group",
        "data_term.weight": 0.5,
    }
    program, seen = tiny_program(shape | edits, flat_source()), []
    prompts, size = prompts_of(program, 0), program.chunk

    def judged(number, chunk):
        rows = np.arange(number * size, (number + 1) * size, dtype=np.float32)
        put = lambda a: place_batch(program.mesh, a)  # noqa: E731
        pages = np.broadcast_to(rows[:, None, None, None], (size, 16, 16, 3))
        return chunk._replace(x0=put(np.ascontiguousarray(pages)), advantages=put(rows))

    def joined(chunks):
        data = [
            to_host(
                chunk._replace(
                    keys=jax.random.key_data(chunk.keys),
                    data_keys=jax.random.key_data(chunk.data_keys),
                )
            )
            for chunk in chunks
        ]
        return jax.tree.map(lambda *a: np.concatenate(a), *data)

    def update(state, frozen, reference, chunks):
        seen.append(joined(chunks))
        return state, {"bad_updates": 0, "bad_leaf": -1}

    drawn = draw_chunks(program, prompts, 0, 0)
    chunks = [judged(number, chunk) for number, chunk in enumerate(drawn)]
    batch = Collected(prompts, chunks, PerPromptTracker.init(4, 16), {})
    update_epoch(program._replace(update=update), program.new_state(), batch, 0)
    return prompts, joined(chunks), seen


@pytest.mark.parametrize("devices", [1, 8])
def test_no_minibatch_of_rwr_is_of_one_prompt_alone(devices):
    """Samples come prompt after prompt, and no ratio must be exact in pass 0."""
    prompts, whole, seen = fitted(devices)
    assert len(seen) == 8
    orders = [found.advantages.astype(int) for found in seen]
    for each in (np.concatenate(orders[:4]), np.concatenate(orders[4:])):
        assert sorted(each) == [*range(32)]
    assert all(len(set(prompts.group[order])) > 1 for order in orders)
    for order, found in zip(orders[:4], seen[:4], strict=True):
        wanted = jax.tree.map(lambda a, rows=order: a[rows], whole)
        assert same_bits(found, wanted)  # all that belongs to a sample came along


def test_eight_devices_fit_by_rwr_the_minibatches_of_one():
    assert same_bits(fitted(1)[2], fitted(8)[2])


def test_rwr_with_one_minibatch_has_no_order():
    edits = {"train.minibatches": 1, "train.inner_epochs": 1}
    _, whole, seen = fitted(1, **edits)
    assert len(seen) == 1 and same_bits(seen[0], whole)
