"""Analytic FLOPs of a function, counted from its jaxpr without compiling it.

Only matrix products and convolutions are counted, a multiply-add as 2. The compiler's
own cost analysis sees the body of a scan once, however often it runs; here it counts
times its length. Shapes in a jaxpr are those of the whole mesh, so a count is that of
all devices together; what stands in a scope ON_EACH, each of so many does whole.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr

from ddrl_jax.interfaces import ON_EACH

_COPIES = re.compile(rf"\b{ON_EACH}(\d+)")


class Count(NamedTuple):
    """What a function multiplies.

    Attributes:
      flops: of matrix products and convolutions; 2 a multiply-add.
      recomputed: the part of `flops` that jax.checkpoint does a second time.
      dot_bytes: operands and results of these products, each read or written once; of
        a Pallas kernel, its own.
      loops: while loops with products in them, of unknown length and counted once.
      repeated: the part of the rest of `flops` that a device does though another does
        the same.
    """

    flops: int = 0
    recomputed: int = 0
    dot_bytes: int = 0
    loops: int = 0
    repeated: int = 0

    @property
    def model_flops(self) -> int:
        """Those of an MFU: neither done a second time nor by a second device."""
        return self.flops - self.recomputed - self.repeated

    def plus(self, other: "Count") -> "Count":
        """Returns the sum of the two."""
        return Count(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, n: int) -> "Count":
        """Returns `n` repetitions; a loop in a repeated body is still one loop."""
        flops, recomputed, dot_bytes, loops, repeated = self
        return Count(n * flops, n * recomputed, n * dot_bytes, loops, n * repeated)


def flops(fn: Callable, *abstract_args: Any) -> int:
    """FLOPs of one call of `fn`.

    Args:
      fn: traceable by JAX; jitted or not.
      *abstract_args: arrays, or ShapeDtypeStructs in their place.

    Raises:
      ValueError: the count depends on how often a while loop runs.
    """
    found = count(fn, *abstract_args)
    if found.loops:
        raise ValueError(f"{found.loops} while loops run an unknown number of times")
    return found.flops


def count(fn: Callable, *abstract_args: Any) -> Count:
    """Counts one call of `fn`; traces it and computes nothing.

    A `cond` counts as the branch that multiplies most, one by platform as that of all
    others. What no result depends on is left out, as compilers leave it out. The blocks
    that a Pallas kernel skips, and what it recomputes, are counted.

    Args:
      fn: traceable by JAX; jitted or not.
      *abstract_args: arrays, or ShapeDtypeStructs in their place.
    """
    return _jaxpr(jax.make_jaxpr(fn)(*abstract_args).jaxpr, _Where(False, 1))


class _Where(NamedTuple):
    """What the scopes around an equation say of it."""

    again: bool  # this is a second computation of the same, by checkpoint
    copies: int  # devices that each do it


def _jaxpr(jaxpr: Jaxpr, where: _Where) -> Count:
    total = Count()
    used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    for eqn in used.eqns:
        # Of an inner jaxpr only what is within it: the outer scopes come as `where`.
        stack = str(eqn.source_info.name_stack)
        again = where.again or "rematted_computation" in stack
        copies = _COPIES.search(stack)
        inside = _Where(again, int(copies[1]) if copies else where.copies)
        total = total.plus(_equation(eqn, inside))
    return total


def _equation(eqn: JaxprEqn, where: _Where) -> Count:
    name, params = eqn.primitive.name, eqn.params
    if name in _PRODUCTS:
        return _on_devices(_PRODUCTS[name](eqn), where)
    parts = [_jaxpr(inner, where) for inner in _inner(params)]
    if not parts:
        return Count()
    if name == "cond":
        platforms = params.get("branches_platforms") or ()
        # What only CPUs do instead is not the work of the chips a count is for.
        return parts[platforms.index(None)] if None in platforms else max(parts)
    total = Count()
    for part in parts:
        total = total.plus(part)
    if name == "pallas_call":  # between its products nothing leaves the chip
        once = _bytes(eqn, len(eqn.invars))
        return total.times(_repetitions(name, params))._replace(dot_bytes=once)
    if name == "while":
        return total._replace(loops=total.loops + (total.flops > 0))
    return total.times(_repetitions(name, params))


def _on_devices(once: Count, where: _Where) -> Count:
    """A product as all devices do it that `where` says."""
    if where.again:
        once = once._replace(recomputed=once.flops)
    found, alone = once.times(where.copies), once.model_flops
    return found._replace(repeated=found.flops - found.recomputed - alone)


def _repetitions(name: str, params: dict) -> int:
    """How often a primitive runs the jaxpr it holds."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # its shapes are those of one device
        mesh, manual = params["mesh"], params.get("newly_manual_axes")
        axes = mesh.axis_names if manual is None else manual
        return math.prod(mesh.shape[axis] for axis in axes)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _inner(params: dict) -> list[Jaxpr]:
    """The jaxprs among the parameters of an equation."""
    values = []
    for value in params.values():
        values += value if isinstance(value, (tuple, list)) else [value]
    closed = [v.jaxpr if isinstance(v, ClosedJaxpr) else v for v in values]
    return [v for v in closed if isinstance(v, Jaxpr)]


