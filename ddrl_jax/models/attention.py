"""Attention on (batch, length, heads, dim): by name, or by what is known of it."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from ddrl_jax.errors import UserError
from ddrl_jax.models.attention_kernels import KERNELS
from ddrl_jax.models.context_parallel import CONTEXT, on_shards, ring, ulysses
from ddrl_jax.sharding import spec_for

LONG = 2**22  # weights a head from which they are not all held at once
SPLASH_FROM = 1024  # queries; below, the kernel's blocks are too few to pay
OPAQUE = ("cudnn", "splash")  # XLA can not divide them over a mesh by itself
SCOPE = "attention_"  # what a profile and a jaxpr call an attention, with its name
WHOLE = "_whole"  # after the name, where every context shard has all of the tokens


class Call(NamedTuple):
    """What is known of an attention before it runs, as one tensor shard sees it.

    Attributes:
      backend: "cpu", "gpu" or "tpu".
      capability: of an NVIDIA GPU, (9, 0) on Hopper; None of anything else.
      dtype: of queries, keys and values.
      queries: their number, all context shards together.
      keys: their number.
      heads: of a tensor shard.
      dim: of a head.
      masked: some keys are padding.
      context: shards of the length.
    """

    backend: str
    capability: tuple[int, int] | None
    dtype: str
    queries: int
    keys: int
    heads: int
    dim: int
    masked: bool
    context: int

    @property
    def divided(self) -> bool:
        """Self-attention whose tokens lie on several devices.

        Equal lengths stand for it: for attention over another sequence of that very
        length the same computation is as right.
        """
        return (
            self.context > 1
            and self.queries == self.keys
            and self.queries % self.context == 0
        )


def choose(call: Call) -> str:
    """The implementation that "auto" stands for: a name of IMPLEMENTATIONS."""
    if call.divided:
        return "ulysses" if refusal("ulysses", call) is None else "ring"
    if refusal("cudnn", call) is None:
        return "cudnn"
    even = call.queries % call.context == 0
    queries = call.queries // call.context if even else call.queries
    if queries >= SPLASH_FROM <= call.keys and refusal("splash", call) is None:
        return "splash"
    return "chunked" if queries * call.keys > LONG else "xla"


def refusal(name: str, call: Call) -> tuple[str, str] | None:
    """Why an implementation can not do this: (got, wanted), or None if it can."""
    if name == "cudnn":
        return _cudnn_refusal(call)
    if name == "splash" and call.backend != "tpu":
        return call.backend, "a TPU"
    if name in ("ulysses", "ring") and call.context == 1:
        return "mesh.context 1", "a mesh whose axis `context` divides the sequence"
    if name == "ulysses" and call.heads % call.context:
        got = f"{call.heads} heads a tensor shard, mesh.context {call.context}"
        return got, "heads that mesh.context divides"
    return None


def _cudnn_refusal(call: Call) -> tuple[str, str] | None:
    if call.capability is None or call.capability < (8, 0):
        got = f"a GPU of compute capability {call.capability}"
        return got if call.capability else call.backend, "an NVIDIA GPU from Ampere on"
    if call.dtype not in ("bfloat16", "float16"):
        return call.dtype, "model.dtype bfloat16"
    most = 256 if call.capability >= (9, 0) else 128
    if call.dim % 8 or call.dim > most:
        return f"{call.dim} channels a head", f"a multiple of 8 up to {most}"
    if call.masked:  # its gradients with a mask changed between versions of JAX
        return "padding among the keys", "lengths that need no padding"
    return None


def attention(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b k h d"],
    v: Float[Array, "b k h d"],
    *,
    impl: str = "xla",
    mask: Bool[Array, "b k"] | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "b q h d"]:
    """Full attention.

    Args:
      q: queries.
      k: keys.
      v: values.
      impl: a name of IMPLEMENTATIONS, or "auto". "ulysses" and "ring" are of
        self-attention; other attention of the same network is as under "auto".
      mask: False where a key is padding.
      mesh: (data, fsdp, tensor, context) on which the arrays lie; None is one device.

    Returns:
      The mixed values, in the dtype of `v`.

    Raises:
      KeyError: an unknown implementation.
      UserError: one that can not compute this here.
    """
    call = describe(q, k, mask, mesh)
    over_another = impl in DIVIDING and call.context > 1 and call.queries != call.keys
    if impl == "auto" or over_another:
        impl = choose(call)
    run = IMPLEMENTATIONS[impl]
    if (reason := refusal(impl, call)) is not None:
        raise UserError(
            f'the attention "{impl}" can not run here',
            got=reason[0],
            wanted=reason[1],
            way_out='set config.model.attention to "auto"',
        )
    whole = call.queries % call.context > 0 and impl not in DIVIDING  # which pad
    with jax.named_scope(SCOPE + impl + WHOLE * whole):
        return run(q, k, v, mask, mesh)


def implementations(fn: Callable, *abstract_args: Any) -> tuple[str, ...]:
    """The names under which a function's attention runs; it is only traced.

    A name with WHOLE after it is of sequences that the context axis does not divide:
    right, and the same work on every device of the axis.

    Args:
      fn: traceable by JAX.
      *abstract_args: arrays, or ShapeDtypeStructs in their place.
    """
    jaxpr = jax.make_jaxpr(fn)(*abstract_args).jaxpr
    text = jaxpr.pretty_print(name_stack=True)
    return tuple(sorted(set(re.findall(rf"\b{SCOPE}([a-z]+(?:{WHOLE})?)", text))))


def describe(q: Array, k: Array, mask: Array | None, mesh: Mesh | None) -> Call:
    """What is known of the attention of these arrays on this mesh."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    version = re.fullmatch(
        r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", ""))
    )
    shards = 1
    if mesh is not None and spec_for((None, None, "heads"), q.shape, mesh)[2]:
        shards = mesh.shape["tensor"]
    return Call(
        backend=device.platform,
        capability=(int(version[1]), int(version[2])) if version else None,
        dtype=str(q.dtype),
        queries=q.shape[1],
        keys=k.shape[1],
        heads=q.shape[2] // shards,
        dim=q.shape[3],
        masked=mask is not None,
        context=1 if mesh is None else mesh.shape[CONTEXT],
    )


