"""Where the activations of a video network live on the mesh.

Tokens are split over the batch axes and the context axis, heads and hidden units over
the tensor axis. Naming it is what makes the compiler gather weights (fsdp) and exchange
heads for tokens (context) in place of anything more expensive it may come up with.
"""

from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from ddrl_jax.models.attention import attention
from ddrl_jax.sharding import RULES, spec_for

# Self-attention sees every token, so there the context axis splits heads instead
# (DeepSpeed Ulysses, Jacobs 2023): an all-to-all each for q, k, v and the result.
WHOLE = {**RULES, "heads": ("tensor", "context")}


class Layout(NamedTuple):
    """The mesh and the attention of a video network; mesh None places nothing."""

    mesh: Mesh | None = None
    impl: str = "xla"

    def _place(self, x: Array, axes: tuple, rules=RULES) -> Array:
        if self.mesh is None:
            return x
        spec = spec_for(axes, x.shape, self.mesh, rules)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def samples(self, x: Float[Array, "b k d"]) -> Float[Array, "b k d"]:
        """A few vectors of each sample, whole on every device that has the sample."""
        return self._place(x, ("batch", None, None))

    def tokens(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """Activations between layers."""
        return self._place(x, ("batch", "length", None))

    def hidden(self, x: Float[Array, "b l m"]) -> Float[Array, "b l m"]:
        """Activations inside the feed-forward layer."""
        return self._place(x, ("batch", "length", "mlp"))

    def self_attention(
        self,
        q: Float[Array, "b l h d"],
        k: Float[Array, "b l h d"],
        v: Float[Array, "b l h d"],
    ) -> Float[Array, "b l h d"]:
        """Attention among all tokens, the heads divided over tensor and context."""
        split, whole = ("batch", "length", "heads"), ("batch", None, "heads")
        each = (self._place(self._place(a, split), whole, WHOLE) for a in (q, k, v))
        mixed = attention(*each, impl=self.impl)
        return self._place(self._place(mixed, whole, WHOLE), split)

    def prompt_attention(
        self,
        q: Float[Array, "b l h d"],
        k: Float[Array, "b n h d"],
        v: Float[Array, "b n h d"],
    ) -> Float[Array, "b l h d"]:
        """Attention of the tokens a device has to all words of the prompt."""
        q = self._place(q, ("batch", "length", "heads"))
        k, v = (self._place(a, ("batch", None, "heads")) for a in (k, v))
        return self._place(attention(q, k, v), ("batch", "length", "heads"))
