"""Prompts -> hidden states of the text encoder, as diffusers prepares them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

from ddrl_jax.interfaces import Cond, Params
from ddrl_jax.models.clip import ClipText, ClipTextConfig
from ddrl_jax.models.clip_tokenizer import Tokenize

CHUNK = 16  # prompts encoded at once; one compiled shape for any number of them


def make_encode(tokenize: Tokenize, config: ClipTextConfig, params: Params) -> Partial:
    """The encoder of prompts, a `Partial` whose leaves are its weights.

    Args:
      tokenize: as `clip_tokenize` gives it.
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

    def encode(params: Params, prompts: Sequence[str]) -> Cond:
        ids = tokenize(prompts)
        padded = np.pad(ids, ((0, -len(ids) % CHUNK), (0, 0)), mode="edge")
        chunks = padded.reshape(-1, CHUNK, ids.shape[1])
        hidden = [apply(params, chunk) for chunk in chunks]
        return Cond(jnp.concatenate(hidden)[: len(ids)])

    return Partial(encode, jax.tree.map(jnp.asarray, params))
