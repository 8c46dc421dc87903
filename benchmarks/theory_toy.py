"""DDRL's objective where its optimum can be written down: a density on a grid.

Two kinds of functions. The closed forms are float64 NumPy and know nothing of the
package. `train` runs the package's own objectives by stochastic gradients on samples
and has to arrive at them. tests/test_theory.py asserts that it does;
benchmarks/theory_figure.py draws it.

The policy q is a softmax over the cells of a grid, p the data, r the reward. DDRL
maximises E_q[lambda((r - c)/beta)] + E_p[log q], lambda(x) = -exp(-x), with a centre c.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddrl_jax.objectives.policy import reinforce, reward_transform


class Arm(NamedTuple):
    """One objective as a row of numbers, so that all of them train in one program.

    Attributes:
      exponential: 1 for lambda(x) = -exp(-x), 0 for the linear reward.
      centre: weights of the exact Z, of E_p[r] and of the policy's E_q[r] in c.
      data: weight of the data term E_p[log q].
      kl: weight of the reverse KL to the reference, in units of beta.
    """

    exponential: float
    centre: tuple[float, float, float]
    data: float
    kl: float


ARMS = {
    "exact": Arm(1.0, (1.0, 0.0, 0.0), 1.0, 0.0),
    "data_mean": Arm(1.0, (0.0, 1.0, 0.0), 1.0, 0.0),
    "group_mean": Arm(1.0, (0.0, 0.0, 1.0), 1.0, 0.0),
    "linear": Arm(0.0, (0.0, 0.0, 1.0), 1.0, 0.0),
    "kl": Arm(0.0, (0.0, 0.0, 1.0), 0.0, 1.0),
    "none": Arm(0.0, (0.0, 0.0, 1.0), 0.0, 0.0),
}


class Toy(NamedTuple):
    """A problem: cells x, data p, reference p_ref, reward r (all [k]) and beta."""

    x: np.ndarray
    data: np.ndarray
    reference: np.ndarray
    reward: np.ndarray
    beta: float


def discrete() -> Toy:
    """Eight unordered cells with random data, reference and reward."""
    rng = np.random.default_rng(1)
    data, reference = rng.dirichlet(np.full(8, 4.0), 2)
    return Toy(np.arange(8.0), data, reference, rng.uniform(-1, 1, 8), 0.5)


def gaussian_mixture(cells: int = 32) -> Toy:
    """Two modes of which the data prefer the left one and the reward the right.

    The reward rises on beyond the right mode, where there are hardly any data: only
    hacking leads there. A twentieth of the data is spread evenly, so that every cell
    is drawn now and then. The reference is like a base model's: the data, blurred.
    """
    x = np.linspace(-3.0, 3.0, cells)
    data = _mixture(x, (-1.5, 1.3), (0.45, 0.45), (0.7, 0.3))
    reference = _mixture(x, (-1.2, 1.0), (0.9, 0.9), (0.6, 0.4))
    data, reference = (0.95 * p + 0.05 / cells for p in (data, reference))
    return Toy(x, data, reference, x.copy(), 2.0)


def _mixture(x: np.ndarray, means, stds, weights) -> np.ndarray:
    parts = [
        w / s * np.exp(-0.5 * ((x - m) / s) ** 2)
        for m, s, w in zip(means, stds, weights, strict=True)
    ]
    return sum(parts) / np.sum(parts)


def centre(p: np.ndarray, reward: np.ndarray, beta: float) -> float:
    """The exact Z = beta log E_p[exp(r / beta)]."""
    top = reward.max()
    return float(top + beta * np.log(np.sum(p * np.exp((reward - top) / beta))))


def tilted(p: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """p exp((r - Z) / beta), with the exact Z: Theorem 3.1 of DDRL for p = data."""
    return p * np.exp((reward - centre(p, reward, beta)) / beta)


def saturated(p: np.ndarray, reward: np.ndarray, beta: float, c: float) -> np.ndarray:
    """p / (exp(-(r - c) / beta) + mu): DDRL with any fixed centre c.

    mu makes it sum to 1. It is positive for c below the exact Z, and the tilt then
    saturates at 1 / mu; for c above Z it is negative and the tilt is steeper.
    """
    falling = np.exp(-(reward - c) / beta)
    return p / (falling + _normaliser(p, falling))


def self_centred(p: np.ndarray, reward: np.ndarray, beta: float) -> tuple:
    """The density q whose own mean reward is its centre c = E_q[r], and that c.

    It is what the mean over samples of the current policy leads to.
    """
    low, high = float(np.min(reward)), float(np.max(reward))
    for _ in range(200):
        c = 0.5 * (low + high)
        above = saturated(p, reward, beta, c) @ reward > c
        low, high = (c, high) if above else (low, c)
    return saturated(p, reward, beta, c), c


def linear_optimum(p: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """p / (nu - r / beta): the linear reward, lambda(x) = x, of the released code."""
    falling = -reward / beta
    return p / (falling + _normaliser(p, falling))


def _normaliser(p: np.ndarray, falling: np.ndarray) -> float:
    """mu with sum p / (falling + mu) = 1, by bisection; the sum falls with mu."""
    used = p > 0
    low = -falling[used].min()  # the sum is infinite here
    high = low + 1.0  # each denominator is at least 1 here, so the sum at most 1
    for _ in range(200):
        middle = 0.5 * (low + high)
        too_much = np.sum(p[used] / (falling[used] + middle)) > 1.0
        low, high = (middle, high) if too_much else (low, middle)
    return high


def optimum(toy: Toy, arm: str) -> np.ndarray:
    """Where theory says that `train` takes this arm of `ARMS`."""
    p, r, beta = toy.data, toy.reward, toy.beta
    return {
        "exact": lambda: tilted(p, r, beta),
        "data_mean": lambda: saturated(p, r, beta, float(p @ r)),
        "group_mean": lambda: self_centred(p, r, beta)[0],
        "linear": lambda: linear_optimum(p, r, beta),
        "kl": lambda: tilted(toy.reference, r, beta),
        "none": lambda: np.eye(r.size)[np.argmax(r)],
    }[arm]()


def train(
    toy: Toy,
    key: jax.Array,
    optimizer: optax.GradientTransformation,
    steps: int,
    batch: int,
) -> dict[str, np.ndarray]:
    """Trains every arm from the data density, all in one compiled program.

    Args:
      toy: the problem.
      key: of all draws; the arms share their random numbers.
      optimizer: of the logits.
      steps: optimizer steps.
      batch: cells drawn from the policy, and as many from the data, in each step;
        0 takes both expectations exactly.

    Returns:
      Arm -> the density reached, float64 [k].
    """
    rows = jax.tree.map(lambda *a: jnp.array(a, jnp.float32), *ARMS.values())
    start = jnp.log(jnp.asarray(toy.data, jnp.float32))

    def run(arm: Arm):
        def body(carry, step_key):
            logits, state = carry
            gradient = jax.grad(_loss)(logits, toy, arm, step_key, batch)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(logits, updates), state), None

        carry = (start, optimizer.init(start))
        (logits, _), _ = jax.lax.scan(body, carry, jax.random.split(key, steps))
        return logits

    logits = np.asarray(jax.jit(jax.vmap(run))(rows), np.float64)
    density = np.exp(logits - logits.max(axis=1, keepdims=True))
    density /= density.sum(axis=1, keepdims=True)
    return dict(zip(ARMS, density, strict=True))


def train_exactly(toy: Toy) -> dict[str, np.ndarray]:
    """`train` with exact expectations and plain gradient ascent."""
    return train(toy, jax.random.key(0), optax.sgd(1.0), 6000, 0)


def train_on_samples(toy: Toy) -> dict[str, np.ndarray]:
    """`train` on 512 draws a step, with a learning rate that falls to 0."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 6000))
    return train(toy, jax.random.key(0), optimizer, 6000, 512)


