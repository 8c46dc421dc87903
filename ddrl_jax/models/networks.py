"""The networks of a diffusers pipeline by name: their files and their empty trees.

The files are imported by name when a network is asked for, so that reading one does
not import the others.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Params

EXAMPLE_SIZE = 64  # pixels of an example; any size that the deepest network can halve
FILES = {
    "unet": "unet",
    "vae": "vae",
    "clip_text": "clip",
    "clip_vision": "clip",
    "clip": "clip",
}


def network_file(name: str) -> Any:
    """The module that holds a network.

    Raises:
      UserError: there is no such network.
    """
    if name not in FILES:
        raise UserError(
            f"there is no network {name!r}",
            got=repr(name),
            wanted=f"one of {', '.join(FILES)}",
            way_out="name one of these",
        )
    return importlib.import_module(f"ddrl_jax.models.{FILES[name]}")


def network_shapes(name: str, config: Any) -> Params:
    """The abstract parameter tree of a network, without any computation.

    Args:
      name: of the network.
      config: its dataclass, or the JSON of the checkpoint.
    """
    boxed = jax.eval_shape(_INIT[name](network_file(name), config), jax.random.key(0))
    return nn.meta.unbox(boxed)["params"]


def _read(kind: Any, config: Any) -> Any:
    return kind.from_json(dict(config)) if isinstance(config, Mapping) else config


def _unet_init(module: Any, config: Any) -> Callable[[Array], Params]:
    config = _read(module.UNetConfig, config)
    network = module.UNet2DConditionModel(config)
    x = jnp.zeros((1, EXAMPLE_SIZE, EXAMPLE_SIZE, config.in_channels))
    emb = jnp.zeros((1, 1, config.cross_attention_dim))
    return lambda key: network.init(key, x, jnp.zeros(1), emb)


def _vae_init(module: Any, config: Any) -> Callable[[Array], Params]:
    network = module.AutoencoderKL(_read(module.VaeConfig, config))
    pixels = jnp.zeros((1, EXAMPLE_SIZE, EXAMPLE_SIZE, 3))
    return lambda key: network.init(key, pixels)


def _text_init(module: Any, config: Any) -> Callable[[Array], Params]:
    network = module.ClipText(_read(module.ClipTextConfig, config))
    return lambda key: network.init(key, jnp.zeros((1, 2), jnp.int32))


def _vision_init(module: Any, config: Any) -> Callable[[Array], Params]:
    config = _read(module.ClipVisionConfig, config)
    pixels = jnp.zeros((1, config.image_size, config.image_size, 3))
    return lambda key: module.ClipVision(config).init(key, pixels)


def _clip_init(module: Any, config: Any) -> Callable[[Array], Params]:
    config = _read(module.ClipConfig, config)
    network = module.Clip(config.text, config.vision, config.projection_dim)
    size = config.vision.image_size
    pixels, ids = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 2), jnp.int32)
    return lambda key: network.init(key, pixels, ids)


_INIT = {
    "unet": _unet_init,
    "vae": _vae_init,
    "clip_text": _text_init,
    "clip_vision": _vision_init,
    "clip": _clip_init,
}
