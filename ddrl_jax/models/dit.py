"""A small text-conditional diffusion transformer in pixel space (Peebles 2023).

Tokens are overlapping patches (a window of two patches, stride one), so that the
picture has no seams at patch borders; the caption's words join the sequence and, as
one vector, modulate every block (adaLN-zero).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from ddrl_jax.models.attention import attention
from ddrl_jax.models.context_parallel import divided
from ddrl_jax.models.layers import Dense, modulate, rms_norm, time_features, weight
from ddrl_jax.models.remat import mark, stack
from ddrl_jax.sharding import constrain


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


PRECISE = "words"  # parameters used in float32 whatever the dtype
_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))


class Block(nn.Module):
    """Attention and a feed-forward layer, each modulated by the condition vector."""

    heads: int
    dtype: str
    rank: int = 0
    alpha: float = 0.0
    impl: str = "xla"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        c: Float[Array, "b d"],
        mask: Bool[Array, "b l"] | None,
    ):
        """Returns (x', None), the form nn.scan wants."""
        d, plain = x.shape[-1], {"dtype": self.dtype, "mesh": self.mesh}
        lora = {"rank": self.rank, "alpha": self.alpha} | plain
        modulation = Dense(
            6 * d, ("embed", "mlp"), zero=True, name="modulation", **plain
        )(c)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
            modulation[:, None, :], 6, -1
        )
        h = modulate(x, shift1, scale1)
        x = place(x + gate1 * mark(self._mix(h, mask, lora), "attention"), self.mesh)
        h = modulate(x, shift2, scale2)
        h = Dense(4 * d, ("embed", "mlp"), name="up", **lora)(h)
        h = Dense(d, ("mlp", "embed"), name="down", **lora)(jax.nn.relu(h) ** 2)
        return place(x + gate2 * mark(h, "mlp"), self.mesh), None

    def _mix(self, h: Array, mask: Array | None, lora: dict) -> Array:
        b, length, d = h.shape
        qkv = Dense(3 * d, ("embed", "heads"), use_bias=False, name="qkv", **lora)(h)
        q, k, v = jnp.moveaxis(qkv.reshape(b, length, 3, self.heads, -1), 2, 0)
        q, k = rms_norm(q), rms_norm(k)
        mixed = attention(q, k, v, impl=self.impl, mask=mask, mesh=self.mesh)
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
      remat: what the blocks keep for the backward pass, a policy of models.remat.
      rank: LoRA rank, 0 for none.
      alpha: LoRA alpha.
      impl: attention implementation.
      mesh: whose axis `context` divides the tokens; None is one device.
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
    mesh: Mesh | None = None

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
        embed = {"dtype": self.dtype, "mesh": self.mesh}
        x = Dense(self.width, ("mlp", "embed"), name="embed", **embed)(x)
        x = x + self._table("position", x.shape[1])
        pixels = x.shape[1]
        x, mask = self._divide(x, words)
        x = self._blocks(x, c, mask)[:, :pixels]
        shift, scale = jnp.split(self._head(2 * self.width, "final", c)[:, None], 2, -1)
        x = modulate(x, shift, scale)
        x = self._head(4 * self.patch**2 * z.shape[-1], "output", x)
        _, h, w, channels = z.shape
        return overlap_add(x.astype(jnp.float32), self.patch, (h, w, channels))

    def _head(self, features: int, name: str, x: Array) -> Array:
        head = {"dtype": self.dtype, "mesh": self.mesh}
        return Dense(features, ("embed", "mlp"), zero=True, name=name, **head)(x)

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
        plain = {"dtype": self.dtype, "mesh": self.mesh}
        c = Dense(self.width, ("mlp", "embed"), name="condition", **plain)(
            features.astype(self.dtype)
        )
        c = Dense(self.width, ("mlp", "embed"), name="condition2", **plain)(
            jax.nn.silu(c)
        )
        return words.astype(self.dtype), jax.nn.silu(c)

    def _divide(self, x: Array, words: Array) -> tuple[Array, Array | None]:
        """All tokens, in equal shares of the context axis, and a mask of what is none.

        The last ones are padding where the axis does not divide their number.
        """
        if self.mesh is None or not divided(self.mesh):
            return jnp.concatenate([x, words], axis=1), None
        # Left open, the layout of the words made XLA (jax 0.10.2) join wrong rows on
        # a mesh with data, tensor and context.
        words = constrain(words, ("batch", None, None), self.mesh)
        x = jnp.concatenate([x, words], axis=1)
        b, length = x.shape[:2]
        padding = -length % self.mesh.shape["context"]
        if not padding:
            return place(x, self.mesh), None
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
        mask = jnp.broadcast_to(jnp.arange(x.shape[1]) < length, (b, x.shape[1]))
        return place(x, self.mesh), mask

    def _blocks(self, x: Array, c: Array, mask: Array | None) -> Array:
        layer = stack(Block, self.depth, self.remat, inputs=2)(
            *(self.heads, self.dtype, self.rank, self.alpha, self.impl, self.mesh),
            name="blocks",
        )
        return layer(x, c, mask)[0]


def place(x: Float[Array, "b l d"], mesh: Mesh | None) -> Float[Array, "b l d"]:
    """Tokens on the mesh: samples over (data, fsdp), their tokens over context.

    Nothing where the tokens are not divided: the compiler then has no choice to make.
    """
    if mesh is None or not divided(mesh):
        return x
    return constrain(x, ("batch", "length", None), mesh)
