"""One update: the terms it traces, how it accumulates, applies, skips and averages."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_runs import (
    PARAMS,
    SOURCE,
    TRAINED,
    apply,
    batch,
    gradient,
    objective,
    params,
    updated,
)
from tiny_runs import same_bits

from ddrl_jax.interfaces import Cond
from ddrl_jax.learner import init_state, make_recompute, make_update

DATA = {"data_term.weight": 0.5}
NO_POLICY = {"policy.weight": 0.0}
KL = {"policy.kl_weight": 0.1}
EVERY = DATA | {"data_term.levels": "rollout", "data_term.every_step": True}


@pytest.fixture(scope="module")
def samples():
    return batch()


def without_data(chunk):
    return chunk._replace(records=None, data_cond=None)


def without_trajectory(chunk):
    return chunk._replace(trajectory=None, old_log_prob=None, advantages=None)


# ---- a term of weight 0


def test_data_weight_0_leaves_the_policy_gradient_alone(samples):
    policy, _ = updated(objective(source=None), (without_data(samples),))
    off, metrics = updated(objective({"data_term.weight": 0.0}), (samples,))
    on, _ = updated(objective(DATA), (samples,))
    assert same_bits(off, policy) and not same_bits(on, policy)
    assert not any(name.startswith("data/") for name in metrics)


def test_advantages_of_0_leave_plain_diffusion_training(samples):
    quiet = samples._replace(advantages=jnp.zeros_like(samples.advantages))
    found, _ = updated(objective(DATA), (quiet,))
    plain, metrics = updated(
        objective(DATA | NO_POLICY), (without_trajectory(samples),)
    )
    assert same_bits(found, plain) and gradient(plain)["w"] != 0
    assert not any(name.startswith("policy/") for name in metrics)


def traced(edits, chunk, source=SOURCE):
    """How often the network is traced in an update."""
    calls = []

    def network(*inputs):
        calls.append(1)
        return apply(*inputs)

    loss, tx = objective(edits, source, network), optax.sgd(1.0)
    state = init_state(params(), tx, 0.0)
    jax.eval_shape(make_update(loss, tx, 0.0), state, {}, (params(), {}), (chunk,))
    return len(calls)


def test_a_term_of_weight_0_is_not_traced(samples):
    policy = traced({}, without_data(samples), source=None)
    data = traced(DATA | NO_POLICY, without_trajectory(samples))
    assert policy > 0 and data > 0
    assert traced({}, samples) == policy
    assert traced(DATA | NO_POLICY, samples) == data
    assert traced(DATA, samples) == policy + data
    assert traced(NO_POLICY, samples) == 0


def test_without_kl_there_is_no_reference(samples):
    updated(objective({"policy.kl_weight": 0.0}), (samples,), reference=None)
    with pytest.raises(TypeError):
        updated(objective(KL), (samples,), reference=None)


# ---- accumulation


@pytest.mark.parametrize("edits", [{}, DATA, DATA | KL, DATA | NO_POLICY, EVERY])
def test_microbatches_add_up_to_one_batch(edits, samples):
    reference = (jax.tree.map(lambda a: 0.5 * a, params()), {})
    whole, one = updated(objective(edits), (samples,), reference=reference)
    parts = tuple(batch(slice(i, i + 2)) for i in range(0, 8, 2))
    found, many = updated(objective(edits), parts, reference=reference)
    for name, value in gradient(whole).items():
        np.testing.assert_allclose(gradient(found)[name], value, atol=1e-6)
        assert np.abs(value).max() > 1e-3
    assert one.keys() == many.keys()
    for name in ("policy/loss", "policy/kl", "data/loss"):
        if name in one:
            np.testing.assert_allclose(many[name], one[name], rtol=1e-5)


def sizes(jaxpr):
    """Elements of every array that a computation makes, loops looked into."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars if hasattr(v.aval, "size"))
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, jax.extend.core.Jaxpr):
                yield from sizes(inner)


