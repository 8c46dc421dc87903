"""Files of real CLIP models: their sizes, and what is refused of them."""

import dataclasses

import jax
import numpy as np
import pytest

from ddrl_jax.errors import UserError
from ddrl_jax.models.clip_config import ClipConfig, ClipTextConfig, ClipVisionConfig
from ddrl_jax.models.networks import network_shapes

# Stable Diffusion 1 and 2.
VIT_L_TEXT = ClipTextConfig(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12
)
VIT_H_TEXT = ClipTextConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
)


def parameters(name, config):
    leaves = jax.tree.leaves(network_shapes(name, config))
    return sum(int(np.prod(leaf.shape)) for leaf in leaves)


def test_the_parameters_of_the_towers_of_stable_diffusion():
    assert parameters("clip_text", VIT_L_TEXT) == 123_060_480
    assert parameters("clip_text", VIT_H_TEXT) == 340_387_840


def test_the_parameters_of_the_judges():
    large = {
        "projection_dim": 768,
        "text_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
        },
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
        },
    }
    assert parameters("clip", large) == 427_616_513
    huge = {
        "projection_dim": 1024,
        "text_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "hidden_act": "gelu",
        },
        "vision_config": {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_attention_heads": 16,
            "num_hidden_layers": 32,
            "patch_size": 14,
            "hidden_act": "gelu",
        },
    }
    assert parameters("clip", huge) == 986_109_441


# What the text_encoder of Stable Diffusion 2 says; transformers 4 wrote it.
SD2 = {
    "_name_or_path": "hf-models/stable-diffusion-v2-768x768/text_encoder",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "pad_token_id": 1,
    "projection_dim": 512,
    "torch_dtype": "float32",
    "transformers_version": "4.25.0.dev0",
    "vocab_size": 49408,
}


def test_a_file_of_stable_diffusion_2():
    config = ClipTextConfig.from_json(SD2)
    assert config == dataclasses.replace(VIT_H_TEXT, eos_token_id=2)


def test_early_files_say_it_twice_and_the_second_wins():
    early = {
        "model_type": "clip",
        "projection_dim": 4,
        "logit_scale_init_value": 2.6592,
        "text_config": {"hidden_size": 64, "bad_words_ids": None, "pruned_heads": {}},
        "text_config_dict": {"hidden_size": 16, "num_attention_heads": 2},
        "vision_config": {"hidden_size": 24, "num_attention_heads": 3},
        "vision_config_dict": None,
    }
    config = ClipConfig.from_json(early)
    assert config.text == ClipTextConfig(hidden_size=16, num_attention_heads=2)
    assert config.vision == ClipVisionConfig(hidden_size=24, num_attention_heads=3)
    assert config.projection_dim == 4
    assert ClipConfig.from_json({"model_type": "clip"}) == ClipConfig(
        ClipTextConfig(), ClipVisionConfig()
    )


REFUSED = {
    "hidden_act": "relu",
    "num_attention_heads": 5,
    "num_hidden_layers": 0,
    "layer_norm_eps": "small",
    "model_type": "siglip",
    "pruned_heads": {"0": [1]},
    "is_decoder": True,
    "rope_theta": 10000.0,
}


@pytest.mark.parametrize("key", REFUSED)
@pytest.mark.parametrize("config", [ClipTextConfig, ClipVisionConfig])
def test_refused(config, key):
    with pytest.raises(UserError, match=key) as error:
        config.from_json({"hidden_size": 12, key: REFUSED[key]})
    assert "CLIP" in str(error.value) and "way out" in str(error.value)


@pytest.mark.parametrize(
    ("config", "half"),
    [(ClipTextConfig, "text_config"), (ClipVisionConfig, "vision_config")],
)
def test_a_half_that_is_null_is_one_message(config, half):
    """It is no half: the file is held against a lone tower, which has no such key."""
    given = {half: None, "hidden_size": 12, "num_attention_heads": 3}
    with pytest.raises(UserError, match=f"{half} = None") as error:
        config.from_json(given)
    assert "hidden_size" not in error.value.got


@pytest.mark.parametrize("config", [ClipTextConfig, ClipConfig])
@pytest.mark.parametrize("given", [
    {"text_config": "x"}, {"text_config": ["x"]},
    {"text_config": {"architectures": 3}},
], ids=str)  # fmt: skip
def test_values_of_another_kind_are_one_message(config, given):
    with pytest.raises(UserError, match="text_config = |architectures = 3"):
        config.from_json(given)


def test_refused_of_one_tower_or_the_pair():
    with pytest.raises(UserError, match="eos_token_id"):
        ClipTextConfig.from_json({"eos_token_id": [1, 2]})
    with pytest.raises(UserError, match="patch_size"):
        ClipVisionConfig.from_json({"image_size": 8, "patch_size": 16})
    with pytest.raises(UserError, match="text tower.*\n.*hidden_act"):
        ClipConfig.from_json({"text_config": {"hidden_act": "silu"}})
    with pytest.raises(UserError, match="model_type"):
        ClipConfig.from_json({"model_type": "siglip"})
