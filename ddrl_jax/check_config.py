"""Everything that can be known to be wrong before a weight is loaded.

`config_rules` says what each key accepts, `check_objective` which terms go together and
`check_network` which sizes; here are batches, devices and outputs, and files and data,
which a plan does without. The first problem found is reported.
"""

import importlib.util
import math
from pathlib import Path
from typing import Any

from ddrl_jax.check_network import check_context, check_network
from ddrl_jax.check_objective import check_objective
from ddrl_jax.check_optimizer import check_optimizer
from ddrl_jax.config_rules import check_keys, near, require
from ddrl_jax.data.picture_tfds import check_tfds
from ddrl_jax.data.prompts import prompt_list
from ddrl_jax.diffusion.kernels import KERNELS
from ddrl_jax.diffusion.schedules import TRAIN_STEPS
from ddrl_jax.diffusion.solvers import METHODS
from ddrl_jax.file_tree import spelt_out
from ddrl_jax.models.attention import IMPLEMENTATIONS
from ddrl_jax.models.pipelines import PIPELINES, data_sources
from ddrl_jax.rewards.registry import REWARDS


def check_config(config: Any, device_count: int, trains: bool = True) -> None:
    """Refuses a configuration that can not run, on the host, without computing.

    Args:
      config: what get_config() of a configuration file returned.
      device_count: devices of all processes together, which the mesh has to cover.
      trains: False for a mode to which weights that are not trained are as good.

    Raises:
      UserError: the first key, combination of keys or file that is wrong.
    """
    check_shapes(config, device_count, trains)
    _check_has_data(config)
    _check_files(config)
    _check_packages(config)


def check_shapes(config: Any, device_count: int, trains: bool = True) -> None:
    """All of `check_config` for which no file, data or logger has to be there.

    A plan asks it too: data that do not exist yet may be planned with.

    Args:
      config: what get_config() of a configuration file returned.
      device_count: devices that the mesh has to cover.
      trains: False for a mode to which weights that are not trained are as good.

    Raises:
      UserError: the first key or combination of keys that is wrong.
    """
    check_keys(config)
    _check_names(config)
    _check_solver(config)
    check_network(config)
    _check_data(config)
    _check_prompts(config)
    check_objective(config, trains)
    _check_batches(config)
    _check_mesh(config, device_count)
    check_optimizer(config)
    _check_pictures(config)


def _check_names(config: Any) -> None:
    """The names of models, samplers, solvers and rewards are those of the code."""
    used = [
        ("model.name", config.model.name, tuple(PIPELINES)),
        ("sampler.kernel", config.sampler.kernel, tuple(KERNELS)),
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
    flow = config.model.name != "stable_diffusion"
    for key, rest in (("evaluate", '"rollout"'), ("sample", '"auto"')):
        require(
            flow or config[key].solver not in METHODS,
            "the solver belongs to flow networks",
            got=f'{key}.solver "{config[key].solver}"',
            wanted=f'"ddim" or {rest} for Stable Diffusion',
            way_out=f"change {key}.solver",
        )
        solver, steps = config[key].solver, config[key].steps
        ddim = solver == "ddim" or (solver == "auto" and not flow)
        require(
            not ddim or steps < TRAIN_STEPS,
            "DDIM has fewer steps than its schedule has timesteps",
            got=f'{key}.steps {steps} with {key}.solver "{solver}"',
            wanted=f"at most {TRAIN_STEPS - 1}",
            way_out=f"lower {key}.steps",
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
    fitting = data_sources(config.model.name)
    require(
        data.source in (*fitting, "none"),
        f"{config.model.name} can not be trained on this data",
        got=f'data.source "{data.source}"',
        wanted="one of " + ", ".join(fitting) + ', or "none" without a data term',
        way_out="change data.source",
    )
    _check_heldout(config)
    require(
        data.source != "none" or config.prompts.source != "data",
        "there are no captions to take prompts from",
        got='data.source "none" with prompts.source "data"',
        wanted='a data source, or prompts.source "file" or "list"',
        way_out='set prompts.source to "file" and prompts.path',
    )


def _check_heldout(config: Any) -> None:
    require(
        config.data.heldout == 0 or config.data_term.captions == "own",
        "no record is held out where the data are those of the prompts",
        got=f'data.heldout {config.data.heldout} with data_term.captions "prompt"',
        wanted='data_term.captions "own", or data.heldout 0',
        way_out="change one of them",
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


def _check_has_data(config: Any) -> None:
    fitting = " or ".join(f'"{name}"' for name in data_sources(config.model.name))
    weight = config.data_term.weight
    require(
        weight == 0 or config.data.source != "none",
        "the data term has no data",
        got=f'data_term.weight {weight} with data.source "none"',
        wanted=f"data.source {fitting}" if fitting else "data_term.weight 0",
        way_out="set data.source, or data_term.weight to 0",
    )


def _check_files(config: Any) -> None:
    data, prompts = config.data, config.prompts
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
    if config.model.name == "stable_diffusion" and data.source != "none":
        spelt_out(data.cache, "--config.data.cache")  # before a model is loaded
        if data.source == "samples":
            check_tfds(data.path)
        elif data.source == "tfds":
            features = (data.image_feature, data.caption_feature)
            check_tfds(data.path, data.split, *features, data.tfds_dir)
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
    check_context(config.model, mesh["context"])
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


def _check_pictures(config: Any) -> None:
    evaluate = config.evaluate
    require(
        evaluate.pictures <= evaluate.samples,
        "evaluate.pictures is more than there are samples to show",
        got=f"{evaluate.pictures} of evaluate.samples {evaluate.samples}",
        wanted="pictures <= samples",
        way_out="lower evaluate.pictures",
    )


def _check_packages(config: Any) -> None:
    for key, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        require(
            not config.log[key] or importlib.util.find_spec(package) is not None,
            f"log.{key} needs a package that is not installed",
            got=f"no module named {package}",
            wanted=package,
            way_out=f"pip install {package}, or set log.{key} to False",
        )
