"""What we write, diffusers loads and computes the same with."""

import copy
import inspect
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sd

from configs import base
from ddrl_jax.errors import UserError
from ddrl_jax.models.convert import to_torch_names
from ddrl_jax.models.export_diffusers import LORA_FILE, write_lora, write_pipeline
from ddrl_jax.models.folder import read_json, read_tensors, weight_files
from ddrl_jax.models.load import load_pipeline
from ddrl_jax.models.stable_diffusion import TINY

RANK, ALPHA = 2, 6.0
CONFIG = SimpleNamespace(rank=RANK, alpha=ALPHA)
TOLERANCE = 1e-5  # relative to the largest value
TIMES = np.array([1.0, 751.0], np.float32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("sd") / "source"
    tiny_sd.write_pipeline(folder, shard_size="60KB")
    (folder / "README.md").write_text("hello")
    (folder / "sd-pruned.safetensors").write_bytes(b"a second copy of everything")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture(scope="module")
def pipeline(source):
    return load_pipeline(str(source), rank=RANK, alpha=ALPHA)


@pytest.fixture(scope="module")
def original(source):
    return read_by_diffusers(source)


@pytest.fixture(scope="module")
def trained(pipeline):
    """(params, lora) that are not those of the source."""
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: np.asarray(a + 0.1 * random.normal(size=a.shape), np.float32),
        pipeline.load(),
    )
    shapes = jax.eval_shape(pipeline.init, jax.random.key(0))["lora"]
    lora = jax.tree.map(
        lambda a: (0.3 * random.normal(size=a.shape)).astype(np.float32), shapes
    )
    return params, lora


@pytest.fixture(scope="module")
def inputs(pipeline):
    random = np.random.default_rng(1)
    x = random.normal(size=(2, *pipeline.latent_shape)).astype(np.float32)
    return x, pipeline.encode(["a cat", "a red dog"])


def ours(pipeline, params, lora, inputs):
    x, cond = inputs
    return jax.jit(pipeline.denoise)(params, lora, x, jnp.asarray(TIMES), cond)


def theirs(unet, inputs):
    import torch

    x, cond = inputs
    with torch.no_grad():
        out = unet(
            torch.tensor(np.moveaxis(x, -1, 1)),
            torch.tensor(TIMES),
            encoder_hidden_states=torch.tensor(np.asarray(cond.emb)),
        ).sample
    return np.moveaxis(out.numpy(), 1, -1)


def relative(a, b):
    return np.abs(np.asarray(a) - b).max() / np.abs(b).max()


def read_by_diffusers(folder):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


def test_a_written_pipeline_is_the_trained_one_in_diffusers(
    source, pipeline, trained, inputs, tmp_path
):
    target = write_pipeline(source, tmp_path / "out", trained[0])
    pipe = read_by_diffusers(target)
    expected = theirs(pipe.unet, inputs)
    assert relative(ours(pipeline, trained[0], None, inputs), expected) < TOLERANCE
    untrained = ours(pipeline, pipeline.load(), None, inputs)
    assert relative(untrained, expected) > 0.01
    for part in ("vae", "text_encoder"):
        before, after = read_tensors(source / part), read_tensors(target / part)
        assert before.keys() == after.keys()
        assert all((before[name] == after[name]).all() for name in before)


def test_a_written_pipeline_loads_here_as_the_same_bits(source, trained, tmp_path):
    target = write_pipeline(source, tmp_path / "out", trained[0])
    again = load_pipeline(str(target)).load()
    assert jax.tree.structure(again) == jax.tree.structure(trained[0])
    pairs = zip(*map(jax.tree.leaves, (again, trained[0])), strict=True)
    assert all((a == b).all() for a, b in pairs)


def test_the_copy_has_the_files_of_the_source(source, trained, tmp_path):
    target = write_pipeline(source, tmp_path / "out", trained[0], "float16")
    names = lambda root: {str(f.relative_to(root)) for f in files(root)}  # noqa: E731
    files = lambda root: filter(lambda f: f.is_file(), root.rglob("*"))  # noqa: E731
    left_out = {"sd-pruned.safetensors", "unet/diffusion_pytorch_model.bin"}
    assert names(target) == names(source) - left_out
    assert len(weight_files(target / "unet")) > 1
    config = "unet/config.json"
    assert (target / config).read_bytes() == (source / config).read_bytes()
    index = read_json(target / "unet/diffusion_pytorch_model.safetensors.index.json")
    count = sum(leaf.size for leaf in jax.tree.leaves(trained[0]))
    assert index["metadata"]["total_size"] == 2 * count  # bytes of a half
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


