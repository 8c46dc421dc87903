"""CLIP: a causal text transformer and a vision transformer (Radford 2021).

Submodules carry the names of the tensors in a transformers file; the layers of a tower
are one stacked module that is scanned.
"""

from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ddrl_jax.models.clip_config import (
    LEGACY_END,
    ClipTextConfig,
    ClipVisionConfig,
)
from ddrl_jax.models.clip_config import (
    ClipConfig as ClipConfig,
)
from ddrl_jax.models.layers import Dense, weight

# (regular expression for the whole of a torch name, kind of the tensor)
KINDS: tuple[tuple[str, str], ...] = (
    (r"(.+\.)?(layer_norm[12]|\w+_layer_?norm|pre_layrnorm)\.weight", "norm"),
    (r"(.+\.)?([qkv]|out)_proj\.weight", "linear"),
    (r"(.+\.)?fc[12]\.weight", "linear"),
    (r"(text|visual)_projection\.weight", "linear"),
    (r"(.+\.)?(token|position)_embedding\.weight", "embedding"),
    (r"(.+\.)?patch_embedding\.weight", "conv2d"),
    (r"(.+\.)?class_embedding|logit_scale", "raw"),
    (r".+\.bias", "bias"),
)
STACKED: tuple[str, ...] = (r"((text|vision)_model\.)?encoder\.layers",)
IGNORED: tuple[str, ...] = (r"(.+\.)?embeddings\.position_ids",)

LOGIT_SCALE = 2.6592  # log of the inverse temperature a new CLIP starts from


class ClipTextOut(NamedTuple):
    """States after the final norm, and that of the end token; float32."""

    hidden: Float[Array, "b l d"]
    pooled: Float[Array, "b d"]


class ClipVisionOut(NamedTuple):
    """States of the last layer, and the normed one of the class token; float32."""

    hidden: Float[Array, "b l d"]
    pooled: Float[Array, "b d"]


class ClipText(nn.Module):
    """Token ids -> states.

    Attributes:
      config: sizes.
      dtype: of the matrix products; parameters stay float32.
    """

    config: ClipTextConfig
    dtype: str = "float32"

    def setup(self):
        """Embeddings, layers, a norm, and the projection of files that have one."""
        config = self.config
        self.embeddings = _TextEmbeddings(config)
        self.encoder = _Encoder(config, self.dtype, causal=True)
        self.final_layer_norm = _norm(config, "float32")
        if config.with_projection:
            self.text_projection = _projection(config.projection_dim, self.dtype)

    def __call__(
        self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None
    ) -> ClipTextOut:
        """Encodes prompts.

        Args:
          ids: tokens, at most config.max_position_embeddings.
          mask: False where a token is padding that nobody may attend to. Stable
            Diffusion has none: it reads its padding.
        """
        x = self.embeddings(ids).astype(self.dtype)
        hidden = self.final_layer_norm(self.encoder(x, mask))
        if self.config.eos_token_id == LEGACY_END:
            end = jnp.argmax(ids, axis=-1)
        else:
            end = jnp.argmax(ids == self.config.eos_token_id, axis=-1)
        pooled = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
        if self.config.with_projection and self.is_initializing():
            self.text_projection(pooled)
        return ClipTextOut(hidden, pooled)

    def features(
        self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None
    ) -> Float[Array, "b p"]:
        """The projected pooled states, not normalised (config.with_projection)."""
        return self.text_projection(self(ids, mask).pooled).astype(jnp.float32)


