"""The values of the DDPO presets, key by key, against the tables that were published.

Expected numbers are copied from arXiv 2305.13301, table D.5, and from the presets of
its two repositories, not from configs/; what differs on purpose is named here.
"""

from pathlib import Path

import pytest

from configs import ddpo_sd
from ddrl_jax.check_config import check_config
from ddrl_jax.command_line import load_config
from ddrl_jax.config_rules import flatten
from ddrl_jax.data.prompts import prompt_list
from ddrl_jax.rewards.questions import questions_of, read_questions

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("aesthetic", "compressibility", "incompressibility", "prompt_alignment")
LORA = ("", "lora", "dpok", "ddrl")  # by the PyTorch repository
FULL = ("paper", "sf", "rwr", "sparse_rwr")  # by the paper and the JAX repository

# Table D.5, all four columns, and what section 4 of the paper says of the sampler.
PAPER = {
    "sampler.kernel": "ddim",
    "sampler.eta": 1.0,
    "sampler.steps": 50,
    "sampler.guidance_scale": 5.0,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 1e-4,
    "optimizer.grad_clip": 1.0,
    "optimizer.warmup": 0,
    "optimizer.schedule": "constant",
    "optimizer.ema_decay": 0.0,  # none in either repository
    "policy.weight": 1.0,
    "policy.reduction": "mean",
    "policy.log_prob": "gaussian",
    "policy.transform": "linear",
    "policy.old_log_prob": "rollout",
    "policy.train_on": (),
    "policy.train_steps": 0,  # timestep_fraction 1
    "model.name": "stable_diffusion",
    "model.image_size": 512,
    "rewards.jpeg_upscale": 1,  # sizes are of 512 px
    "advantages.tracker_min": 16,
    "advantages.epsilon": 1e-6,
}
EPOCHS = {"aesthetic": 200, "prompt_alignment": 200}  # the other two 100
UPDATES = {"aesthetic": 2, "prompt_alignment": 2}  # the other two 4
BUFFER = {"aesthetic": 32, "prompt_alignment": 32}  # of the LoRA presets; others 16
PROMPTS = {  # set, how many
    "aesthetic": ("simple_animals", 45),
    "compressibility": ("imagenet_animals", 398),
    "incompressibility": ("imagenet_animals", 398),
    "prompt_alignment": ("nouns_activities", 135),
}
REWARDS = dict(zip(TASKS, (*TASKS[:3], "vlm_alignment"), strict=True))


def preset(task: str, variant: str):
    return load_config(str(ROOT / "configs" / f"{task}.py:{variant}"))


def check(config, wanted: dict) -> None:
    found = flatten(config)
    assert {key: found[key] for key in wanted} == wanted


def samples(config) -> int:
    return config.prompts.per_epoch * config.prompts.group_size


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variant", (*LORA, *FULL))
def test_what_all_share(task, variant, tmp_path):
    config = preset(task, variant)
    check(config, PAPER)
    assert dict(config.rewards.weights) == {REWARDS[task]: 1.0}
    name, count = PROMPTS[task]
    assert (config.prompts.source, config.prompts.set) == ("set", name)
    assert len(prompt_list(config.prompts, (), 0)) == count
    assert config.data_term.weight == (0.01 if variant == "ddrl" else 0.0)
    assert config.policy.kl_weight == (0.01 if variant == "dpok" else 0.0)
    if variant == "ddrl":
        config.data.path = str(tmp_path)
    check_config(config, 1)
    check_config(config, 8)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variant", LORA)
