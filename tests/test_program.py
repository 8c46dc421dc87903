"""A program of one narrow block: its keys, its draws, its jitted functions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edited_config import configured
from tiny_runs import (
    TINY,
    WORDS,
    chunks_with_trajectories,
    flat_source,
    perturbed,
    perturbed_state,
    same_bits,
    tiny_program,
)

from ddrl_jax import program as program_module
from ddrl_jax.check_optimizer import total_updates
from ddrl_jax.data.prompts import draw_prompts
from ddrl_jax.diffusion.kernels import make_kernel
from ddrl_jax.draws import draw_chunks, draw_trained_steps
from ddrl_jax.errors import UserError
from ddrl_jax.program import (
    DATA_STREAM,
    build,
)
from ddrl_jax.rewards import retrieval
from ddrl_jax.sources import in_short, make_source

DATA = {"data_term.weight": 0.5}


@pytest.fixture(scope="module")
def program():
    return tiny_program(DATA, flat_source(captions=(*WORDS, *WORDS)))


def draw(program, epoch=0, inner=0, group_size=4):
    prompts = draw_prompts(program.prompts, 0, epoch, 2, group_size)
    return prompts, draw_chunks(program, prompts, epoch, inner)


def raw(keys):
    return np.asarray(jax.random.key_data(keys))


# ---- keys: a function of seed, epoch and the sample's place in the epoch


def test_a_samples_key_is_the_rule_of_the_design(program):
    _, chunks = draw(program, epoch=3)
    found = np.concatenate([raw(c.keys) for c in chunks])
    root = jax.random.fold_in(jax.random.key(program.config.seed), 3)
    expected = np.stack([raw(jax.random.fold_in(root, i)) for i in range(8)])
    np.testing.assert_array_equal(found, expected)


def test_the_cut_into_chunks_changes_no_key(program):
    prompts, chunks = draw(program)
    index, records = prompts.index, np.zeros(8, np.int32)
    samples = np.arange(8, dtype=np.int32)
    whole = program.prepare(0, 0, samples, index, records, index)
    for name in ("keys", "data_keys"):
        parts = np.concatenate([raw(getattr(c, name)) for c in chunks])
        np.testing.assert_array_equal(raw(getattr(whole, name)), parts)


def test_no_two_draws_share_a_key(program):
    draws = [draw(program, epoch, inner)[1] for epoch in (0, 1) for inner in (0, 1)]
    keys = [raw(c.keys) for chunks in draws[::2] for c in chunks]
    data = [raw(c.data_keys) for chunks in draws for c in chunks]
    rows = np.concatenate(keys + data)
    assert len(np.unique(rows, axis=0)) == len(rows) == 2 * 8 + 4 * 8
    # Another pass over the same samples: other data, the same rollouts.
    first, second = (np.concatenate([raw(c.keys) for c in d]) for d in draws[:2])
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(np.unique(first, axis=0), np.unique(second, axis=0))


def test_no_two_passes_draw_the_same_records(program):
    """Each of an epoch draws data anew, and not those of a pass of the next epoch."""
    config = program.config.copy_and_resolve_references()
    config.train.update(inner_epochs=2, minibatches=1)  # in their order in all passes
    twice = program._replace(config=config)
    prompts = draw_prompts(program.prompts, 0, 0, 2, 32)  # the same ones in all passes
    passes = [(epoch, inner) for epoch in range(3) for inner in range(2)]
    draws = [draw_chunks(twice, prompts, *which) for which in passes]
    records = {np.concatenate([c.records for c in d]).tobytes() for d in draws}
    assert len(records) == len(passes)


def test_seeds_do_not_meet():
    a, b = (tiny_program({"seed": seed}) for seed in (0, 1))
    keys = [raw(c.keys) for p in (a, b) for c in draw(p)[1]]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 16
    leaves = [jax.tree.leaves(p.new_state().params) for p in (a, b)]
    assert any((x != y).any() for x, y in zip(*leaves, strict=True))
    assert DATA_STREAM > 10_000  # no epoch of a run is ever that number


# ---- what a chunk holds


def test_captions_and_records_are_those_of_the_prompt(program):
    prompts, chunks = draw(program)
    tokens = np.asarray(program.pipeline.encode(prompts.text).emb)
    np.testing.assert_array_equal(np.concatenate([c.cond.emb for c in chunks]), tokens)
    for chunk in chunks:
        assert same_bits(chunk.cond, chunk.data_cond) and chunk.trajectory is None
    records = np.concatenate([c.records for c in chunks])
    assert [program.source.captions[r] for r in records] == list(prompts.text)
    assert len(set(records)) > 2  # more than one picture of the two captions


@pytest.mark.parametrize("source", [None, flat_source()])
def test_the_processes_compare_their_data_before_any_weight(source, monkeypatch):
    """All of them or none, so also where there are no data."""

    def compared(values):
        assert values == in_short(source)
        raise InterruptedError

    monkeypatch.setattr(program_module, "check_agreement", compared)
    with pytest.raises(InterruptedError):
        tiny_program({}, source)


def test_a_judge_that_does_not_know_a_prompt_is_heard_before_any_weight(monkeypatch):
    class Judge:
        def __init__(self, *known):
            self.known = known

        def __call__(self, images, prompts):
            raise AssertionError("nothing is judged here")

        def check_prompts(self, prompts):
            if set(prompts) - set(self.known):
                raise UserError("unheard of", got="", wanted="", way_out="")

    def no_weights(*_):
        raise AssertionError("weights were described first")

    config = configured(TINY | {"evaluate.samples": 2, "rewards.heldout": ("held",)})
    monkeypatch.setattr("ddrl_jax.program.describe_weights", no_weights)
    # A held-out judge sees the prompts of the evaluation, a trained one all of them.
    for known, fine in ((WORDS[:1], False), (WORDS[:2], True)):
        judges = {"compressibility": Judge(*WORDS), "held": Judge(*known)}
        with pytest.raises(AssertionError if fine else UserError):
            build(config, judges)
    with pytest.raises(UserError):
        build(config, {"compressibility": Judge(*WORDS[:2]), "held": Judge(*WORDS)})


@pytest.mark.parametrize("judge", [retrieval.Retrieval, retrieval.RetrievalLogProb])
@pytest.mark.parametrize("size", [16, 32])
def test_pictures_a_judge_can_not_read_are_told_before_any_weight(
    judge, size, monkeypatch
):
    def no_weights(*_):
        raise AssertionError("weights were described first")

    known = retrieval.Judge(WORDS, no_weights, no_weights)
    config = configured(TINY | {"model.image_size": size})
    monkeypatch.setattr("ddrl_jax.program.describe_weights", no_weights)
    with pytest.raises(AssertionError if size == 32 else UserError) as error:
        build(config, {"held": judge(known)})
    if size != 32:
        assert error.value.got == "uint8 [16, 16, 3]"


def test_prompts_without_pictures_are_told_before_any_weight(monkeypatch):
    """Nothing is trained on data, but each evaluation takes the loss of the prompts."""

    def no_weights(*_):
        raise AssertionError("weights were described first")

    monkeypatch.setattr("ddrl_jax.program.describe_weights", no_weights)
    source = flat_source(captions=WORDS[:3])
    with pytest.raises(UserError, match="held-out data loss") as error:
        tiny_program(source=source)
    assert error.value.got == repr(WORDS[3])
    assert "evaluate.data_samples=0" in error.value.way_out
    for fine in ({"evaluate.data_samples": 0}, {"data_term.captions": "own"}):
        with pytest.raises(AssertionError, match="described first"):
            tiny_program(fine, source)
    with pytest.raises(AssertionError, match="described first"):  # data.source "none"
        tiny_program()


def test_without_a_data_term_there_is_no_data():
    _, chunks = draw(tiny_program(source=flat_source()))
    assert chunks[0].records is None and chunks[0].data_cond is None


def test_no_source_is_none(program):
    assert make_source(configured({"data.source": "none"}), program.pipeline) is None


# ---- trained steps


def trained(epoch=0, samples=6, **edits):
    config = configured({"sampler.steps": 10} | edits)
    return draw_trained_steps(config, make_kernel(config.sampler), epoch, samples)


def test_named_steps_are_trained_in_order():
    found = trained(**{"policy.train_on": (5, 0, 2)})
    np.testing.assert_array_equal(found, np.repeat([[0], [2], [5]], 6, 1))
    assert found.dtype == np.int32


def test_drawn_steps_are_noisy_ascending_and_a_function_of_the_epoch():
    draws = [trained(epoch, **{"policy.train_steps": 3}) for epoch in range(200)]
    assert all((np.diff(d, axis=0) > 0).all() for d in draws)
    assert all((d == d[:, :1]).all() for d in draws)  # the same for all samples
    np.testing.assert_array_equal(draws[7], trained(7, 6, **{"policy.train_steps": 3}))
    counts = np.bincount(np.concatenate([d[:, 0] for d in draws]), minlength=10)
    assert counts[9] == 0  # the last step has no noise
    assert (abs(counts[:9] - 200 / 3) < 4 * np.sqrt(200 * 2 / 9)).all()


def test_each_sample_may_draw_its_own_steps():
    edits = {"policy.train_steps": 3, "policy.per_sample_steps": True}
    found = trained(0, 500, **edits)
    assert found.shape == (3, 500) and (np.diff(found, axis=0) > 0).all()
    assert len(np.unique(found, axis=1).T) > 50 and found.max() == 8


def test_no_number_of_steps_means_all_noisy_ones():
    np.testing.assert_array_equal(trained(**{"policy.train_steps": 0})[:, 0], range(9))
    everything = trained(**{"policy.train_steps": 0, "sampler.kernel": "ddim"})
    assert len(everything) == 10


def test_updates_of_a_run():
    edits = {"train.epochs": 5, "train.minibatches": 2, "train.inner_epochs": 3}
    assert total_updates(configured(edits)) == 30


# ---- the jitted functions


def test_an_update_compiles_once_and_takes_its_state(program):
    state = perturbed_state(program)
    prompts, _ = draw(program)
    for _ in range(2):
        chunks = tuple(chunks_with_trajectories(program, state, prompts))
        old = state
        state, _ = program.update(old, program.frozen, program.reference, chunks)
        assert all(a.is_deleted() for a in jax.tree.leaves(old))
    assert program.update._cache_size() == 1
    assert int(state.step) == 2 and int(state.bad_updates) == 0


def test_pictures_and_trajectories(program):
    state = perturbed_state(program)
    _, (chunk, _) = draw(program)
    steps = jnp.asarray([[0] * 4, [2] * 4], jnp.int32)
    images, kept, _ = program.rollout(
        state.params, program.frozen, chunk.keys, chunk.cond, steps
    )
    assert images.shape == (4, 16, 16, 3) and images.dtype == jnp.uint8
    assert kept.x_t.shape == (2, 4, 16, 16, 3) and kept.x_t.dtype == jnp.float32
    np.testing.assert_array_equal(kept.index, steps)


@pytest.mark.parametrize("kernel", ["ddim", "flow_grpo", "edm"])
def test_all_but_the_network_is_float32_where_that_computes_in_half(kernel):
    edits = DATA | {"model.dtype": "bfloat16", "sampler.kernel": kernel}
    edits |= {"sampler.guidance_scale": 2.0, "policy.kl_weight": 0.1}
    half = tiny_program(edits, flat_source())
    _, (chunk, _) = draw(half)
    steps, state = jnp.zeros((1, 4), jnp.int32), half.abstract_state()
    sample = lambda p: half.rollout(p, half.frozen, chunk.keys, chunk.cond, steps)  # noqa: E731
    found = jax.eval_shape(sample, state.params)
    kept = found.trajectory
    chunk = chunk._replace(
        trajectory=jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), kept),
        old_log_prob=jnp.zeros((1, 4)),
        advantages=jnp.zeros(4),
    )
    update = lambda s: half.update(s, half.frozen, half.reference, (chunk,))  # noqa: E731
    after = jax.eval_shape(update, state)
    floats = [
        leaf.dtype
        for leaf in jax.tree.leaves((found.x0, kept, after))
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert set(floats) == {jnp.dtype("float32")} and len(floats) > 60
    assert "bf16" in str(jax.make_jaxpr(sample)(state.params))


def test_the_abstract_state_is_the_state(program):
    state, abstract = program.new_state(), program.abstract_state()
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert same_bits(state, program.new_state())


# ---- LoRA


def test_only_the_lora_is_trained():
    program = tiny_program({"lora.rank": 2, "policy.kl_weight": 0.1})
    state = program.new_state()
    size = sum(a.size for a in jax.tree.leaves(state.params))
    assert size == 2 * (4 + 2 + 5 + 5) * 16  # rank times the sides of four matrices
    base = perturbed(program.frozen)  # as it starts the network says 0 to all
    program = program._replace(frozen=base, reference=(None, base))
    prompts, _ = draw(program)
    frozen = jax.tree.map(np.array, base)
    chunks = tuple(chunks_with_trajectories(program, state, prompts))
    before = jax.tree.map(np.array, state.params)
    after, metrics = program.update(state, program.frozen, program.reference, chunks)
    assert same_bits(frozen, base)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after.params)
    assert all(layer["b"] for layer in moved["blocks"].values())
    assert float(metrics["policy/kl"]) == pytest.approx(0.0, abs=1e-9)


def test_more_texts_than_a_device_holds(monkeypatch):
    """Told in bytes, before anything is encoded."""
    monkeypatch.setattr("ddrl_jax.data.prompts.TEXT_BYTES", 50)
    with pytest.raises(UserError, match="do not fit on a device") as error:
        tiny_program({"prompts.list": WORDS})
    each = int(re.search(r"4 of (\d+) bytes", str(error.value))[1])
    assert f"--config.prompts.limit={50 // each}" in error.value.way_out
    tiny_program({"prompts.list": WORDS, "prompts.limit": 50 // each})


def test_a_run_names_what_does_not_divide(capsys):
    tiny_program({"mesh.data": 1, "mesh.tensor": 8, "model.heads": 8})
    told = capsys.readouterr().err
    assert told.count("not split as config.sharding has it") == 1
    assert "vocab 316 over tensor 8" in told
