"""The four DDPO tasks as a user runs them, on tiny models that diffusers and
transformers wrote: load, rollout, decode, judge, update, save, evaluate, export, and
diffusers reads what was written.
"""

import json
from functools import partial
from pathlib import Path

import ddim_walk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vlm_server

from ddrl_jax.check_config import check_config
from ddrl_jax.checkpoint import Checkpoints
from ddrl_jax.config_file import load_config, override
from ddrl_jax.data.prompts import prompt_list
from ddrl_jax.export import export_mode
from ddrl_jax.models.convert import to_jax
from ddrl_jax.models.export_diffusers import LORA_FILE
from ddrl_jax.models.folder import read_json, read_tensors
from ddrl_jax.models.stable_diffusion import TINY
from ddrl_jax.models.unet import UNet2DConditionModel
from ddrl_jax.models.unet_config import UNetConfig
from ddrl_jax.program import build
from ddrl_jax.resume import start
from ddrl_jax.rewards.questions import read_questions
from ddrl_jax.train import train

ROOT = Path(__file__).resolve().parents[1]
SHORT = ("sampler.steps=2", "evaluate.samples=4", "mesh.data=1", "log.progress=False")
# A LoRA that matters after two epochs. All tests have the same one: what is compiled
# for the first is found in the cache by the others.
LORA = ("lora.alpha=12.0", "optimizer.lr=0.01")


def read(spec: str, *keys: str):
    """A configuration on this machine, with some keys changed."""
    config = load_config(str(ROOT / "configs" / spec))
    override(config, ["", *(f"--config.{key}" for key in (*SHORT, *keys))])
    check_config(config, 1)
    return config


def run(spec: str, workdir: Path, *keys: str) -> list[dict]:
    """Trains a configuration, exports it; returns its metrics."""
    config = read(spec, *keys)
    train(config, str(workdir))
    export_mode(config, str(workdir))
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def check_rows(rows: list[dict], reward: str) -> None:
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows[1:]:
        assert row["policy/ratio_max_deviation"] == 0
        assert np.isfinite([row["policy/loss"], row["grad_norm"]]).all()
        assert row[f"reward/{reward}/std"] > 0
    assert np.isfinite([row[f"evaluation/{reward}/mean"] for row in rows]).all()


def ours(folder: Path, x, time, emb):
    """The UNet of a written folder in this package."""
    config = UNetConfig.from_json(read_json(folder / "unet" / "config.json"))
    params = to_jax("unet", read_tensors(folder / "unet"), config)
    return UNet2DConditionModel(config).apply({"params": params}, x, time, emb)


def check_diffusers_reads(folder: Path) -> None:
    """The exported pipeline in PyTorch gives the prediction of ours."""
    torch = pytest.importorskip("torch")
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, 4, 4, 4))
    emb = jax.random.normal(keys[1], (2, 16, pipe.unet.config.cross_attention_dim))
    time = np.asarray([981.0, 21.0], np.float32)
    with torch.no_grad():
        theirs = pipe.unet(
            torch.from_numpy(np.asarray(x.transpose(0, 3, 1, 2))),
            torch.from_numpy(time),
            torch.from_numpy(np.asarray(emb)),
        ).sample.numpy()
    found = np.asarray(ours(folder, x, jnp.asarray(time), emb))
    error = np.abs(found - theirs.transpose(0, 2, 3, 1)).max() / np.abs(theirs).max()
    assert error < 1e-5


@pytest.mark.slow
def test_aesthetic_with_a_lora_that_is_merged(tmp_path):
    merged = (*LORA, "export.merge_lora=True")
    rows = run("aesthetic.py:smoke", tmp_path / "run", *merged)
    check_rows(rows, "aesthetic")
    folder = tmp_path / "run" / "export" / "000002"
    start = read_tensors(ROOT / "ddrl_jax" / "assets" / "tiny_sd" / "unet")
    moved = {
        k for k, v in read_tensors(folder / "unet").items() if (v != start[k]).any()
    }
    assert moved and all(".attn" in name for name in moved)
    check_diffusers_reads(folder)


@pytest.mark.slow
def test_compressibility_with_all_weights(tmp_path):
    rows = run("compressibility.py:paper-smoke", tmp_path / "run")
    check_rows(rows, "compressibility")
    check_diffusers_reads(tmp_path / "run" / "export" / "000002")


