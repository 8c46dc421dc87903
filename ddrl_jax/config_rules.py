"""What every key of a configuration may hold: one row a key.

The rows are exactly the keys of configs/base.py, which a test compares. Names that are
keys of a table in the code (models, rewards, samplers) and what several keys must
satisfy together are checked in check_config.
"""

import difflib
from collections.abc import Sequence
from typing import Any

from ddrl_jax.config_values import (
    Rule,
    choice,
    folder,
    integer,
    number,
    sequence,
    switch,
    table,
    text,
)
from ddrl_jax.errors import UserError


def require(ok: bool, what: str, *, got: object, wanted: str, way_out: str) -> None:
    """Raises UserError with these words unless `ok`."""
    if not ok:
        raise UserError(what, got=got, wanted=wanted, way_out=way_out)


def near(name: object, names: Sequence[str]) -> str:
    """Returns 'did you mean "x"? ' for the nearest name, or "" when none is near."""
    matches = difflib.get_close_matches(str(name), list(names), 1, 0.6)
    return f'did you mean "{matches[0]}"? ' if matches else ""


def mesh_axis() -> Rule:
    """Returns the rule of the size of a mesh axis."""
    least = integer(1)
    return Rule(
        "a whole number >= 1, or -1 for all devices that are left",
        lambda value: least.accepts(value) or (value == -1 and type(value) is int),
    )


