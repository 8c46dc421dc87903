"""A whole DDIM walk with guidance, by our pipeline and by one of diffusers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from ddrl_jax.diffusion.kernels import make_kernel
from ddrl_jax.rollout import guided

STEPS, GUIDANCE = 4, 5.0


def ours(
    pipeline: Any, params: Any, lora: Any, noise: np.ndarray, prompts: list[str]
) -> tuple[jax.Array, list[float]]:
    """Deterministic DDIM with guidance: (latents, timesteps the network saw)."""
    sampler = base.get_config().sampler
    sampler.kernel, sampler.steps, sampler.eta = "ddim", STEPS, 0.0
    kernel = make_kernel(sampler, pipeline.prediction)
    cond = pipeline.encode(prompts)

    @jax.jit
    def step(params, lora, x, t, s):
        policy = guided(
            lambda z, time, c: pipeline.denoise(params, lora, z, time, c),
            pipeline.uncond,
            GUIDANCE,
        )
        z, time = kernel.to_network(x, t)
        return kernel.step(x, policy(z, time, cond), t, s, None).mean, time

    x, seen = jnp.asarray(noise), []
    for level in kernel.levels.astype(np.float32):
        x, time = step(params, lora, x, *np.repeat(level[:, None], len(noise), 1))
        seen.append(float(time[0]))
    return x, seen


def theirs(pipe: Any, noise: np.ndarray, prompts: list[str], output: str) -> np.ndarray:
    """The same by a StableDiffusionPipeline: "latent", or "np" for its pictures.

    Returns:
      [b h w c]; pictures within 0 to 1.
    """
    import torch
    from diffusers import DDIMScheduler

    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    found = pipe(
        prompts,
        latents=torch.tensor(np.moveaxis(noise, -1, 1)),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        eta=0.0,
        output_type=output,
    ).images
    return np.moveaxis(found.numpy(), 1, -1) if output == "latent" else found