# The model_index.json of Stable Diffusion 1.5.
SD15 = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "requires_safety_checker": True,
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
KEPT = {"_class_name", "_diffusers_version", "requires_safety_checker"}
PARTS = {"scheduler", "text_encoder", "tokenizer", "unet", "vae"}


def as_downloaded(source, folder, kind):
    """A copy with the index of SD 1.5: as from the hub, or with what is not copied."""
    shutil.copytree(source, folder)
    (folder / "model_index.json").write_text(json.dumps(SD15))
    if kind == "pickle":
        (folder / "feature_extractor").mkdir()
        (folder / "feature_extractor" / "preprocessor_config.json").write_text("{}")
        (folder / "safety_checker").mkdir()
        (folder / "safety_checker" / "config.json").write_text("{}")
        (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"a pickle")
    if kind == "eyeless":
        (folder / "safety_checker").mkdir()
        (folder / "safety_checker" / "model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize("kind", ["hub", "pickle", "eyeless"])
def test_the_index_names_only_what_is_there(tmp_path, kind):
    source = as_downloaded(TINY, tmp_path / "in", kind)
    target = write_pipeline(source, tmp_path / "out", load_pipeline(str(TINY)).load())
    index = read_json(target / "model_index.json")
    assert {name for name in SD15 if index[name] == [None, None]} == (
        {"safety_checker"} if kind == "pickle" else set(SD15) - PARTS - KEPT
    )
    assert index["requires_safety_checker"] is False
    assert all(index[name] == SD15[name] for name in PARTS)
    assert json.loads((source / "model_index.json").read_text()) == SD15


def test_a_model_of_the_hub_loads_in_diffusers_again(source, trained, tmp_path):
    folder = as_downloaded(source, tmp_path / "in", "hub")
    target = write_pipeline(folder, tmp_path / "out", trained[0])
    pipe = read_by_diffusers(target)
    assert pipe.safety_checker is None and pipe.feature_extractor is None
    assert type(pipe.unet).__name__ == SD15["unet"][1]


def test_a_component_that_is_there_stays_in_the_index(tmp_path):
    source = as_downloaded(TINY, tmp_path / "in", "pickle")
    weights = source / "safety_checker"
    (weights / "pytorch_model.bin").rename(weights / "model.safetensors")
    target = write_pipeline(source, tmp_path / "out", load_pipeline(str(TINY)).load())
    assert read_json(target / "model_index.json") == SD15


@pytest.mark.parametrize(("dtype", "step"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_other_precisions_round_to_nearest(source, trained, tmp_path, dtype, step):
    target = write_pipeline(source, tmp_path / "out", trained[0], dtype)
    written, exact = read_tensors(target / "unet"), to_torch_names("unet", trained[0])
    errors = [np.abs(written[n] - t).max() / np.abs(t).max() for n, t in exact.items()]
    assert 0 < max(errors) < step


def test_a_variant_is_written_under_its_name(source, trained, tmp_path):
    half = tiny_sd.write_pipeline(tmp_path / "half", variant="fp16")
    target = write_pipeline(half, tmp_path / "out", trained[0], "float16", "fp16")
    assert len(read_tensors(target / "unet", "fp16")) > 100
    names = [file.name for file in weight_files(target / "unet", "fp16")]
    assert names == ["diffusion_pytorch_model.fp16.safetensors"]


def test_nothing_is_written_over(source, trained, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="already there"):
        write_pipeline(source, tmp_path / "out", trained[0])
    assert not list((tmp_path / "out").iterdir())
    write_lora(tmp_path / "lora", trained[1], CONFIG)
    with pytest.raises(UserError, match="already there"):
        write_lora(tmp_path / "lora", trained[1], CONFIG)


def test_weights_of_another_model_leave_nothing_behind(source, trained, tmp_path):
    params = {**trained[0], "surplus": {"bias": np.zeros(2)}}
    with pytest.raises(UserError, match="surplus"):
        write_pipeline(source, tmp_path / "out", params)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (1e6, "float16")])
def test_numbers_that_are_lost_are_refused(source, trained, tmp_path, value, dtype):
    params = jax.tree.map(np.copy, trained[0])
    params["conv_in"]["bias"][0] = value
    with pytest.raises(UserError, match="conv_in.bias"):
        write_pipeline(source, tmp_path / "out", params, dtype)


def test_an_unknown_precision_is_refused(source, trained, tmp_path):
    with pytest.raises(UserError, match="'int8'"):
        write_pipeline(source, tmp_path / "out", trained[0], "int8")


def peft_scale(metadata):
    """alpha / r as peft reads them of the header that diffusers parsed."""
    return metadata["unet.lora_alpha"] / metadata["unet.r"]


@pytest.mark.parametrize("options", [{}, {"bake_alpha": True}, {"bake_alpha": False}])
def test_a_lora_file_means_the_same_to_diffusers(
    original, pipeline, trained, inputs, tmp_path, options
):
    """Read by diffusers' own reader; merged by peft's W + (lora_alpha / r) B A."""
    import torch

    params, lora = pipeline.load(), trained[1]
    write_lora(tmp_path, lora, CONFIG, **options)
    unet = copy.deepcopy(original.unet)
    state, alphas, metadata = original.lora_state_dict(
        str(tmp_path), weight_name=LORA_FILE, return_lora_metadata=True
    )
    assert not alphas
    scale = peft_scale(metadata)
    assert scale == (1.0 if options.get("bake_alpha", True) else ALPHA / RANK)
    modules = dict(unet.named_modules())
    targets = metadata["unet.target_modules"]
    assert len(state) == 2 * len(targets)
    with torch.no_grad():
        for name in targets:
            a = state[f"unet.{name}.lora_A.weight"]
            b = state[f"unet.{name}.lora_B.weight"]
            modules[name].weight += scale * b @ a
    expected = theirs(unet, inputs)
    assert relative(ours(pipeline, params, lora, inputs), expected) < TOLERANCE
    assert relative(ours(pipeline, params, None, inputs), expected) > 0.01


def test_diffusers_loads_the_lora_itself(source, pipeline, trained, inputs, tmp_path):
    pytest.importorskip("peft")
    write_lora(tmp_path, trained[1], CONFIG)
    pipe = read_by_diffusers(source)
    pipe.load_lora_weights(str(tmp_path), weight_name=LORA_FILE)
    expected = theirs(pipe.unet, inputs)
    found = ours(pipeline, pipeline.load(), trained[1], inputs)
    assert relative(found, expected) < TOLERANCE


def test_alpha_is_baked_in_unless_a_config_says_otherwise():
    default = inspect.signature(write_lora).parameters["bake_alpha"].default
    assert default is base.get_config().export.bake_alpha is True


@pytest.mark.parametrize(("bake_alpha", "alpha"), [(True, RANK), (False, ALPHA)])
def test_the_header_of_a_lora_is_what_peft_takes(trained, tmp_path, bake_alpha, alpha):
    from safetensors import safe_open

    file = write_lora(tmp_path / "cats.safetensors", trained[1], CONFIG, bake_alpha)
    with safe_open(file, framework="numpy") as content:
        header = json.loads(content.metadata()["lora_adapter_metadata"])
        names = set(content.keys())
    assert (header["unet.r"], header["unet.lora_alpha"]) == (RANK, alpha)
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
    assert module in header["unet.target_modules"]
    assert f"unet.{module}.lora_A.weight" in names
    # LoraConfig of peft is made of exactly these keys.
    known = {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"}
    known |= {"use_dora", "lora_bias", "bias"}
    assert {key.removeprefix("unet.") for key in header} == known


@pytest.mark.parametrize("lora", [{}, {"conv_in": {"a": np.zeros((3, 5))}}])
def test_a_tree_that_is_no_such_lora_is_refused(tmp_path, lora):
    with pytest.raises(UserError, match="LoRA"):
        write_lora(tmp_path, lora, CONFIG)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("factor", ["a", "b"])
def test_a_lora_that_has_diverged_is_refused(tmp_path, factor):
    layer = {"a": np.ones((4, RANK)), "b": np.ones((RANK, 4))}
    layer[factor][0, 0] = np.nan
    lora = {"time_embedding": {"linear_1": layer}}
    with pytest.raises(UserError, match="time_embedding.linear_1") as error:
        write_lora(tmp_path, lora, CONFIG)
    assert "not finite" in error.value.got and not list(tmp_path.iterdir())
