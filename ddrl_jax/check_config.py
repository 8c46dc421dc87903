"""Everything that can be known to be wrong before a weight is loaded.

`config_rules` says what each key accepts and `check_objective` which terms go together;
here are files, batches, devices and outputs. The first problem found is reported.
"""

import importlib.util
import math
from pathlib import Path
from typing import Any

from ddrl_jax.check_objective import SOURCES, check_objective
from ddrl_jax.config_rules import check_keys, near, require
from ddrl_jax.data.prompts import prompt_list
from ddrl_jax.diffusion.kernels import KERNELS
from ddrl_jax.diffusion.solvers import METHODS
from ddrl_jax.models.attention import IMPLEMENTATIONS
from ddrl_jax.models.remat import check_offload
from ddrl_jax.rewards.registry import REWARDS


def check_config(config: Any, device_count: int) -> None:
    """Refuses a configuration that can not run, on the host, without computing.

    Args:
      config: what get_config() of a configuration file returned.
      device_count: devices of all processes together, which the mesh has to cover.

    Raises:
      UserError: the first key, combination of keys or file that is wrong.
    """
    check_keys(config)
    _check_names(config)
    _check_solver(config)
    _check_network(config)
    _check_data(config)
    _check_prompts(config)
    check_objective(config)
    _check_batches(config)
    _check_mesh(config, device_count)
    _check_optimizer(config)
    _check_outputs(config)


def check_shapes(config: Any, device_count: int) -> None:
    """The part of `check_config` that a plan needs: no file has to be there.

    Args:
      config: what get_config() of a configuration file returned.
      device_count: devices that the mesh has to cover.

    Raises:
      UserError: the first key or combination of keys that is wrong.
    """
    check_keys(config)
    _check_names(config)
    _check_network(config)
    _check_batches(config)
    _check_mesh(config, device_count)
    _check_optimizer(config)


def _check_names(config: Any) -> None:
    """The names of samplers, solvers, attention and rewards are those of the code."""
    used = [
        ("sampler.kernel", config.sampler.kernel, KERNELS),
        ("evaluate.solver", config.evaluate.solver, (*METHODS, "ddim", "rollout")),
        ("model.attention", config.model.attention, ("auto", *IMPLEMENTATIONS)),
        *(("rewards.weights", name, tuple(REWARDS)) for name in config.rewards.weights),
        *(("rewards.heldout", name, tuple(REWARDS)) for name in config.rewards.heldout),
    ]
    for path, name, names in used:
        require(
            name in names,
            f"{path} has an unknown name",
            got=repr(name),
            wanted="one of " + ", ".join(names),
            way_out=near(name, names) + f"change {path}",
        )


def _check_solver(config: Any) -> None:
    require(
        config.model.name != "stable_diffusion"
        or config.evaluate.solver not in METHODS,
        "the solver belongs to flow networks",
        got=f'evaluate.solver "{config.evaluate.solver}"',
        wanted='"ddim" or "rollout" for Stable Diffusion',
        way_out="change evaluate.solver",
    )


def _check_network(config: Any) -> None:
    model, lora = config.model, config.lora
    require(
        lora.rank > 0 or lora.alpha == 0,
        "lora.alpha scales nothing without LoRA",
        got=f"alpha {lora.alpha}, rank 0",
        wanted="a rank >= 1 with an alpha, or alpha 0",
        way_out="set lora.rank, or lora.alpha to 0",
    )
    if model.remat == "offload":
        check_offload()
    if model.name == "emoji":
        _check_emoji(model, lora)
    elif model.name == "video_dit":
        check_video(model)
    else:
        require(
            model.init != "random",
            "Stable Diffusion has no random start here",
            got='model.init "random"',
            wanted='a diffusers folder, "owner/name" on the hub, or "assets"',
            way_out="set config.model.init; :smoke runs on the tiny shipped one",
        )


