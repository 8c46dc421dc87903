"""The UNet of Stable Diffusion 1.x and 2.x (Rombach 2022), PyTorch names and numbers.

What it predicts, eps or v, is written in the scheduler of the checkpoint, not here.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ddrl_jax.models.layers import Dense
from ddrl_jax.models.resnet import Conv, GroupNorm
from ddrl_jax.models.unet_blocks import DownBlock, MidBlock, Style, UpBlock
from ddrl_jax.models.unet_config import UNetConfig

__all__ = ["IGNORED", "KINDS", "STACKED", "UNet2DConditionModel", "UNetConfig"]

# What each tensor of a checkpoint is. proj_in and proj_out are 1x1 convolutions in
# Stable Diffusion 1 and linear layers in 2; their rank says which.
KINDS: tuple[tuple[str, str], ...] = (
    (r".*\.bias", "bias"),
    (r"conv_norm_out\.weight|.*\.(norm|norm[123])\.weight", "norm"),
    (r"(.*\.)?(conv|conv[12]|conv_in|conv_out|conv_shortcut)\.weight", "conv2d"),
    (r".*\.(proj_in|proj_out)\.weight", "conv2d"),
    (r".*\.(linear_[12]|time_emb_proj|to_[qkv]|to_out\.0)\.weight", "linear"),
    (r".*\.ff\.net\.(0\.proj|2)\.weight", "linear"),
)
STACKED: tuple[str, ...] = ()
IGNORED: tuple[str, ...] = ()
# Parameters used in float32 whatever the dtype: norms, time and the last layer.
PRECISE = r"(.*/)?(norm\d?|conv_norm_out|time_embedding|conv_out)/.*"
PERIOD = 10000.0  # the slowest time feature has this period over 2 pi


class UNet2DConditionModel(nn.Module):
    """(latent, timestep, text states) -> prediction.

    Attributes:
      config: of the checkpoint.
      dtype: of the products; parameters, norms and the softmax are float32.
      remat: what resnets and transformers keep for the backward pass, a policy of
        models.remat.
      rank: LoRA rank in the attention, 0 for none.
      alpha: LoRA alpha, 0 for the rank.
      impl: attention implementation.
      mesh: on which it runs; None is one device.
    """

    config: UNetConfig
    dtype: str = "float32"
    remat: str = "none"
    rank: int = 0
    alpha: float = 0.0
    impl: str = "xla"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        timesteps: Float[Array, " b"],
        emb: Float[Array, "b l d"],
    ) -> Float[Array, "b h w o"]:
        """Predicts eps or v in float32.

        Args:
          x: noisy latents of any size; halves are rounded up on the way down, and the
            way up returns to the sizes of the way down.
          timesteps: 0 .. 999, fractions allowed.
          emb: hidden states of the text encoder.
        """
        c = self.config
        x = 2 * x - 1 if c.center_input_sample else x
        temb, emb = self._time(timesteps), emb.astype(self.dtype)
        first, last = c.block_out_channels[0], c.block_out_channels[-1]
        made = {"dtype": self.dtype, "mesh": self.mesh}
        skips = [Conv(first, name="conv_in", **made)(x)]
        skips += self._down(skips[0], temb, emb)
        middle = MidBlock(self._style(), last, c.heads[-1], name="mid_block")
        x = self._up(middle(skips[-1], temb, emb), skips, temb, emb)
        norm = GroupNorm(c.norm_num_groups, c.norm_eps, name="conv_norm_out")
        # The last layer costs nothing in float32, and its rounding would go straight
        # into the log-probability.
        axes = ("mlp", "embed")
        out = Conv(c.out_channels, axes=axes, mesh=self.mesh, name="conv_out")
        return out(jax.nn.silu(norm(x)))

    def _style(self) -> Style:
        c = self.config
        return Style(
            groups=c.norm_num_groups,
            epsilon=c.norm_eps,
            linear_projection=c.use_linear_projection,
            transformer_layers=c.transformer_layers_per_block,
            dtype=self.dtype,
            remat=self.remat,
            rank=self.rank,
            alpha=self.alpha,
            impl=self.impl,
            mesh=self.mesh,
        )

    def _time(self, timesteps: Array) -> Array:
        c = self.config
        features = timestep_features(
            timesteps, c.block_out_channels[0], c.flip_sin_to_cos, float(c.freq_shift)
        )
        width = 4 * c.block_out_channels[0]
        return TimestepEmbedding(width, self.mesh, name="time_embedding")(features)

    def _down(self, x: Array, temb: Array, emb: Array) -> list[Array]:
        """The pictures of all levels on the way down, in order."""
        c, pictures = self.config, [x]
        for i, kind in enumerate(c.down_block_types):
            block = DownBlock(
                self._style(),
                c.block_out_channels[i],
                c.heads[i] if kind.startswith("CrossAttn") else 0,
                c.only_cross[i],
                layers=c.layers_per_block,
                downsample=i < len(c.down_block_types) - 1,
                name=f"down_blocks_{i}",
            )
            pictures += block(pictures[-1], temb, emb)
        return pictures[1:]

    def _up(self, x: Array, skips: list[Array], temb: Array, emb: Array) -> Array:
        """Uses up the pictures of the way down, the last one first."""
        c, left = self.config, list(skips)
        for i, kind in enumerate(c.up_block_types):
            level = len(c.up_block_types) - 1 - i
            block = UpBlock(
                self._style(),
                c.block_out_channels[level],
                c.heads[level] if kind.startswith("CrossAttn") else 0,
                c.only_cross[level],
                name=f"up_blocks_{i}",
            )
            used = [left.pop() for _ in range(c.layers_per_block + 1)]
            size = (left[-1].shape[1], left[-1].shape[2]) if left else None
            x = block(x, temb, emb, used, size)
        return x


class TimestepEmbedding(nn.Module):
    """Two linear layers with a silu between, in float32: they are the same for every
    pixel, so precision is free."""

    features: int
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b o"]:
        """Embeds time features."""
        up, down, mesh = ("embed", "mlp"), ("mlp", "embed"), self.mesh
        h = jax.nn.silu(Dense(self.features, up, mesh=mesh, name="linear_1")(x))
        return Dense(self.features, down, mesh=mesh, name="linear_2")(h)


def timestep_features(
    timesteps: Float[Array, " b"], width: int, flip_sin_to_cos: bool, freq_shift: float
) -> Float[Array, "b {width}"]:
    """sin and cos of timestep / 10000^(i / (width / 2 - shift)), float32 (Ho 2020).

    The frequencies are rounded where the published networks round them (exponent, then
    power): at timestep 999 one unit in the last place is an angle of 6e-5.

    Args:
      timesteps: times.
      width: number of features, even.
      flip_sin_to_cos: cosines come first.
      freq_shift: taken from the number of frequencies in the exponent.
    """
    half = width // 2
    steps = np.arange(half, dtype=np.float32)
    exponent = np.float32(-math.log(PERIOD)) * steps / np.float32(half - freq_shift)
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angle = timesteps.astype(jnp.float32)[:, None] * frequency
    parts = [jnp.sin(angle), jnp.cos(angle)]
    return jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)
