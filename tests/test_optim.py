"""The optax chain against the formulas of Adam, decay, clip and schedules."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from edited_config import configured

from ddrl_jax.optim import learning_rate, make_optimizer

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
