"""What the config.json of a UNet may say, and what is refused by name."""

import pytest

from ddrl_jax.errors import UserError
from ddrl_jax.models.unet_config import UNetConfig

SD1 = {  # the published file of Stable Diffusion 1.5
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SD2 = SD1 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
REFUSED = {  # key: a value that other networks have
    "_class_name": "UNet3DConditionModel",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "downsample_padding": 0,
    "mid_block_scale_factor": 1.4,
    "dropout": 0.1,
    "act_fn": "mish",
    "reverse_transformer_layers_per_block": [[1, 2]],
    "encoder_hid_dim": 32,
    "encoder_hid_dim_type": "text_proj",
    "num_attention_heads": 8,
    "dual_cross_attention": True,
    "class_embed_type": "projection",
    "num_class_embeds": 1000,
    "class_embeddings_concat": True,
    "projection_class_embeddings_input_dim": 2816,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "resnet_time_scale_shift": "scale_shift",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.5,
    "time_embedding_type": "fourier",
    "time_embedding_dim": 256,
    "time_embedding_act_fn": "silu",
    "timestep_post_act": "silu",
    "time_cond_proj_dim": 256,  # a consistency model
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
    "attention_type": "gated",
    "cross_attention_norm": "layer_norm",
    "mode_of_tomorrow": "on",
    # keys we read, with values we do not have
    "in_channels": 0,
    "out_channels": "4",
    "sample_size": "large",
    "center_input_sample": 1,
    "flip_sin_to_cos": None,
    "freq_shift": 160,
    "down_block_types": ["AttnDownBlock2D"] + ["DownBlock2D"] * 3,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "only_cross_attention": [True],
    "block_out_channels": 320,
    "layers_per_block": [2, 2, 2, 2],
    "norm_num_groups": 48,
    "norm_eps": 0.0,
    "cross_attention_dim": [768, 768, 768, 768],
    "transformer_layers_per_block": [1, 2, 10, 10],  # Stable Diffusion XL
    "attention_head_dim": 3,
    "use_linear_projection": "yes",
}
ACCEPTED = {  # key: a value that changes nothing here
    "_name_or_path": "somewhere",
    "act_fn": "swish",
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "mid_block_scale_factor": 1.0,
    "dropout": 0.0,
    "upcast_attention": True,
    "mid_block_only_cross_attention": True,
    "addition_embed_type_num_heads": 64,
    "optimization_step": 1000,
    "a_switch_of_tomorrow": False,
    "an_option_of_tomorrow": None,
    "sample_size": [64, 96],
    "in_channels": 9,
}


def test_stable_diffusion_1_has_eight_heads_at_every_level():
    config = UNetConfig.from_json(SD1)
    assert config.heads == (8, 8, 8, 8) and not config.use_linear_projection
    assert config.cross_attention_dim == 768 and config.sample_size == 64
    assert config.only_cross == (False,) * 4


def test_stable_diffusion_2_has_heads_a_level_and_linear_projections():
    config = UNetConfig.from_json(SD2)
    assert config.heads == (5, 10, 20, 20) and config.use_linear_projection
    assert hash(config) == hash(UNetConfig.from_json(dict(SD2)))
    assert config != UNetConfig.from_json(SD1)


@pytest.mark.parametrize("key", REFUSED)
def test_what_can_not_be_honoured_is_refused_by_name(key):
    with pytest.raises(UserError) as e:
        UNetConfig.from_json(SD1 | {key: REFUSED[key]})
    assert f"{key} = {REFUSED[key]!r} (" in str(e.value.got)


def test_all_that_is_refused_is_in_one_message():
    keys = ("class_embed_type", "addition_embed_type", "layers_per_block")
    with pytest.raises(UserError) as e:
        UNetConfig.from_json(SD1 | {k: REFUSED[k] for k in keys})
    assert all(f"{k} = {REFUSED[k]!r}" in str(e.value.got) for k in keys)


@pytest.mark.parametrize("key", ACCEPTED)
def test_what_changes_nothing_is_accepted(key):
    changed = UNetConfig.from_json(SD1 | {key: ACCEPTED[key]})
    read = key in ("sample_size", "in_channels")
    assert (changed == UNetConfig.from_json(SD1)) == (not read)


def test_heads_must_be_as_many_as_the_levels():
    with pytest.raises(
        UserError, match=r"attention_head_dim = \[5, 10, 20\] \(4 values"
    ):
        UNetConfig.from_json(SD2 | {"attention_head_dim": [5, 10, 20]})