class ClipVision(nn.Module):
    """Normalised pictures -> states.

    Attributes:
      config: sizes.
      dtype: of the matrix products; parameters stay float32.
    """

    config: ClipVisionConfig
    dtype: str = "float32"

    def setup(self):
        """Patches, layers, two norms, and the projection of files that have one."""
        config = self.config
        self.embeddings = _VisionEmbeddings(config, self.dtype)
        self.pre_layrnorm = _norm(config, self.dtype)  # misspelt in every file
        self.encoder = _Encoder(config, self.dtype, causal=False)
        self.post_layernorm = _norm(config, "float32")
        if config.with_projection:
            self.visual_projection = _projection(config.projection_dim, self.dtype)

    def __call__(self, pixels: Float[Array, "b h w c"]) -> ClipVisionOut:
        """Encodes pictures of config.image_size, normalised as the model was trained.

        Raises:
          ValueError: pictures of another size.
        """
        hidden = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        pooled = self.post_layernorm(hidden[:, 0])
        if self.config.with_projection and self.is_initializing():
            self.visual_projection(pooled)
        return ClipVisionOut(hidden.astype(jnp.float32), pooled)

    def features(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b p"]:
        """The projected pooled states, not normalised (config.with_projection)."""
        return self.visual_projection(self(pixels).pooled).astype(jnp.float32)


class Clip(nn.Module):
    """Both towers, projected into one space.

    Attributes:
      text_config: sizes of the text tower.
      vision_config: sizes of the vision tower.
      projection_dim: width of the common space.
      dtype: of the matrix products; parameters stay float32.
    """

    text_config: ClipTextConfig
    vision_config: ClipVisionConfig
    projection_dim: int
    dtype: str = "float32"

    def setup(self):
        """Towers, projections and the temperature."""
        self.text_model = ClipText(self.text_config, self.dtype)
        self.vision_model = ClipVision(self.vision_config, self.dtype)
        self.text_projection = _projection(self.projection_dim, self.dtype)
        self.visual_projection = _projection(self.projection_dim, self.dtype)
        init = nn.initializers.constant(LOGIT_SCALE)
        self.logit_scale = weight(self, "logit_scale", init, (), ())

    def image_features(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b p"]:
        """Pictures in the common space, not normalised."""
        pooled = self.vision_model(pixels).pooled
        return self.visual_projection(pooled).astype(jnp.float32)

    def text_features(
        self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None
    ) -> Float[Array, "b p"]:
        """Prompts in the common space, not normalised."""
        pooled = self.text_model(ids, mask).pooled
        return self.text_projection(pooled).astype(jnp.float32)

    def __call__(
        self,
        pixels: Float[Array, "n h w c"],
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
    ) -> Float[Array, "n b"]:
        """exp(logit_scale) cos(picture, prompt), all pairs (Radford 2021, Fig. 3)."""
        pictures = self.image_features(pixels)
        prompts = self.text_features(ids, mask)
        pictures /= jnp.linalg.norm(pictures, axis=-1, keepdims=True)
        prompts /= jnp.linalg.norm(prompts, axis=-1, keepdims=True)
        return jnp.exp(self.logit_scale) * pictures @ prompts.T


# ---- parts


def quick_gelu(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """x sigmoid(1.702 x), OpenAI's stand-in for the Gaussian error unit."""
    return x * jax.nn.sigmoid(1.702 * x)


def _norm(config: Any, dtype: str, name: str | None = None) -> nn.LayerNorm:
    """Layer norm whose mean and variance are float32, by the two-pass formula."""
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps,
        dtype=jnp.dtype(dtype),
        use_fast_variance=False,
        scale_init=nn.with_partitioning(nn.initializers.ones, (None,)),
        bias_init=nn.with_partitioning(nn.initializers.zeros, (None,)),
        name=name,
    )


def _projection(features: int, dtype: str) -> Dense:
    return Dense(features, ("embed", "mlp"), dtype=dtype, use_bias=False)


def _embedding(rows: int, width: int, axis: str | None, name: str) -> nn.Embed:
    init = nn.with_partitioning(nn.initializers.normal(0.02), (axis, "embed"))
    return nn.Embed(rows, width, embedding_init=init, name=name)


class _TextEmbeddings(nn.Module):
    """Word and position vectors, added."""

    config: ClipTextConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        c, length = self.config, ids.shape[1]
        if length > c.max_position_embeddings:
            raise ValueError(f"{length} tokens, {c.max_position_embeddings} positions")
        tokens = _embedding(c.vocab_size, c.hidden_size, "vocab", "token_embedding")
        rows = c.max_position_embeddings
        places = _embedding(rows, c.hidden_size, None, "position_embedding")
        return tokens(ids) + places(jnp.arange(length))


class _VisionEmbeddings(nn.Module):
    """A class vector and one linear map of each patch, plus position vectors."""

    config: ClipVisionConfig
    dtype: str

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b l d"]:
        c, patch, width = self.config, self.config.patch_size, self.config.hidden_size
        size = (c.image_size, c.image_size, c.num_channels)
        if pixels.shape[1:] != size:
            raise ValueError(f"pictures of {pixels.shape[1:]}, the tower takes {size}")
        init, axes = nn.initializers.normal(0.02), (None, None, None, "embed")
        patches = nn.Conv(
            width,
            (patch, patch),
            strides=patch,
            padding="VALID",
            use_bias=False,
            dtype=jnp.dtype(self.dtype),
            kernel_init=nn.with_partitioning(init, axes),
            name="patch_embedding",
        )(pixels.astype(self.dtype))
        patches = patches.reshape(pixels.shape[0], -1, width)
        first = weight(self, "class_embedding", init, (width,), ("embed",))
        first = jnp.broadcast_to(first, (pixels.shape[0], 1, width))
        x = jnp.concatenate([first.astype(self.dtype), patches], axis=1)
        places = _embedding(x.shape[1], width, None, "position_embedding")
        return x + places(jnp.arange(x.shape[1])).astype(self.dtype)


class _Encoder(nn.Module):
    """The layers of a tower: one set of stacked weights, scanned."""

    config: ClipTextConfig | ClipVisionConfig
    dtype: str
    causal: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None
    ) -> Float[Array, "b l d"]:
        stack = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, nn.broadcast),  # Flax's annotation forgets it
            length=self.config.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return stack(self.config, self.dtype, self.causal, name="layers")(x, mask)[0]


