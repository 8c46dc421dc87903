"""How exactly an accelerator multiplies in a float32 network."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import jax


def matmul_precision(model: Any) -> AbstractContextManager:
    """A context in which products are those of config.model.matmul_precision.

    A product of two bfloat16 numbers is exact in float32 already: there it is nothing.

    Args:
      model: config.model.
    """
    if model.dtype != "float32":
        return nullcontext()
    return jax.default_matmul_precision(model.matmul_precision)


def in_matmul_precision(mode: Callable[..., None]) -> Callable[..., None]:
    """Puts all that a mode, `mode(config, ...)`, does into `matmul_precision`.

    Around the whole of it, as backward passes are traced outside of the network.
    """

    @wraps(mode)
    def exact(config: Any, *arguments: Any, **named: Any) -> None:
        with matmul_precision(config.model):
            mode(config, *arguments, **named)

    return exact
