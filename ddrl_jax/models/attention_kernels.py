"""Attention on one device, or on the shard that a device has: four ways to compute it.

Each is (q [b q h d], k [b k h d], v [b k h d], mask [b k] or None) -> [b q h d] and is
softmax(q k^T / sqrt(d)) v with float32 weights whatever the dtype. `cudnn` and `splash`
were lowered for their platforms, and `splash` was run in Pallas's interpreter; neither
has yet run on an accelerator.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

QUERY_CHUNK = 1024  # queries at once, at most, where attention is chunked
LEAST_CHUNK = 128  # fewer would be a loop of slivers: then all queries at once
# A finite floor, not -inf: a row with nothing to attend to stays finite.
MASKED = -1e9
# Pallas tiles of a TPU have 128 lanes; larger blocks of keys and queries reuse more.
SPLASH_BLOCKS = (512, 256, 128)


def xla(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Written out for the compiler, all weights in memory at once."""
    scale = q.shape[-1] ** -0.5
    weights = jnp.einsum(
        "bqhd,bkhd->bhqk", q * scale, k, preferred_element_type=jnp.float32
    )
    if mask is not None:
        weights = jnp.where(mask[:, None, None, :], weights, MASKED)
    weights = jax.nn.softmax(weights, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def chunk_of(length: int) -> int:
    """Queries at once: the largest divisor of their number, 936 of 32,760."""
    if length <= QUERY_CHUNK:
        return length
    size = next(n for n in range(QUERY_CHUNK, 0, -1) if length % n == 0)
    return size if size >= LEAST_CHUNK else length


def chunked(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """`xla` for some queries at a time, recomputed in the backward pass.

    The weights of a whole picture of 512 px are 0.5 GB a sample; of a chunk 0.13 GB.
    """
    b, length, heads, dim = q.shape
    size = chunk_of(length)
    if size == length:
        return xla(q, k, v, mask)
    parts = q.reshape(b, -1, size, heads, dim).swapaxes(0, 1)
    mixed = jax.lax.map(jax.checkpoint(lambda part: xla(part, k, v, mask)), parts)
    return mixed.swapaxes(0, 1).reshape(b, length, heads, v.shape[-1])


def cudnn(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """NVIDIA's fused kernel; `mask` has to be None (see `attention.refusal`)."""
    assert mask is None
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def splash(
    q: Array, k: Array, v: Array, mask: Array | None, interpret: bool = False
) -> Array:
    """The Pallas kernel for TPUs, lengths padded to its blocks.

    Args:
      q: queries.
      k: keys.
      v: values.
      mask: False where a key is padding.
      interpret: run it on any backend, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    (b, queries, heads, dim), keys = q.shape, k.shape[1]
    q, k, v = _heads_first(q * dim**-0.5), _heads_first(k), _heads_first(v)
    lengths = (q.shape[2], k.shape[2])
    full = pallas.MultiHeadMask([pallas.FullMask(lengths)] * heads)
    kernel = pallas.make_splash_mha_single_device(
        full, block_sizes=_blocks(*lengths), interpret=interpret
    )
    if mask is None and lengths[1] == keys:
        mixed = jax.vmap(kernel)(q, k, v)
    else:
        seen = jnp.ones((b, keys), bool) if mask is None else mask
        seen = jnp.pad(seen, ((0, 0), (0, lengths[1] - keys)))
        # Tokens see the keys of their own segment: 0 is everything that is there.
        segments = pallas.SegmentIds(
            jnp.zeros((b, lengths[0]), jnp.int32), 1 - seen.astype(jnp.int32)
        )
        mixed = jax.vmap(kernel)(q, k, v, segments)
    return jnp.asarray(mixed)[:, :, :queries].swapaxes(1, 2)


def _heads_first(x: Array) -> Array:
    """[b l h d] -> [b h l' d] with the length padded to whole blocks."""
    padding = -x.shape[1] % SPLASH_BLOCKS[-1]
    return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)


def _blocks(queries: int, keys: int):
    """The largest tiles that divide the padded lengths."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    q, kv = (next(n for n in SPLASH_BLOCKS if m % n == 0) for m in (queries, keys))
    return pallas.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_q_dq=q,
        block_kv_dq=kv,
    )


KERNELS = {"xla": xla, "chunked": chunked, "cudnn": cudnn, "splash": splash}
