"""Stable Diffusion 1.x and 2.x as a Pipeline: text encoder, UNet and autoencoder."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.tree_util import Partial

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Cond, Params, Pipeline
from ddrl_jax.models.clip_tokenizer import clip_tokenize
from ddrl_jax.models.convert import check_leaves, to_jax
from ddrl_jax.models.denoiser import make_denoiser
from ddrl_jax.models.folder import fingerprint, read_tensors
from ddrl_jax.models.hub import resolve
from ddrl_jax.models.latent_codec import make_decode, make_encode_images
from ddrl_jax.models.networks import network_shapes
from ddrl_jax.models.prompt_encoder import make_encode
from ddrl_jax.models.sd_folder import Source, published_source, read_source
from ddrl_jax.models.sd_published import REPOSITORIES
from ddrl_jax.models.unet import PRECISE, UNet2DConditionModel
from ddrl_jax.sharding import RULES, Rules, batch_shares, table

# A random model of 70 thousand weights that diffusers wrote, for ":smoke".
TINY = Path(__file__).parent.parent / "assets" / "tiny_sd"
COMPONENTS = {"unet": "unet", "vae": "vae", "clip_text": "text_encoder"}


def stable_diffusion_pipeline(config: Any, mesh: Mesh | None = None) -> Pipeline:
    """Builds the pipeline of config.model and config.lora.

    Text encoder and autoencoder are loaded here, the denoiser by `Pipeline.load`.

    Args:
      config: the whole configuration; config.model.init is a folder or a repository.
      mesh: on which the network will run; None is one device.

    Raises:
      UserError: the model can not be found, read or honoured.
    """
    source = read_source(model_folder(config.model), config.model.variant)
    return assemble(source, mesh=mesh, **_options(config))


def planned_pipeline(config: Any, mesh: Mesh | None = None) -> Pipeline:
    """The same of the folder's JSON alone: weights are shapes, nothing can run.

    Of a hub repository only the JSON and text files are downloaded; of those in
    `sd_published` nothing is.

    Args:
      config: the whole configuration.
      mesh: on which the network is planned to run.

    Raises:
      UserError: the model can not be found, read or honoured.
    """
    model = config.model
    if model.init in REPOSITORIES and not Path(model.init).is_dir():
        source = published_source(model.init)
    else:
        source = read_source(model_folder(model, False), model.variant)
    return assemble(source, mesh=mesh, weights=False, **_options(config))


def _options(config: Any) -> dict[str, Any]:
    """What a configuration says of its pipeline besides the folder."""
    model = config.model
    return {
        "image_size": model.image_size,
        "dtype": model.dtype,
        "remat": model.remat,
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
        "impl": model.attention,
        "vae_dtype": model.vae_dtype,
        "vae_at_once": model.vae_at_once,
        "rules": table(config.sharding),
    }


def model_folder(model: Any, weights: bool = True) -> Path:
    """The folder of config.model.init: shipped, local, or downloaded from the hub.

    Args:
      model: config.model.
      weights: False where only its JSON and text files are wanted.

    Raises:
      UserError: the model can not be found.
    """
    if model.init == "assets":
        return TINY
    parts = tuple(COMPONENTS.values()) if weights else ()
    return resolve(model.init, model.revision, model.variant, parts, "model.init")


def assemble(
    source: Source,
    *,
    image_size: int = 0,
    dtype: str = "float32",
    remat: str = "none",
    rank: int = 0,
    alpha: float = 0.0,
    impl: str = "xla",
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    vae_dtype: str = "float32",
    vae_at_once: int = 1,
    weights: bool = True,
) -> Pipeline:
    """A Pipeline of a folder that was read.

    Args:
      source: the folder.
      image_size: sides of the pictures in pixels; 0 is what the UNet was trained on.
      dtype: of the UNet's products.
      remat: a policy of models.remat.
      rank: of the LoRA, 0 for none.
      alpha: of the LoRA, 0 for its rank.
      impl: attention implementation.
      mesh: on which the UNet will run; None is one device.
      rules: the table by which its weights are laid out.
      vae_dtype: of the autoencoder's products.
      vae_at_once: pictures a device decodes, or encodes, at a time.
      weights: False for a plan: no weight is read, nothing but shapes can be asked for.

    Raises:
      UserError: weights that do not fit, or an image size that has no latent.
    """
    shape = latent_shape(source, image_size)
    network = UNet2DConditionModel(source.unet, dtype, remat, rank, alpha, impl, mesh)
    emb = jnp.zeros((1, 1, source.unet.cross_attention_dim))
    made = make_denoiser(network, (jnp.zeros((1, *shape)), jnp.zeros(1), emb), rules)
    encode, uncond = _text(source) if weights else _planned_text(source)
    vae = load_params(source, "vae") if weights else network_shapes("vae", source.vae)
    components = [source.folder / name for name in COMPONENTS.values()]
    # Samples lie on all devices; what is encoded for a cache lies on one.
    on_all = vae_at_once * (1 if mesh is None else batch_shares(mesh))
    return Pipeline(
        encode=encode,
        uncond=uncond,
        init=made.init,
        denoise=made.denoise,
        decode=make_decode(source.vae, vae, vae_dtype, on_all),
        axes=made.axes,
        latent_shape=shape,
        prediction=source.prediction,
        load=lambda: load_params(source, "unet", made.shapes["params"]),
        fingerprint=fingerprint(components, source.variant) if weights else "",
        encode_images=make_encode_images(source.vae, vae, vae_dtype, vae_at_once),
        precise=PRECISE,
        described=source.described,
    )


def _text(source: Source) -> tuple[Callable[..., Cond], Cond]:
    """The encoder of prompts, and the empty prompt."""
    # Before the weights: what is wrong with it is an error without a wait.
    tokenize = clip_tokenize(source.folder / "tokenizer", source.text)
    encode = make_encode(tokenize, source.text, load_params(source, "clip_text"))
    return encode, encode([""])


def _planned_text(source: Source) -> tuple[Callable[..., Cond], Cond]:
    """Without weights: zeros in place of the empty prompt."""
    shape = (1, source.text.max_position_embeddings, source.text.hidden_size)

    def encode(params: Params, prompts: Sequence[str]) -> Cond:
        raise AssertionError("a plan has no text encoder")

    planned = Partial(encode, network_shapes("clip_text", source.text))
    return planned, Cond(jnp.zeros(shape))


def load_params(source: Source, name: str, shapes: Params | None = None) -> Params:
    """The weights of a component as our parameter tree, float32, on the host.

    Args:
      source: the folder.
      name: "unet", "vae" or "clip_text".
      shapes: the abstract tree of the network, where it is known already.

    Raises:
      UserError: files that can not be read, or tensors that do not fit the network.
    """
    config = {"unet": source.unet, "vae": source.vae, "clip_text": source.text}[name]
    tensors = read_tensors(source.folder / COMPONENTS[name], source.variant)
    params = to_jax(name, tensors)
    shapes = network_shapes(name, config) if shapes is None else shapes
    check_leaves(name, params, shapes)
    return params


def encode_images(
    folder: Path, variant: str = "", dtype: str = "float32", at_once: int = 1
) -> Callable[..., Any]:
    """uint8 pictures [b h w 3] -> (mean, logvar) [b h w c] of their scaled latents.

    Args:
      folder: of the model.
      variant: of its weight files.
      dtype: of the autoencoder's products.
      at_once: pictures encoded at a time.

    Raises:
      UserError: the autoencoder can not be read.
    """
    source = read_source(folder, variant)
    vae = load_params(source, "vae")
    return make_encode_images(source.vae, vae, dtype, at_once)


def latent_shape(source: Source, image_size: int) -> tuple[int, int, int]:
    """(h, w, c) of a latent for square pictures; 0 is the size the UNet was trained on.

    Raises:
      UserError: the size is no multiple of the autoencoder's, or the folder names none.
    """
    factor, size = source.vae.downsampling, source.unet.sample_size
    if image_size and image_size % factor == 0:
        size = image_size // factor
    elif image_size or size is None:
        raise UserError(
            "no latent has the size of the pictures (config.model.image_size)",
            got=image_size or "0, and unet/config.json has no sample_size",
            wanted=f"a multiple of {factor} pixels",
            way_out="set config.model.image_size, for example to "
            f"{max(image_size // factor, 1) * factor or 512}",
        )
    height, width = size if isinstance(size, tuple) else (size, size)
    return (height, width, source.vae.latent_channels)
