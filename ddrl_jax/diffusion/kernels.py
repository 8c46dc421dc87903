"""Samplers as values: `make_kernel` turns the sampler's config into a `Kernel`.

| kernel    | level (t, s)             | state | starts at      | steps with noise   |
|-----------|--------------------------|-------|----------------|--------------------|
| ddim      | alpha_bar                | VP    | N(0, 1)        | all (eta > 0)      |
| flow_grpo | sigma of the flow        | flow  | N(0, 1)        | all but last_step  |
| dance     | sigma of the flow        | flow  | N(0, 1)        | all but last_step  |
| cps       | sigma of the flow        | flow  | N(0, 1)        | all but the last   |
| edm       | sigma_hat_i, sigma_{i+1} | VE    | N(0, first t^2) | all but the last  |

VP is sqrt(abar) x0 + sqrt(1 - abar) eps, flow (1 - sigma) x0 + sigma eps, VE
x0 + sigma eps. The state of the kernel and the input of the network are two things:
`to_network` rescales the one to the other, and `step` reads the prediction there.
A velocity network sees flow coordinates, (z, time = sigma); a network that predicts
eps, x0 or v sees VP coordinates and the (fractional) timestep of Stable Diffusion.

The three of the flow have noise within `sampler.window` only, where one is given.
Where a step has no noise its std is exactly 0 and `stochastic` is False. The last
state is returned as the sample: exact data for the flow kernels, while ddim leaves
noise of std 0.029 (alpha_bar_0) and edm of std sigma_min in it.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ddrl_jax.diffusion import schedules
from ddrl_jax.diffusion.ddim import ddim_step
from ddrl_jax.diffusion.edm import churn_eta, churned_ab2_step, churned_levels
from ddrl_jax.diffusion.flow_sde import cps_step, dance_step, flow_grpo_step
from ddrl_jax.diffusion.gaussian import Gaussian
from ddrl_jax.diffusion.prediction import convert
from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Kernel, Memory

PREDICTIONS = ("velocity", "eps", "x0", "v")

# (x, prediction, t, target) -> the quantity `target` at the state x of level t
_Read = Callable[[Array, Array, Array, str], Array]


def make_kernel(sampler: Any, prediction: str = "velocity") -> Kernel:
    """The sampler that the config names, for a network that predicts `prediction`.

    Args:
      sampler: `config.sampler`: kernel, steps, noise_level, eta, churn, sigma_max,
        sigma_min, shift, last_step, window.
      prediction: "velocity" for a rectified-flow network; "eps", "x0" or "v" for one
        of Stable Diffusion's schedule.

    Returns:
      The kernel. Its functions take levels t, s of shape [b], which may differ between
      samples, and are the same in rollout and replay.

    Raises:
      UserError: for a value that no sampler can work with.
    """
    _check(sampler, prediction)
    build, state = _KERNELS[sampler.kernel]
    kernel = build(sampler, _reader(state, prediction))
    if prediction != "velocity":
        _check_range(kernel.levels[:, 0], state, prediction)
    return kernel._replace(to_network=_to_network(state, prediction))


def _view(
    x: Array, t: Array, state: schedules.Process, network: schedules.Process
) -> tuple[Array, Array]:
    """The state and its level in the network's coordinates."""
    if state is network:  # untouched: no rounding of alpha + sigma enters
        return jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.float32)
    to = schedules.to_flow if network is schedules.FLOW else schedules.to_vp
    return to(x, *state.scales(jnp.asarray(t, jnp.float32)))


def _network(prediction: str) -> schedules.Process:
    return schedules.FLOW if prediction == "velocity" else schedules.VP


def _to_network(state: schedules.Process, prediction: str) -> Callable:
    network = _network(prediction)

    def to_network(x: Array, t: Array) -> tuple[Array, Array]:
        z, level = _view(x, t, state, network)
        flow = network is schedules.FLOW
        return z, level if flow else schedules.sd_timestep(level)

    return to_network


def _reader(state: schedules.Process, source: str) -> _Read:
    network = _network(source)

    def read(x: Array, prediction: Array, t: Array, target: str) -> Array:
        z, level = _view(x, t, state, network)
        return convert(prediction, z, source, target, *network.scales(level))

    return read


def _pairs(grid: np.ndarray) -> np.ndarray:
    return np.stack([grid[:-1], grid[1:]], axis=1)


