"""DDPO-IS, DDPO-SF, RWR and sparse RWR on a small latent model that it trains.

    python -m benchmarks.latent_emoji

Builds the model first, in the layout of a Stable Diffusion folder: an autoencoder and a
UNet trained on 32 captions of the emoji data, a random text encoder. Then every row of
configs/latent_emoji.py with the same number of reward calls. What is there already is
not done again. Writes benchmarks/results/latent_emoji.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.latent_table import write_results
from configs.latent_emoji import ALGORITHMS, HOME, REWARDS
from ddrl_jax.data.emoji import emoji_source
from ddrl_jax.data.samples import write_samples
from ddrl_jax.models.clip import ClipText
from ddrl_jax.models.clip_config import ClipTextConfig
from ddrl_jax.models.convert import to_torch_names
from ddrl_jax.models.emoji import decode as to_uint8
from ddrl_jax.models.folder import write_tensors
from ddrl_jax.models.unet import UNet2DConditionModel
from ddrl_jax.models.unet_config import UNetConfig
from ddrl_jax.models.vae import AutoencoderKL, VaeConfig

ROOT = Path(__file__).resolve().parents[1]
CAPTIONS, DRAWS, PIXELS, LENGTH, SEED = 32, 64, 32, 24, 0
VAE_STEPS, VAE_BATCH, VAE_RATE, KL_WEIGHT = 1200, 16, 3e-3, 1e-4
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": PIXELS,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": PIXELS // 2,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 48,
}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "hidden_act": "quick_gelu",
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "prediction_type": "epsilon",
}


def say(text: str) -> None:
    """A line with the time of day."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def draw_pictures(source: Any, records: np.ndarray, seed: int) -> jax.Array:
    """Augmented emoji in [-1, 1]."""
    keys = jax.random.split(jax.random.key(seed), len(records))
    return source.latents(jnp.asarray(records, jnp.int32), keys)


def train_autoencoder(source: Any, chosen: np.ndarray) -> tuple[VaeConfig, Any, float]:
    """Squared error plus a small KL to N(0, 1); returns (config, weights, error)."""
    config = VaeConfig.from_json(VAE)
    network = AutoencoderKL(config)
    size = jnp.zeros((1, PIXELS, PIXELS, 3))

    def both(module: AutoencoderKL, x: jax.Array, key: jax.Array):
        found = module.encode(x)
        noise = jax.random.normal(key, found.mean.shape)
        z = found.mean + jnp.exp(0.5 * found.logvar) * noise
        return module.decode(z), found

    key = jax.random.key(SEED)
    start = jax.jit(lambda k: network.init(k, size, k, method=both)["params"])
    params = nn.meta.unbox(start(key))
    schedule = optax.cosine_decay_schedule(VAE_RATE, VAE_STEPS)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss(params: Any, x: jax.Array, key: jax.Array):
        y, (mean, logvar) = network.apply({"params": params}, x, key, method=both)  # type: ignore
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
        error = jnp.mean((y - x) ** 2)
        return error + KL_WEIGHT * kl, error

    @jax.jit
    def step(params: Any, state: Any, records: jax.Array, number: jax.Array):
        draw, noise = jax.random.split(jax.random.fold_in(key, number))
        x = source.latents(records, jax.random.split(draw, VAE_BATCH))
        (_, error), grad = jax.value_and_grad(loss, has_aux=True)(params, x, noise)
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state, error

    state, random, errors = tx.init(params), np.random.default_rng(SEED), []
    for number in range(VAE_STEPS):
        records = jnp.asarray(random.choice(chosen, VAE_BATCH), jnp.int32)
        params, state, error = step(params, state, records, jnp.int32(number))
        errors.append(error)
        if number % 250 == 249:
            say(f"autoencoder {number + 1}/{VAE_STEPS}: {np.mean(errors[-50:]):.5f}")
    return config, params, float(np.mean(jax.device_get(errors[-50:])))


def scaling_factor(config: VaeConfig, params: Any, pictures: jax.Array) -> float:
    """1 / std of the latents, which makes their variance 1."""
    network = AutoencoderKL(config)
    encode = jax.jit(lambda p, x: network.apply({"params": p}, x, method="encode"))
    return float(1.0 / np.std(np.asarray(encode(params, pictures)[0])))


