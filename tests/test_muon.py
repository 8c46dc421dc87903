"""Muon on the matrices of the blocks, NAdamW on the rest: formulas, layout, resume."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from edited_config import configured
from mesh_epochs import compare, epoch
from tiny_runs import perturbed_state, same_bits, tiny_program

from ddrl_jax.checkpoint import Checkpoints, abstract
from ddrl_jax.optim import make_optimizer
from ddrl_jax.sharding import to_host

NUMBERS = {"lr": 0.02, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
MUON = {"optimizer.name": "muon"}
QUINTIC = (3.4445, -4.775, 2.0315)  # Jordan 2024


def orthogonal(m):
    """U p(p(p(p(p(S / |S|))))) V^T, the quintic five times on the singular values."""
    u, s, v = np.linalg.svd(m, full_matrices=False)
    s = s / np.sqrt(np.sum(s**2))
    for _ in range(5):
        s = QUINTIC[0] * s + QUINTIC[1] * s**3 + QUINTIC[2] * s**5
    return (u * s) @ v


def momentum(m, g, t, b):
    """Nesterov's, with the bias of both of its parts corrected (Dozat 2016)."""
    return b * m / (1 - b ** (t + 1)) + (1 - b) * g / (1 - b**t)


def test_two_steps_by_hand():
    random = np.random.default_rng(0)
    shapes = {"kernel": (2, 3, 5), "bias": (2, 5)}
    start = {"block": {name: random.normal(size=s) for name, s in shapes.items()}}
    gradients = [jax.tree.map(lambda a: random.normal(size=a.shape), start)] * 2
    optimizer = configured(
        MUON | {f"optimizer.{k}": v for k, v in NUMBERS.items()}
    ).optimizer
    optimizer.grad_clip = 0.0
    tx = make_optimizer(optimizer, 10)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), start)
    state = tx.init(params)
    for g in gradients:
        updates, state = tx.update(
            jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), g), state, params
        )
        params = optax.apply_updates(params, updates)
    found = jax.tree.map(np.asarray, params)["block"]
    g, start = gradients[0]["block"], start["block"]
    lr, b1, b2, decay = (NUMBERS[k] for k in ("lr", "b1", "b2", "weight_decay"))
    kernel, bias = start["kernel"], start["bias"]
    m, m_bias, v_bias = 0 * kernel, 0 * bias, 0 * bias
    for t in (1, 2):
        m = b1 * m + (1 - b1) * g["kernel"]
        step = np.stack([orthogonal(one) for one in momentum(m, g["kernel"], t, b1)])
        kernel = kernel - lr * (0.2 * np.sqrt(5) * step + decay * kernel)
        m_bias = b1 * m_bias + (1 - b1) * g["bias"]
        v_bias = b2 * v_bias + (1 - b2) * g["bias"] ** 2
        step = momentum(m_bias, g["bias"], t, b1) / np.sqrt(v_bias / (1 - b2**t))
        bias = bias - lr * (step + decay * bias)
    np.testing.assert_allclose(found["kernel"], kernel, atol=2e-5)
    np.testing.assert_allclose(found["bias"], bias, atol=2e-5)


@pytest.fixture(scope="module")
def state():
    return tiny_program(MUON | {"mesh.fsdp": 2, "mesh.tensor": 2}).new_state()


def test_it_is_the_matrices_of_the_blocks_that_have_no_second_moment(state):
    (nu,) = optax.tree.get_all_with_path(state.opt_state, "nu")
    absent = lambda leaf: isinstance(leaf, optax.MaskedNode)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(nu[1], is_leaf=absent)
    without = {jax.tree_util.keystr(p) for p, leaf in leaves if absent(leaf)}
    kernels = ("modulation", "qkv", "out", "up", "down")
    assert without == {f"['blocks']['{name}']['kernel']" for name in kernels}


def test_its_moments_live_with_their_weights(state):
    is_muon = lambda part: hasattr(part, "ns_coeffs")  # noqa: E731
    parts = jax.tree.leaves(state.opt_state, is_leaf=is_muon)
    (mu,) = [part.mu for part in parts if is_muon(part)]
    for name in ("qkv", "down"):
        weight = state.params["blocks"][name]["kernel"].sharding.spec
        assert mu["blocks"][name]["kernel"].sharding.spec == weight
        assert any(weight)


def test_its_state_is_saved_and_comes_back_to_the_bit(tmp_path):
    state = perturbed_state(tiny_program(MUON))
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, 1)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    found = checkpoints.restore(abstract(state)).state
    checkpoints.close()
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert same_bits(found, state)


@pytest.mark.slow
def test_a_mesh_changes_no_number():
    alone = epoch(**MUON)
    found = epoch(**MUON, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    adamw = epoch()[4].params
    assert not same_bits(to_host(alone[4].params), to_host(adamw))
    compare(to_host(found[4].params), to_host(alone[4].params), 1e-5)
