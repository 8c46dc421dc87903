"""The blocks of the Stable Diffusion UNet: transformers on pixels, down, middle, up.

Names of modules follow the published checkpoints; `x` is a picture [b h w c].
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ddrl_jax.models.attention import attention
from ddrl_jax.models.context_parallel import divided
from ddrl_jax.models.layers import Dense, weight
from ddrl_jax.models.remat import mark, remat
from ddrl_jax.models.resnet import (
    Conv,
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    Upsample2D,
)
from ddrl_jax.sharding import constrain

LAYER_NORM_EPSILON = 1e-5  # of the transformers, whatever the resnets have
TRANSFORMER_NORM_EPSILON = 1e-6  # of the group norm before a transformer
PICTURE, TOKENS = ("batch",), ("batch", "length")  # what a mesh divides


class Style(NamedTuple):
    """What all blocks of one network share.

    Attributes:
      groups: of the group norms.
      epsilon: of the group norms of the resnets.
      linear_projection: linear layers around a transformer, not 1x1 convolutions.
      transformer_layers: of each transformer.
      dtype: of the products.
      remat: what resnets and transformers keep for the backward pass.
      rank: of LoRA in the attention, 0 for none.
      alpha: of LoRA.
      impl: of the attention.
      mesh: on which it runs; None is one device.
    """

    groups: int
    epsilon: float
    linear_projection: bool
    transformer_layers: int
    dtype: str
    remat: str
    rank: int
    alpha: float
    impl: str
    mesh: Mesh | None


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + epsilon) over the last axis, in float32 (Ba 2016)."""

    dtype: str = "float32"
    epsilon: float = LAYER_NORM_EPSILON

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Normalises each row on its own."""
        wide, shape = x.astype(jnp.float32), x.shape[-1:]
        centred = wide - jnp.mean(wide, -1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), -1, keepdims=True)
        scale = weight(self, "scale", nn.initializers.ones, shape, (None,))
        bias = weight(self, "bias", nn.initializers.zeros, shape, (None,))
        normal = centred * jax.lax.rsqrt(variance + self.epsilon)
        return (normal * scale + bias).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head attention of x over a context; LoRA in all four projections."""

    heads: int
    style: Style

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], context: Float[Array, "b k e"]
    ) -> Float[Array, "b l d"]:
        """Mixes values of the context; no bias before, one after."""
        s, width = self.style, x.shape[-1]
        made = {"dtype": s.dtype, "mesh": s.mesh, "rank": s.rank, "alpha": s.alpha}

        def split(name: str, rows: Array) -> Array:
            axes = ("embed", "heads")
            layer = Dense(width, axes, use_bias=False, name=name, **made)
            return layer(rows).reshape(*rows.shape[:2], self.heads, -1)

        q, k, v = split("to_q", x), split("to_k", context), split("to_v", context)
        mixed = attention(q, k, v, impl=s.impl, mesh=s.mesh).reshape(x.shape)
        return Dense(width, ("heads", "embed"), name="to_out_0", **made)(mixed)


class GEGLU(nn.Module):
    """a * gelu(b) with (a, b) halves of a linear layer (Shazeer 2020, Eq. 6)."""

    features: int
    dtype: str = "float32"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b f"]:
        """Applies the layer with the exact gelu."""
        made = {"dtype": self.dtype, "mesh": self.mesh}
        both = Dense(2 * self.features, ("embed", "mlp"), name="proj", **made)(x)
        value, gate = jnp.split(both, 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """A gated layer of four times the width and back."""

    dtype: str = "float32"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Applies both layers; the net.1 of checkpoints is a dropout, no weights."""
        made = {"dtype": self.dtype, "mesh": self.mesh}
        h = GEGLU(4 * x.shape[-1], name="net_0", **made)(x)
        return Dense(x.shape[-1], ("mlp", "embed"), name="net_2", **made)(h)


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention over the text and a feed-forward layer, pre-norm.

    Attributes:
      heads: of both attentions.
      style: of the network.
      only_cross: the first attention reads the text too.
    """

    heads: int
    style: Style
    only_cross: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], emb: Float[Array, "b k e"]
    ) -> Float[Array, "b l d"]:
        """Applies the block to the pixels as rows."""
        dtype, mesh = self.style.dtype, self.style.mesh
        h = LayerNorm(dtype, name="norm1")(x)
        context = emb if self.only_cross else h
        mixed = Attention(self.heads, self.style, name="attn1")(h, context)
        x = x + mark(mixed, "attention")
        h = LayerNorm(dtype, name="norm2")(x)
        mixed = Attention(self.heads, self.style, name="attn2")(h, emb)
        x = x + mark(mixed, "attention")
        h = LayerNorm(dtype, name="norm3")(x)
        return x + mark(FeedForward(dtype, mesh, name="ff")(h), "mlp")


