"""Where the activations of a video network live on the mesh.

Tokens are split over the batch axes and the context axis, heads and hidden units over
the tensor axis. Naming it is what makes the compiler gather weights (fsdp) and exchange
heads for tokens (context) in place of anything more expensive it may come up with.
"""

from typing import NamedTuple

from jax.sharding import Mesh
from jaxtyping import Array, Float

from ddrl_jax.models.attention import attention
from ddrl_jax.sharding import constrain


class Layout(NamedTuple):
    """The mesh and the attention of a video network; mesh None places nothing."""

    mesh: Mesh | None = None
    impl: str = "xla"

    def _place(self, x: Array, axes: tuple) -> Array:
        return x if self.mesh is None else constrain(x, axes, self.mesh)

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
        """Attention among all tokens; the context axis is the attention's to handle."""
        split = ("batch", "length", "heads")
        each = (self._place(a, split) for a in (q, k, v))
        mixed = attention(*each, impl=self.impl, mesh=self.mesh)
        return self._place(mixed, split)

    def prompt_attention(
        self,
        q: Float[Array, "b l h d"],
        k: Float[Array, "b n h d"],
        v: Float[Array, "b n h d"],
    ) -> Float[Array, "b l h d"]:
        """Attention of the tokens a device has to all words of the prompt.

        Where `impl` divides tokens, which a prompt has too few of, it is as "auto".
        """
        q = self._place(q, ("batch", "length", "heads"))
        k, v = (self._place(a, ("batch", None, "heads")) for a in (k, v))
        mixed = attention(q, k, v, impl=self.impl, mesh=self.mesh)
        return self._place(mixed, ("batch", "length", "heads"))
