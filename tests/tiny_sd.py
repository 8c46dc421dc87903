"""Tiny Stable Diffusion pipelines with random weights, written by diffusers itself.

`write_pipeline(folder)` needs PyTorch; a test that calls it starts with
`pytest.importorskip("torch")`.
"""

import json
import logging
from pathlib import Path
from typing import Any

WORDS = ("a", "photo", "of", "cat", "dog", "fox", "bear", "lion", "horse", "red")
LENGTH = 16  # tokens of a prompt, both ends included
PIXELS, LATENT = 32, 4  # sides of a picture and of its latent
BETAS = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def write_pipeline(folder: Path, **options: Any) -> Path:
    """Writes a pipeline with save_pretrained and returns its folder.

    Args:
      folder: where to; made if need be.
      **options: as for `make_pipeline`, and
        variant: "fp16" writes half-precision weights under that name.
        shard_size: "20KB" splits the UNet into shards of that size with an index.
    """
    import torch

    variant = options.pop("variant", None)
    shard_size = options.pop("shard_size", None)
    pipe = make_pipeline(**options)
    if variant == "fp16":
        pipe = pipe.to(torch.float16)
    pipe.save_pretrained(folder, variant=variant)
    if shard_size:
        unet = Path(folder) / "unet"
        for file in unet.glob("*.safetensors"):
            file.unlink()
        pipe.unet.save_pretrained(unet, variant=variant, max_shard_size=shard_size)
    return Path(folder)


def make_pipeline(
    *,
    seed: int = 0,
    sd2: bool = False,
    prediction: str = "",
    scheduler: str = "DDIMScheduler",
    betas: dict[str, Any] | None = None,
    length: int = LENGTH,
    unet: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
) -> Any:
    """A StableDiffusionPipeline of diffusers on the CPU, float32, random weights.

    Args:
      seed: of the weights.
      sd2: the layout of 2.x: heads a level, linear projections, OpenCLIP's gelu, pads
        with "!", v-prediction; else that of 1.x.
      prediction: "epsilon" or "v_prediction"; "" is that of the layout.
      scheduler: class name of its scheduler.
      betas: scheduler settings other than those of Stable Diffusion.
      length: tokens of a prompt.
      unet, vae, text: further settings of the three networks.
    """
    import diffusers
    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)  # tests run beside each other; spinning threads cost more
    transformers_logging.set_verbosity_error()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    prediction = prediction or ("v_prediction" if sd2 else "epsilon")
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(length, pad="!" if sd2 else "")
    kind = getattr(diffusers, scheduler)
    settings = BETAS | (betas or {})
    known = {k: v for k, v in settings.items() if k in _parameters(kind)}
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**_VAE | (vae or {})),
        text_encoder=_text_encoder(tokenizer, sd2, length, text or {}),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            **_UNET | (_SD2 if sd2 else {}) | (unet or {})
        ),
        scheduler=kind(**known, prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


_UNET: dict[str, Any] = {
    "sample_size": LATENT,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
}
_SD2: dict[str, Any] = {"attention_head_dim": (1, 2), "use_linear_projection": True}
_VAE: dict[str, Any] = {
    "sample_size": PIXELS,
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}


def make_tokenizer(length: int = LENGTH, pad: str = "") -> Any:
    """A CLIPTokenizer of letters and WORDS: `!` is token 0, start and end the last."""
    import tempfile

    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789.,")
    tokens = ["!", *letters, "!</w>", *(f"{c}</w>" for c in letters)]
    merges: list[str] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append(f"{pieces[0]} {pieces[1]}")
            pieces[:2] = ["".join(pieces[:2])]
            tokens.append(pieces[0])
    merges = list(dict.fromkeys(merges))
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {token: index for index, token in enumerate(tokens)}
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary))
        Path(folder, "merges.txt").write_text(
            "\n".join(["#version: 0.2", *merges]) + "\n"
        )
        return CLIPTokenizer.from_pretrained(
            folder, model_max_length=length, pad_token=pad or "<|endoftext|>"
        )


def _text_encoder(tokenizer: Any, sd2: bool, length: int, text: dict[str, Any]) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 12,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": length,
        "hidden_act": "gelu" if sd2 else "quick_gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        # Wide, so that different prompts are far from each other.
        "initializer_factor": 5.0,
    }
    return CLIPTextModel(CLIPTextConfig(**settings | text)).eval()


def _parameters(kind: type) -> set[str]:
    import inspect

    return set(inspect.signature(kind).parameters)
