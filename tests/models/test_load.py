"""Stable Diffusion through load_pipeline against diffusers, from prompt to picture."""

import json
import re
import shutil
import warnings
from typing import Any

import ddim_walk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sd
from ml_collections import ConfigDict

from configs import aesthetic
from ddrl_jax.errors import UserError
from ddrl_jax.models.load import load_pipeline
from ddrl_jax.models.sd_folder import read_prediction, read_source
from ddrl_jax.models.stable_diffusion import (
    TINY,
    assemble,
    encode_images,
    latent_shape,
    stable_diffusion_pipeline,
)
from ddrl_jax.sharding import make_mesh, place_batch, put, replicated

PROMPTS = ["a photo of a cat", "zebra, red"]
TOLERANCE = 1e-5  # relative to the largest value
SD1 = tiny_sd.BETAS | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}


def channels_last(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


def relative(a, b):
    return np.abs(np.asarray(a) - b).max() / np.abs(b).max()


@pytest.fixture(scope="module", params=["1.x", "2.x"])
def pair(request, tmp_path_factory):
    """(the pipeline of diffusers, ours of the same folder, the folder)."""
    pytest.importorskip("torch")
    sd2 = request.param == "2.x"
    folder = tmp_path_factory.mktemp("sd")
    # Shards and another scheduler's name on the way.
    options = {"shard_size": "60KB", "scheduler": "PNDMScheduler"} if sd2 else {}
    theirs = tiny_sd.make_pipeline(sd2=sd2)
    tiny_sd.write_pipeline(folder, sd2=sd2, **options)
    return theirs, load_pipeline(str(folder)), folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("torch")
    return tiny_sd.write_pipeline(tmp_path_factory.mktemp("sd") / "original")


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.optimised
def test_the_same_noise_gives_the_same_latents_and_picture(pair):
    """Compiled as shipped: of what PyTorch is compared with, the whole walk once."""
    theirs, ours, _ = pair
    noise = np.random.default_rng(0).normal(size=(2, *ours.latent_shape))
    noise = noise.astype(np.float32)
    x0, seen = ddim_walk.ours(ours, ours.load(), None, noise, PROMPTS)
    latents = ddim_walk.theirs(theirs, noise, PROMPTS, "latent")
    assert seen == [float(t) for t in theirs.scheduler.timesteps]
    assert relative(x0, latents) < TOLERANCE
    pictures = ddim_walk.theirs(theirs, noise, PROMPTS, "np") * 255.0
    levels = np.asarray(ours.decode(x0)).astype(np.float32)
    assert levels.std() > 10  # no grey picture equals another by chance
    # Rounded to nearest, up to a hundredth of a level where a value lies between two.
    assert np.abs(levels - pictures).max() < 0.51


def test_text_states_equal_those_of_diffusers(pair):
    theirs, ours, _ = pair
    expected = theirs.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    assert relative(ours.encode(PROMPTS).emb, expected.detach().numpy()) < TOLERANCE
    empty = theirs.encode_prompt("", "cpu", 1, False)[0]
    assert relative(ours.uncond.emb, empty.detach().numpy()) < TOLERANCE


def test_many_prompts_are_encoded_as_each_alone(pair):
    _, ours, _ = pair
    many = [f"{word} {i}" for word in tiny_sd.WORDS for i in range(4)]
    together = ours.encode(many).emb
    assert together.shape == (40, tiny_sd.LENGTH, 12)
    np.testing.assert_array_equal(together[37], ours.encode(many[37:38]).emb[0])


def test_pictures_become_the_latents_of_diffusers(pair):
    import torch

    theirs, ours, folder = pair
    shape = (2, tiny_sd.PIXELS, tiny_sd.PIXELS, 3)
    pixels = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    x = torch.tensor(np.moveaxis(pixels, -1, 1)).float() / 127.5 - 1
    posterior = theirs.vae.encode(x).latent_dist
    scale = theirs.vae.config.scaling_factor
    for encode in (ours.encode_images, encode_images(folder)):
        mean, logvar = encode(pixels)
        assert mean.shape == (2, *ours.latent_shape)
        assert relative(mean, channels_last(posterior.mean) * scale) < TOLERANCE
        std = channels_last(posterior.std) * scale
        assert relative(np.exp(np.asarray(logvar) / 2), std) < TOLERANCE


def test_the_decoder_brings_its_weights_as_arguments(pair):
    """As an argument of jit no weight is a constant of the program."""
    _, ours, _ = pair
    x0 = jnp.zeros((2, *ours.latent_shape))
    traced = jax.make_jaxpr(lambda decode, x: decode(x))(ours.decode, x0)
    assert not [c for c in traced.consts if np.size(c) > 1]
    assert len(jax.tree.leaves(ours.decode)) > 10


@pytest.mark.parametrize("at_once", [1, 2])
def test_each_device_decodes_its_own_pictures(at_once):
    """On 8 devices: no picture is decoded twice, none is moved, and none changes."""
    sizes = {"data": 4, "fsdp": 2, "tensor": 1, "context": 1}
    mesh, source = make_mesh(ConfigDict(sizes)), read_source(TINY)
    alone, spread = (
        assemble(source, mesh=on, vae_at_once=at_once).decode for on in (None, mesh)
    )
    x0 = np.random.default_rng(0).normal(size=(32, *latent_shape(source, 0)))
    x0 = x0.astype(np.float32)
    placed = put(spread, replicated(mesh)), place_batch(mesh, x0)
    compiled = jax.jit(lambda decode, x: decode(x)).lower(*placed).compile()
    program = compiled.as_text()
    moved = re.findall(r"all-(?:gather|reduce|to-all)|collective-permute", program)
    turns = {int(n) for n in re.findall(r'known_trip_count":\{"n":"(\d+)"', program)}
    together = {int(n) for n in re.findall(r"f32\[(\d+),\S* convolution\(", program)}
    assert (moved, turns, together) == ([], {32 // 8 // at_once}, {at_once})
    found = np.asarray(compiled(*placed))
    np.testing.assert_array_equal(found, jax.jit(alone)(x0))


def test_the_trees_of_a_pipeline_agree(pair):
    _, ours, _ = pair
    shapes = jax.eval_shape(ours.init, jax.random.key(0))
    shape_of = lambda tree: jax.tree.map(lambda a: a.shape, tree)  # noqa: E731
    assert shape_of(ours.load()) == shape_of(shapes["params"])
    axes = jax.tree.map(len, ours.axes, is_leaf=lambda a: isinstance(a, tuple))
    assert axes == jax.tree.map(lambda a: len(a.shape), shapes)


def test_a_variant_is_the_same_model_in_half_precision(folder, tmp_path):
    half = tiny_sd.write_pipeline(tmp_path, variant="fp16")
    ours = load_pipeline(str(half), variant="fp16")
    full = load_pipeline(str(folder))
    pairs = zip(*map(jax.tree.leaves, (ours.load(), full.load())), strict=True)
    assert all(np.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in pairs)
    assert ours.fingerprint != full.fingerprint
    with pytest.raises(UserError, match="variant"):
        load_pipeline(str(half))


def test_the_pipeline_of_a_config(folder):
    config: Any = aesthetic.get_config()
    config.model.update(init=str(folder), revision="main", variant="", image_size=64)
    config.model.update(dtype="bfloat16", remat="full", attention="xla")
    config.model.update(vae_dtype="float32", vae_at_once=2)
    config.lora.update(rank=2, alpha=4.0)
    ours = stable_diffusion_pipeline(config)
    assert ours.latent_shape == (8, 8, 4)
    assert jax.tree.all(jax.tree.map(np.array_equal, ours.params, ours.load()))
    trees = jax.eval_shape(ours.init, jax.random.key(0))
    assert {leaf.shape[-1] for leaf in jax.tree.leaves(trees["lora"])} >= {2}
    out = jax.eval_shape(
        ours.denoise, trees["params"], trees["lora"], jnp.zeros((2, 8, 8, 4)),
        jnp.zeros(2), ours.encode(PROMPTS),
    )  # fmt: skip
    assert (out.shape, out.dtype) == ((2, 8, 8, 4), jnp.float32)
    assert ours.decode(jnp.zeros((4, 8, 8, 4))).shape == (4, 64, 64, 3)


def test_a_prompt_beyond_the_limit_is_cut_and_reported_once(folder):
    ours = load_pipeline(str(folder))
    long = "a cat " * tiny_sd.LENGTH
    with pytest.warns(UserWarning, match="1 prompts are longer than the 16 tokens"):
        cond = ours.encode([long, "a cat"])
    assert cond.emb.shape == (2, tiny_sd.LENGTH, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = ours.encode([long])
    np.testing.assert_array_equal(again.emb[0], cond.emb[0])


@pytest.mark.parametrize(
    ("size", "shape"), [(0, (4, 4, 4)), (32, (4, 4, 4)), (48, (6, 6, 4))]
)
def test_pictures_have_the_size_that_is_asked_for(folder, size, shape):
    assert latent_shape(read_source(folder), size) == shape


def test_a_size_without_a_latent_is_refused(folder):
    with pytest.raises(UserError, match="a multiple of 8"):
        latent_shape(read_source(folder), 36)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, "eps"),
        ({"prediction_type": "v_prediction"}, "v"),
        ({"order": 2}, "eps"),
        ({"steps_offset": 0}, "eps"),
        ({"clip_sample": True}, "eps"),
    ],
)
def test_schedules_of_stable_diffusion_are_read(tmp_path, changes, wanted):
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(SD1 | changes))
    assert read_prediction(path) == wanted


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what diffusers repairs
def test_diffusers_repairs_the_schedules_of_early_files_as_we_do():
    pytest.importorskip("torch")
    early = {"steps_offset": 0, "clip_sample": True}
    repaired = tiny_sd.make_pipeline(betas=early).scheduler.config
    assert (repaired.steps_offset, repaired.clip_sample) == (1, False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta_schedule", "linear"),
        ("beta_start", 0.0001),
        ("beta_end", 0.02),
        ("num_train_timesteps", 500),
        ("trained_betas", [0.1]),
        ("steps_offset", 2),
        ("set_alpha_to_one", True),
        ("rescale_betas_zero_snr", True),
        ("timestep_spacing", "trailing"),
        ("prediction_type", "sample"),
    ],
)
def test_another_schedule_is_refused_by_key_and_value(tmp_path, key, value):
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(SD1 | {key: value}))
    with pytest.raises(UserError) as caught:
        read_prediction(path)
    assert f"{key} = {value!r}" in caught.value.got
    assert f"{key} = " in caught.value.wanted


