"""Files, batches, devices and outputs, each by a direct call; and the experiments."""

import pathlib
import re

import pytest
from edited_config import configured, refused, told_by_plan

from configs.smoke import shrink
from ddrl_jax.check_config import check_config
from ddrl_jax.config_file import load_config
from ddrl_jax.errors import UserError

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
PARTS = {"base", "smoke", "ddpo_sd"}  # of experiments
EXPERIMENTS = sorted({p.stem for p in CONFIGS.glob("*.py")} - PARTS)

# edits, words of the message, and an edit that puts it right
COMBINATIONS = {
    # network
    "heads": ({"model.width": 100}, "model.heads", {"model.heads": 5}),
    "patch": ({"model.patch": 6}, "model.image_size", {"model.image_size": 36}),
    "odd width": ({"model.width": 33, "model.heads": 3}, "odd", {"model.width": 36}),
    "odd patch": ({"model.patch": 1}, "odd", {"model.patch": 2}),
    "lora": ({"lora.rank": 193}, "lora.rank", {"lora.rank": 192}),
    "alpha": ({"lora.alpha": 8.0}, "lora.alpha", {"lora.rank": 4}),
    "init": ({"model.init": "asset"}, '"assets"', {"model.init": "assets"}),
    "weights": ({"model.init": "no/such.npz"}, ".npz", {"model.init": "random"}),
    # data and prompts
    "scales": ({"data.min_scale": 1.0, "data.max_scale": 0.5}, "max_scale",
               {"data.max_scale": 1.0}),
    "samples": ({"data.source": "samples"}, "data.path", {"data.source": "emoji"}),
    "samples, no folder": ({"data.source": "samples", "data.path": "no/such"},
                           "no/such", {"data.path": "."}),
    "cache of nobody": (
        {"model.name": "stable_diffusion", "sampler.kernel": "ddim",
         "evaluate.solver": "ddim", "rewards.heldout": (), "data.source": "folder",
         "data.path": ".", "data.cache": "~no-such-user/x"},
        "--config.data.cache", {"data.cache": "/tmp/x"}),
    "no captions": ({"data.source": "none"}, "captions",
                    {"prompts.source": "list", "prompts.list": ("a dog",)}),
    "no list": ({"prompts.source": "list"}, "prompts.list",
                {"prompts.list": ("a dog",)}),
    "no file": ({"prompts.source": "file"}, "prompts.path", {"prompts.source": "data"}),
    "limit": ({"prompts.source": "list", "prompts.list": ("a", "b"),
               "prompts.limit": 3}, "limit", {"prompts.limit": 2}),
    # batches, optimizer, outputs
    "minibatches": ({"train.minibatches": 3}, "train.minibatches",
                    {"prompts.per_epoch": 6}),
    "microbatch": ({"train.microbatch": 24}, "to 8", {"train.microbatch": 8}),
    "cosine": ({"optimizer.schedule": "cosine", "optimizer.warmup": 60}, "warm-up",
               {"optimizer.warmup": 59}),
    "solver of samples": (
        {"model.name": "stable_diffusion", "data.source": "none", "rewards.heldout": (),
         "prompts.source": "list", "prompts.list": ("a dog",),
         "evaluate.solver": "ddim", "sampler.kernel": "ddim",
         "sample.solver": "heun"},
        "sample.solver", {"sample.solver": "auto"}),
    "steps of DDIM": (
        {"evaluate.solver": "ddim", "evaluate.steps": 1000},
        "evaluate.steps", {"evaluate.steps": 999}),
    "steps of samples": ({"sample.solver": "ddim", "sample.steps": 1000},
                         "sample.steps", {"sample.steps": 999}),
    "fresh cosine": ({"optimizer.schedule": "cosine", "optimizer.fresh": True},
                     "anew each epoch", {"optimizer.schedule": "constant"}),
    "muon of a LoRA": ({"optimizer.name": "muon", "lora.rank": 2}, "lora.rank 2",
                       {"lora.rank": 0}),
    "muon in bfloat16": (
        {"optimizer.name": "muon", "optimizer.state_dtype": "bfloat16"},
        'optimizer.state_dtype "bfloat16"', {"optimizer.state_dtype": "float32"}),
    "muon of a UNet": (
        {"model.name": "stable_diffusion", "data.source": "none", "rewards.heldout": (),
         "prompts.source": "list", "prompts.list": ("a dog",), "sampler.kernel": "ddim",
         "evaluate.solver": "ddim", "optimizer.name": "muon"},
        "stable_diffusion", {"optimizer.name": "adamw"}),
    "held-out records": ({"data.heldout": 3}, "data_term.captions",
                         {"data_term.captions": "own"}),
    "pictures": ({"evaluate.pictures": 65}, "evaluate.pictures",
                 {"evaluate.samples": 65}),
}  # fmt: skip


