"""Attention of sequences whose tokens lie on several devices (mesh axis `context`).

Ulysses (Jacobs 2023, arXiv 2309.14509) exchanges tokens for heads: for the time of the
attention a device has every token and a part of the heads. The ring (Liu 2023, arXiv
2310.01889) leaves queries where they are and passes keys and values around; a device
has never more than its share of the tokens, forwards and backwards.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from ddrl_jax.models.attention_kernels import MASKED, chunk_of
from ddrl_jax.sharding import spec_for

CONTEXT = "context"
Body = Callable[[Array, Array, Array, Array | None], Array]


def divided(mesh: Mesh | None) -> bool:
    """Whether the tokens of a sample lie on several devices."""
    return mesh is not None and mesh.shape[CONTEXT] > 1


def on_shards(
    body: Body,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    mesh: Mesh,
    *,
    split_keys: bool,
    checked: bool = True,
) -> Array:
    """Runs attention on each device's shard: batch, queries and heads are divided.

    Args:
      body: attention of the shard; it may use collectives over `context`.
      q: queries [b q h d].
      k: keys [b k h d].
      v: values [b k h d].
      mask: False where a key is padding [b k], or None.
      mesh: (data, fsdp, tensor, context).
      split_keys: a device gets its share of the keys, else all of them.
      checked: let JAX check what is replicated; kernels it can not see into refuse.
    """
    names = ("batch", "length", "heads", None)
    queries = spec_for(names, q.shape, mesh)
    keys = queries if split_keys else P(queries[0], None, queries[2], None)
    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(queries, keys, keys, P(*keys[:2])),
        out_specs=queries,
        check_vma=checked,
    )
    return mapped(q, k, v, mask)


def ulysses(q: Array, k: Array, v: Array, mask: Array | None, local: Body) -> Array:
    """Self-attention by exchange of heads for tokens; runs inside `on_shards`.

    Args:
      q: queries of this device [b l/n h d], h divisible by the n devices.
      k: keys of the same tokens.
      v: values of the same tokens.
      mask: of the same tokens, or None.
      local: attention of all tokens with h/n heads.
    """
    swap = partial(jax.lax.all_to_all, axis_name=CONTEXT, tiled=True)
    q, k, v = (swap(x, split_axis=2, concat_axis=1) for x in (q, k, v))
    if mask is not None:
        mask = jax.lax.all_gather(mask, CONTEXT, axis=1, tiled=True)
    return swap(local(q, k, v, mask), split_axis=1, concat_axis=2)


class Part(NamedTuple):
    """Attention over some of the keys, before it is divided by its weights.

    Attributes:
      mixed: sum of exp(score - peak) v, float32 [b q h d].
      peak: largest score [b q h].
      total: sum of exp(score - peak) [b q h].
    """

    mixed: Array
    peak: Array
    total: Array


@jax.custom_vjp
def ring(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Self-attention with keys and values that go around; runs inside `on_shards`.

    The gradient goes around once more and computes the weights again from the peaks
    and totals, so that neither keys nor weights of all tokens are ever kept.

    Args:
      q: queries of this device [b l/n h d].
      k: keys of the same tokens.
      v: values of the same tokens.
      mask: of the same tokens, or None.
    """
    return _ring_forward(q, k, v, mask)[0]


def _ring_forward(q, k, v, mask) -> tuple[Array, Any]:
    scaled = q * q.shape[-1] ** -0.5
    row = q[..., 0]
    start = Part(_zeros(q), _zeros(row) - jnp.inf, _zeros(row))

    def step(carry, _):
        part, keys = carry
        following = _pass_on(keys)  # on its way while these keys are used
        return (_merge(part, _part(scaled, *keys)), following), None

    (part, keys), _ = jax.lax.scan(step, (start, (k, v, mask)), length=_others())
    mixed, peak, total = _merge(part, _part(scaled, *keys))
    out = (mixed / total[..., None]).astype(v.dtype)
    return out, (q, k, v, mask, out, peak, total)


