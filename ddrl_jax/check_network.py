"""What the sizes of a network, its LoRA and its starting weights must satisfy."""

import math
from pathlib import Path
from typing import Any

from ddrl_jax.config_rules import near, require
from ddrl_jax.models.remat import check_offload


def check_network(config: Any) -> None:
    """Refuses sizes of the network and starting weights that do not fit.

    Raises:
      UserError: the first one that is wrong.
    """
    model, lora = config.model, config.lora
    require(
        lora.rank > 0 or lora.alpha == 0,
        "lora.alpha scales nothing without LoRA",
        got=f"alpha {lora.alpha}, rank 0",
        wanted="a rank >= 1 with an alpha, or alpha 0",
        way_out="set lora.rank, or lora.alpha to 0",
    )
    if model.remat == "offload":
        check_offload()
    if model.name == "emoji":
        _check_emoji(model)
        _check_rank(model, lora)
    elif model.name == "video_dit":
        check_video(model)
        _check_rank(model, lora)
    elif model.name == "stable_diffusion":
        require(
            model.init != "random",
            "Stable Diffusion has no random start here",
            got='model.init "random"',
            wanted='a diffusers folder, "owner/name" on the hub, or "assets"',
            way_out="set config.model.init; :smoke runs on the tiny shipped one",
        )


def _check_rank(model: Any, lora: Any) -> None:
    require(
        lora.rank <= model.width,
        "lora.rank is larger than the matrices it factors",
        got=f"rank {lora.rank}, model.width {model.width}",
        wanted="rank <= width",
        way_out="4 to 32 is usual; 0 trains all weights",
    )


def _check_emoji(model: Any) -> None:
    require(
        model.image_size > 0,
        "model.image_size is 0",
        got=0,
        wanted="the side of a picture in pixels",
        way_out="set model.image_size, 32 for the shipped weights",
    )
    for whole, part in (("width", "heads"), ("image_size", "patch")):
        require(
            model[whole] % model[part] == 0,
            f"model.{whole} is not divisible by model.{part}",
            got=f"{whole} {model[whole]}, {part} {model[part]}",
            wanted=f"a multiple of {model[part]}",
            way_out=f"change model.{whole} or model.{part}",
        )
    for key in ("width", "patch"):
        require(
            model[key] % 2 == 0,
            f"model.{key} is odd",
            got=model[key],
            wanted="an even number: sines and cosines, and windows of two patches",
            way_out=f"set model.{key} to {model[key] + 1}",
        )
    if model.init not in ("assets", "random"):
        path = Path(model.init)
        require(
            path.suffix == ".npz" and path.is_file(),
            "the starting weights do not exist",
            got=f"model.init {model.init!r}",
            wanted='"assets", "random" or the path of an .npz file',
            way_out=near(model.init, ("assets", "random"))
            + "--mode=export writes such a file",
        )


def check_video(model: Any) -> None:
    """Heads share the width, and patches cut the latents without a rest.

    Raises:
      UserError: names the two numbers that do not fit.
    """
    video = model.video
    parts = (
        ("model.width", model.width, "model.heads times 2", 2 * model.heads),
        ("model.video.height", video.height, "model.patch", model.patch),
        ("model.video.width", video.width, "model.patch", model.patch),
    )
    for whole, size, part, divisor in parts:
        require(
            size % divisor == 0,
            f"{whole} is not divisible by {part}",
            got=f"{size} and {divisor}",
            wanted=f"a multiple of {divisor}",
            way_out=f"change {whole}",
        )


def video_tokens(model: Any) -> int:
    """How many tokens a video is cut into."""
    video = model.video
    return video.frames * (video.height // model.patch) * (video.width // model.patch)


def check_context(model: Any, context: int) -> None:
    """Refuses a context axis over which the tokens of a video do not divide.

    They would be whole on every device of it, and all of them would do the same work.

    Args:
      model: config.model.
      context: size of the axis.

    Raises:
      UserError: names both numbers.
    """
    if model.name != "video_dit":
        return
    tokens = video_tokens(model)
    require(
        tokens % context == 0,
        "mesh.context does not divide the tokens of a video",
        got=f"frames x height / patch x width / patch = {tokens} tokens, "
        f"mesh.context {context}",
        wanted=f"a divisor of {tokens}: else every device has all of them",
        way_out=f"set mesh.context to {math.gcd(tokens, context)}, or change "
        "model.video or model.patch",
    )