def _kernel(name: str, q, k, v, mask, mesh: Mesh | None) -> Array:
    """A kernel of one device; on a mesh the keys are gathered and queries stay."""
    kernel, opaque = KERNELS[name], name in OPAQUE
    if mesh is None or (mesh.shape[CONTEXT] == 1 and not (opaque and mesh.size > 1)):
        return kernel(q, k, v, mask)
    return on_shards(kernel, q, k, v, mask, mesh, split_keys=False, checked=not opaque)


def _ulysses(q, k, v, mask, mesh: Mesh) -> Array:
    call = describe(q, k, mask, mesh)
    local = choose(call._replace(heads=call.heads // call.context, context=1))
    body = partial(ulysses, local=KERNELS[local])
    checked = local not in OPAQUE
    with jax.named_scope(SCOPE + local):
        return on_shards(body, q, k, v, mask, mesh, split_keys=True, checked=checked)


def _ring(q, k, v, mask, mesh: Mesh) -> Array:
    return on_shards(ring, q, k, v, mask, mesh, split_keys=True)


def _padded(run, q, k, v, mask, mesh: Mesh) -> Array:
    """Self-attention of a length that the context axis does not divide."""
    (b, length), shards = q.shape[:2], mesh.shape[CONTEXT]
    if length % shards == 0:
        return run(q, k, v, mask, mesh)
    mask = jnp.ones((b, length), bool) if mask is None else mask
    rows = ((0, 0), (0, -length % shards))
    q, k, v = (jnp.pad(x, (*rows, (0, 0), (0, 0))) for x in (q, k, v))
    return run(q, k, v, jnp.pad(mask, rows), mesh)[:, :length]


DIVIDING = {"ulysses": partial(_padded, _ulysses), "ring": partial(_padded, _ring)}
IMPLEMENTATIONS = {name: partial(_kernel, name) for name in KERNELS} | DIVIDING