RULES: dict[str, Rule] = {
    "name": text(empty=False),
    # jax.random.key takes 32 bits
    "seed": integer(0, 2**32 - 1),
    "model.name": text(empty=False),
    "model.revision": text(empty=False),
    "model.variant": text(),
    "model.vae_dtype": choice("float32", "bfloat16"),
    "model.vae_at_once": integer(1),
    "model.init": text(empty=False),
    "model.width": integer(1),
    "model.depth": integer(1),
    "model.heads": integer(1),
    "model.patch": integer(1),
    "model.image_size": integer(0),
    "model.dtype": choice("float32", "bfloat16"),
    "model.matmul_precision": choice("highest", "high", "default"),
    "model.attention": text(empty=False),
    "model.remat": choice("none", "full", "dots", "named", "offload"),
    "model.video.frames": integer(1),
    "model.video.height": integer(1),
    "model.video.width": integer(1),
    "model.video.channels": integer(3),
    "model.video.mlp": integer(1),
    "model.video.text_tokens": integer(1),
    "model.video.text_width": integer(1),
    "lora.rank": integer(0),
    "lora.alpha": number(0),
    "lora.base_dtype": choice("compute", "float32"),
    "data.source": choice("emoji", "samples", "none", "folder", "tfds"),
    "data.path": text(),
    "data.split": text(empty=False),
    "data.image_feature": text(empty=False),
    "data.caption_feature": text(empty=False),
    "data.tfds_dir": text(),
    "data.resample": choice("bicubic", "lanczos"),
    "data.on_bad": choice("error", "skip"),
    "data.cache": folder(empty=False),
    "data.cache_dtype": choice("float16", "float32"),
    "data.cache_text_dtype": choice("float16", "float32"),
    "data.cache_batch": integer(1),
    "data.min_scale": number(above=0, most=1),
    "data.max_scale": number(above=0, most=1),
    "data.rotation": number(0, most=180),
    "data.heldout": integer(0),
    "prompts.source": choice("data", "file", "list", "set", "questions", "tfds"),
    "prompts.path": text(),
    "prompts.set": text(),
    "prompts.feature": text(empty=False),
    "prompts.split": text(empty=False),
    "prompts.list": sequence(text(empty=False)),
    "prompts.limit": integer(0),
    "prompts.per_epoch": integer(1),
    "prompts.group_size": integer(1),
    "sampler.kernel": text(empty=False),
    "sampler.steps": integer(1),
    "sampler.noise_level": number(0),
    "sampler.eta": number(0),
    "sampler.churn": number(0),
    "sampler.sigma_max": number(above=0),
    "sampler.sigma_min": number(above=0),
    "sampler.shift": number(above=0),
    "sampler.last_step": choice("stochastic", "deterministic"),
    "sampler.window": sequence(integer(0)),
    "sampler.guidance_scale": number(0),
    "rewards.weights": table(number(0)),
    "rewards.heldout": sequence(text(empty=False)),
    "rewards.jpeg_upscale": integer(1),
    "rewards.threads": integer(1),
    "rewards.timeout": number(above=0),
    "rewards.on_failure": choice("error", "mask"),
    "rewards.clip": text(empty=False),
    "rewards.clip_h": text(empty=False),
    "rewards.aesthetic_head": text(),
    "rewards.pickscore": text(empty=False),
    "rewards.hpsv2": text(),
    "rewards.vlm.base_url": text(),
    "rewards.vlm.model": text(),
    "rewards.vlm.api_key_env": text(),
    "rewards.vlm.timeout": number(above=0),
    "rewards.vlm.retries": integer(0),
    "rewards.vlm.backoff": number(0),
    "rewards.vlm.threads": integer(1),
    "rewards.vlm.max_tokens": integer(1),
    "rewards.vlm.body": text(),
    "rewards.vlm.scorer": choice("bertscore", "words"),
    "rewards.vlm.bertscore_model": text(empty=False),
    "rewards.vlm.bertscore_layers": integer(0),
    "rewards.vlm.bertscore_device": text(empty=False),
    "rewards.vlm.questions": text(empty=False),
    "rewards.vlm.match": choice("substring", "word"),
    "advantages.kind": choice("group", "tracker", "batch"),
    "advantages.std": choice("group", "global", "none"),
    # equal rewards have std 0, so the epsilon can not be 0
    "advantages.epsilon": number(above=0),
    "advantages.clip": number(0),
    "advantages.tracker_size": integer(1),
    "advantages.tracker_min": integer(1),
    "policy.weight": number(0),
    "policy.term": choice("clipped", "reinforce", "rwr", "sparse_rwr"),
    "policy.rwr_inverse_temperature": number(0),
    "policy.rwr_percentile": number(0, below=1),
    "policy.clip_range": number(above=0),
    "policy.log_prob": choice("gaussian", "squared_error"),
    "policy.reduction": choice("mean", "sum"),
    "policy.transform": choice("linear", "neg_exp", "neg_exp_centered"),
    "policy.beta": number(above=0),
    "policy.old_log_prob": choice("rollout", "recompute", "exact"),
    "policy.kl_weight": number(0),
    "policy.train_on": sequence(integer(0)),
    "policy.train_steps": integer(0),
    "policy.per_sample_steps": switch(),
    "policy.ratio_tolerance": number(0),
    "data_term.weight": number(0),
    "data_term.weighting": choice("velocity", "edm", "eps"),
    "data_term.levels": choice("own", "rollout"),
    "data_term.every_step": switch(),
    "data_term.time": choice("uniform", "logit_normal"),
    "data_term.text_dropout": number(0, below=1),
    "data_term.captions": choice("prompt", "own"),
    "train.epochs": integer(1),
    "train.minibatches": integer(1),
    "train.microbatch": integer(1),
    "train.inner_epochs": integer(1),
    "train.nan_limit": integer(1),
    "optimizer.name": choice("adamw", "muon"),
    "optimizer.lr": number(above=0),
    "optimizer.master": choice("float32", "bfloat16"),
    "optimizer.state_dtype": choice("float32", "bfloat16"),
    "optimizer.warmup": integer(0),
    "optimizer.schedule": choice("constant", "cosine"),
    "optimizer.b1": number(0, below=1),
    "optimizer.b2": number(0, below=1),
    "optimizer.eps": number(above=0),
    "optimizer.weight_decay": number(0),
    "optimizer.grad_clip": number(0),
    "optimizer.fresh": switch(),
    "optimizer.ema_decay": number(0, below=1),
    "evaluate.every": integer(0),
    "evaluate.samples": integer(1),
    "evaluate.steps": integer(1),
    "evaluate.solver": text(empty=False),
    "evaluate.guidance_scale": number(0),
    "evaluate.data_samples": integer(0),
    "evaluate.pictures": integer(0),
    "checkpoint.every": integer(1),
    "checkpoint.keep": integer(1),
    "checkpoint.wait": switch(),
    "checkpoint.resume": choice("latest", "last_good"),
    "sample.per_prompt": integer(1),
    "sample.solver": choice("auto", "euler", "heun", "ddim"),
    "sample.guidance_scale": number(0),
    "sample.steps": integer(1),
    "sample.output": folder(),
    "export.merge_lora": switch(),
    "export.bake_alpha": switch(),
    "export.dtype": choice("float32", "float16", "bfloat16"),
    "mesh.data": mesh_axis(),
    "mesh.fsdp": mesh_axis(),
    "mesh.tensor": mesh_axis(),
    "mesh.context": mesh_axis(),
    **{
        f"sharding.{axis}": sequence(choice("data", "fsdp", "tensor", "context"))
        for axis in ("embed", "mlp", "heads", "vocab", "layers")
    },
    "rollout.layout": choice("train", "replicated", "tensor"),
    "rollout.dtype": choice("float32", "bfloat16"),
    "log.tensorboard": switch(),
    "log.wandb": switch(),
    "log.progress": switch(),
    "log.peak_flops": number(0),
}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns {"section.key": value} of a configuration; reward tables stay whole."""
    flat = {}
    for key in tree:
        path, value = f"{prefix}{key}", tree[key]
        if hasattr(value, "keys") and path not in RULES:
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = value
    return flat


def shared_settings(config: Any) -> dict[str, Any]:
    """The keys that have to be the same in every process of a run."""
    own = ("log.", "rewards.threads", "rewards.timeout")
    flat = flatten(config).items()
    return {key: plain(value) for key, value in flat if not key.startswith(own)}


def plain(value: Any) -> Any:
    """Returns a table as a dict, so that it prints on one line."""
    return value.to_dict() if hasattr(value, "to_dict") else value


def check_keys(config: Any) -> None:
    """Refuses unknown and missing keys, and values that a key does not accept.

    Raises:
      UserError: the first one that is wrong.
    """
    values = flatten(config)
    for path in values:
        if path not in RULES:
            raise UserError(
                f"the configuration has an unknown key: {path}",
                got=f"{path} = {values[path]!r}",
                wanted="the keys of configs/base.py and no others",
                way_out=near(path, tuple(RULES)) + "rename or remove it",
            )
    for path, rule in RULES.items():
        if path not in values:
            raise UserError(
                f"the configuration lacks the key {path}",
                got="nothing",
                wanted=f"{path}: {rule.wanted}",
                way_out="start from get_config() of configs/base.py, which has it",
            )
        if not rule.accepts(values[path]):
            raise UserError(
                f"{path} has a value that can not be used",
                got=repr(plain(values[path])),
                wanted=rule.wanted,
                way_out=near(values[path], rule.names) + f"change {path}",
            )
