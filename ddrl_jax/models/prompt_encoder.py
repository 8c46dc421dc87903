"""Prompts -> hidden states of the text encoder, as diffusers prepares them."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Cond, Params
from ddrl_jax.models.clip import ClipText, ClipTextConfig

CHUNK = 16  # prompts encoded at once; one compiled shape for any number of them
SHOWN = 60  # characters of a prompt in a message


Tokenize = Callable[[Sequence[str]], Int[np.ndarray, "b l"]]


def make_encode(
    tokenize: Tokenize, config: ClipTextConfig, params: Params
) -> Callable[[Sequence[str]], Cond]:
    """The encoder of prompts.

    Args:
      tokenize: as `make_tokenize` gives it.
      config: of the text encoder.
      params: of the text encoder.

    Returns:
      prompts -> Cond with emb [b l d] float32, l the tokenizer's limit.
    """
    network = ClipText(config)

    def hidden_states(params: Params, ids: Array) -> Any:
        out: Any = network.apply({"params": params}, ids)
        return out.hidden

    apply = jax.jit(hidden_states)
    params = jax.tree.map(jnp.asarray, params)

    def encode(prompts: Sequence[str]) -> Cond:
        ids = tokenize(prompts)
        padded = np.pad(ids, ((0, -len(ids) % CHUNK), (0, 0)), mode="edge")
        chunks = padded.reshape(-1, CHUNK, ids.shape[1])
        hidden = [apply(params, chunk) for chunk in chunks]
        return Cond(jnp.concatenate(hidden)[: len(ids)])

    return encode


def make_tokenize(folder: Path, config: ClipTextConfig) -> Tokenize:
    """prompts -> token ids [b l], padded to the tokenizer's limit.

    A prompt longer than that is cut, as everywhere with Stable Diffusion, and reported
    once.

    Args:
      folder: of the model, with tokenizer/.
      config: of the text encoder.

    Raises:
      UserError: the tokenizer is missing, damaged or of another model.
    """
    tokenizer = _read_tokenizer(folder / "tokenizer")
    limit = min(tokenizer.model_max_length, config.max_position_embeddings)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer of {folder} belongs to another text encoder",
            got=f"{len(tokenizer)} tokens",
            wanted=f"at most {config.vocab_size}, the vocab_size of text_encoder/",
            way_out="download the whole model again",
        )
    reported: set[str] = set()

    def tokenize(prompts: Sequence[str]) -> Int[np.ndarray, "b l"]:
        whole = tokenizer(list(prompts))["input_ids"]
        long = [p for p, ids in zip(prompts, whole, strict=True) if len(ids) > limit]
        _report(sorted(set(long) - reported), limit)
        reported.update(long)
        cut = tokenizer(
            list(prompts), padding="max_length", max_length=limit, truncation=True
        )
        return np.asarray(cut["input_ids"], np.int32)

    return tokenize


def _report(prompts: Sequence[str], limit: int) -> None:
    if prompts:
        warnings.warn(
            f"{len(prompts)} prompts are longer than the {limit} tokens of the text "
            f"encoder and lose their end, the first is {prompts[0][:SHOWN]!r}...",
            stacklevel=4,
        )


def _read_tokenizer(folder: Path) -> Any:
    try:
        from transformers import CLIPTokenizer
    except ImportError as e:
        raise UserError(
            "the tokenizer of Stable Diffusion can not be read",
            got="transformers is not installed",
            wanted="transformers, which reads tokenizers",
            way_out="pip install transformers",
        ) from e
    complete = (folder / "tokenizer.json").is_file() or (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    )
    if not complete:  # transformers would make an empty vocabulary of it
        raise _bad_tokenizer(
            folder, "neither tokenizer.json nor vocab.json, merges.txt"
        )
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    # A damaged file raises whatever the parser in it happens to meet.
    except Exception as e:
        raise _bad_tokenizer(folder, f"{type(e).__name__}: {e}") from e


def _bad_tokenizer(folder: Path, reason: str) -> UserError:
    return UserError(
        f"the tokenizer {folder} can not be read",
        got=reason,
        wanted="a CLIP tokenizer, as save_pretrained writes it",
        way_out="download the whole model again",
    )