def _kernel(levels: np.ndarray, step: Callable, stochastic: Any, **rest: Any) -> Kernel:
    noisy = np.broadcast_to(np.asarray(stochastic, bool), levels.shape[:1]).copy()
    return Kernel(
        levels=levels,
        init_scale=rest.get("init_scale", 1.0),
        to_network=lambda x, t: (x, t),  # set by make_kernel
        step=step,
        remember=rest.get("remember"),
        stochastic=noisy,
    )


def _ddim(sampler: Any, read: _Read) -> Kernel:
    eta = float(sampler.eta)

    def step(x: Array, prediction: Array, t: Array, s: Array, memory: Any) -> Gaussian:
        return ddim_step(x, read(x, prediction, t, "eps"), t, s, eta)

    return _kernel(schedules.ddim_levels(sampler.steps), step, eta > 0.0)


def _noise(sampler: Any, amount: float, quiet_end: bool) -> tuple[Callable, np.ndarray]:
    """The noise amount as a function of the next sigma, and the steps that have it.

    Steps outside of `sampler.window` are those of the ODE (MixGRPO, Li et al. 2025).
    """
    sigmas = schedules.flow_sigmas(sampler.steps, sampler.shift)
    start, stop = sampler.window or (0, sampler.steps)
    stop = min(stop, sampler.steps - 1) if quiet_end else stop
    stochastic = np.zeros(sampler.steps, bool)
    stochastic[start:stop] = amount > 0.0
    # Half way between the next sigmas of steps with noise and of those without
    between = np.concatenate([[np.inf], (sigmas[1:-1] + sigmas[2:]) / 2, [-np.inf]])
    high, low = float(between[start]), float(between[stop])
    return lambda s: jnp.where((low < s) & (s < high), amount, 0.0), stochastic


def _flow_grpo(sampler: Any, read: _Read) -> Kernel:
    sigmas = schedules.flow_sigmas(sampler.steps, sampler.shift)
    quiet = sampler.last_step == "deterministic"
    amount, stochastic = _noise(sampler, float(sampler.noise_level), quiet)
    second = float(sigmas[1])

    def step(x: Array, prediction: Array, t: Array, s: Array, memory: Any) -> Gaussian:
        velocity = read(x, prediction, t, "velocity")
        return flow_grpo_step(x, velocity, t, s, amount(s), second)

    return _kernel(_pairs(sigmas), step, stochastic)


def _dance(sampler: Any, read: _Read) -> Kernel:
    sigmas = schedules.flow_sigmas(sampler.steps, sampler.shift)
    quiet = sampler.last_step == "deterministic"
    amount, stochastic = _noise(sampler, float(sampler.eta), quiet)

    def step(x: Array, prediction: Array, t: Array, s: Array, memory: Any) -> Gaussian:
        return dance_step(x, read(x, prediction, t, "velocity"), t, s, amount(s))

    return _kernel(_pairs(sigmas), step, stochastic)


def _cps(sampler: Any, read: _Read) -> Kernel:
    levels = _pairs(schedules.flow_sigmas(sampler.steps, sampler.shift))
    amount, stochastic = _noise(sampler, float(sampler.noise_level), quiet_end=True)

    def step(x: Array, prediction: Array, t: Array, s: Array, memory: Any) -> Gaussian:
        return cps_step(x, read(x, prediction, t, "velocity"), t, s, amount(s))

    return _kernel(levels, step, stochastic)


def _edm(sampler: Any, read: _Read) -> Kernel:
    n = sampler.steps
    eta = churn_eta(float(sampler.churn), n)
    sigmas = schedules.karras_sigmas(n, sampler.sigma_max, sampler.sigma_min)
    levels = churned_levels(sigmas, eta)
    last = np.float32(levels[-1, 1])  # as the levels arrive in `step`

    def step(
        x: Array, prediction: Array, t: Array, s: Array, memory: Memory | None
    ) -> Gaussian:
        before = (None, None) if memory is None else memory
        x0 = read(x, prediction, t, "x0")
        # Nothing follows the last step, so nothing is churned: its result is the mean.
        churn = jnp.where(s <= last, 0.0, eta)
        return churned_ab2_step(x, x0, *before, t, s, churn)

    def remember(x: Array, prediction: Array, t: Array) -> Memory:
        return Memory(read(x, prediction, t, "x0"), jnp.asarray(t, jnp.float32))

    stochastic = (np.arange(n) < n - 1) & (eta > 0.0)
    start = float(levels[0, 0])
    return _kernel(levels, step, stochastic, init_scale=start, remember=remember)