def _ring_backward(saved, slope: Array):
    q, k, v, mask, out, peak, total = saved
    scale = q.shape[-1] ** -0.5
    # The row sums of weight x slope of the weight (Dao 2022, Appendix B.2).
    dot = jnp.sum(slope.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    rows = (q * scale, slope, dot, peak, total)

    def add(gradients, keys):
        return jax.tree.map(jnp.add, gradients, _part_gradient(rows, *keys))

    def step(carry, _):
        (dq, dk, dv), keys = carry
        following = _pass_on(keys)
        dq, dk, dv = add((dq, dk, dv), keys)
        return ((dq, *_pass_on((dk, dv))), following), None

    carry = ((_zeros(q), _zeros(k), _zeros(v)), (k, v, mask))
    (gradients, keys), _ = jax.lax.scan(step, carry, length=_others())
    dq, dk, dv = add(gradients, keys)
    dk, dv = _pass_on((dk, dv))  # the last step brings them home
    return (dq * scale).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


ring.defvjp(_ring_forward, _ring_backward)


def _others() -> int:
    return jax.lax.axis_size(CONTEXT) - 1


def _pass_on(tree: Any) -> Any:
    """Every device hands its arrays to the next one."""
    n = jax.lax.axis_size(CONTEXT)
    around = [(i, (i + 1) % n) for i in range(n)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, CONTEXT, around), tree)


def _zeros(like: Array) -> Array:
    """Float32 zeros that JAX takes to differ between devices where `like` does."""
    return jnp.zeros_like(like, jnp.float32)


def _scores(q: Array, k: Array, mask: Array | None) -> Array:
    """q k^T [b h q k] in float32, the floor at padding."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    return scores if mask is None else jnp.where(_over_keys(mask), scores, MASKED)


def _over_keys(mask: Array) -> Array:
    return mask[:, None, None, :]


def _by_query(x: Array) -> Array:
    """[b h q] <-> [b q h]."""
    return x.swapaxes(1, 2)


def _part(q: Array, k: Array, v: Array, mask: Array | None) -> Part:
    """Attention of scaled queries over these keys, a chunk of queries at a time."""

    def chunk(q: Array) -> Part:
        scores = _scores(q, k, mask)
        peak = jnp.max(scores, axis=-1)
        weights = jnp.exp(scores - peak[..., None])
        mixed = jnp.einsum(
            "bhqk,bkhd->bqhd",
            weights.astype(v.dtype),
            v,
            preferred_element_type=jnp.float32,
        )
        return Part(mixed, _by_query(peak), _by_query(jnp.sum(weights, axis=-1)))

    return jax.tree.map(_join, jax.lax.map(chunk, _chunks(q)))


def _merge(a: Part, b: Part) -> Part:
    """The softmax over the keys of both (Milakov 2018, Section 3)."""
    peak = jnp.maximum(a.peak, b.peak)
    left, right = jnp.exp(a.peak - peak), jnp.exp(b.peak - peak)
    mixed = a.mixed * left[..., None] + b.mixed * right[..., None]
    return Part(mixed, peak, a.total * left + b.total * right)


def _part_gradient(
    rows: tuple[Array, ...], k: Array, v: Array, mask: Array | None
) -> tuple[Array, Array, Array]:
    """What these keys add to the gradients of scaled q, of k and of v, float32."""

    def chunk(sums, rows):
        q, slope, dot, peak, total = rows
        peak, total, dot = (_by_query(x)[..., None] for x in (peak, total, dot))
        weights = jnp.exp(_scores(q, k, mask) - peak) / total
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        dv = product("bhqk,bqhd->bkhd", weights.astype(slope.dtype), slope)
        ds = weights * (product("bqhd,bkhd->bhqk", slope, v) - dot)
        if mask is not None:
            ds = jnp.where(_over_keys(mask), ds, 0.0)
        ds = ds.astype(q.dtype)
        dk = product("bhqk,bqhd->bkhd", ds, q)
        return (sums[0] + dk, sums[1] + dv), product("bhqk,bkhd->bqhd", ds, k)

    zeros = (_zeros(k), _zeros(v))
    (dk, dv), dq = jax.lax.scan(chunk, zeros, jax.tree.map(_chunks, rows))
    return _join(dq), dk, dv


def _chunks(x: Array) -> Array:
    """[b q ...] -> [chunks b c ...]."""
    b, length = x.shape[:2]
    return x.reshape(b, -1, chunk_of(length), *x.shape[2:]).swapaxes(0, 1)


def _join(x: Array) -> Array:
    """[chunks b c ...] -> [b q ...]."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