def _loss(logits, toy: Toy, arm: Arm, key, batch: int):
    """One step's objective out of `ddrl_jax.objectives`, on cells drawn or on all.

    On all cells, E_q is the batch mean with each advantage times k q(cell).
    """
    log_q = jax.nn.log_softmax(logits)
    q, p = (a.astype(jnp.float32) for a in (jnp.exp(log_q), jnp.asarray(toy.data)))
    q = jax.lax.stop_gradient(q)
    own_key, data_key = jax.random.split(key)
    everything = jnp.arange(q.size)
    mine = _draw(own_key, q, batch) if batch else everything
    share = jnp.ones(batch) if batch else q * q.size
    advantages = share * _advantages(log_q[mine], mine, share, toy, arm)
    policy_loss, _ = reinforce(log_q[mine], advantages)
    data = _draw(data_key, p, batch) if batch else everything
    weight = jnp.ones(batch) if batch else p * p.size
    return policy_loss - arm.data * jnp.mean(weight * log_q[data])


def _advantages(log_q, cells, share, toy: Toy, arm: Arm):
    """lambda((r - c) / beta), with the reverse KL as part of the reward."""
    reward = jnp.asarray(toy.reward, jnp.float32)[cells]
    reference = jnp.log(jnp.asarray(toy.reference, jnp.float32))[cells]
    reward = reward - arm.kl * toy.beta * (jax.lax.stop_gradient(log_q) - reference)
    exact = centre(toy.data, toy.reward, toy.beta)
    centres = exact, toy.data @ toy.reward, jnp.mean(share * reward)
    scaled = (
        reward - sum(w * c for w, c in zip(arm.centre, centres, strict=True))
    ) / toy.beta
    transformed = reward_transform(scaled, "neg_exp")
    transformed = transformed - jnp.mean(share * transformed)
    return jnp.where(arm.exponential > 0, transformed, scaled)


def _draw(key, density, batch: int):
    """Cells drawn from a density by inverting its sums, [batch] int32."""
    total = jnp.cumsum(density)
    uniform = jax.random.uniform(key, (batch, 1), maxval=total[-1])
    return jnp.sum(total[None, :-1] <= uniform, axis=1)