@pytest.mark.parametrize("edits", [{}, DATA | {"data_term.every_step": True}])
def test_nothing_is_repeated_for_each_step(edits):
    """The largest array holds a prompt's text once a sample, not once a step too."""
    loss, width, steps = objective(edits), 1000, len(TRAINED)
    loss = loss._replace(apply=lambda p, f, z, t, c: p["w"] * z + c.emb[:, :1, None])
    cond = Cond(jnp.zeros((4, width)))
    loss = loss._replace(uncond=Cond(jnp.zeros((1, width))))
    halves = (batch(slice(0, 4)), batch(slice(4, 8)))
    chunks = tuple(half._replace(cond=cond, data_cond=cond) for half in halves)
    tx = optax.sgd(1.0)
    update, state = make_update(loss, tx, 0.0), init_state(params(), tx, 0.0)
    jaxpr = jax.make_jaxpr(update)(state, {}, None, chunks).jaxpr
    assert max(sizes(jaxpr)) == 8 * width
    assert steps * 4 > 8  # or the repetition would not show


def test_the_largest_deviation_of_all_microbatches_is_reported(samples):
    a, b = batch(slice(0, 4)), batch(slice(4, 8))
    b = b._replace(old_log_prob=b.old_log_prob.at[1, 2].add(-0.5))
    _, metrics = updated(objective(), (a, b))
    deviation = float(metrics["policy/ratio_max_deviation"])
    assert deviation == pytest.approx(np.exp(0.5) - 1, rel=1e-4)


def test_recompute_gives_the_log_probs_of_the_rollout(samples):
    found = jax.jit(make_recompute(objective()))(params(), {}, samples)
    np.testing.assert_allclose(found, samples.old_log_prob, atol=1e-6)
    moved = {"w": params()["w"] + 0.1, "b": params()["b"]}
    other = make_recompute(objective())(moved, {}, samples)
    assert np.abs(other - samples.old_log_prob).max() > 1e-3


# ---- what an update does to the state


def test_average_of_the_weights(samples):
    tx, old = optax.sgd(1.0), {"w": jnp.float32(2.0), "b": jnp.asarray([1.0, -1.0])}
    start = init_state(params(), tx, 0.9)._replace(ema=old)
    state, _ = updated(objective(), (samples,), tx, ema=0.9, start=start)
    for name in PARAMS:
        expected = 0.9 * np.asarray(old[name]) + 0.1 * np.asarray(state.params[name])
        np.testing.assert_allclose(state.ema[name], expected, rtol=1e-6)
    assert int(state.step) == 1 and int(state.bad_updates) == 0


def test_the_average_of_narrow_weights_that_stand_still_is_these_weights(samples):
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params())
    tx = optax.sgd(0.0)
    start = init_state(narrow, tx, 0.9)
    state, _ = updated(objective(), (samples,), tx, ema=0.9, start=start)
    assert int(state.step) == 1
    for name in PARAMS:
        assert state.params[name].dtype == jnp.bfloat16
        expected = np.asarray(narrow[name], np.float32)
        np.testing.assert_allclose(state.ema[name], expected, rtol=1e-6)


def test_without_an_average_it_is_the_weights(samples):
    state, _ = updated(objective(), (samples,), ema=0.0)
    assert state.ema is None and state.average is state.params
    assert not same_bits(state.params, params())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("term", ["policy", "data"])
def test_a_gradient_that_is_no_number_is_skipped_and_counted(term, bad, samples):
    tx = optax.adam(0.1)
    before, _ = updated(objective(DATA), (samples,), tx, ema=0.9)
    if term == "policy":
        broken = samples._replace(advantages=samples.advantages.at[3].set(bad))
        loss = objective(DATA)
    else:
        broken = samples
        spoilt = lambda r, k: SOURCE.latents(r, k).at[2].set(bad)  # noqa: E731
        loss = objective(DATA, SOURCE._replace(latents=spoilt))
    kept = before
    for count in (1, 2):
        after, metrics = updated(loss, (broken,), tx, ema=0.9, start=kept)
        assert not np.isfinite(metrics["grad_norm"])
        assert int(after.bad_updates) == count
        assert same_bits(after._replace(bad_updates=before.bad_updates), before)
        kept = after
    good, _ = updated(objective(DATA), (samples,), tx, ema=0.9, start=kept)
    unbroken, _ = updated(objective(DATA), (samples,), tx, ema=0.9, start=before)
    assert int(good.bad_updates) == 0 and int(good.step) == int(before.step) + 1
    assert same_bits(good, unbroken)


def test_a_fresh_state_owns_its_average():
    start = params()
    state = init_state(start, optax.adam(0.1), 0.9)
    assert same_bits(state.ema, state.params) and int(state.step) == 0
    assert state.average is state.ema
    assert state.ema["b"].unsafe_buffer_pointer() != start["b"].unsafe_buffer_pointer()
