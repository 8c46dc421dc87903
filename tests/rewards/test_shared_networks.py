"""Rewards on one CLIP hold it once, and what they lack is told before the model."""

import gc

import jax
import numpy as np
import pytest
from edited_config import configured

from ddrl_jax import evaluate, train
from ddrl_jax.errors import UserError
from ddrl_jax.rewards.clip_folder import CLIP_H
from ddrl_jax.rewards.registry import TINY as TINY_FOLDER
from ddrl_jax.rewards.registry import make_rewards
from ddrl_jax.workdir import open_workdir

TINY = {"rewards.clip": "assets", "rewards.aesthetic_head": "assets"}
NAMES = ("aesthetic", "clip_score")


def section(**edits):
    return configured(TINY | {f"rewards.{k}": v for k, v in edits.items()}).rewards


def bytes_on_device() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1]])
def test_aesthetic_and_clip_score_hold_one_clip(names):
    before = bytes_on_device()
    alone = make_rewards(section(), names=["clip_score"])
    whole = bytes_on_device() - before
    del alone
    both = make_rewards(section(), names=names)
    head = sum(np.size(x) * 4 for layer in both["aesthetic"].head for x in layer)
    assert bytes_on_device() - before == whole + head
    assert both["aesthetic"].judge.pictures is both["clip_score"].judge.pictures


def test_without_a_text_to_read_its_tower_is_not_held():
    before = bytes_on_device()
    alone = make_rewards(section(), names=["aesthetic"])
    without = bytes_on_device() - before
    both = make_rewards(section(), names=NAMES)
    text = bytes_on_device() - before - 2 * without
    assert text > 1000 and alone["aesthetic"].judge.prompts is None
    assert both["clip_score"].judge.prompts is not None


def test_a_shared_clip_scores_as_its_own():
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 26, 3), dtype=np.uint8)
    prompts = ["a cat", "a red fox", "a cat"]
    both = make_rewards(section(), names=NAMES)
    for name in NAMES:
        own = make_rewards(section(), names=[name])[name]
        np.testing.assert_array_equal(both[name](images, prompts), own(images, prompts))


MISSING = {
    "no head": (
        {"rewards.weights": {"aesthetic": 1.0}, "rewards.aesthetic_head": ""},
        "aesthetic_head=''",
    ),
    "head of the hub": (
        {"rewards.weights": {"aesthetic": 1.0}},
        "(?s)trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth.*:smoke",
    ),
    "head not there": (
        {"rewards.weights": {"aesthetic": 1.0}, "rewards.aesthetic_head": "no/h.pth"},
        "no/h.pth",
    ),
    "no HPS": (
        {"rewards.heldout": ("hpsv2",), "rewards.hpsv2": ""},
        "the reward hpsv2 needs the file",
    ),
    "HPS of the hub": (
        {"rewards.heldout": ("hpsv2",), "rewards.clip_h": "assets"},
        "(?s)xswu/HPSv2:HPS_v2.1_compressed.pt.*--config.rewards.hpsv2=FOLDER/HPS_v2.1",
    ),
    "hub": (
        {"rewards.heldout": ("pickscore",)},
        "(?s)can not be downloaded.*--config.rewards.pickscore=FOLDER",
    ),
    "processing": (
        {"rewards.heldout": ("pickscore",), "rewards.pickscore": "assets"},
        "(?s)can not be downloaded.*--config.rewards.clip_h=FOLDER",
    ),
    "CLIP of the hub": (
        {"rewards.heldout": ("clip_score",)},
        "(?s)can not be downloaded.*--config.rewards.clip=FOLDER",
    ),
    "CLIP": (
        {"rewards.weights": {"clip_score": 1.0}, "rewards.clip": "/no/folder"},
        "/no/folder",
    ),
    "server": ({"rewards.weights": {"vlm_alignment": 1.0},
                "rewards.vlm.scorer": "words"}, "vision-language"),
}  # fmt: skip


@pytest.mark.parametrize("mode", [train.train, evaluate.evaluate_mode])
@pytest.mark.parametrize("case", MISSING)
def test_what_a_reward_lacks_is_told_before_the_model_is_read(
    case, mode, monkeypatch, tmp_path
):
    def build(*_):
        raise AssertionError("the model was read first")

    monkeypatch.setattr("ddrl_jax.train.build", build)
    monkeypatch.setattr("ddrl_jax.program.build", build)
    edits, told = MISSING[case]
    config = configured(edits)
    open_workdir(tmp_path, config).close()  # an evaluation is of a run
    with pytest.raises(UserError, match=told):
        mode(config, str(tmp_path))


@pytest.mark.parametrize("reward", ["pickscore", "hpsv2"])
def test_of_the_repository_of_a_tokenizer_no_weights_are_downloaded(
    reward, monkeypatch, tmp_path
):
    """What comes is TINY; the weights of the score itself lie in a folder."""
    import huggingface_hub

    asked = []

    def download(repo, **rest):
        asked.append((repo, rest["allow_patterns"]))
        return str(TINY_FOLDER)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    weights = {"pickscore": str(TINY_FOLDER), "hpsv2": str(tmp_path / "no.pt")}
    try:
        make_rewards(section(**weights), names=[reward])
    except UserError as error:  # of the file that is not there
        assert reward == "hpsv2" and "no.pt" in str(error)
    assert asked == [(CLIP_H, ["*.json", "*.txt"])]


def test_training_and_evaluation_ask_the_same_judges(monkeypatch, tmp_path):
    """Each network of a run is loaded by one call."""
    asked = []

    def run(program, rewards, *_):
        evaluation = evaluate.Evaluation(program, rewards)
        with train.make_pool(program, rewards) as pool:
            asked.extend([evaluation.judges, pool.rewards])

    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(train, "write_report", lambda home: "")
    edits = {"rewards.heldout": ("retrieval",), "log.tensorboard": False}
    train.train(configured(edits), str(tmp_path))
    judges, trained = asked
    assert set(judges) == {"compressibility", "retrieval"}
    assert set(trained) == {"compressibility"}
    assert trained["compressibility"] is judges["compressibility"]
