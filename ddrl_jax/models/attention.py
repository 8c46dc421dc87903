"""Attention on (batch, length, heads, dim), chosen by name."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

QUERY_CHUNK = 1024  # queries at once, at most, where attention is chunked
LEAST_CHUNK = 128  # fewer would be a loop of slivers: then all queries at once


def _xla(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """softmax(q k^T / sqrt(d)) v with float32 weights whatever the dtype of q."""
    scale = q.shape[-1] ** -0.5
    weights = jnp.einsum(
        "bqhd,bkhd->bhqk", q * scale, k, preferred_element_type=jnp.float32
    )
    if mask is not None:
        # A finite floor, not -inf: a row with nothing to attend to stays finite.
        weights = jnp.where(mask[:, None, None, :], weights, -1e9)
    weights = jax.nn.softmax(weights, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def _chunked(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """`_xla` for some queries at a time, recomputed in the backward pass.

    The largest number that divides them, at most QUERY_CHUNK: 936 of 32,760.

    The weights of a whole picture of 512 px are 0.5 GB a sample; of a chunk 0.13 GB.
    """
    b, length, heads, dim = q.shape
    size = next(n for n in range(min(length, QUERY_CHUNK), 0, -1) if length % n == 0)
    if size == length or size < LEAST_CHUNK:
        return _xla(q, k, v, mask)
    parts = q.reshape(b, -1, size, heads, dim).swapaxes(0, 1)
    mixed = jax.lax.map(jax.checkpoint(lambda part: _xla(part, k, v, mask)), parts)
    return mixed.swapaxes(0, 1).reshape(b, length, heads, v.shape[-1])


IMPLEMENTATIONS = {"xla": _xla, "chunked": _chunked}


def attention(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b k h d"],
    v: Float[Array, "b k h d"],
    *,
    impl: str = "xla",
    mask: Bool[Array, "b k"] | None = None,
) -> Float[Array, "b q h d"]:
    """Full attention.

    Args:
      q: queries.
      k: keys.
      v: values.
      impl: a name of IMPLEMENTATIONS.
      mask: False where a key is padding.

    Returns:
      The mixed values, in the dtype of `v`.

    Raises:
      KeyError: an unknown implementation.
    """
    return IMPLEMENTATIONS[impl](q, k, v, mask)