def _array(operand: Any) -> ShapedArray:
    return operand.aval


def _bytes(eqn: JaxprEqn, operands: int) -> int:
    used = [_array(v) for v in (*eqn.invars[:operands], *eqn.outvars)]
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in used)


def _dot(eqn: JaxprEqn) -> Count:
    """[.. m k] times [.. k n]: m n products of length k for each of the batch."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = _array(eqn.invars[0]).shape
    length = math.prod(shape[axis] for axis in contracted)
    products = math.prod(_array(eqn.outvars[0]).shape)
    return Count(2 * products * length, 0, _bytes(eqn, 2))


def _convolution(eqn: JaxprEqn) -> Count:
    """Multiply-adds with real pixels only.

    Taps on padding and in the holes of a dilated input are left out, as XLA's cost
    analysis does; so the two gradients of a convolution cost exactly what it costs.
    """
    p, (image, kernel) = eqn.params, (_array(v).shape for v in eqn.invars[:2])
    numbers = p["dimension_numbers"]
    out = _array(eqn.outvars[0]).shape
    pairs = 1
    for axis in range(len(p["window_strides"])):
        pairs *= _touching(
            image[numbers.lhs_spec[2 + axis]],
            kernel[numbers.rhs_spec[2 + axis]],
            out[numbers.out_spec[2 + axis]],
            stride=p["window_strides"][axis],
            before=p["padding"][axis][0],
            holes=(p["lhs_dilation"][axis], p["rhs_dilation"][axis]),
        )
    batch, features = (out[axis] for axis in numbers.out_spec[:2])
    inputs = kernel[numbers.rhs_spec[1]]  # of one feature group
    return Count(2 * batch * features * inputs * pairs, 0, _bytes(eqn, 2))


def _touching(
    size: int, taps: int, out: int, *, stride: int, before: int, holes: tuple[int, int]
) -> int:
    """Pairs of an output and a tap, along one axis, that meet a pixel of the input."""
    start = np.arange(out)[:, None] * stride - before
    at = start + np.arange(taps)[None] * holes[1]
    return int(((at >= 0) & (at <= (size - 1) * holes[0]) & (at % holes[0] == 0)).sum())


def _cudnn_forward(eqn: JaxprEqn) -> Count:
    """q k^T and its product with v: 2 products."""
    return Count(2 * _cudnn_product(eqn), 0, _bytes(eqn, 3))


def _cudnn_backward(eqn: JaxprEqn) -> Count:
    """q k^T again, and the gradients of the two products with each factor."""
    one = _cudnn_product(eqn)
    return Count(5 * one, one, _bytes(eqn, 3))


def _cudnn_product(eqn: JaxprEqn) -> int:
    q, k = (_array(v).shape for v in eqn.invars[:2])
    length = k[1] if eqn.params["layout"] == 0 else k[2]  # BTNH or BNTH
    return 2 * math.prod(q) * length


_PRODUCTS: dict[str, Callable[[JaxprEqn], Count]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "dot_product_attention_fwd_wrapper": _cudnn_forward,
    "dot_product_attention_bwd_wrapper": _cudnn_backward,
}
