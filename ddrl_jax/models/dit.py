"""A small text-conditional diffusion transformer in pixel space (Peebles 2023).

Tokens are overlapping patches (a window of two patches, stride one), so that the
picture has no seams at patch borders; the caption's words join the sequence and, as
one vector, modulate every block (adaLN-zero).
"""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddrl_jax.models.attention import attention
from ddrl_jax.models.layers import Dense, rms_norm, time_features, weight


def overlapping_patches(
    x: Float[Array, "b h w c"], patch: int
) -> Float[Array, "b l k"]:
    """Windows of 2 patch x 2 patch pixels at stride patch, zero-padded at the rim."""
    half = patch // 2
    b, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    cells = x.reshape(b, h // patch + 1, patch, w // patch + 1, patch, c)
    cells = cells.transpose(0, 1, 3, 2, 4, 5).reshape(
        b, h // patch + 1, w // patch + 1, -1
    )
    corners = [cells[:, i : i - 1 or None, j : j - 1 or None] for i, j in _CORNERS]
    return jnp.concatenate(corners, -1).reshape(b, (h // patch) * (w // patch), -1)


def overlap_add(
    tokens: Float[Array, "b l k"], patch: int, shape: tuple[int, int, int]
) -> Float[Array, "b h w c"]:
    """The transpose of `overlapping_patches`: windows are summed where they overlap."""
    h, w, c = shape
    b, rows, columns, half = tokens.shape[0], h // patch, w // patch, patch // 2
    parts = tokens.reshape(b, rows, columns, 4, -1)
    shifted = (
        jnp.pad(parts[:, :, :, k], ((0, 0), (i, 1 - i), (j, 1 - j), (0, 0)))
        for k, (i, j) in enumerate(_CORNERS)
    )
    cells = sum(shifted, start=jnp.zeros((), tokens.dtype))
    cells = cells.reshape(b, rows + 1, columns + 1, patch, patch, c)
    x = cells.transpose(0, 1, 3, 2, 4, 5).reshape(b, h + patch, w + patch, c)
    return x[:, half : half + h, half : half + w]


_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))


class Block(nn.Module):
    """Attention and a feed-forward layer, each modulated by the condition vector."""

    heads: int
    dtype: str
    rank: int = 0
    alpha: float = 0.0
    impl: str = "xla"

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], c: Float[Array, "b d"]):
        """Returns (x', None), the form nn.scan wants."""
        d = x.shape[-1]
        lora = {"rank": self.rank, "alpha": self.alpha, "dtype": self.dtype}
        modulation = Dense(
            6 * d, ("embed", "mlp"), zero=True, name="modulation", dtype=self.dtype
        )(c)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
            modulation[:, None, :], 6, -1
        )
        h = rms_norm(x) * (1 + scale1) + shift1
        x = x + gate1 * self._mix(h, lora)
        h = rms_norm(x) * (1 + scale2) + shift2
        h = Dense(4 * d, ("embed", "mlp"), name="up", **lora)(h)
        h = Dense(d, ("mlp", "embed"), name="down", **lora)(jax.nn.relu(h) ** 2)
        return x + gate2 * h, None

    def _mix(self, h: Array, lora: dict) -> Array:
        b, length, d = h.shape
        qkv = Dense(3 * d, ("embed", "heads"), use_bias=False, name="qkv", **lora)(h)
        q, k, v = jnp.moveaxis(qkv.reshape(b, length, 3, self.heads, -1), 2, 0)
        mixed = attention(rms_norm(q), rms_norm(k), v, impl=self.impl)
        return Dense(d, ("heads", "embed"), name="out", **lora)(
            mixed.reshape(b, length, d)
        )


class DiT(nn.Module):
    """(z, time, token ids) -> velocity of the rectified flow.

    Attributes:
      width: channels, divisible by heads and even.
      depth: number of blocks, stacked and scanned.
      heads: attention heads.
      patch: pixels between tokens, even.
      vocabulary: number of token ids; id 0 is padding, all 0 is the empty prompt.
      length: tokens of a prompt.
      dtype: of the matrix products.
      remat: "none", or "full" to recompute the blocks in the backward pass.
      rank: LoRA rank, 0 for none.
      alpha: LoRA alpha.
      impl: attention implementation.
    """

    width: int
    depth: int
    heads: int
    patch: int
    vocabulary: int
    length: int
    dtype: str = "float32"
    remat: str = "none"
    rank: int = 0
    alpha: float = 0.0
    impl: str = "xla"

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b h w c"],
        time: Float[Array, " b"],
        tokens: Int[Array, "b l"],
    ) -> Float[Array, "b h w c"]:
        """Predicts v = eps - x0 in float32."""
        words, c = self._condition(time, tokens)
        x = overlapping_patches(z, self.patch).astype(self.dtype)
        x = Dense(self.width, ("mlp", "embed"), name="embed", dtype=self.dtype)(x)
        x = x + self._table("position", x.shape[1])
        x = jnp.concatenate([x, words], axis=1)
        x = self._blocks(x, c)[:, : -self.length]
        shift, scale = jnp.split(self._head(2 * self.width, "final", c)[:, None], 2, -1)
        x = rms_norm(x) * (1 + scale) + shift
        x = self._head(4 * self.patch**2 * z.shape[-1], "output", x)
        _, h, w, channels = z.shape
        return overlap_add(x.astype(jnp.float32), self.patch, (h, w, channels))

    def _head(self, features: int, name: str, x: Array) -> Array:
        layer = Dense(
            features, ("embed", "mlp"), zero=True, name=name, dtype=self.dtype
        )
        return layer(x)

    def _table(self, name: str, rows: int) -> Array:
        init, axes = nn.initializers.normal(0.02), (None, "embed")
        return weight(self, name, init, (rows, self.width), axes).astype(self.dtype)

    def _condition(self, time: Array, tokens: Array) -> tuple[Array, Array]:
        """Word states [b l d] and the vector [b d] that modulates the blocks."""
        init, axes = nn.initializers.normal(1.0), ("vocab", "embed")
        table = weight(self, "words", init, (self.vocabulary, self.width), axes)
        words = table[tokens] + self._table("word_position", self.length)
        present = (tokens > 0)[..., None]
        pooled = jnp.sum(words * present, axis=1)
        features = jnp.concatenate([time_features(time, self.width), pooled], -1)
        c = Dense(self.width, ("mlp", "embed"), name="condition", dtype=self.dtype)(
            features.astype(self.dtype)
        )
        c = Dense(self.width, ("mlp", "embed"), name="condition2", dtype=self.dtype)(
            jax.nn.silu(c)
        )
        return words.astype(self.dtype), jax.nn.silu(c)

    def _blocks(self, x: Array, c: Array) -> Array:
        block = nn.remat(Block, prevent_cse=False) if self.remat == "full" else Block
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "lora": True},
            in_axes=cast(Any, nn.broadcast),  # Flax's annotation forgets it
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        layer = stack(
            self.heads, self.dtype, self.rank, self.alpha, self.impl, name="blocks"
        )
        return layer(x, c)[0]