def check_diffusers_loads_the_lora(task: str, workdir: Path) -> None:
    """The picture of `load_lora_weights` is the one of the trained factors here."""
    folder = workdir / "export" / "000002"
    assert [file.name for file in folder.iterdir()] == [LORA_FILE]
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline

    program = build(read(task, *LORA))
    checkpoints = Checkpoints(workdir / "checkpoints", 0, 1, read_only=True)
    lora = start(program, checkpoints)[1].average
    noise = np.random.default_rng(0).normal(size=(2, *program.pipeline.latent_shape))
    noise, prompts = noise.astype(np.float32), ["a photo of a cat", "zebra, red"]
    walk = partial(ddim_walk.ours, program.pipeline, program.frozen)
    found, _ = walk(lora, noise, prompts)
    pipe = StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None)
    pipe.load_lora_weights(folder)
    expected = ddim_walk.theirs(pipe, noise, prompts, "latent")
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() / scale < 1e-5
    untrained, _ = walk(jax.tree.map(jnp.zeros_like, lora), noise, prompts)
    assert np.abs(untrained - expected).max() / scale > 0.01
    pictures = ddim_walk.theirs(pipe, noise, prompts, "np") * 255.0
    levels = np.asarray(program.pipeline.decode(found)).astype(np.float32)
    assert np.abs(levels - pictures).max() < 0.51  # rounded to nearest


@pytest.mark.slow
@pytest.mark.parametrize("task", ["compressibility", "incompressibility"])
def test_file_sizes_with_a_lora_file(task, tmp_path):
    check_rows(run(f"{task}.py:smoke", tmp_path / "run", *LORA), task)
    check_diffusers_loads_the_lora(f"{task}.py:smoke", tmp_path / "run")


@pytest.mark.slow
def test_prompt_alignment_asks_a_server(tmp_path):
    random = np.random.default_rng(0)

    def reply(body, nth):
        words = ["a cat", "a dog washing", "washing the dishes", "nothing"]
        return vlm_server.said(words[int(random.integers(4))])

    with vlm_server.serving(reply) as (url, seen):
        keys = (f"rewards.vlm.base_url={url}", "rewards.vlm.model=judge")
        keys += ("rewards.weights={'vlm_alignment': 1.0}",)
        rows = run("prompt_alignment.py:smoke", tmp_path / "run", *LORA, *keys)
    check_rows(rows, "vlm_alignment")
    assert len(seen.bodies) >= 2 * 16 + 3 * 4
    check_diffusers_loads_the_lora("prompt_alignment.py:smoke", tmp_path / "run")


@pytest.mark.slow
def test_the_strict_variant_counts_right_answers(tmp_path):
    """Whoever is asked sees a cat washing the dishes."""
    seen_there = "a cat is washing the dishes"
    with vlm_server.serving(lambda *_: vlm_server.said(seen_there)) as (url, seen):
        keys = (f"rewards.vlm.base_url={url}", "rewards.vlm.model=judge")
        keys += ("rewards.weights={'vlm_questions': 1.0}", "train.epochs=1")
        config = read("prompt_alignment.py:strict-smoke", *LORA, *keys)
        train(config, str(tmp_path / "run"))
    table = read_questions(config.rewards.vlm.questions)
    asked = [vlm_server.question_of(body) for body in seen.bodies]
    assert len(asked) == 1 + 3 * (4 + 16 + 4)  # a check, then three for each picture
    assert set(asked[1:]) <= {q.text for row in table.values() for q in row}
    right = [
        np.mean([q.words[0] in seen_there for q in table[prompt]])
        for prompt in prompt_list(config.prompts, (), config.seed)[:4]
    ]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        mean = row["evaluation/vlm_questions/mean"]
        np.testing.assert_allclose(mean, np.mean(right), rtol=1e-6)
    assert row["reward/vlm_questions/std"] > 0 and row["grad_norm"] > 0


@pytest.mark.slow
def test_dpok_has_its_kl(tmp_path):
    rows = run("compressibility.py:dpok-smoke", tmp_path / "run", *LORA)
    check_rows(rows, "compressibility")
    assert rows[1]["policy/kl"] >= 0 and rows[2]["policy/kl"] > 0


@pytest.mark.parametrize("task", ["aesthetic", "compressibility", "prompt_alignment"])
@pytest.mark.parametrize(
    "variant",
    ["", "lora", "paper", "sf", "rwr", "sparse_rwr", "dpok", "ddrl", "smoke"],
)
def test_every_variant_passes_the_check_at_full_size(task, variant, tmp_path):
    config = load_config(str(ROOT / "configs" / f"{task}.py:{variant}"))
    if variant == "ddrl":
        config.data.path = str(tmp_path)
    check_config(config, 1)


def test_an_unknown_variant_lists_those_there_are():
    from ddrl_jax.errors import UserError

    with pytest.raises((UserError, ValueError), match="sparse_rwr"):
        load_config(str(ROOT / "configs" / "aesthetic.py:ppo"))