# what reads files, for which a plan does not ask
FILES = {"samples", "samples, no folder", "cache of nobody", "limit"}


@pytest.mark.parametrize("case", COMBINATIONS)
def test_keys_that_do_not_go_together(case):
    edits, word, remedy = COMBINATIONS[case]
    message = str(refused(edits))
    assert word in message
    check_config(configured(edits | remedy), 1)
    assert told_by_plan(edits) == ("" if case in FILES else message)


def test_a_logger_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install tensorboardX" in refused({}).way_out
    assert told_by_plan({}) == ""
    error = refused({"log.tensorboard": False, "log.wandb": True})
    assert "log.wandb" in error.what
    check_config(configured({"log.tensorboard": False}), 1)


@pytest.mark.parametrize(
    ("path", "misspelt", "name"),
    [
        ("sampler.kernel", "flow_gpro", "flow_grpo"),
        ("sampler.kernel", "DDIM", ""),
        ("evaluate.solver", "heum", "heun"),
        ("model.attention", "xlaa", "xla"),
        ("rewards.weights", {"compresibility": 1.0}, "compressibility"),
        ("rewards.weights", {"compressibility": 1.0, "beauty": 1.0}, ""),
        ("rewards.heldout", ("retrival",), "retrieval"),
        ("rewards.heldout", ("retrieval", "Retrieval"), "retrieval"),
    ],
)
def test_an_unknown_name_brings_the_near_one(path, misspelt, name):
    error = refused({path: misspelt})
    assert f"{path} has an unknown name" == error.what
    assert (f'did you mean "{name}"?' in error.way_out) == bool(name)
    assert name in error.wanted


# ---- files


def test_prompt_files(tmp_path):
    def with_file(content: bytes, limit: int = 0) -> dict:
        path = tmp_path / "prompts.txt"
        path.write_bytes(content)
        return {
            "prompts.source": "file",
            "prompts.path": str(path),
            "prompts.limit": limit,
        }

    check_config(configured(with_file("a café\n\na dog".encode(), limit=2)), 1)
    assert "limit" in refused(with_file(b"a dog\n\n", limit=2)).what
    for content in (b"", b" \n\n", b"a caf\xe9"):
        assert "prompts.txt" in refused(with_file(content)).what
    missing = with_file(b"") | {"prompts.path": str(tmp_path / "missing.txt")}
    assert "missing.txt" in refused(missing).what
    folder = with_file(b"") | {"prompts.path": str(tmp_path)}
    assert str(tmp_path) in refused(folder).what


def test_weights_that_are_there(tmp_path):
    (tmp_path / "mine.npz").write_bytes(b"")
    (tmp_path / "mine.ckpt").write_bytes(b"")
    check_config(configured({"model.init": str(tmp_path / "mine.npz")}), 1)
    refused({"model.init": str(tmp_path / "mine.ckpt")})
    refused({"model.init": str(tmp_path)})


# ---- devices

MESHES = {
    # mesh (data, fsdp, tensor, context), devices, whether minibatches of 32 fit on it
    "one": ((-1, 1, 1, 1), 1, True),
    "eight": ((-1, 1, 1, 1), 8, True),
    "mixed": ((2, -1, 2, 1), 8, True),
    "exact": ((4, 2, 1, 1), 8, True),
    "two free": ((-1, -1, 1, 1), 8, False),
    "too few": ((4, 1, 1, 1), 8, False),
    "too many": ((16, 1, 1, 1), 8, False),
    "not whole": ((-1, 3, 1, 1), 8, False),
    "fsdp above devices": ((-1, 16, 1, 1), 8, False),
    "a sample each": ((-1, 1, 1, 1), 32, True),
    "samples over 64": ((-1, 1, 1, 1), 64, False),
    "samples over 3": ((-1, 1, 1, 1), 3, False),
    "tensor takes no samples": ((1, 1, 32, 1), 32, True),
}


