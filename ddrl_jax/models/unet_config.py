"""The config.json of a Stable Diffusion UNet: what it says, and what is refused.

Fields have the names and defaults of the file format. A key that would change the
mathematics to something this package does not have is an error that names it.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ddrl_jax.models.network_config import Check, number, positive, read_config, refuse

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")

# Keys of the format that we do not read, with the values that ask for nothing more.
ACCEPTED: Mapping[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DConditionModel",),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1, 1.0),
    "dropout": (0, 0.0),  # the policy has no random numbers but the sampler's
    "act_fn": ("silu", "swish"),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "class_embeddings_concat": (False,),
    "projection_class_embeddings_input_dim": (None,),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1, 1.0),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "cross_attention_norm": (None,),
}
# Keys whose value makes no difference to this network.
HARMLESS = {
    "upcast_attention",  # the scores are float32 whatever the dtype
    "mid_block_only_cross_attention",  # of a middle block that is refused
    "addition_embed_type_num_heads",  # of an embedding that is refused
    # written by the moving average of diffusers' training scripts
    "decay",
    "min_decay",
    "inv_gamma",
    "power",
    "optimization_step",
    "update_after_step",
    "use_ema_warmup",
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """A UNet of the Stable Diffusion 1.x and 2.x families.

    Attributes:
      in_channels: channels of the latent (9 for inpainting).
      out_channels: channels of the prediction.
      sample_size: height and width of the latents it was trained on, or None.
      center_input_sample: feed 2 x - 1 for x.
      flip_sin_to_cos: time features are (cos, sin), not (sin, cos).
      freq_shift: taken from the number of frequencies in their exponent.
      down_block_types: from the highest resolution to the lowest.
      up_block_types: from the lowest resolution to the highest.
      only_cross_attention: the first attention of a transformer reads the text too;
        one for all levels, or one a level.
      block_out_channels: channels of each level.
      layers_per_block: resnets of a level on the way down; one more on the way up.
      norm_num_groups: of the group norms.
      norm_eps: of the group norms of the resnets.
      cross_attention_dim: width of the text states.
      transformer_layers_per_block: attention blocks of each transformer.
      attention_head_dim: the number of heads, despite its name: one for all levels
        (Stable Diffusion 1), or one a level (2).
      use_linear_projection: linear layers around a transformer, not 1x1 convolutions.
    """

    in_channels: int = 4
    out_channels: int = 4
    sample_size: int | tuple[int, int] | None = None
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int | float = 0
    down_block_types: tuple[str, ...] = (DOWN_BLOCKS[1],) * 3 + DOWN_BLOCKS[:1]
    up_block_types: tuple[str, ...] = UP_BLOCKS[:1] + (UP_BLOCKS[1],) * 3
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "UNetConfig":
        """Reads the content of a config.json.

        Args:
          given: the file as a dict; keys that are absent have the format's defaults.

        Raises:
          UserError: keys or values that this network can not honour, all of them.
        """
        config = read_config(
            cls,
            "UNet",
            given,
            only=ACCEPTED,
            ignored=HARMLESS,
            checks=CHECKS,
            off=(None, False),
        )
        refuse("UNet", list(_contradictions(config)))
        return config

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each level, highest resolution first."""
        return _each_level(self.attention_head_dim, self)

    @property
    def only_cross(self) -> tuple[bool, ...]:
        """`only_cross_attention` of each level, highest resolution first."""
        return _each_level(self.only_cross_attention, self)


def _each_level(value: Any, config: UNetConfig) -> tuple:
    """A value given once or a level, as one a level."""
    many = isinstance(value, tuple)
    return value if many else (value,) * len(config.block_out_channels)


def _tuple_of(check: Any) -> Any:
    return lambda v: isinstance(v, tuple) and len(v) > 0 and all(map(check, v))


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


_COUNTS, _BOOLS = _tuple_of(positive), _tuple_of(_is_bool)
# Fields that may be one of two kinds, or are names.
CHECKS: Mapping[str, Check] = {
    "sample_size": (
        lambda v: v is None or positive(v) or (_COUNTS(v) and len(v) == 2),
        "an integer, two of them, or None",
    ),
    "freq_shift": (number, "a number"),
    "down_block_types": (
        _tuple_of(lambda v: v in DOWN_BLOCKS),
        "a list of " + " and ".join(DOWN_BLOCKS),
    ),
    "up_block_types": (
        _tuple_of(lambda v: v in UP_BLOCKS),
        "a list of " + " and ".join(UP_BLOCKS),
    ),
    "only_cross_attention": (
        lambda v: _is_bool(v) or _BOOLS(v),
        "true, false or a list of them",
    ),
    "norm_eps": (lambda v: number(v) and v > 0, "a positive number"),
    "attention_head_dim": (
        lambda v: positive(v) or _COUNTS(v),
        "a positive integer or a list of them",
    ),
}


def _contradictions(config: UNetConfig) -> Iterator[str]:
    """Values that are fine alone and do not fit together, and what was wanted."""
    channels, groups = config.block_out_channels, config.norm_num_groups
    lists = {
        "down_block_types": config.down_block_types,
        "up_block_types": config.up_block_types,
        "attention_head_dim": config.heads,
        "only_cross_attention": config.only_cross,
    }
    for key, value in lists.items():
        if len(value) != len(channels):
            wanted = f"{len(channels)} values, as many as block_out_channels has"
            yield f"{key} = {list(value)} ({wanted})"
    if any(c % groups for c in channels):
        yield f"norm_num_groups = {groups} (a divisor of each of {channels})"
    pairs = zip(channels, config.heads, strict=False)
    if any(c % heads for c, heads in pairs):
        given = config.attention_head_dim
        yield f"attention_head_dim = {given} (divisors of {channels})"
    if config.freq_shift >= channels[0] // 2:
        most = channels[0] // 2
        yield f"freq_shift = {config.freq_shift} (less than {most} frequencies)"
    if channels[0] % 2:
        yield f"block_out_channels = {list(channels)} (an even number first)"
