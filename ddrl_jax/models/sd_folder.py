"""A Stable Diffusion folder read and checked, all but its weights."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ddrl_jax.errors import UserError
from ddrl_jax.models.clip import ClipTextConfig
from ddrl_jax.models.folder import read_json
from ddrl_jax.models.sd_published import FILES
from ddrl_jax.models.unet_config import UNetConfig
from ddrl_jax.models.vae import VaeConfig

PIPELINE_CLASS = "StableDiffusionPipeline"
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
# The one noise schedule of Stable Diffusion 1.x and 2.x, which our samplers hold fixed.
REQUIRED: Mapping[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
# What a scheduler may say besides, and must then say so. Its class does not matter:
# the sampler is a choice of the experiment, the betas belong to the weights.
IF_PRESENT: Mapping[str, tuple[Any, ...]] = {
    "num_train_timesteps": (1000,),
    "trained_betas": (None,),
    # Files before diffusers 0.8 say 0 and True here, and diffusers makes 1 and False of
    # it when it loads them; our grid and samplers have 1 and False whatever is said.
    "steps_offset": (1, 0),
    "set_alpha_to_one": (False,),
    "clip_sample": (False, True),
    "thresholding": (False,),
    "rescale_betas_zero_snr": (False,),
    "timestep_spacing": ("leading", "linspace"),
    "prediction_type": tuple(PREDICTIONS),
}


class Source(NamedTuple):
    """What a folder says of its pipeline.

    Attributes:
      folder: in the diffusers layout.
      variant: of its weight files, "" for the plain ones.
      unet: configuration of the denoiser.
      vae: configuration of the autoencoder.
      text: configuration of the text encoder.
      prediction: "eps" or "v", what the denoiser was trained to predict.
    """

    folder: Path
    variant: str
    unet: UNetConfig
    vae: VaeConfig
    text: ClipTextConfig
    prediction: str

    @property
    def described(self) -> str:
        """Names what the JSON says of the networks and what the denoiser predicts."""
        return described(self.unet, self.vae, self.text, self.prediction)


def described(*parts: Any) -> str:
    """16 hexadecimal digits of configurations and names that were read from JSON."""
    plain = json.dumps(parts, sort_keys=True, default=dataclasses.asdict)
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def read_source(folder: Path, variant: str = "") -> Source:
    """Reads and checks the JSON of a Stable Diffusion folder.

    Args:
      folder: in the diffusers layout.
      variant: of its weight files.

    Raises:
      UserError: a pipeline of another class, a missing component, or a value that this
        program can not honour.
    """
    check_class(folder)
    parts = {name: _component(folder, name) for name in ("unet", "vae", "text_encoder")}
    prediction = read_prediction(folder / "scheduler" / "scheduler_config.json")
    source = _source(folder, variant, parts, prediction)
    _check_sizes(source)
    return source


def published_source(repo_id: str) -> Source:
    """What is known of a repository of `sd_published`, for plans: nothing is read."""
    parts = {name: FILES[f"{name}/config"] for name in ("unet", "vae", "text_encoder")}
    return _source(Path(repo_id), "", parts, "eps")


def _source(
    folder: Path, variant: str, parts: Mapping[str, Any], prediction: str
) -> Source:
    return Source(
        folder=folder,
        variant=variant,
        unet=UNetConfig.from_json(parts["unet"]),
        vae=VaeConfig.from_json(parts["vae"]),
        text=ClipTextConfig.from_json(parts["text_encoder"]),
        prediction=prediction,
    )


def check_class(folder: Path) -> None:
    """Raises UserError unless model_index.json names a pipeline that we have."""
    path = folder / "model_index.json"
    found = read_json(path).get("_class_name")
    if found != PIPELINE_CLASS:
        raise UserError(
            f"{path} describes a pipeline of another family",
            got=f"_class_name = {found!r}",
            wanted=PIPELINE_CLASS,
            way_out="use a Stable Diffusion 1.x or 2.x model",
        )


def read_prediction(path: Path) -> str:
    """ "eps" or "v" of a scheduler_config.json whose noise schedule is ours.

    Raises:
      UserError: another schedule; the message names key, value and what is accepted.
    """
    given = read_json(path)
    accepted = {key: (value,) for key, value in REQUIRED.items()}
    accepted |= {key: values for key, values in IF_PRESENT.items() if key in given}
    wrong = [key for key, values in accepted.items() if given.get(key) not in values]
    if wrong:
        raise UserError(
            f"{path} has another noise schedule than Stable Diffusion 1.x and 2.x",
            got=", ".join(f"{key} = {given.get(key, 'absent')!r}" for key in wrong),
            wanted=", ".join(
                f"{key} = {' or '.join(map(repr, accepted[key]))}" for key in wrong
            ),
            way_out="use a checkpoint trained with that schedule; where only the "
            "sampler's settings differ, correct the file",
        )
    return PREDICTIONS[given.get("prediction_type", "epsilon")]


def _component(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).is_dir():
        raise UserError(
            f"the model {folder} lacks a component",
            got=f"no folder {name}/",
            wanted="unet/, vae/, text_encoder/, tokenizer/ and scheduler/",
            way_out="download the whole model again",
        )
    return read_json(folder / name / "config.json")


def _check_sizes(source: Source) -> None:
    """Components that come from different models do not fit each other."""
    unet, vae, text = source.unet, source.vae, source.text
    pairs = {
        "unet in_channels": (unet.in_channels, vae.latent_channels),
        "unet out_channels": (unet.out_channels, vae.latent_channels),
        "unet cross_attention_dim": (unet.cross_attention_dim, text.hidden_size),
    }
    for name, (got, wanted) in pairs.items():
        if got != wanted:
            raise UserError(
                f"the components of {source.folder} do not fit each other",
                got=f"{name} = {got}",
                wanted=f"{wanted}, as the autoencoder and the text encoder have it",
                way_out="use a text-to-image model (inpainting models have 9 input "
                "channels), or the components of one model",
            )
