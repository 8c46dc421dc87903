"""The autoencoder of Stable Diffusion 1.x and 2.x: pictures <-> latents (Rombach 2022).

Submodules carry the names of the tensors in a diffusers file.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sized
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddrl_jax.models.layers import Dense
from ddrl_jax.models.network_config import read_config, refuse
from ddrl_jax.models.resnet import Conv, GroupNorm, ResnetBlock2D, Upsample2D

# (regular expression for the whole of a torch name, kind of the tensor)
KINDS: tuple[tuple[str, str], ...] = (
    (r"(.+\.)?(norm[12]|group_norm|conv_norm_out)\.weight", "norm"),
    (r"(.+\.)?(conv([12]|_in|_out|_shortcut)?|(post_)?quant_conv)\.weight", "conv2d"),
    (r".+\.(to_[qkv]|to_out\.0)\.weight", "linear"),
    (r".+\.bias", "bias"),
)
STACKED: tuple[str, ...] = ()
IGNORED: tuple[str, ...] = ()

NORM_EPSILON = 1e-6  # of every group norm of this network
QUERY_CHUNK = 1024  # queries attended to at once: bounds the weights to chunk x length
# exp(logvar) of an encoder gone astray stays finite, as in the reference network.
LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Sizes of the autoencoder; names and defaults are those of a diffusers folder."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "VaeConfig":
        """Reads `vae/config.json`.

        Raises:
          UserError: keys or values that this network can not honour, all listed.
        """
        given = {k: v for k, v in given.items() if (k, v) != ("shift_factor", None)}
        widths = given.get("block_out_channels", cls.block_out_channels)
        depth = len(widths) if isinstance(widths, Sized) else 0
        config = read_config(
            cls,
            "autoencoder",
            given,
            only={
                "_class_name": ("AutoencoderKL",),
                "act_fn": ("silu", "swish"),
                "down_block_types": (("DownEncoderBlock2D",) * depth,),
                "up_block_types": (("UpDecoderBlock2D",) * depth,),
                "latents_mean": (None,),
                "latents_std": (None,),
            },
            # force_upcast is about the narrow range of float16, which we never use.
            ignored=("sample_size", "force_upcast"),
        )
        refuse("autoencoder", list(config._problems()))
        return config

    def _problems(self):
        groups = self.norm_num_groups
        if any(width % groups for width in self.block_out_channels):
            yield (
                f"norm_num_groups = {groups} (a divisor of each of "
                f"block_out_channels = {list(self.block_out_channels)})"
            )
        if not self.scaling_factor:
            yield "scaling_factor = 0 (any other number)"

    @property
    def downsampling(self) -> int:
        """Pixels of the picture for one of the latent, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def scale(self, z: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        """What the encoder gives -> what the denoiser works on."""
        return (z - self.shift_factor) * self.scaling_factor

    def unscale(self, z: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        """What the denoiser works on -> what the decoder takes."""
        return z / self.scaling_factor + self.shift_factor


class Posterior(NamedTuple):
    """The Gaussian over latents of each picture, unscaled, float32."""

    mean: Float[Array, "b h w c"]
    logvar: Float[Array, "b h w c"]


class AutoencoderKL(nn.Module):
    """Pictures in [-1, 1] -> Gaussian over latents, and latents -> pictures.

    Attributes:
      config: sizes.
      dtype: of convolutions and matrix products; parameters stay float32.
    """

    config: VaeConfig
    dtype: str = "float32"

    def setup(self):
        """Two halves; each is only built by the methods that use it."""
        config = self.config
        self.encoder = _Encoder(config, self.dtype)
        self.decoder = _Decoder(config, self.dtype)
        if config.use_quant_conv:
            self.quant_conv = Conv(2 * config.latent_channels, size=1, dtype=self.dtype)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv(
                config.latent_channels, size=1, dtype=self.dtype
            )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j k"]:
        """The picture decoded from the mean of its posterior (touches every weight)."""
        return self.decode(self.encode(x).mean)

    def encode(self, x: Float[Array, "b h w c"]) -> Posterior:
        """Mean and log-variance of the latents.

        Args:
          x: pictures in [-1, 1].

        Returns:
          Posterior over [b h/f w/f latent_channels], f = config.downsampling, unscaled.
        """
        h = self.encoder(x.astype(self.dtype))
        if self.config.use_quant_conv:
            h = self.quant_conv(h)
        mean, logvar = jnp.split(h.astype(jnp.float32), 2, -1)
        return Posterior(mean, jnp.clip(logvar, *LOGVAR_RANGE))

    def decode(self, z: Float[Array, "b h w c"]) -> Float[Array, "b i j k"]:
        """Pictures of unscaled latents, about [-1, 1], float32, not clipped."""
        z = z.astype(self.dtype)
        if self.config.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z).astype(jnp.float32)


def decode_sliced(
    apply: Callable[[Array], Any], z: Float[Array, "b h w c"], at_once: int = 1
) -> Any:
    """apply(z), a few samples at a time: activations of those few are alive at once.

    Args:
      apply: a function of a batch that treats samples alone: decode, or encode.
      z: its argument.
      at_once: samples in one step, at most; the largest common divisor with `b` is
        used. A step takes every (b / at_once)-th sample, so with z split over n devices
        and at_once = n each device decodes one of its own and nothing is moved.

    Returns:
      What apply(z) returns.
    """
    few = math.gcd(at_once, z.shape[0])
    steps = z.reshape(few, -1, *z.shape[1:]).swapaxes(0, 1)
    whole = lambda y: y.swapaxes(0, 1).reshape(-1, *y.shape[2:])  # noqa: E731
    return jax.tree.map(whole, jax.lax.map(apply, steps))


# ---- blocks


class _Downsample(nn.Module):
    """A 3x3 convolution with stride 2 and zeros below and to the right only."""

    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
        init, axes = nn.initializers.lecun_normal(), (None, None, "embed", "mlp")
        zeros = nn.initializers.zeros
        return nn.Conv(
            x.shape[-1],
            (3, 3),
            strides=2,
            padding=((0, 1), (0, 1)),
            dtype=jnp.dtype(self.dtype),
            kernel_init=nn.with_partitioning(init, axes),
            bias_init=nn.with_partitioning(zeros, axes[3:]),
            name="conv",
        )(x)


class _Attention(nn.Module):
    """x + attention with one head over all positions of the group-normed x."""

    groups: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        dense = partial(Dense, c, dtype=self.dtype)
        h = GroupNorm(self.groups, NORM_EPSILON, self.dtype, name="group_norm")(x)
        h = h.reshape(b, height * width, c)
        q, k, v = (dense(("embed", "heads"), name=f"to_{n}")(h) for n in "qkv")
        h = dense(("heads", "embed"), name="to_out_0")(chunked_attention(q, k, v))
        return x + h.reshape(x.shape)


def chunked_attention(
    q: Float[Array, "b l d"],
    k: Float[Array, "b m d"],
    v: Float[Array, "b m d"],
    chunk: int = QUERY_CHUNK,
) -> Float[Array, "b l d"]:
    """softmax(q k^T / sqrt(d)) v, at most `chunk` queries at once, weights in float32.

    Above `chunk` queries the weights of one chunk are alive at a time, forward and
    backward: memory grows with the length, not with its square.
    """
    b, length, d = q.shape
    k, v = k[:, :, None], v[:, :, None]
    attend = partial(jax.nn.dot_product_attention, key=k, value=v, implementation="xla")
    if length <= chunk:
        return attend(q[:, :, None])[:, :, 0]
    rows = jnp.pad(q, ((0, 0), (0, -length % chunk), (0, 0)))
    rows = rows.reshape(b, -1, chunk, 1, d).swapaxes(0, 1)
    mixed = jax.lax.map(jax.checkpoint(attend), rows)
    return mixed.swapaxes(0, 1).reshape(b, -1, d)[:, :length]


class _Middle(nn.Module):
    """Resnet, attention, resnet at the lowest resolution."""

    config: VaeConfig
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        groups = self.config.norm_num_groups
        sizes = (self.config.block_out_channels[-1], groups, NORM_EPSILON, self.dtype)
        x = ResnetBlock2D(*sizes, name="resnets_0")(x)
        if self.config.mid_block_add_attention:
            x = _Attention(groups, self.dtype, name="attentions_0")(x)
        return ResnetBlock2D(*sizes, name="resnets_1")(x)


class _Block(nn.Module):
    """A few resnets of one width, and the change of resolution after them."""

    features: int
    layers: int
    groups: int
    resize: str  # "down", "up" or "" for none
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        sizes = (self.features, self.groups, NORM_EPSILON, self.dtype)
        for i in range(self.layers):
            x = ResnetBlock2D(*sizes, name=f"resnets_{i}")(x)
        if self.resize == "down":
            x = _Downsample(self.dtype, name="downsamplers_0")(x)
        if self.resize == "up":
            size = (2 * x.shape[1], 2 * x.shape[2])
            x = Upsample2D(self.dtype, name="upsamplers_0")(x, size)
        return x


class _Encoder(nn.Module):
    config: VaeConfig
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        c, widths = self.config, self.config.block_out_channels
        x = Conv(widths[0], dtype=self.dtype, name="conv_in")(x)
        for i, width in enumerate(widths):
            resize = "down" if i < len(widths) - 1 else ""
            sizes = (width, c.layers_per_block, c.norm_num_groups, resize, self.dtype)
            x = _Block(*sizes, name=f"down_blocks_{i}")(x)
        x = _Middle(c, self.dtype, name="mid_block")(x)
        return _out(c, 2 * c.latent_channels, self.dtype, x)


class _Decoder(nn.Module):
    config: VaeConfig
    dtype: str

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        c, widths = self.config, self.config.block_out_channels[::-1]
        z = Conv(widths[0], dtype=self.dtype, name="conv_in")(z)
        z = _Middle(c, self.dtype, name="mid_block")(z)
        for i, width in enumerate(widths):
            resize = "up" if i < len(widths) - 1 else ""
            layers = c.layers_per_block + 1
            sizes = (width, layers, c.norm_num_groups, resize, self.dtype)
            z = _Block(*sizes, name=f"up_blocks_{i}")(z)
        return _out(c, c.out_channels, self.dtype, z)


def _out(config: VaeConfig, features: int, dtype: str, x: Array) -> Array:
    """conv(silu(norm(x))), the end of both halves."""
    norm = (config.norm_num_groups, NORM_EPSILON, dtype)
    x = nn.silu(GroupNorm(*norm, name="conv_norm_out")(x))
    return Conv(features, dtype=dtype, name="conv_out")(x)