def _check_emoji(model: Any, lora: Any) -> None:
    require(
        model.image_size > 0,
        "model.image_size is 0",
        got=0,
        wanted="the side of a picture in pixels",
        way_out="set model.image_size, 32 for the shipped weights",
    )
    for whole, part in (("width", "heads"), ("image_size", "patch")):
        require(
            model[whole] % model[part] == 0,
            f"model.{whole} is not divisible by model.{part}",
            got=f"{whole} {model[whole]}, {part} {model[part]}",
            wanted=f"a multiple of {model[part]}",
            way_out=f"change model.{whole} or model.{part}",
        )
    for key in ("width", "patch"):
        require(
            model[key] % 2 == 0,
            f"model.{key} is odd",
            got=model[key],
            wanted="an even number: sines and cosines, and windows of two patches",
            way_out=f"set model.{key} to {model[key] + 1}",
        )
    require(
        lora.rank <= model.width,
        "lora.rank is larger than the matrices it factors",
        got=f"rank {lora.rank}, model.width {model.width}",
        wanted="rank <= width",
        way_out="4 to 32 is usual; 0 trains all weights",
    )
    if model.init not in ("assets", "random"):
        path = Path(model.init)
        require(
            path.suffix == ".npz" and path.is_file(),
            "the starting weights do not exist",
            got=f"model.init {model.init!r}",
            wanted='"assets", "random" or the path of an .npz file',
            way_out=near(model.init, ("assets", "random"))
            + "--mode=export writes such a file",
        )


def check_video(model: Any) -> None:
    """Heads share the width, and patches cut the latents without a rest.

    Raises:
      UserError: names the two numbers that do not fit.
    """
    video = model.video
    parts = (
        ("model.width", model.width, "model.heads times 2", 2 * model.heads),
        ("model.video.height", video.height, "model.patch", model.patch),
        ("model.video.width", video.width, "model.patch", model.patch),
    )
    for whole, size, part, divisor in parts:
        require(
            size % divisor == 0,
            f"{whole} is not divisible by {part}",
            got=f"{size} and {divisor}",
            wanted=f"a multiple of {divisor}",
            way_out=f"change {whole}",
        )


def _check_data(config: Any) -> None:
    data = config.data
    require(
        data.min_scale <= data.max_scale,
        "data.min_scale is above data.max_scale",
        got=f"{data.min_scale} and {data.max_scale}",
        wanted="min_scale <= max_scale",
        way_out="swap them",
    )
    fitting = SOURCES.get(config.model.name, ())
    require(
        data.source in (*fitting, "none"),
        f"{config.model.name} can not be trained on this data",
        got=f'data.source "{data.source}"',
        wanted="one of " + ", ".join(fitting) + ', or "none" without a data term',
        way_out="change data.source",
    )
    if data.source in ("samples", "folder"):
        require(
            bool(data.path) and Path(data.path).is_dir(),
            f'data.path is no folder, which data.source "{data.source}" needs',
            got=repr(data.path),
            wanted="the folder of a data set",
            way_out="--mode=sample writes samples and prints the path"
            if data.source == "samples"
            else "set config.data.path to a folder of pictures with captions",
        )
    require(
        data.source != "none" or config.prompts.source != "data",
        "there are no captions to take prompts from",
        got='data.source "none" with prompts.source "data"',
        wanted='a data source, or prompts.source "file" or "list"',
        way_out='set prompts.source to "file" and prompts.path',
    )


def _check_prompts(config: Any) -> None:
    prompts = config.prompts
    files = {
        "file": "a UTF-8 text file, one prompt a line",
        "questions": "a file of JSON lines with prompts and questions",
        "tfds": "a folder or the name of a prepared TFDS data set",
    }
    require(
        prompts.source not in files or bool(prompts.path),
        f'prompts.path is empty, which prompts.source "{prompts.source}" needs',
        got="''",
        wanted=files.get(prompts.source, ""),
        way_out="set prompts.path; it is relative to where you started",
    )
    require(
        prompts.source != "list" or len(prompts.list) > 0,
        'prompts.list is empty, which prompts.source "list" needs',
        got="()",
        wanted="at least one prompt",
        way_out="--config.prompts.list=\"('a red apple', 'a dog')\"",
    )
    if prompts.source != "data":
        prompt_list(prompts, (), config.seed)  # reads the file; checks its length


