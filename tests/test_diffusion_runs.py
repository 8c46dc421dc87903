"""The other variants of the four tasks as a user runs them, on the tiny shipped model:
DDRL with data of each kind, REINFORCE, both forms of RWR, and what the full-size
configuration computes with.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tfds_set import write_set
from tiny_runs import perturbed

from ddrl_jax import sources
from ddrl_jax.check_config import check_config
from ddrl_jax.command_line import load_config, override
from ddrl_jax.data import images, latent_writer, record_table
from ddrl_jax.errors import UserError
from ddrl_jax.main import run
from ddrl_jax.program import build
from ddrl_jax.self_test import ratio_deviations
from ddrl_jax.sources import without_data
from ddrl_jax.train import train

ROOT = Path(__file__).resolve().parents[1]
SHORT = (
    "sampler.steps=2",
    "train.epochs=1",
    "evaluate.samples=4",
    "evaluate.data_samples=4",
    "evaluate.pictures=0",
    "mesh.data=1",
    "log.progress=False",
    "log.tensorboard=False",
)
WORDS = ("a cat", "a dog", "a red fox", "a bear")


def read(spec: str, *keys: str):
    config = load_config(str(ROOT / "configs" / spec))
    override(config, ["", *(f"--config.{key}" for key in (*SHORT, *keys))])
    return config


def trained(spec: str, workdir: Path, *keys: str) -> list[dict]:
    """The metrics of a run: before the first epoch, and after the only one."""
    config = read(spec, *keys)
    check_config(config, 1)
    train(config, str(workdir))
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def draw_pictures(folder: Path) -> Path:
    """Four pictures of noise with a caption beside each."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for i, text in enumerate(WORDS):
        pixels = random.integers(0, 256, (48, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(text)
    return folder


# ---- DDRL: the data of a folder, and the base model's own samples


@pytest.mark.slow
def test_ddrl_from_a_folder_and_from_samples(tmp_path, capsys, monkeypatch):
    """The samples are drawn before there are any data."""
    spec, cache = "aesthetic.py:ddrl-smoke", f"data.cache={tmp_path / 'cache'}"
    flags = [f"--config.{key}" for key in (*SHORT, cache, "sample.per_prompt=1")]
    command = [f"--config={ROOT / 'configs' / spec}", *flags]
    made = tmp_path / "made"
    monkeypatch.setattr("ddrl_jax.main._device_count", lambda: 1)
    assert run(["", *command, f"--workdir={made}", "--mode=sample"]) == 0
    assert f"8 samples of 8 prompts: {made / 'dataset'}" in capsys.readouterr().out
    sources = {"folder": draw_pictures(tmp_path / "pictures"), "samples": None}
    for source, folder in sources.items():
        keys = (f"data.source={source}", f"data.path={folder or made / 'dataset'}")
        before, after = trained(spec, tmp_path / source, cache, *keys)
        assert after["policy/ratio_max_deviation"] == 0
        assert after["data/loss"] > 0 and after["grad_norm"] > 0
        losses = [row["data/heldout_loss"] for row in (before, after)]
        assert np.isfinite(losses).all() and losses[0] != losses[1]


def counted(monkeypatch, place, name: str, calls: list[str]) -> None:
    """Notes in `calls` that place.name was called."""
    real = getattr(place, name)

    def noted(*args, **kwargs):
        calls.append(name)
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, noted)


@pytest.mark.slow
def test_ddrl_from_a_tfds_set_encodes_it_once_and_streams_it_after(
    tmp_path, monkeypatch
):
    calls: list[str] = []
    counted(monkeypatch, sources, "read_tfds", calls)  # all records, for their bytes
    counted(monkeypatch, latent_writer, "_encode_span", calls)  # pictures by the VAE
    counted(monkeypatch, latent_writer, "_say_span", calls)  # captions by the encoder
    counted(monkeypatch, images, "decode_picture", calls)
    counted(monkeypatch, record_table.Table, "read", calls)
    name = write_set(tmp_path / "sets", (*WORDS, ""))
    keys = ("data.source=tfds", f"data.path={name}", "data.split=validation")
    keys += (f"data.tfds_dir={tmp_path / 'sets'}", "data.image_feature=photo")
    keys += ("data.caption_feature=texts", "data.on_bad=skip", "data.heldout=1")
    keys += (f"data.cache={tmp_path / 'cache'}",)
    lines = trained("aesthetic.py:ddrl-smoke", tmp_path / "first", *keys)
    stages = {"read_tfds", "_encode_span", "_say_span", "decode_picture", "read"}
    assert set(calls) == stages
    [cache] = (tmp_path / "cache").glob("latents-*")
    assert {file.name for file in cache.glob("*.array_record")} == {
        "latents-00000.array_record",
        "texts-00000.array_record",
    }
    assert lines[1]["data/loss"] > 0 and lines[1]["policy/ratio_max_deviation"] == 0
    assert lines[1]["data/skipped"] == 1  # the one without a caption
    calls.clear()
    again = trained("aesthetic.py:ddrl-smoke", tmp_path / "second", *keys)
    assert set(calls) == {"read"}  # of the cache alone
    timed = ("time/", "samples_per_second", "perf/")
    plain = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in lines]
    for row, other in zip(plain, again, strict=True):
        assert row == {k: v for k, v in other.items() if k in row}


def test_only_what_is_trained_on_data_needs_them():
    config = read("aesthetic.py:ddrl-smoke")
    with pytest.raises(UserError, match="data.path is no folder"):
        check_config(config, 1)
    used = without_data(config, "sample")
    check_config(used, 1)
    assert config.data.source == "folder" and config.data_term.weight > 0
    config.prompts.source = "data"  # its captions are the prompts
    assert without_data(config, "sample").data.source == "folder"
    assert without_data(config, "export").data.source == "none"


# ---- the other policy terms


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sf", "rwr", "sparse_rwr"])
def test_a_variant_trains(kind, tmp_path):
    task = "aesthetic" if kind == "rwr" else "compressibility"
    rows = trained(f"{task}.py:{kind}-smoke", tmp_path / kind)
    assert np.isfinite(rows[1]["policy/loss"]) and rows[1]["grad_norm"] > 0
    assert rows[1][f"reward/{task}/std"] > 0
    if kind == "sf":
        assert rows[1]["policy/ratio_max_deviation"] == 0


# ---- what the full size computes with


@pytest.mark.slow
@pytest.mark.optimised
def test_the_ratio_is_1_in_bfloat16_with_remat_and_long_attention():
    """At 384 px attention is over 2,304 places, which "auto" takes in portions."""
    keys = ("model.dtype=bfloat16", "model.remat=full", "model.image_size=384")
    keys += ("train.microbatch=1", "prompts.per_epoch=2", "train.minibatches=1")
    program = build(read("compressibility.py:smoke", *keys))
    assert program.config.model.attention == "auto"
    assert program.config.sampler.guidance_scale == 5.0
    state = program.new_state()
    state = state._replace(params=perturbed(state.params, 0.3))
    found = ratio_deviations(program, state)
    assert {name: values.max() for name, values in found.items()} == {
        "replay": 0.0,
        "update": 0.0,
    }
