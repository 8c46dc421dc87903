"""The layers every network is made of; the only file that attaches logical axes.

Logical names: "embed" (model width), "mlp" (hidden width), "heads" (heads x dim),
"vocab", "layers" (stacked blocks), "lora_rank". sharding.py maps them to mesh axes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ddrl_jax.models.context_parallel import divided
from ddrl_jax.sharding import RULES, spec_for, without

NORM_EPSILON = 1e-6  # under the root of a variance: a constant row must not be 0 / 0


def weight(
    module: nn.Module, name: str, init: Any, shape: tuple[int, ...], axes: tuple
) -> Any:
    """A parameter of a module with logical axes, as a plain array.

    Args:
      module: in whose compact method this is called.
      name: of the parameter.
      init: (key, shape) -> array.
      shape: of the parameter.
      axes: a logical name, or None, for each of its axes.
    """
    return module.param(name, nn.with_partitioning(init, axes), shape)


def gathered(x: Any, axes: tuple, mesh: Mesh | None) -> Any:
    """A weight as a product uses it: whole over fsdp, which divides samples there.

    Left open, XLA (jax 0.10.2 to 0.12) may let fsdp divide the result's channels and
    gets them wrong: outputs of convolutions and gradients of matrices were, on a mesh
    of data 2, fsdp 2 and tensor 2. Axes that are not fsdp's stay as they come: a copy
    that is whole everywhere (rollout.layout "replicated") is used without a message.
    Which these are says the table that denoiser.py hands to Flax, RULES without one.

    Args:
      x: the weight, in the dtype of the product.
      axes: its logical axes.
      mesh: on which it is used; None is one device.
    """
    if mesh is None or mesh.shape["fsdp"] == 1:
        return x
    rules: Any = dict(nn.get_logical_axis_rules()) or RULES
    rest = spec_for(axes, x.shape, mesh, without(rules, "fsdp"))
    free = [n is not None and "fsdp" not in rules.get(n, ()) for n in axes]
    parts = zip(free, rest, strict=True)
    spec = P(*(P.UNCONSTRAINED if is_free else part for is_free, part in parts))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


class Dense(nn.Module):
    """x W + b with an optional low-rank W + (alpha / rank) A B in its own collection.

    Attributes:
      features: width of the output.
      axes: logical names of the two axes of W.
      dtype: of the matrix product; parameters stay float32.
      rank: rank of the LoRA factors, 0 for none.
      alpha: LoRA scale times rank; 0 means alpha = rank.
      zero: start W at 0 (outputs that must begin as the identity).
      mesh: on which it runs; None is one device.
    """

    features: int
    axes: tuple[str, str] = ("embed", "mlp")
    dtype: str = "float32"
    rank: int = 0
    alpha: float = 0.0
    zero: bool = False
    use_bias: bool = True
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        """Applies the layer to the last axis."""
        init = nn.initializers.zeros if self.zero else nn.initializers.xavier_uniform()
        shape = (x.shape[-1], self.features)
        kernel = weight(self, "kernel", init, shape, self.axes)
        # Two-dimensional operands: XLA's weight gradient of a 3-D product is twice
        # as slow on CPU. Not where a mesh divides both the samples and their rows: the
        # joined axis can not be divided so, and would be gathered.
        rows = x if divided(self.mesh) else x.reshape(-1, x.shape[-1])
        rows = rows.astype(self.dtype)
        y = rows @ gathered(kernel.astype(self.dtype), self.axes, self.mesh)
        if self.rank and self.has_lora():
            y = y + self._low_rank(rows)
        if self.use_bias:
            zeros = nn.initializers.zeros
            bias = weight(self, "bias", zeros, (self.features,), self.axes[1:])
            y = y + gathered(bias.astype(self.dtype), self.axes[1:], self.mesh)
        return y.reshape(*x.shape[:-1], self.features)

    def has_lora(self) -> bool:
        """True while initialising and where the caller handed in a LoRA tree."""
        return self.is_initializing() or self.has_variable("lora", "a")

    def _low_rank(self, rows: Array) -> Array:
        def factor(name, init, shape, axes) -> Any:
            boxed = nn.with_partitioning(init, axes)
            make = lambda: boxed(self.make_rng("lora"), shape, jnp.float32)  # noqa: E731
            value: Any = self.variable("lora", name, make).value
            return gathered(value.astype(self.dtype), axes, self.mesh)

        gaussian = nn.initializers.normal(1.0 / self.rank)
        a = factor("a", gaussian, (rows.shape[-1], self.rank), (self.axes[0], None))
        b = factor(
            "b", nn.initializers.zeros, (self.rank, self.features), (None, self.axes[1])
        )
        scale = (self.alpha or self.rank) / self.rank
        return (rows @ a) @ b * scale


def rms_norm(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """x / sqrt(mean(x^2) + epsilon), computed in float32 (Zhang 2019, Eq. 4)."""
    wide = x.astype(jnp.float32)
    scale = jnp.reciprocal(
        jnp.sqrt(jnp.mean(wide * wide, -1, keepdims=True) + NORM_EPSILON)
    )
    return (wide * scale).astype(x.dtype)


def modulate(
    x: Float[Array, "b l d"], shift: Float[Array, "b _ d"], scale: Float[Array, "b _ d"]
) -> Float[Array, "b l d"]:
    """rms_norm(x) (1 + scale) + shift (Peebles 2023, adaLN)."""
    return rms_norm(x) * (1 + scale) + shift


def time_features(time: Float[Array, " b"], width: int) -> Float[Array, "b {width}"]:
    """cos and sin of 1000 time at geometric frequencies 1 .. 1/10000, float32."""
    half = width // 2
    frequency = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / half)
    angle = 1000.0 * time.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