class Transformer2DModel(nn.Module):
    """x + proj_out(blocks(proj_in(norm(x)))) with the pixels of x as rows."""

    heads: int
    style: Style
    only_cross: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b l d"]
    ) -> Float[Array, "b h w c"]:
        """Applies the transformer at one resolution."""
        s, (b, h, w, c) = self.style, x.shape
        x = _placed(x, PICTURE, s.mesh)
        norm = GroupNorm(s.groups, TRANSFORMER_NORM_EPSILON, s.dtype, name="norm")
        rows = self._project("proj_in", ("embed", "mlp"), norm(x)).reshape(b, -1, c)
        rows = _placed(rows, TOKENS, s.mesh)
        for i in range(s.transformer_layers):
            name = f"transformer_blocks_{i}"
            block = BasicTransformerBlock(self.heads, s, self.only_cross, name=name)
            rows = block(rows, emb)
        out = _placed(rows, PICTURE, s.mesh).reshape(b, h, w, c)
        out = self._project("proj_out", ("mlp", "embed"), out)
        return x + _placed(out, PICTURE, s.mesh)

    def _project(self, name: str, axes: tuple[str, str], x: Array) -> Array:
        made = {"dtype": self.style.dtype, "mesh": self.style.mesh, "name": name}
        if self.style.linear_projection:
            return Dense(x.shape[-1], axes, **made)(x)
        return Conv(x.shape[-1], size=1, axes=axes, **made)(x)


def _placed(x: Array, axes: tuple, mesh: Mesh | None) -> Array:
    """Says where activations live; nothing without a context axis to choose about.

    Of pictures every device of that axis has all pixels. Left open, XLA hands the
    layout of the tokens on to the convolutions, and where a picture is small these come
    out wrong (jax 0.10.2): in a loop, of 2 rows, or of 4 with stride 2, that lie on
    several devices.
    """
    return x if mesh is None or not divided(mesh) else constrain(x, axes, mesh)


class Layers(nn.Module):
    """Base of the blocks: resnets and transformers, recomputed where wanted.

    Attributes:
      style: of the network.
      features: channels of the block.
      heads: of its transformers; 0: the block has none.
      only_cross: its self-attention reads the text too.
    """

    style: Style
    features: int
    heads: int
    only_cross: bool = False

    def resnet(self, index: int, x: Array, temb: Array) -> Array:
        """Applies resnets.index; to be called in a compact method."""
        s = self.style
        sizes = (self.features, s.groups, s.epsilon)
        block = remat(ResnetBlock2D, s.remat)
        return block(*sizes, s.dtype, s.mesh, name=f"resnets_{index}")(x, temb)

    def attend(self, index: int, x: Array, emb: Array) -> Array:
        """Applies attentions.index, if the block has transformers."""
        if not self.heads:
            return x
        block = remat(Transformer2DModel, self.style.remat)
        name = f"attentions_{index}"
        return block(self.heads, self.style, self.only_cross, name=name)(x, emb)


class DownBlock(Layers):
    """DownBlock2D, or with heads CrossAttnDownBlock2D.

    Attributes:
      layers: number of resnets.
      downsample: halve the picture at the end.
    """

    layers: int = 2
    downsample: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w i"],
        temb: Float[Array, "b t"],
        emb: Float[Array, "b l d"],
    ) -> list[Array]:
        """Returns the picture after each layer and after halving; the last goes on."""
        pictures = []
        for i in range(self.layers):
            x = self.attend(i, self.resnet(i, x, temb), emb)
            pictures.append(x)
        if self.downsample:
            down = Downsample2D(
                self.style.dtype, self.style.mesh, name="downsamplers_0"
            )
            pictures.append(down(x))
        return pictures


class MidBlock(Layers):
    """UNetMidBlock2DCrossAttn: resnet, transformer, resnet."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        temb: Float[Array, "b t"],
        emb: Float[Array, "b l d"],
    ) -> Float[Array, "b h w c"]:
        """Applies the block at the lowest resolution."""
        x = self.attend(0, self.resnet(0, x, temb), emb)
        return self.resnet(1, x, temb)


class UpBlock(Layers):
    """UpBlock2D, or with heads CrossAttnUpBlock2D."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w i"],
        temb: Float[Array, "b t"],
        emb: Float[Array, "b l d"],
        skips: list[Array],
        size: tuple[int, int] | None,
    ) -> Float[Array, "b h2 w2 o"]:
        """Applies the block.

        Args:
          x: picture from below.
          temb: time embedding.
          emb: text states.
          skips: pictures of the way down, one a resnet, in the order of use.
          size: grow the picture to this height and width at the end, None: do not.
        """
        for i, skip in enumerate(skips):
            x = self.resnet(i, jnp.concatenate([x, skip], axis=-1), temb)
            x = self.attend(i, x, emb)
        if size is None:
            return x
        up = Upsample2D(self.style.dtype, self.style.mesh, name="upsamplers_0")
        return up(x, size)