def test_the_lora_presets(task, variant):
    """config/dgx.py of the PyTorch repository; its alignment has 288 samples an epoch
    and updates of 144 because two of eight GPUs serve the judge."""
    config = preset(task, variant)
    updates = UPDATES.get(task, 4)
    wanted = {
        "lora.rank": 4,
        "lora.alpha": 0.0,  # scale 1
        "optimizer.lr": 3e-4,
        "train.epochs": EPOCHS.get(task, 100),
        "train.inner_epochs": 1,
        "train.minibatches": updates,
        "policy.term": "clipped",
        "policy.clip_range": 1e-4,
        "policy.per_sample_steps": True,
        "advantages.kind": "tracker",
        "advantages.tracker_size": BUFFER.get(task, 16),
        "advantages.clip": 5.0,
        "model.dtype": "bfloat16",  # fp16 there
    }
    check(config, wanted)
    assert samples(config) == 256
    assert samples(config) // updates == (128 if updates == 2 else 64)
    queries = {100: 25_600, 200: 51_200}
    assert config.train.epochs * samples(config) == queries[config.train.epochs]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("variant", "term", "updates"), [("paper", "clipped", 4), ("sf", "reinforce", 1)]
)
def test_the_paper(task, variant, term, updates):
    """DDPO-IS: 4 updates of 64. DDPO-SF: 1 of 256. 200 epochs of 256 samples."""
    config = preset(task, variant)
    wanted = {
        "lora.rank": 0,
        "optimizer.lr": 1e-5,
        "optimizer.fresh": False,
        "train.epochs": 200,
        "train.minibatches": updates,
        "train.inner_epochs": 1,
        "policy.term": term,
        "policy.clip_range": 1e-4,
        "policy.per_sample_steps": True,
        "advantages.kind": "tracker",
        "advantages.tracker_size": 32,
        "advantages.clip": 10.0,
        "model.dtype": "float32",
        "model.init": "CompVis/stable-diffusion-v1-4",
    }
    check(config, wanted)
    assert samples(config) == 256
    assert samples(config) // updates == {4: 64, 1: 256}[updates]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variant", ["rwr", "sparse_rwr"])
def test_reward_weighted_regression(task, variant):
    """10 rounds of 10,240 samples and 400 updates of 128 with fresh moments. Sparse:
    what reaches the 90th percentile of its prompt, here 4 of 32."""
    config, sparse = preset(task, variant), variant == "sparse_rwr"
    alone = sparse or task == "aesthetic"  # weights of each prompt's own samples
    wanted = {
        "lora.rank": 0,
        "optimizer.lr": 1e-5,
        "optimizer.fresh": True,
        "train.epochs": 10,
        "policy.term": variant,
        "policy.rwr_inverse_temperature": 0.2,
        "policy.rwr_percentile": 0.9,
        "advantages.kind": "group" if alone else "batch",
        "model.dtype": "float32",
    }
    check(config, wanted)
    assert samples(config) == 10_240
    fitted = samples(config) // 32 * 4 if sparse else samples(config)
    train = config.train
    assert fitted // train.minibatches == 128
    assert train.minibatches * train.inner_epochs == 400


def test_prompt_alignment_asks_as_the_paper_did():
    config = preset("prompt_alignment", "")
    wanted = {
        "rewards.vlm.scorer": "bertscore",
        "rewards.vlm.bertscore_model": "microsoft/deberta-xlarge-mnli",
        "rewards.vlm.max_tokens": 64,
        "rewards.on_failure": "mask",
    }
    check(config, wanted)


def test_the_strict_variant_differs_in_its_reward_alone():
    config = preset("prompt_alignment", "strict")
    found, plain = flatten(config), flatten(preset("prompt_alignment", "lora"))
    changed = {key for key in found if found[key] != plain.get(key)}
    assert changed == {"name", "rewards.weights", "rewards.vlm.questions"}
    assert dict(config.rewards.weights) == {"vlm_questions": 1.0}
    table = read_questions(config.rewards.vlm.questions)
    questions_of(table, prompt_list(config.prompts, (), 0))  # each has some
    check_config(config, 8)


def test_aesthetic_reads_the_published_judge():
    wanted = {
        "rewards.clip": "openai/clip-vit-large-patch14",
        "rewards.aesthetic_head": "trl-lib/ddpo-aesthetic-predictor:"
        "aesthetic-model.pth",
        "model.init": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    }
    check(preset("aesthetic", ""), wanted)


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_and_sampling_are_the_tasks_own(task):
    wanted = {
        "evaluate.solver": "ddim",
        "evaluate.steps": 50,
        "evaluate.guidance_scale": 5.0,
        "sample.steps": 50,
        "sample.guidance_scale": 5.0,
        "rewards.heldout": (),
    }
    check(preset(task, ""), wanted)


# Where a preset differs on purpose: our value, and what its header says of it.
DIFFERENT = [
    ("", "policy.train_steps", 0, "each pass draws anew"),
    ("", "model.init", ddpo_sd.REPO, "starts from v1-4"),
    ("", "model.dtype", "bfloat16", "computes in float16"),
    ("paper", "optimizer.state_dtype", "float32", "the first is bfloat16"),
    ("", "checkpoint.keep", 2, "there all of them"),
]


@pytest.mark.parametrize(("variant", "key", "ours", "said"), DIFFERENT)
def test_what_differs_is_in_the_header(variant, key, ours, said):
    check(preset("aesthetic", variant), {key: ours})
    header = " ".join((ddpo_sd.__doc__ or "").split())
    assert said in header.partition("Where this differs")[2]
