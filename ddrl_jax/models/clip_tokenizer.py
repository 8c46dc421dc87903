"""Prompts -> token ids of CLIP, by the tokenizer files of a folder."""

import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ddrl_jax.errors import UserError
from ddrl_jax.models.clip import ClipTextConfig

SHOWN = 60  # characters of a prompt in a message
EITHER = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # a complete tokenizer

Tokenize = Callable[[Sequence[str]], Int[np.ndarray, "b l"]]


def clip_tokenize(folder: Path, config: ClipTextConfig) -> Tokenize:
    """prompts -> ids [b l] int32, padded to the limit of the text tower.

    Args:
      folder: that holds the tokenizer's files.
      config: of the text tower.

    Returns:
      The function. A prompt that is too long keeps its end token and loses the words
      before it, as everywhere with CLIP, and is reported once.

    Raises:
      UserError: the tokenizer is missing, damaged or of another model.
    """
    tokenizer = _read(folder)
    limit = min(tokenizer.model_max_length, config.max_position_embeddings)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} belongs to another text tower",
            got=f"{len(tokenizer)} tokens",
            wanted=f"at most {config.vocab_size}, the vocab_size of the text tower",
            way_out="download the whole model again",
        )
    reported: set[str] = set()
    lock = threading.Lock()  # padding and truncation are settings of the one tokenizer

    def both(prompts: list[str]) -> tuple[list[list[int]], list[list[int]]]:
        with lock:
            whole = tokenizer(prompts)["input_ids"]
            cut = tokenizer(
                prompts, padding="max_length", max_length=limit, truncation=True
            )
        return whole, cut["input_ids"]

    def tokenize(prompts: Sequence[str]) -> Int[np.ndarray, "b l"]:
        whole, cut = both(list(prompts))
        pairs = zip(prompts, whole, strict=True)
        long = {prompt for prompt, ids in pairs if len(ids) > limit} - reported
        reported.update(long)
        if long:
            warnings.warn(
                f"{len(long)} prompts are longer than the {limit} tokens of CLIP and"
                f" lose their end, such as {min(long)[:SHOWN]!r}...",
                stacklevel=2,
            )
        return np.asarray(cut, np.int32)

    return tokenize


def _read(folder: Path) -> Any:
    try:
        from transformers import CLIPTokenizer
    except ImportError as e:
        raise UserError(
            "the tokenizer of CLIP can not be read",
            got="transformers is not installed",
            wanted="transformers, which reads tokenizers",
            way_out="pip install transformers",
        ) from e
    # transformers would make an empty vocabulary of an incomplete folder
    if not any(all((folder / f).is_file() for f in files) for files in EITHER):
        raise _bad(folder, f"neither {' nor '.join(map(' and '.join, EITHER))}")
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    # a damaged file raises whatever the parser in it happens to meet
    except Exception as e:
        raise _bad(folder, f"{type(e).__name__}: {e}") from e


def _bad(folder: Path, reason: str) -> UserError:
    return UserError(
        f"the tokenizer in {folder} can not be used",
        got=reason,
        wanted="the CLIP tokenizer of this model, as save_pretrained writes it",
        way_out="download the whole model again",
    )
