"""The config.json of CLIP models: each tower alone, or both in one file."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ddrl_jax.models.network_config import read_config, refuse

ACTIVATIONS = ("quick_gelu", "gelu")
# The end token that configurations before transformers 4.31 name, whatever it is.
LEGACY_END = 2
WITH_PROJECTION = ("CLIPTextModelWithProjection", "CLIPVisionModelWithProjection")
# Keys of the format that do not touch what a frozen tower computes: what it is made
# for, how it was initialised and trained, and settings of text generation, which older
# files list in full.
# fmt: off
IGNORED_KEYS = frozenset((
    "architectures", "attention_dropout", "dropout", "initializer_factor",
    "initializer_range", "bos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "dtype", "torch_dtype", "transformers_version",
    "tokenizer_class", "task_specific_params", "finetuning_task", "problem_type",
    "id2label", "label2id", "num_labels", "prefix", "return_dict", "torchscript",
    "use_bfloat16", "use_cache", "output_attentions", "output_hidden_states",
    "output_scores", "tie_word_embeddings", "tie_encoder_decoder", "tf_legacy_loss",
    "return_dict_in_generate", "attn_implementation", "cross_attention_hidden_size",
    "chunk_size_feed_forward", "remove_invalid_values", "bad_words_ids",
    "begin_suppress_tokens", "suppress_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "exponential_decay_length_penalty", "diversity_penalty",
    "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "no_repeat_ngram_size", "length_penalty", "repetition_penalty", "max_length",
    "min_length", "num_beam_groups", "num_beams", "num_return_sequences", "temperature",
    "top_k", "top_p", "typical_p", "logit_scale_init_value", "text_config_dict",
    "vision_config_dict", "gradient_checkpointing", "transformers.js_config",
))
# fmt: on
_ONLY: dict[str, tuple] = {
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
T = TypeVar("T", "ClipTextConfig", "ClipVisionConfig")


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Sizes of a text tower; names and defaults are those of a transformers file.

    `eos_token_id` decides where the pooled state is read: 2 is the legacy rule, the
    position of the largest id; else the first position of that id. `with_projection`
    is ours: the file has a `text_projection` to `projection_dim`.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    with_projection: bool = False

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "ClipTextConfig":
        """Reads the config.json of a text tower, or the text half of a CLIP model's.

        Raises:
          UserError: keys or values that this network can not honour, all listed.
        """
        return _read(cls, "text", given)


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """Sizes of a vision tower; names and defaults are those of a transformers file.

    `with_projection` is ours: the file has a `visual_projection` to `projection_dim`.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    with_projection: bool = False

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "ClipVisionConfig":
        """Reads the config.json of a vision tower, or that half of a CLIP model's.

        Raises:
          UserError: keys or values that this network can not honour, all listed.
        """
        return _read(cls, "vision", given)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Both towers and the width of the space they meet in."""

    text: ClipTextConfig
    vision: ClipVisionConfig
    projection_dim: int = 512

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "ClipConfig":
        """Reads the config.json of a CLIP model.

        Raises:
          UserError: keys or values that this network can not honour, all listed.
        """
        top = {k: v for k, v in given.items() if k not in _HALVES}
        only = {"model_type": ("clip",), **_ONLY}
        top = read_config(_Top, "CLIP model", top, only=only, ignored=IGNORED_KEYS)
        halves = (given.get("text_config"), given.get("vision_config"))
        halves = {k: v or {} for k, v in zip(_HALVES, halves, strict=True)}
        whole = {**given, **halves}
        return cls(
            ClipTextConfig.from_json(whole),
            ClipVisionConfig.from_json(whole),
            top.projection_dim,
        )


_HALVES = ("text_config", "vision_config")


@dataclasses.dataclass(frozen=True)
class _Top:
    projection_dim: int = 512


def _read(cls: type[T], tower: str, given: Mapping[str, Any]) -> T:
    what = f"CLIP {tower} tower"
    if given.get(f"{tower}_config") is not None:
        # Early files hold what differs from the defaults a second time, as a dict
        # that wins.
        early = given.get(f"{tower}_config_dict")
        given = given[f"{tower}_config"] if early is None else early
    if not isinstance(given, Mapping):
        refuse(what, [f"{tower}_config = {given!r} (an object)"])
    made_by = given.get("architectures") or ()
    if not isinstance(made_by, list | tuple):
        refuse(what, [f"architectures = {made_by!r} (a list)"])
    projected = any(name in made_by for name in WITH_PROJECTION)
    given = {**given, "with_projection": projected}
    only = {"model_type": (f"clip_{tower}_model", "clip"), **_ONLY}
    config = read_config(cls, what, given, only=only, ignored=IGNORED_KEYS)
    refuse(what, list(_problems(config)))
    return config


def _problems(config: Any):
    if config.hidden_act not in ACTIVATIONS:
        yield f"hidden_act = {config.hidden_act!r} ({' or '.join(ACTIVATIONS)})"
    heads, width = config.num_attention_heads, config.hidden_size
    if width % heads:
        yield f"num_attention_heads = {heads} (a divisor of hidden_size = {width})"
    if isinstance(config, ClipVisionConfig) and config.image_size < config.patch_size:
        yield f"patch_size = {config.patch_size} (image_size = {config.image_size})"