def test_a_schedule_that_names_no_betas_is_refused(tmp_path):
    path = tmp_path / "scheduler_config.json"
    path.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    with pytest.raises(UserError, match="beta_start = 'absent'"):
        read_prediction(path)


@pytest.mark.parametrize(
    "family", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", None]
)
def test_pipelines_of_other_families_are_refused(copied, family):
    edit(copied / "model_index.json", _class_name=family)
    with pytest.raises(UserError, match=f"{family!r}"):
        load_pipeline(str(copied))


@pytest.mark.parametrize(
    "part",
    ["unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"],
)
def test_a_missing_component_is_named(copied, part):
    path = copied / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=part):
        load_pipeline(str(copied))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}'])
def test_a_damaged_tokenizer_is_one_message(copied, content):
    (copied / "tokenizer" / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer"):
        load_pipeline(str(copied))


def test_components_of_different_models_are_refused(copied):
    edit(copied / "unet" / "config.json", cross_attention_dim=20)
    with pytest.raises(UserError, match="20"):
        load_pipeline(str(copied))


def test_a_tokenizer_larger_than_the_text_encoder_is_refused(copied):
    edit(copied / "text_encoder" / "config.json", vocab_size=5)
    with pytest.raises(UserError, match="at most 5"):
        load_pipeline(str(copied))


def test_weights_that_do_not_fit_their_configuration_are_listed(copied):
    edit(copied / "vae" / "config.json", block_out_channels=[8, 8, 8, 16])
    with pytest.raises(UserError, match="vae"):
        load_pipeline(str(copied))