_KERNELS: dict[str, tuple[Callable[[Any, _Read], Kernel], schedules.Process]] = {
    "ddim": (_ddim, schedules.VP),
    "flow_grpo": (_flow_grpo, schedules.FLOW),
    "dance": (_dance, schedules.FLOW),
    "cps": (_cps, schedules.FLOW),
    "edm": (_edm, schedules.VE),
}
KERNELS = _KERNELS.keys()  # a view: a row that is added later is in it


def _require(ok: bool, key: str, got: object, wanted: str) -> None:
    if not ok:
        raise UserError(
            f"{key} is out of range",
            got=got,
            wanted=wanted,
            way_out=f"set {key} to a value in that range",
        )


def _check(sampler: Any, prediction: str) -> None:
    kernel, steps = sampler.kernel, sampler.steps
    names = ", ".join(KERNELS)
    _require(kernel in KERNELS, "sampler.kernel", kernel, f"one of {names}")
    _require(prediction in PREDICTIONS, "prediction", prediction, f"{PREDICTIONS}")
    most = schedules.TRAIN_STEPS - 1 if kernel == "ddim" else 100_000
    _require(1 <= steps <= most, "sampler.steps", steps, f"1 to {most}")
    ends = ("stochastic", "deterministic")
    last = sampler.last_step
    _require(last in ends, "sampler.last_step", last, f"one of {ends}")
    _check_window(sampler)
    _require(sampler.shift > 0.0, "sampler.shift", sampler.shift, "above 0")
    if kernel in ("flow_grpo", "cps"):
        a, high = sampler.noise_level, 1.0 if kernel == "cps" else np.inf
        _require(0.0 <= a <= high, "sampler.noise_level", a, f"0 to {high}")
    if kernel in ("ddim", "dance"):
        high = 1.0 if kernel == "ddim" else np.inf
        _require(0.0 <= sampler.eta <= high, "sampler.eta", sampler.eta, f"0 to {high}")
    if kernel == "edm":
        low, high = sampler.sigma_min, sampler.sigma_max
        _require(sampler.churn >= 0.0, "sampler.churn", sampler.churn, "0 or more")
        _require(low > 0.0, "sampler.sigma_min", low, "above 0")
        _require(high > low, "sampler.sigma_max", high, f"above sigma_min = {low}")


def _check_window(sampler: Any) -> None:
    window, flow = tuple(sampler.window), ("flow_grpo", "dance", "cps")
    if not window:
        return
    _require(
        sampler.kernel in flow,
        "sampler.window",
        f"{window} with sampler.kernel {sampler.kernel}",
        f"() but for the kernels {', '.join(flow)}",
    )
    _require(
        len(window) == 2 and 0 <= window[0] < window[1] <= sampler.steps,
        "sampler.window",
        window,
        f"(first, stop) with 0 <= first < stop <= sampler.steps = {sampler.steps}",
    )


def _check_range(levels: np.ndarray, state: schedules.Process, prediction: str) -> None:
    """Refuses noise levels that a network of Stable Diffusion's schedule never saw."""
    alpha, sigma = (np.asarray(scale) for scale in state.scales(jnp.asarray(levels)))
    alpha_bars = alpha**2 / (alpha**2 + sigma**2)
    trained = schedules.sd_alpha_bars()
    # The schedule's own ends pass through float32, hence the slack of a few ulp.
    low, high = trained[-1] * (1 - 1e-6), trained[0] + 1e-6
    if alpha_bars.min() < low or alpha_bars.max() > high:
        raise UserError(
            f"this sampler asks a network that predicts {prediction} outside the noise "
            "levels of Stable Diffusion's schedule",
            got=f"alpha_bar from {alpha_bars.min():.6g} to {alpha_bars.max():.6g}",
            wanted=f"alpha_bar from {trained[-1]:.6g} to {trained[0]:.6g}",
            # churn raises sigma_max by at most 9.54 %, to the schedule's 14.6
            way_out="use sampler.kernel = ddim, or edm with sampler.sigma_max 13.3 and "
            "sampler.sigma_min 0.03",
        )
