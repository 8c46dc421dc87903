"""Stable Diffusion in the whole program, on the tiny pipeline that diffusers wrote."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from edited_config import configured, refused
from PIL import Image
from tiny_runs import DIFFUSION, perturbed, perturbed_state

from ddrl_jax.diffusion.schedules import ddim_levels, ddim_timesteps
from ddrl_jax.evaluate import make_sampler
from ddrl_jax.models.stable_diffusion import TINY, stable_diffusion_pipeline
from ddrl_jax.program import build
from ddrl_jax.rollout import initial_noise
from ddrl_jax.self_test import ratio_deviations
from ddrl_jax.sources import make_source


def make(**edits):
    edits = {key.replace("__", "."): value for key, value in edits.items()}
    program = build(configured(DIFFUSION | edits))
    return program, perturbed_state(program)


@pytest.mark.optimised
@pytest.mark.parametrize(
    "dtype, rank",
    [
        pytest.param("float32", 0),
        pytest.param("bfloat16", 2),
        pytest.param("bfloat16", 0, marks=pytest.mark.slow),
        pytest.param("float32", 2, marks=pytest.mark.slow),
    ],
)
def test_the_ratio_is_exactly_one_with_guidance_5(dtype, rank):
    """With and without gradients, all weights or a LoRA whose factors are not 0.

    Ten steps of DDIM with eta 1 and guidance 5 in both directions: the replay that
    DDPO's PyTorch code passes with a difference of exactly 0.
    """
    program, state = make(model__dtype=dtype, lora__rank=rank, sampler__steps=10)
    sampler = program.config.sampler
    assert (sampler.steps, sampler.guidance_scale, sampler.eta) == (10, 5.0, 1.0)
    for where, deviation in ratio_deviations(program, state).items():
        assert deviation.shape == (10,)
        np.testing.assert_array_equal(deviation, 0.0, err_msg=where)


def guided_ddim(program, params, keys, cond, scale):
    """DDIM with eta 0 (arXiv 2010.02502, Eq. 12) on a network that predicts eps."""
    network = jax.jit(program.objective.apply)
    empty = jax.tree.map(
        lambda u, c: np.broadcast_to(u, c.shape), program.pipeline.uncond, cond
    )
    steps = program.config.evaluate.steps
    x = initial_noise(keys, program.pipeline.latent_shape)
    for timestep, (now, after) in zip(
        ddim_timesteps(steps), ddim_levels(steps), strict=True
    ):
        time = np.full(len(keys), timestep, np.float32)
        plain, told = (
            network(params, program.frozen, x, time, text) for text in (empty, cond)
        )
        eps = plain + scale * (told - plain)
        x0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
        x = np.sqrt(after) * x0 + np.sqrt(1 - after) * eps
    return np.asarray(program.decode(x))


def test_samples_of_ddim_without_noise_depend_on_the_prompt():
    program, state = make(evaluate__guidance_scale=5.0)
    sample = make_sampler(program, program.config.evaluate, "ddim")
    keys = jax.random.split(jax.random.key(0), 1)[np.zeros(4, int)]
    cond = jax.tree.map(lambda t: t[np.asarray([0, 0, 1, 2])], program.cond_table)
    images, finite = map(np.asarray, sample(state.params, program.frozen, keys, cond))
    assert finite.all()
    assert images.shape == (4, 32, 32, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(images[0], images[1])
    assert (images[0] != images[2]).any() and (images[2] != images[3]).any()
    by_hand = guided_ddim(program, state.params, keys, cond, 5.0)
    assert np.abs(images - by_hand.astype(int)).max() <= 1


def write_pictures(folder: Path, count: int = 12) -> Path:
    """Noise with captions, in the form of an ImageFolder."""
    folder.mkdir()
    random, rows = np.random.default_rng(0), []
    for i in range(count):
        pixels = random.integers(0, 255, (40, 52, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"a photo of {i % 5}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_data_term_on_a_folder_with_captions_of_its_own(tmp_path):
    edits = {
        "data.source": "folder",
        "data.path": str(write_pictures(tmp_path / "pictures")),
        "data.cache": str(tmp_path / "cache"),
        "data.heldout": 4,
        "data_term.weight": 1.0,
        "data_term.weighting": "eps",
        "data_term.captions": "own",
        "policy.weight": 0.0,
    }
    program = build(configured(DIFFUSION | edits))
    source = program.source
    assert source is not None and source.fetch is not None and source.cond is not None
    records = np.asarray([3, 3, 7, 11], np.int32)
    fetched = source.fetch(records)
    text = program.pipeline.encode([source.captions[i] for i in records])
    np.testing.assert_array_equal(source.cond(fetched).emb, text.emb)
    keys = jax.random.split(jax.random.key(1), 4)
    placed = jax.tree.map(jax.numpy.asarray, fetched)  # as the loop does
    latents = np.asarray(source.latents(placed, keys))
    assert latents.shape == (4, *program.pipeline.latent_shape)
    assert (latents[0] != latents[1]).any()  # another draw of one posterior
    # a second start finds the cache, even where the pictures are gone
    caches = sorted(p.name for p in (tmp_path / "cache").iterdir())
    again = build(configured(DIFFUSION | edits)).source
    assert again is not None and again.fetch is not None
    assert caches == sorted(p.name for p in (tmp_path / "cache").iterdir())
    jax.tree.map(np.testing.assert_array_equal, again.fetch(records), fetched)


MODELS = {  # of whose latents the first two share a cache
    "shipped": ("", {}, "float32"),
    "written anew": ("vae/config.json", {"_diffusers_version": "0.6.0"}, "float32"),
    "in half": ("", {}, "bfloat16"),
    "scaled": ("vae/config.json", {"scaling_factor": 0.13025}, "float32"),
}


def model_with(folder: Path, path: str, changes: dict) -> str:
    """A copy of the shipped model with some values of a JSON file changed."""
    shutil.copytree(TINY, folder)
    if path:
        content = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps(content | changes))
    return str(folder)


def test_a_cache_belongs_to_the_networks_that_wrote_it(tmp_path):
    """The weights of all four are the same bytes."""
    pictures, caches = write_pictures(tmp_path / "pictures", 2), tmp_path / "cache"
    data = {"data.path": str(pictures), "data.cache": str(caches)}
    data |= {"data.source": "folder", "data.cache_batch": 2}
    names = []
    for i, (path, changes, dtype) in enumerate(MODELS.values()):
        init = model_with(tmp_path / str(i), path, changes)
        edits = {"model.init": init, "model.vae_dtype": dtype}
        config = configured(DIFFUSION | data | edits)
        source = make_source(config, stable_diffusion_pipeline(config))
        assert source is not None
        names.append(source.digest)
    assert names[0] == names[1] and len(set(names)) == 3
    assert {path.name for path in caches.glob("latents-*")} == set(names)


@pytest.mark.slow
def test_samples_of_the_base_model_are_data_under_their_prompts(tmp_path):
    from ddrl_jax.sample import sample_mode

    short = {"sample.per_prompt": 2, "sample.steps": 2, "sample.guidance_scale": 1.0}
    sample_mode(configured(DIFFUSION | short), str(tmp_path / "run"))
    edits = {
        "data.source": "samples",
        "data.path": str(tmp_path / "run" / "dataset"),
        "data.cache": str(tmp_path / "cache"),
        "data_term.weight": 0.5,
        "data_term.weighting": "eps",
    }
    program = build(configured(DIFFUSION | edits))
    assert program.source is not None
    words = tuple(DIFFUSION["prompts.list"])
    assert program.source.captions == tuple(np.repeat(words, 2))
    assert [list(r) for r in program.records_of] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_the_lora_export_needs_no_base_in_it(tmp_path):
    """The written factors, put back by the rule of the format, are the trained ones."""
    from safetensors.numpy import load_file

    from ddrl_jax.models.export_diffusers import write_lora

    config = configured(DIFFUSION | {"lora.rank": 2, "lora.alpha": 4.0})
    program = build(config)
    lora = jax.device_get(perturbed(program.new_state().params))
    tensors = load_file(write_lora(tmp_path, lora, config.lora))
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    block = lora["down_blocks_0"]["attentions_0"]["transformer_blocks_0"]["attn1"]
    np.testing.assert_array_equal(
        tensors[f"{name}.lora_A.weight"], block["to_q"]["a"].T
    )
    np.testing.assert_array_equal(
        tensors[f"{name}.lora_B.weight"], 2.0 * block["to_q"]["b"].T
    )  # alpha / rank is in it
    leaves = jax.tree.leaves(lora)
    assert sum(t.size for t in tensors.values()) == sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize(
    "edits, word",
    [
        ({"evaluate.solver": "euler"}, "flow networks"),
        ({"data.source": "emoji"}, "can not be trained on this data"),
        ({"data.source": "folder"}, "data.path is no folder"),
        ({"model.init": "random"}, "no random start"),
        ({"sampler.kernel": "edm"}, "noise levels"),
        ({"lora.alpha": 2.0}, "scales nothing"),
        ({"prompts.source": "set", "prompts.set": "cats"}, "no prompt set"),
        ({"prompts.source": "tfds"}, "prompts.path is empty"),
    ],
)
def test_what_is_refused_before_a_weight_is_read(edits, word):
    assert word in str(refused(DIFFUSION | {"evaluate.pictures": 0} | edits))


@pytest.mark.parametrize(
    "path, value, word",
    [
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "beta_end"),
        ("unet/config.json", {"act_fn": "gelu"}, "act_fn"),
        ("vae/config.json", {"latent_channels": 8}, "do not fit each other"),
    ],
)
def test_a_model_that_can_not_be_honoured_names_the_key(tmp_path, path, value, word):
    from ddrl_jax.errors import UserError

    folder = model_with(tmp_path / "model", path, value)
    with pytest.raises(UserError, match=word):
        build(configured(DIFFUSION | {"model.init": folder}))