def _check_batches(config: Any) -> None:
    prompts, train = config.prompts, config.train
    samples = prompts.per_epoch * prompts.group_size
    require(
        samples % train.minibatches == 0,
        "the samples of an epoch do not split into equal minibatches",
        got=f"prompts.per_epoch {prompts.per_epoch} x prompts.group_size "
        f"{prompts.group_size} = {samples} samples, train.minibatches "
        f"{train.minibatches}",
        wanted=f"samples divisible by {train.minibatches}",
        way_out="change train.minibatches, prompts.per_epoch or prompts.group_size",
    )


def _check_mesh(config: Any, device_count: int) -> None:
    mesh = dict(config.mesh)
    got = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
    free = [axis for axis, size in mesh.items() if size == -1]
    require(
        len(free) <= 1,
        "more than one axis of the mesh is to take all devices that are left",
        got=got,
        wanted="-1 at most once",
        way_out=f"give a size to mesh.{free[-1] if free else 'data'}",
    )
    fixed = math.prod(size for size in mesh.values() if size != -1)
    fits = device_count % fixed == 0 if free else device_count == fixed
    require(
        fits,
        "the mesh does not cover the devices",
        got=f"{got} on {device_count} device(s)",
        wanted=f"sizes whose product is {device_count}"
        + (" with a whole number in place of -1" if free else ""),
        way_out="set mesh.data to -1 and the other axes to 1",
    )
    if free:
        mesh[free[0]] = device_count // fixed
    _check_chunks(config, mesh["data"] * mesh["fsdp"])


def _check_chunks(config: Any, shares: int) -> None:
    """Each share of the batch (mesh data x fsdp) gets equal microbatches."""
    prompts, train = config.prompts, config.train
    samples = prompts.per_epoch * prompts.group_size
    minibatch = samples // train.minibatches
    require(
        minibatch % shares == 0,
        "a minibatch does not split evenly over the devices",
        got=f"{samples} samples / train.minibatches {train.minibatches} = {minibatch} "
        f"a minibatch, {shares} shares of the batch (mesh data x fsdp)",
        wanted=f"a minibatch divisible by {shares}",
        way_out="change train.minibatches or prompts.per_epoch, or use less of "
        "mesh.data and mesh.fsdp",
    )
    share = minibatch // shares
    require(
        share % min(train.microbatch, share) == 0,
        "a minibatch does not split into equal microbatches",
        got=f"{samples} samples / train.minibatches {train.minibatches} / {shares} "
        f"share(s) of the batch = {share}, train.microbatch {train.microbatch}",
        wanted=f"train.microbatch that divides {share}, or is larger",
        way_out=f"set train.microbatch to {math.gcd(share, train.microbatch)}",
    )


def _check_optimizer(config: Any) -> None:
    optimizer, train = config.optimizer, config.train
    updates = train.epochs * train.inner_epochs * train.minibatches
    require(
        optimizer.schedule != "cosine" or optimizer.warmup < updates,
        "the warm-up is not over before the cosine ends",
        got=f"optimizer.warmup {optimizer.warmup} of {updates} updates",
        wanted=f"fewer than {updates} (epochs x inner_epochs x minibatches)",
        way_out="lower optimizer.warmup or raise train.epochs",
    )


def _check_outputs(config: Any) -> None:
    evaluate = config.evaluate
    require(
        evaluate.pictures <= evaluate.samples,
        "evaluate.pictures is more than there are samples to show",
        got=f"{evaluate.pictures} of evaluate.samples {evaluate.samples}",
        wanted="pictures <= samples",
        way_out="lower evaluate.pictures",
    )
    for key, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        require(
            not config.log[key] or importlib.util.find_spec(package) is not None,
            f"log.{key} needs a package that is not installed",
            got=f"no module named {package}",
            wanted=package,
            way_out=f"pip install {package}, or set log.{key} to False",
        )