class _Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ClipTextConfig | ClipVisionConfig
    dtype: str
    causal: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], mask: Array | None):
        """Returns (x', None), the form nn.scan wants."""
        norm, dtype = partial(_norm, self.config, self.dtype), self.dtype
        heads = (self.config.num_attention_heads, self.causal)
        attend = _Attention(*heads, dtype, name="self_attn")
        x = x + attend(norm(name="layer_norm1")(x), mask)
        mlp = _Mlp(self.config, dtype, name="mlp")
        return x + mlp(norm(name="layer_norm2")(x)), None


class _Attention(nn.Module):
    heads: int
    causal: bool
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], mask: Array | None):
        b, length, d = x.shape
        dense = partial(Dense, d, dtype=self.dtype)
        shape = (b, length, self.heads, -1)
        q, k, v = (
            dense(("embed", "heads"), name=f"{n}_proj")(x).reshape(shape) for n in "qkv"
        )
        seen = None if mask is None else mask[:, None, None, :]
        mixed = jax.nn.dot_product_attention(
            q, k, v, mask=seen, is_causal=self.causal, implementation="xla"
        )
        out = dense(("heads", "embed"), name="out_proj")
        return out(mixed.reshape(b, length, d))


class _Mlp(nn.Module):
    config: ClipTextConfig | ClipVisionConfig
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        c, dtype = self.config, self.dtype
        h = Dense(c.intermediate_size, ("embed", "mlp"), dtype=dtype, name="fc1")(x)
        quick = c.hidden_act == "quick_gelu"
        h = quick_gelu(h) if quick else nn.gelu(h, approximate=False)
        return Dense(x.shape[-1], ("mlp", "embed"), dtype=dtype, name="fc2")(h)