@pytest.mark.parametrize("case", MESHES)
def test_the_mesh_covers_the_devices_and_splits_the_samples(case):
    sizes, devices, fits = MESHES[case]
    axes = ("data", "fsdp", "tensor", "context")
    edits = {f"mesh.{a}": n for a, n in zip(axes, sizes, strict=True)}
    if fits:
        check_config(configured(edits), devices)
        return
    error = refused(edits, devices)
    assert "mesh" in str(error) and "way out" in str(error)


def test_a_context_axis_divides_the_tokens_of_a_video():
    config = load_config(f"{CONFIGS / 'video_14b'}.py:smoke")
    config.mesh.update(data=1, context=-1)
    check_config(config, 8)
    config.model.video.frames = 3  # of 8 x 8 latents in patches of 2 x 2: 48 tokens
    check_config(config, 16)
    with pytest.raises(UserError) as caught:
        check_config(config, 32)
    assert "48 tokens, mesh.context 32" in str(caught.value)
    assert "set mesh.context to 16" in str(caught.value)


def test_a_lora_of_the_video_network_fits_its_matrices():
    config = load_config(f"{CONFIGS / 'video_14b'}.py:smoke")
    config.lora.rank = config.model.width
    check_config(config, 1)
    config.lora.rank += 1
    with pytest.raises(UserError, match="larger than the matrices it factors"):
        check_config(config, 1)


# ---- the experiments

ROWS = {
    # kernel, advantages, term, log-prob, KL, data term, guidance: design's table
    "quickstart": ("flow_grpo", "group", "clipped", "gaussian", False, True, False),
    "ddpo_sf": ("ddim", "tracker", "reinforce", "gaussian", False, False, True),
    "ddpo_is": ("ddim", "tracker", "clipped", "gaussian", False, False, True),
    "flow_grpo": ("flow_grpo", "group", "clipped", "gaussian", True, False, False),
    "ddrl_paper": ("flow_grpo", "group", "clipped", "gaussian", False, True, False),
    "ddrl_cosmos": ("edm", "group", "clipped", "squared_error", False, True, False),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("variant", ["", "smoke"])
def test_an_experiment_passes_on_one_device_and_on_eight(
    name, variant, tmp_path, monkeypatch
):
    config = load_config(f"{CONFIGS / name}.py:{variant}")
    if config.data.path:  # a data set that another command writes
        config.data.path = str(tmp_path)
        monkeypatch.setattr("ddrl_jax.check_config.check_tfds", lambda path: None)
    for devices in (1, 8):
        check_config(config, devices)
    narrow = config.model.width == 32 or config.model.init == "assets"
    small = narrow and config.train.epochs == 2
    assert small == (variant == "smoke")


@pytest.mark.parametrize(
    ("window", "steps"),
    [((0, 10), {}), ((0, 1), {"train_steps": 1}), ((5, 9), {}), ((8, 10), {}),
     ((0, 4), {"train_on": (0, 2)}), ((2, 6), {"train_on": (2, 5)}),
     ((1, 2), {"train_on": (1,)}), ((3, 4), {"train_on": (3,)})],
)  # fmt: skip
@pytest.mark.parametrize("last_step", ["deterministic", "stochastic"])
def test_noise_in_a_window_stays_some_where_an_experiment_is_made_small(
    window, steps, last_step
):
    config = configured({"sampler.window": window, "sampler.last_step": last_step})
    config.policy.update(train_steps=min(3, window[1] - window[0] - 1) or 1)
    config.policy.update(steps)
    check_config(config, 1)
    check_config(shrink(config, "smoke"), 1)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_header_of_an_experiment_gives_its_command(name):
    text = (CONFIGS / f"{name}.py").read_text()
    command = rf"python -m ddrl_jax\.main (--mode=plan )?--config=configs/{name}\.py"
    assert re.search(command, text)
    assert load_config(f"{CONFIGS / name}.py").name == name


@pytest.mark.parametrize("name", ROWS)
def test_an_experiment_is_the_row_it_says(name):
    c = load_config(f"{CONFIGS / name}.py")
    assert ROWS[name] == (
        c.sampler.kernel,
        c.advantages.kind,
        c.policy.term,
        c.policy.log_prob,
        c.policy.kl_weight > 0,
        c.data_term.weight > 0,
        c.sampler.guidance_scale > 1,
    )


def test_pre_training_has_no_policy_term():
    c = load_config(f"{CONFIGS / 'emoji_pretrain'}.py")
    assert (c.policy.weight, c.data_term.weight, c.model.init) == (0, 1, "random")
