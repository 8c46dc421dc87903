"""A tiny CLIP folder with random weights, written by transformers itself.

It needs PyTorch; a test that calls it starts with `pytest.importorskip("torch")`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import tiny_sd

SIDE, LENGTH, WIDTH = 12, 10, 6  # pixels, tokens, and numbers of an embedding
PROMPTS = ("a photo of a cat", "a red fox", "a lion", "a photo of a cat")


def make_clip(hidden_act: str = "quick_gelu", seed: int = 0) -> Any:
    """A CLIPModel of transformers; two layers a tower, weights that matter."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    tower = {
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": hidden_act,
        "projection_dim": WIDTH,
    }
    tokenizer = tiny_sd.make_tokenizer(LENGTH)
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={
            **tower,
            **ends,
            "hidden_size": 8,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": LENGTH,
        },
        vision_config={
            **tower,
            "hidden_size": 12,
            "image_size": SIDE,
            "patch_size": 4,
        },
        projection_dim=WIDTH,
    )
    model = CLIPModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def make_processor(**settings: Any) -> Any:
    """The picture processor of the tiny CLIP."""
    from transformers.models.clip import image_processing_pil_clip

    kind = image_processing_pil_clip.CLIPImageProcessorPil
    return kind(**{"size": SIDE, "crop_size": SIDE, **settings})


def write_clip(folder: Path, model: Any) -> Path:
    """Writes weights, config.json, tokenizer and picture processing of a model."""
    model.save_pretrained(folder)
    tiny_sd.make_tokenizer(LENGTH).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return Path(folder)


def features_of(
    model: Any, images: Any, prompts: Any = PROMPTS
) -> tuple[np.ndarray, np.ndarray]:
    """(picture, prompt) embeddings by transformers alone, not normalised."""
    import torch

    pixels = make_processor()(list(images), return_tensors="pt")["pixel_values"]
    tokens = tiny_sd.make_tokenizer(LENGTH)(
        list(prompts), padding=True, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        seen = model.get_image_features(pixels).pooler_output
        read = model.get_text_features(**tokens).pooler_output
    return seen.numpy(), read.numpy()


def pictures(count: int = 4, height: int = 20, width: int = 26) -> np.ndarray:
    """Random uint8 pictures."""
    rng = np.random.default_rng(5)
    return rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