def write_json(path: Path, value: Any) -> None:
    """Writes a config.json with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, words: Sequence[str]) -> int:
    """A CLIPTokenizer whose merges build the words; returns the size of the vocabulary.

    It must say how long a prompt may be, and pads with the end-of-text token.
    """
    from transformers import CLIPTokenizer

    letters = sorted({c for word in words for c in word})
    tokens, merges = [*letters, *(f"{c}</w>" for c in letters)], []
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append(f"{pieces[0]} {pieces[1]}")
            pieces[:2] = ["".join(pieces[:2])]
            tokens.append(pieces[0])
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    raw = folder / "raw"
    write_json(raw / "vocab.json", {token: i for i, token in enumerate(tokens)})
    lines = ["#version: 0.2", *dict.fromkeys(merges)]
    (raw / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(raw, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(raw)
    return len(tokens)


def write_folder(folder: Path, words: Sequence[str], vae: Any, factor: float) -> None:
    """A Stable Diffusion folder: the trained autoencoder, all else random."""
    vocabulary = write_tokenizer(folder / "tokenizer", words)
    ends = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    text = TEXT | {"vocab_size": vocabulary, "pad_token_id": vocabulary - 1} | ends
    config, unet_config = ClipTextConfig.from_json(text), UNetConfig.from_json(UNET)
    keys = jax.random.split(jax.random.key(SEED + 1))
    encoder, unet = ClipText(config), UNet2DConditionModel(unet_config)
    ids = jnp.zeros((1, LENGTH), jnp.int32)
    side = PIXELS // 2
    x = (jnp.zeros((1, side, side, 4)), jnp.zeros(1), jnp.zeros((1, LENGTH, 48)))
    trees = {
        "vae": (vae, VAE | {"scaling_factor": factor}),
        "text_encoder": (encoder.init(keys[0], ids)["params"], text),
        "unet": (unet.init({"params": keys[1]}, *x)["params"], UNET),
    }
    names = {"text_encoder": "clip_text"}
    for part, (params, settings) in trees.items():
        write_json(folder / part / "config.json", settings)
        plain = jax.device_get(nn.meta.unbox(params))
        tensors = to_torch_names(names.get(part, part), plain)
        file = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        write_tensors(folder / part / f"{file}.safetensors", tensors)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "model_index.json", _index())


def _index() -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }


def build(home: Path) -> None:
    """The random model, its captions and its pictures; the UNet is trained by main."""
    source = emoji_source(PIXELS, 0.5, 1.0, 15.0)
    random = np.random.default_rng(SEED)
    chosen = np.sort(random.choice(len(source.captions), CAPTIONS, replace=False))
    captions = [source.captions[i] for i in chosen]
    config, vae, error = train_autoencoder(source, chosen)
    records = np.repeat(chosen, DRAWS)
    pictures = draw_pictures(source, records, SEED + 2)
    factor = scaling_factor(config, vae, pictures[:: DRAWS // 8])
    write_json(home / "autoencoder.json", {"error": error, "scaling_factor": factor})
    text = tuple(source.captions[i] for i in records)
    write_samples(home / "pictures", [(np.asarray(to_uint8(pictures)), text)])
    (home / "captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    words = sorted({w for caption in captions for w in caption.lower().split()})
    write_folder(home / "random", words, vae, factor)


def main_program(*arguments: str) -> None:
    """Runs the program as a user would."""
    command = [sys.executable, "-m", "ddrl_jax.main", *arguments]
    say(" ".join(command[1:]))
    subprocess.run(command, cwd=ROOT, check=True)


def main(arguments: Sequence[str]) -> None:
    """Builds, trains, compares."""
    flags = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    flags.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS))
    flags.add_argument("--build-only", action="store_true")
    flags.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = flags.parse_args(arguments)
    home = ROOT / HOME
    if not (home / "random" / "model_index.json").exists():
        build(home)
    config, workdir = "--config=configs/latent_emoji.py", f"--workdir={HOME}/pretrain"
    if not (home / "base" / "model_index.json").exists():
        main_program(config, workdir)
        main_program(config, workdir, "--mode=export")
        (home / "pretrain" / "export" / "000030").rename(home / "base")
    if options.build_only:
        return
    for reward in REWARDS:
        for algorithm in options.algorithms:
            row = f"{algorithm}-{reward}"
            main_program(f"{config}:{row}", f"--workdir={HOME}/{row}")
    command = ["benchmarks.latent_emoji", *arguments]
    print(write_results(home, options.out, command, options.algorithms))


if __name__ == "__main__":
    main(sys.argv[1:])
