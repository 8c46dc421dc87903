"""Every sampler through `make_kernel`: grids, coordinates, noise and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import get_config
from ddrl_jax.diffusion import schedules
from ddrl_jax.diffusion.gaussian import squared_error_log_prob
from ddrl_jax.diffusion.kernels import KERNELS, PREDICTIONS, make_kernel
from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Memory

STEPS = 6
QUIET = {"eta": 0.0, "noise_level": 0.0, "churn": 0.0}
RNG = np.random.default_rng(0)
# One sample for each step of the sampler: all levels of a grid in one batch.
X0, EPS = (RNG.normal(size=(STEPS, 2, 3)).astype(np.float32) for _ in range(2))


def sampler(kernel, **changes):
    config = get_config().sampler
    config.update({"kernel": kernel, "steps": STEPS} | changes)
    return config


def scales(kernel, level):
    """(alpha, sigma) of a level by the definition of each process, float64."""
    level = np.asarray(level, np.float64)[:, None, None]
    if kernel == "ddim":
        return np.sqrt(level), np.sqrt(1 - level)
    return (np.ones_like(level) if kernel == "edm" else 1 - level), level


def states(name, kernel):
    alpha, sigma = scales(name, kernel.levels[:, 0])
    return jnp.asarray(alpha * X0 + sigma * EPS, jnp.float32)


def levels(kernel):
    return jnp.asarray(kernel.levels, jnp.float32).T


def first_memory(kernel):
    if kernel.remember is None:
        return None
    return Memory(jnp.zeros(X0.shape), jnp.full(STEPS, jnp.inf))


def distance(found, expected, scale):
    return np.abs((np.asarray(found, np.float64) - np.asarray(expected)) / scale).max()


@pytest.mark.parametrize("name", KERNELS)
def test_grid_runs_from_noise_to_data_without_a_gap(name):
    kernel = make_kernel(sampler(name, sigma_max=80.0))
    t, s = kernel.levels.T
    assert kernel.levels.dtype == np.float64 and kernel.levels.shape == (STEPS, 2)
    sign = 1 if name == "ddim" else -1
    assert (sign * (s - t) > 0).all()
    eta = 1.2**0.5 - 1  # of EDM: S_churn / (n + 1) = 1/7 is above the cap
    lift = 1 + eta if name == "edm" else 1.0
    np.testing.assert_allclose(t[1:], lift * s[:-1], rtol=1e-12)
    expected = 80.0 * lift if name == "edm" else 1.0
    np.testing.assert_allclose(kernel.init_scale, expected, rtol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("last_step", ["deterministic", "stochastic"])
def test_std_is_exactly_zero_where_the_kernel_says_so(name, noisy, last_step):
    kernel = make_kernel(sampler(name, last_step=last_step, **({} if noisy else QUIET)))
    # Only DDIM ends on a level with noise; an SDE may be told to keep its last noise.
    last = name == "ddim" or (name in ("flow_grpo", "dance") and last_step[0] == "s")
    expected = np.full(STEPS, noisy)
    expected[-1] &= last
    np.testing.assert_array_equal(kernel.stochastic, expected)
    x = states(name, kernel)
    step = kernel.step(x, jnp.ones_like(x), *levels(kernel), first_memory(kernel))
    assert step.std.shape == (STEPS,)
    np.testing.assert_array_equal(np.asarray(step.std) > 0.0, expected)


@pytest.mark.parametrize("name", ["flow_grpo", "dance", "cps"])
@pytest.mark.parametrize("last_step", ["deterministic", "stochastic"])
@pytest.mark.parametrize("window", [(0, 3), (2, 4), (2, STEPS), (STEPS - 1, STEPS)])
def test_noise_is_in_its_window_and_elsewhere_is_the_ode(name, last_step, window):
    kernel = make_kernel(sampler(name, last_step=last_step, window=window))
    everywhere = make_kernel(sampler(name, last_step=last_step))
    inside = np.zeros(STEPS, bool)
    inside[slice(*window)] = True
    np.testing.assert_array_equal(kernel.stochastic, inside & everywhere.stochastic)
    x, v = states(name, kernel), jnp.asarray(EPS - X0)
    found = kernel.step(x, v, *levels(kernel), None)
    noisy = everywhere.step(x, v, *levels(kernel), None)
    ode = make_kernel(sampler(name, **QUIET)).step(x, v, *levels(kernel), None)
    for value, there, elsewhere in zip(found, noisy, ode, strict=True):
        shape = (STEPS, *(1,) * (value.ndim - 1))
        np.testing.assert_array_equal(
            value, np.where(kernel.stochastic.reshape(shape), there, elsewhere)
        )


@pytest.mark.parametrize("name", KERNELS)
def test_network_sees_the_rectified_flow(name):
    kernel = make_kernel(sampler(name))
    x = states(name, kernel)
    z, time = kernel.to_network(x, levels(kernel)[0])
    t = np.asarray(time, np.float64)[:, None, None]
    assert time.shape == (STEPS,) and (np.diff(time) < 0).all()
    np.testing.assert_allclose(z, (1 - t) * X0 + t * EPS, atol=3e-6)
    if name not in ("ddim", "edm"):  # no rounding on the way to its own coordinates
        np.testing.assert_array_equal(z, x)
        np.testing.assert_array_equal(time, levels(kernel)[0])


@pytest.mark.parametrize("name", KERNELS)
def test_without_noise_a_known_picture_is_denoised_exactly(name):
    # The true velocity of (x0, eps) leads to the same x0 and eps at the next level.
    kernel = make_kernel(sampler(name, **QUIET))
    x = states(name, kernel)
    velocity = jnp.asarray(EPS - X0)
    step = kernel.step(x, velocity, *levels(kernel), first_memory(kernel))
    alpha, sigma = scales(name, kernel.levels[:, 1])
    assert distance(step.mean, alpha * X0 + sigma * EPS, alpha + sigma) < 1e-5


@pytest.mark.parametrize("name", KERNELS)
def test_levels_of_a_batch_do_not_meet(name):
    kernel = make_kernel(sampler(name))
    x, (t, s) = states(name, kernel), levels(kernel)
    velocity = jnp.asarray(EPS - X0)
    memory = first_memory(kernel)
    step = jax.jit(kernel.step)
    together = step(x, velocity, t, s, memory)
    turn = np.roll(np.arange(STEPS), 2)
    turned = step(x[turn], velocity[turn], t[turn], s[turn], memory)
    np.testing.assert_allclose(turned.mean, together.mean[turn], 1e-6, 1e-6)
    np.testing.assert_allclose(turned.std, together.std[turn], 1e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_log_prob_has_a_finite_gradient_at_every_noisy_step(name):
    kernel = make_kernel(sampler(name, last_step="stochastic"))
    noisy = np.flatnonzero(kernel.stochastic)
    x, (t, s) = states(name, kernel)[noisy], levels(kernel)[:, noisy]
    memory = jax.tree.map(lambda leaf: leaf[noisy], first_memory(kernel))
    keys = jax.random.split(jax.random.key(0), len(noisy))

    def total(velocity):
        step = kernel.step(x, velocity, t, s, memory)
        drawn = jax.lax.stop_gradient(step.sample(keys))
        return step.log_prob(drawn).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(jnp.asarray(EPS - X0)[noisy])
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert (np.abs(gradient).max((1, 2)) > 0).all()


def test_edm_remembers_the_x0_it_used():
    kernel = make_kernel(sampler("edm"))
    x, (t, s) = states("edm", kernel), levels(kernel)
    velocity = jnp.asarray(EPS - X0)
    assert kernel.remember is not None
    memory = kernel.remember(x, velocity, t)
    np.testing.assert_allclose(memory.x0, X0, atol=1e-4)
    np.testing.assert_array_equal(memory.level, t)
    # No memory, and the memory of a first step, are both the Euler step.
    none = kernel.step(x, velocity, t, s, None)
    first = kernel.step(x, velocity, t, s, first_memory(kernel))
    np.testing.assert_allclose(first.mean, none.mean, rtol=1e-6, atol=1e-6)
    # A memory of another x0 is used.
    level = 1.5 * t
    other = kernel.step(x, velocity, t, s, Memory(memory.x0 + 1.0, level))
    r = np.asarray(s / t, np.float64)
    expected = -(-np.log(r) - 1 + r) / np.log(1.5)  # - (h - 1 + e^-h) / L
    shift = np.asarray(other.mean - none.mean)
    weight = 1.0 / (1.0 + np.asarray(s))[:, None, None]  # relative to the state
    np.testing.assert_allclose(
        shift * weight, expected[:, None, None] * weight + 0 * shift, atol=2e-4
    )


@pytest.mark.parametrize("name", ["flow_grpo", "dance", "cps"])
def test_time_shift_reaches_the_grid(name):
    kernel = make_kernel(sampler(name, shift=3.0))
    s = np.linspace(1, 0, STEPS + 1)
    shifted = 3 * s / (1 + 2 * s)
    np.testing.assert_allclose(kernel.levels[:, 0], shifted[:-1], rtol=1e-12)
    np.testing.assert_allclose(kernel.levels[:, 1], shifted[1:], rtol=1e-12)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("name", ["ddim", "edm"])
def test_other_predictions_take_the_same_step(name, prediction):
    changes = {"sigma_max": 12.0, "sigma_min": 0.03} if name == "edm" else {}
    config = sampler(name, **changes)
    kernel, flow = make_kernel(config, prediction), make_kernel(config)
    x, (t, s) = states(name, kernel), levels(kernel)
    # Stable Diffusion's coordinates: variance preserving, time is the timestep.
    alpha, sigma = scales(name, kernel.levels[:, 0])
    r = np.sqrt(alpha**2 + sigma**2)
    z, time = kernel.to_network(x, t)
    np.testing.assert_allclose(z, (alpha * X0 + sigma * EPS) / r, atol=1e-5)
    if name == "ddim":
        np.testing.assert_array_equal(time, schedules.ddim_timesteps(STEPS))
    assert (np.diff(time) < 0).all() and time[0] <= 999
    truth = {"eps": EPS, "x0": X0, "v": (alpha * EPS - sigma * X0) / r}[prediction]
    memory = first_memory(kernel)
    found = kernel.step(x, jnp.asarray(truth, jnp.float32), t, s, memory)
    expected = flow.step(x, jnp.asarray(EPS - X0), t, s, memory)
    # eps from x0 divides by sigma = 0.04 at the last steps.
    assert distance(found.mean, expected.mean, 1.0) < 1e-4
    np.testing.assert_array_equal(found.std, expected.std)


@pytest.mark.parametrize(
    ("kernel", "changes", "key"),
    [
        ("ddimm", {}, "sampler.kernel"),
        ("flow_grpo", {"steps": 0}, "sampler.steps"),
        ("ddim", {"steps": 1000}, "sampler.steps"),
        ("flow_grpo", {"last_step": "none"}, "sampler.last_step"),
        ("ddim", {"window": (0, 2)}, "sampler.window"),
        ("edm", {"window": (0, 2)}, "sampler.window"),
        ("cps", {"window": (2,)}, "sampler.window"),
        ("dance", {"window": (2, 2)}, "sampler.window"),
        ("flow_grpo", {"steps": 5, "window": (0, 6)}, "sampler.window"),
        ("dance", {"shift": 0.0}, "sampler.shift"),
        ("flow_grpo", {"noise_level": -0.1}, "sampler.noise_level"),
        ("cps", {"noise_level": 1.1}, "sampler.noise_level"),
        ("ddim", {"eta": 1.1}, "sampler.eta"),
        ("dance", {"eta": -1.0}, "sampler.eta"),
        ("edm", {"churn": -1.0}, "sampler.churn"),
        ("edm", {"sigma_min": 0.0}, "sampler.sigma_min"),
        ("edm", {"sigma_max": 0.01}, "sampler.sigma_max"),
    ],
)
def test_refuses_what_no_sampler_can_do(kernel, changes, key):
    config = get_config().sampler
    config.update(kernel=kernel, **changes)
    with pytest.raises(UserError) as error:
        make_kernel(config)
    assert key in error.value.what and key in error.value.way_out


@pytest.mark.parametrize("name", ["flow_grpo", "edm"])
def test_refuses_noise_that_stable_diffusion_never_saw(name):
    with pytest.raises(UserError, match="outside the noise levels") as error:
        make_kernel(sampler(name), "eps")
    assert "sigma_max 13.3 and sampler.sigma_min 0.03" in error.value.way_out
    for steps in (2, 10, 20, 50):  # and that is accepted, with any churn
        range_ = {"sigma_max": 13.3, "sigma_min": 0.03, "churn": 99.0}
        make_kernel(sampler("edm", steps=steps, **range_), "eps")


def test_refuses_an_unknown_prediction():
    with pytest.raises(UserError, match="prediction"):
        make_kernel(sampler("ddim"), "score")


# (sampler, prediction): all that make_kernel accepts within Stable Diffusion's range.
PROGRAMS = [("ddim", p) for p in PREDICTIONS] + [(k, "velocity") for k in KERNELS]
PROGRAMS += [("edm", p) for p in PREDICTIONS if p != "velocity"]


@pytest.mark.optimised
@pytest.mark.parametrize("name, prediction", dict.fromkeys(PROGRAMS))
def test_a_step_has_the_bits_of_its_operations(name, prediction):
    """Whatever a compiler fuses: what it may contract or rewrite is fenced.

    The on-policy ratio rests on it: rollout, replay and update fuse differently.
    """
    kernel = make_kernel(sampler(name, sigma_max=12.0, sigma_min=0.03), prediction)
    random = np.random.default_rng(5)

    def draw():
        return jnp.asarray(random.normal(size=(STEPS, 16, 16, 3)), jnp.float32)

    def program(x, said, x_s, t, s, memory):
        step = kernel.step(x, said, t, s, memory)
        safe = step._replace(std=jnp.where(step.std > 0, step.std, 1.0))
        kept = None if kernel.remember is None else kernel.remember(x, said, t)
        scores = [safe.log_prob(x_s, reduction) for reduction in ("mean", "sum")]
        scores.append(squared_error_log_prob(step, x_s))
        return kernel.to_network(x, t), step, kept, scores

    t, s = levels(kernel)
    memory = None if kernel.remember is None else Memory(draw(), 1.5 * t)
    arguments = (draw(), draw(), draw(), t, s, memory)
    with jax.disable_jit():
        expected = program(*arguments)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(program)(*arguments), expected)
