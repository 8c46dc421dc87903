"""Pictures <-> the latents that a denoiser works on, with an autoencoder's weights.

The functions are `jax.tree_util.Partial`: callables whose weights are leaves. Handed
to a jitted function as an argument, they bring their weights as arguments too; closed
over, these become constants of the program.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, UInt8

from ddrl_jax.interfaces import Params
from ddrl_jax.models.vae import AutoencoderKL, Posterior, VaeConfig, decode_sliced


def make_decode(
    config: VaeConfig, params: Params, dtype: str = "float32", at_once: int = 1
) -> Partial:
    """x0 [b h w c] -> uint8 pictures [b h w 3]; keeps the decoder's half of weights.

    Args:
      config: of the autoencoder.
      params: its weights.
      dtype: of its products.
      at_once: samples decoded at a time.
    """
    network = AutoencoderKL(config, dtype)

    def decode(params: Params, x0: Float[Array, "b h w c"]) -> Any:
        def apply(z: Array) -> Any:
            return network.apply({"params": params}, z, method="decode")

        return to_uint8(decode_sliced(apply, config.unscale(x0), at_once))

    return Partial(decode, _half(params, ("decoder", "post_quant_conv")))


def make_encode_images(
    config: VaeConfig, params: Params, dtype: str = "float32", at_once: int = 1
) -> Partial:
    """uint8 [b h w 3] -> (mean, logvar) of the scaled latents; the encoder's half.

    Latents to train on are mean + exp(logvar / 2) noise. Arguments as `make_decode`.
    """
    network = AutoencoderKL(config, dtype)

    def encode(params: Params, pixels: Any) -> Posterior:
        def apply(x: Array) -> Any:
            return network.apply({"params": params}, x, method="encode")

        mean, logvar = decode_sliced(apply, to_unit(jnp.asarray(pixels)), at_once)
        shift = 2.0 * jnp.log(abs(config.scaling_factor))
        return Posterior(config.scale(mean), logvar + shift)

    return Partial(encode, _half(params, ("encoder", "quant_conv")))


def to_uint8(x: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """Pictures in [-1, 1] to uint8, clipped, rounded to nearest."""
    return jnp.round(jnp.clip(x / 2 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def to_unit(pixels: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """uint8 pictures to float32 in [-1, 1]."""
    return pixels.astype(jnp.float32) / 255.0 * 2.0 - 1.0


def _half(params: Params, parts: tuple[str, ...]) -> Params:
    kept = {name: params[name] for name in parts if name in params}
    # a plan has shapes in place of weights
    place = lambda a: a if isinstance(a, jax.ShapeDtypeStruct) else jnp.asarray(a)  # noqa: E731
    return jax.tree.map(place, kept)
