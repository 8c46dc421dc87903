"""Convolutions, group norm and the residual block of the Stable Diffusion networks.

Names of modules and parameters follow the published checkpoints.
"""

from contextlib import AbstractContextManager, nullcontext

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ddrl_jax.interfaces import ON_EACH
from ddrl_jax.models.context_parallel import CONTEXT, divided
from ddrl_jax.models.convolution import convolve
from ddrl_jax.models.layers import Dense, gathered, weight
from ddrl_jax.models.remat import mark


class Conv(nn.Module):
    """A square convolution with a rim of zeros, so that stride 1 keeps the size.

    Attributes:
      features: channels of the output.
      size: 1 or 3 pixels.
      stride: 1 or 2.
      axes: logical names of the two channel axes.
      dtype: of the product; parameters stay float32.
      mesh: on which it runs; None is one device.
    """

    features: int
    size: int = 3
    stride: int = 1
    axes: tuple[str, str] = ("embed", "mlp")
    dtype: str = "float32"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        """Applies the layer; the result has its dtype."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        init = nn.initializers.xavier_uniform()
        kernel = weight(self, "kernel", init, shape, (None, None, *self.axes))
        bias = weight(
            self, "bias", nn.initializers.zeros, (self.features,), self.axes[1:]
        )
        x, kernel = jnp.asarray(x, self.dtype), jnp.asarray(kernel, self.dtype)
        kernel = gathered(kernel, (None, None, *self.axes), self.mesh)
        with _counted(self.mesh):
            if self.size == 1 and self.stride == 1:
                y = (x.reshape(-1, shape[2]) @ kernel[0, 0]).reshape(*x.shape[:3], -1)
            else:
                y = convolve(x, kernel, self.stride)
        return y + gathered(bias.astype(self.dtype), self.axes[1:], self.mesh)


def _counted(mesh: Mesh | None) -> AbstractContextManager:
    """Of pictures every device of a context axis has all pixels: it convolves them all.

    A jaxpr has the shapes of the whole mesh; what counts it is told so.
    """
    if mesh is None or not divided(mesh):
        return nullcontext()
    return jax.named_scope(f"{ON_EACH}{mesh.shape[CONTEXT]}")


class GroupNorm(nn.Module):
    """(x - mean) / sqrt(var + epsilon) over each group of channels (Wu 2018, Eq. 1).

    The statistics are in float32 and of two passes: E[x^2] - E[x]^2 loses what a
    large mean leaves.

    Attributes:
      groups: number of groups, divides the channels.
      epsilon: added to the variance.
      dtype: of the result.
    """

    groups: int
    epsilon: float
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Normalises each sample on its own."""
        b, h, w, c = x.shape
        wide = x.astype(jnp.float32).reshape(b, h * w, self.groups, c // self.groups)
        centred = wide - jnp.mean(wide, (1, 3), keepdims=True)
        variance = jnp.mean(jnp.square(centred), (1, 3), keepdims=True)
        normal = (centred * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        scale = weight(self, "scale", nn.initializers.ones, (c,), (None,))
        bias = weight(self, "bias", nn.initializers.zeros, (c,), (None,))
        return (normal * scale + bias).astype(self.dtype)


class ResnetBlock2D(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))), both norms in groups.

    Attributes:
      features: channels of the output; a 1x1 convolution fits the shortcut to them.
      groups: of the norms.
      epsilon: of the norms.
      dtype: of the products.
      mesh: on which it runs; None is one device.
    """

    features: int
    groups: int
    epsilon: float
    dtype: str = "float32"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w i"], temb: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b h w o"]:
        """Applies the block; without `temb` it has no time projection."""
        up, down = ("embed", "mlp"), ("mlp", "embed")
        norm = (self.groups, self.epsilon, self.dtype)
        h = jax.nn.silu(GroupNorm(*norm, name="norm1")(x))
        made = {"dtype": self.dtype, "mesh": self.mesh}
        h = Conv(self.features, axes=up, name="conv1", **made)(h)
        h = mark(h, "convolution")
        if temb is not None:
            time = Dense(self.features, up, name="time_emb_proj", **made)
            h = h + time(jax.nn.silu(temb))[:, None, None, :]
        h = jax.nn.silu(GroupNorm(*norm, name="norm2")(h))
        h = Conv(self.features, axes=down, name="conv2", **made)(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, size=1, name="conv_shortcut", **made)(x)
        return x + h


class Downsample2D(nn.Module):
    """A 3x3 convolution with stride 2: [h w] -> [(h + 1) // 2, (w + 1) // 2]."""

    dtype: str = "float32"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Halves the picture."""
        made = {"dtype": self.dtype, "mesh": self.mesh}
        return Conv(x.shape[-1], stride=2, name="conv", **made)(x)


class Upsample2D(nn.Module):
    """Each pixel becomes 2x2 equal ones, cut to a size; then a 3x3 convolution."""

    dtype: str = "float32"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], size: tuple[int, int]
    ) -> Float[Array, "b h2 w2 c"]:
        """Doubles the picture.

        Args:
          x: picture.
          size: height and width of the result, twice those of x or one pixel less:
            what was odd before it was halved.
        """
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, : size[0], : size[1]]
        made = {"dtype": self.dtype, "mesh": self.mesh}
        return Conv(x.shape[-1], name="conv", **made)(x)
