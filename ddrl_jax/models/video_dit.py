"""A text-to-video diffusion transformer at the size of the 14 B models of 2025.

Latents are cut into patches of one frame; every block has self-attention over the whole
video with three-dimensional rotary positions (Su 2021), attention to the prompt and a
feed-forward layer, modulated by time (adaLN-zero, Peebles 2023, with one shared
projection and a table a block, Chen 2023). Blocks are stacked and scanned.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddrl_jax.models.layers import Dense, modulate, rms_norm, time_features, weight
from ddrl_jax.models.remat import mark, stack
from ddrl_jax.models.video_layout import Layout

TIME_FEATURES = 256
ROTARY_BASE = 10000.0
PRECISE = "blocks/modulation"  # parameters used in float32 whatever the dtype


def to_patches(z: Float[Array, "b f h w c"], patch: int) -> Float[Array, "b l k"]:
    """One token for patch x patch latents of one frame, frames first."""
    b, f, h, w, c = z.shape
    cells = z.reshape(b, f, h // patch, patch, w // patch, patch, c)
    return cells.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, -1, patch * patch * c)


def from_patches(
    tokens: Float[Array, "b l k"], patch: int, shape: tuple[int, int, int, int]
) -> Float[Array, "b f h w c"]:
    """The inverse of `to_patches` for latents of this shape."""
    f, h, w, c = shape
    cells = tokens.reshape(-1, f, h // patch, w // patch, patch, patch, c)
    return cells.transpose(0, 1, 2, 4, 3, 5, 6).reshape(-1, f, h, w, c)


def rotary_angles(grid: tuple[int, int, int], dim: int) -> Float[Array, "l r"]:
    """Angles of a head's pairs at each token: a share for frame, row and column.

    Each axis has 2 (dim // 6) channels and the frame what is left; the pair k of n
    turns by position * 10000^(-k / n).

    Args:
      grid: tokens along frames, rows and columns.
      dim: of a head, even.
    """
    pairs = (dim // 2 - 2 * (dim // 6), dim // 6, dim // 6)
    places = jnp.meshgrid(
        *(jnp.arange(n, dtype=jnp.float32) for n in grid), indexing="ij"
    )
    angles = [
        place.reshape(-1, 1) * ROTARY_BASE ** (-jnp.arange(n) / max(n, 1))
        for place, n in zip(places, pairs, strict=True)
    ]
    return jnp.concatenate(angles, axis=-1)


def rotate(
    x: Float[Array, "b l h d"], angles: Float[Array, "l r"]
) -> Float[Array, "b l h d"]:
    """Turns the pairs (x_k, x_{k + d/2}) by their angles, in float32."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, first * sin + second * cos)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class VideoBlock(nn.Module):
    """Self-attention, attention to the prompt, feed-forward; modulated by time.

    Attributes:
      heads: attention heads.
      mlp: hidden width of the feed-forward layer.
      layout: where activations live.
      dtype: of the matrix products.
      rank: LoRA rank, 0 for none.
      alpha: LoRA alpha.
    """

    heads: int
    mlp: int
    layout: Layout
    dtype: str
    rank: int = 0
    alpha: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        words: Float[Array, "b k d"],
        modulation: Float[Array, "b 6 d"],
        angles: Float[Array, "l r"],
    ):
        """Returns (x', None), the form nn.scan wants."""
        place = self.layout.tokens
        table = weight(
            self, "modulation", nn.initializers.zeros, (6, x.shape[-1]), (None, None)
        )
        rows = (modulation + table).astype(self.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(rows, 6, axis=1)
        h = modulate(x, shift1, scale1)
        mixed = mark(self._among_tokens(h, angles), "attention")
        x = place(x + gate1 * mixed)
        x = place(x + mark(self._to_prompt(rms_norm(x), words), "attention"))
        h = modulate(x, shift2, scale2)
        h = self._dense(self.mlp, ("embed", "mlp"), "up")(h)
        h = self.layout.hidden(jax.nn.gelu(h))
        h = self._dense(x.shape[-1], ("mlp", "embed"), "down")(h)
        return place(x + gate2 * mark(h, "mlp")), None

    def _dense(self, features: int, axes: tuple[str, str], name: str) -> Dense:
        return Dense(
            *(features, axes, self.dtype, self.rank, self.alpha),
            use_bias=False,
            mesh=self.layout.mesh,
            name=name,
        )

    def _heads(self, x: Array, name: str) -> Array:
        h = self._dense(x.shape[-1], ("embed", "heads"), name)(x)
        return h.reshape(*x.shape[:2], self.heads, -1)

    def _among_tokens(self, h: Array, angles: Array) -> Array:
        q, k = (rms_norm(self._heads(h, name)) for name in ("q", "k"))
        q, k = rotate(q, angles), rotate(k, angles)
        mixed = self.layout.self_attention(q, k, self._heads(h, "v"))
        out = self._dense(h.shape[-1], ("heads", "embed"), "out")
        return out(mixed.reshape(h.shape))

    def _to_prompt(self, h: Array, words: Array) -> Array:
        q = rms_norm(self._heads(h, "prompt_q"))
        k = rms_norm(self._heads(words, "prompt_k"))
        mixed = self.layout.prompt_attention(q, k, self._heads(words, "prompt_v"))
        out = self._dense(h.shape[-1], ("heads", "embed"), "prompt_out")
        return out(mixed.reshape(h.shape))


class VideoDiT(nn.Module):
    """(z, time, text states) -> velocity of the rectified flow.

    Attributes:
      width: channels, divisible by heads; a head's channels are even.
      depth: number of blocks.
      heads: attention heads.
      mlp: hidden width of the feed-forward layers.
      patch: latents a token is wide and high.
      layout: where activations live, and which attention mixes them.
      dtype: of the matrix products.
      remat: what the blocks keep for the backward pass, a policy of models.remat.
      rank: LoRA rank, 0 for none.
      alpha: LoRA alpha.
    """

    width: int
    depth: int
    heads: int
    mlp: int
    patch: int
    layout: Layout
    dtype: str = "float32"
    remat: str = "none"
    rank: int = 0
    alpha: float = 0.0

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b f h w c"],
        time: Float[Array, " b"],
        text: Float[Array, "b k t"],
    ) -> Float[Array, "b f h w c"]:
        """Predicts v = eps - x0 in float32."""
        _, f, h, w, c = z.shape
        grid = (f, h // self.patch, w // self.patch)
        vector, modulation = self._modulation(time)
        words = self._head(self.width, "text", text.astype(self.dtype))
        words = self._head(self.width, "text2", jax.nn.gelu(words))
        x = to_patches(z, self.patch).astype(self.dtype)
        x = self.layout.tokens(self._head(self.width, "embed", x))
        angles = rotary_angles(grid, self.width // self.heads)
        x = self._blocks(x, words, modulation, angles)
        ends = self._head(2 * self.width, "final", vector, zero=True)[:, None]
        shift, scale = jnp.split(ends, 2, axis=-1)
        x = modulate(x, shift, scale)
        x = self._head(self.patch**2 * c, "output", x, zero=True)
        return from_patches(x.astype(jnp.float32), self.patch, (f, h, w, c))

    def _head(self, features: int, name: str, x: Array, zero: bool = False) -> Array:
        axes = ("embed", "mlp") if x.shape[-1] >= features else ("mlp", "embed")
        axes = ("embed", "mlp") if name == "modulation" else axes
        head = {"dtype": self.dtype, "zero": zero, "mesh": self.layout.mesh}
        return Dense(features, axes, name=name, **head)(x)

    def _modulation(self, time: Array) -> tuple[Array, Array]:
        """The vector of time [b d], and shift, scale and gate for a block [b 6 d]."""
        features = time_features(time, TIME_FEATURES).astype(self.dtype)
        hidden = jax.nn.silu(self._head(self.width, "time", features))
        vector = jax.nn.silu(self._head(self.width, "time2", hidden))
        six = self._head(6 * self.width, "modulation", vector, zero=True)
        return vector, self.layout.samples(six.reshape(-1, 6, self.width))

    def _blocks(self, x: Array, words: Array, modulation: Array, angles: Array):
        layer = stack(VideoBlock, self.depth, self.remat, inputs=3)(
            self.heads, self.mlp, self.layout, self.dtype, self.rank, self.alpha,
            name="blocks",
        )  # fmt: skip
        return layer(x, words, modulation, angles)[0]
