"""The optax chain against the formulas of Adam, decay, clip and schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from edited_config import configured

from ddrl_jax.optim import (
    StoredState,
    add_updates,
    learning_rate,
    make_optimizer,
    round_at_random,
)

P, G = np.asarray([1.0, -2.0, 0.5]), np.asarray([3.0, -4.0, 12.0])  # |G| = 13


def section(**changes):
    return configured({f"optimizer.{k}": v for k, v in changes.items()}).optimizer


def steps(optimizer, gradients, total=10):
    """The weights after each gradient, from P."""
    tx = make_optimizer(optimizer, total)
    params, out = jnp.asarray(P, jnp.float32), []
    state = tx.init(params)
    for g in gradients:
        updates, state = tx.update(jnp.asarray(g, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        out.append(np.asarray(params, np.float64))
    return out


def adamw(gradients, lr, b1, b2, eps, decay):
    """Loshchilov and Hutter 2019, algorithm 2, with bias correction, in float64."""
    p, m, v, out = P.copy(), np.zeros(3), np.zeros(3), []
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        p = p - lr * (step + decay * p)
        out.append(p)
    return out


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_by_hand(decay):
    numbers = {"lr": 0.02, "b1": 0.8, "b2": 0.95, "eps": 0.1}
    gradients = [G, -0.5 * G, np.asarray([0.0, 1.0, 0.0])]
    found = steps(section(**numbers, weight_decay=decay, grad_clip=0.0), gradients)
    expected = adamw(gradients, **numbers, decay=decay)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("clip", "scale"), [(1.0, 1 / 13), (20.0, 1.0), (0.0, 1.0)])
def test_gradients_are_clipped_to_a_global_norm(clip, scale):
    # With a large eps Adam's first step is nearly linear in the gradient.
    numbers = {"lr": 1.0, "b1": 0.0, "b2": 0.0, "eps": 1e4}
    found = steps(section(**numbers, weight_decay=0.0, grad_clip=clip), [G])
    expected = adamw([scale * G], **numbers, decay=0.0)
    moved = (found[0] - P) / (expected[0] - P)
    np.testing.assert_allclose(moved, 1.0, rtol=1e-2)


def rates(total=20, **changes):
    schedule = learning_rate(section(lr=0.4, **changes), total)
    return np.asarray([float(schedule(i)) for i in range(total + 1)])


def test_constant_rate():
    np.testing.assert_allclose(rates(), 0.4, rtol=1e-6)


def test_warm_up_starts_above_0_and_ends_at_the_rate():
    found = rates(warmup=4)
    np.testing.assert_allclose(found[:5], [0.1, 0.175, 0.25, 0.325, 0.4], rtol=1e-6)
    np.testing.assert_allclose(found[4:], 0.4, rtol=1e-6)


def test_cosine_falls_to_0_at_the_last_step():
    found = rates(schedule="cosine")
    expected = 0.2 * (1 + np.cos(np.pi * np.arange(21) / 20))
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_cosine_after_warm_up():
    found = rates(schedule="cosine", warmup=4)
    expected = 0.2 * (1 + np.cos(np.pi * np.arange(17) / 16))
    np.testing.assert_allclose(found[4:], expected, atol=1e-7)
    assert found[0] == pytest.approx(0.1) and found[20] == pytest.approx(0, abs=1e-7)


def test_warm_up_as_long_as_the_run_is_no_division_by_0():
    assert np.isfinite(rates(total=4, schedule="cosine", warmup=4)).all()


# ---- narrow weights and moments


def halfway(share: float) -> float:
    """`share` of the way from 1 to its upper neighbour in bfloat16, 1 + 2^-7."""
    return 1.0 + share * 2.0**-7


@pytest.mark.parametrize("share", [0.0, 0.125, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_at_random_has_the_right_mean(share, sign):
    wide = jnp.full(40_000, sign * halfway(share), jnp.float32)
    found = round_at_random([wide], [wide.astype(jnp.bfloat16)], jax.random.key(5))[0]
    assert found.dtype == jnp.bfloat16
    values = np.asarray(found, np.float64) * sign
    assert set(np.unique(values)) <= {1.0, halfway(1.0)}
    up = np.mean(values > 1.0)
    assert abs(up - share) < 4 * np.sqrt(0.25 / values.size)  # four standard errors


def test_rounding_at_random_keeps_what_is_exact_or_no_number():
    exact = jnp.asarray([0.0, -0.0, 1.5, -3e38, jnp.inf, -jnp.inf], jnp.float32)
    like = [exact.astype(jnp.bfloat16)]
    for seed in range(8):
        found = round_at_random([exact], like, jax.random.key(seed))[0]
        np.testing.assert_array_equal(found[jnp.arange(3)], exact[:3])
        np.testing.assert_array_equal(found[4:], exact[4:])
        nan = round_at_random([exact * jnp.nan], like, jax.random.key(seed))[0]
        assert np.isnan(np.asarray(nan, np.float32)).all()


def test_float32_is_added_as_it_is():
    p, u = {"a": jnp.asarray(P, jnp.float32)}, {"a": jnp.asarray(G, jnp.float32)}
    found = add_updates(p, u, jnp.int32(3))["a"]
    np.testing.assert_array_equal(found, np.float32(P) + np.float32(G))


def test_small_steps_on_narrow_weights_add_up():
    # 200 steps of 2^-13 are 0.0244; to the nearest, each would be lost beside 1.
    p = jnp.ones(2000, jnp.bfloat16)
    step = jax.jit(add_updates)
    for i in range(200):
        p = step(p, jnp.full(p.shape, 2.0**-13), jnp.int32(i))
    assert (p[:2] + jnp.bfloat16(2.0**-13) == p[:2]).all()
    mean = float(np.mean(np.asarray(p, np.float64)))
    assert mean == pytest.approx(1 + 200 * 2.0**-13, abs=1e-3)


def narrow_states(dtype: str, gradients: list):
    """The second moments after each gradient, [steps, 4000]."""
    optimizer = section(lr=1e-3, state_dtype=dtype, grad_clip=0.0)
    tx, params = make_optimizer(optimizer, 10), jnp.zeros(4000)
    state, out = tx.init(params), []
    update = jax.jit(tx.update)
    for g in gradients:
        _, state = update(jnp.full(4000, g), state, params)
        (nu,) = optax.tree.get_all_with_path(state, "nu")
        out.append(np.asarray(nu[1], np.float64))
        assert nu[1].dtype == jnp.dtype(dtype)
    return np.asarray(out)


def test_a_narrow_second_moment_falls_as_it_should():
    # After one large gradient it decays by 0.999 a step: to the nearest it never would.
    gradients = [1.0] + [0.0] * 300
    exact = narrow_states("float32", gradients)
    narrow = narrow_states("bfloat16", gradients)
    np.testing.assert_allclose(exact[-1], 1e-3 * 0.999**300, rtol=1e-3)
    np.testing.assert_allclose(narrow.mean(1)[-1], exact[-1, 0], rtol=5e-3)


def test_the_default_has_no_wrapper_and_narrow_weights_have_wide_moments():
    plain = make_optimizer(section(), 10).init(jnp.zeros(2))
    assert not isinstance(plain, StoredState)
    state = make_optimizer(section(master="bfloat16"), 10).init(
        jnp.zeros(2, jnp.bfloat16)
    )
    dtypes = {a.dtype for a in jax.tree.leaves(state) if a.ndim}
    assert dtypes == {jnp.dtype("float32")}


def test_adamw_in_narrow_moments_follows_adamw():
    numbers = {"lr": 0.02, "b1": 0.8, "b2": 0.95, "eps": 0.1}
    gradients = [G, -0.5 * G, np.asarray([0.0, 1.0, 0.0])]
    optimizer = section(
        **numbers, weight_decay=0.1, grad_clip=0.0, state_dtype="bfloat16"
    )
    expected = adamw(gradients, **numbers, decay=0.1)
    np.testing.assert_allclose(steps(optimizer, gradients), expected, atol=2e-3)
