"""Models of the hub: what is asked for, and one message for whatever is not there."""

import re
import shlex
import sys
from fnmatch import fnmatch

import huggingface_hub as hub
import numpy as np
import pytest
from safetensors.numpy import save_file

from ddrl_jax.errors import UserError
from ddrl_jax.models.hub import ROOT, resolve, resolve_file

PARTS = ("unet", "vae", "text_encoder")
# The file list of a Stable Diffusion repository, shortened.
FILES = (
    "model_index.json",
    "tokenizer/merges.txt",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "v1-5-pruned.safetensors",
    "v1-5-pruned-emaonly.safetensors",
    "whole_model.safetensors",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "feature_extractor/preprocessor_config.json",
    "handler.py",
)
JSON = ["model_index.json", "tokenizer/merges.txt", "unet/config.json"]
PLAIN = [f for f in FILES[3:5]] + ["text_encoder/model.safetensors"]
FP16 = [f for f in FILES[5:8]] + ["text_encoder/model.fp16.safetensors"]


def refusal(call, *args, **named):
    with pytest.raises(UserError) as caught:
        call(*args, **named)
    return str(caught.value)


def fail(*args, **kwargs):
    raise ConnectionError("no route to host")


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What a download is asked for; it brings an empty folder."""
    found = {}
    bring = lambda repo, **rest: found.update(rest) or str(tmp_path)  # noqa: E731
    monkeypatch.setattr(hub, "snapshot_download", bring)
    return found


def chosen(asked, files=FILES) -> list[str]:
    return list(
        hub.utils.filter_repo_objects(
            files,
            allow_patterns=asked["allow_patterns"],
            ignore_patterns=asked["ignore_patterns"],
        )
    )


def test_a_local_folder_needs_no_hub(tmp_path, monkeypatch):
    assert resolve(str(tmp_path), parts=PARTS) == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert str(resolve("owner/name")) == "owner/name"


@pytest.mark.parametrize("path", ["/no/such/folder", "a/b/c", "./checkpoint", "a b"])
def test_what_can_be_no_repository_is_a_missing_folder(path):
    assert "no such folder" in refusal(resolve, path)


def test_a_single_file_checkpoint_is_explained(tmp_path):
    file = tmp_path / "v1-5-pruned.safetensors"
    save_file({"a": np.ones(2)}, file)
    assert "from_single_file" in refusal(resolve, str(file))
    assert "from_single_file" in refusal(resolve, str(file), key="model.init")


@pytest.mark.parametrize("key", ["rewards.clip", "rewards.clip_h", "rewards.pickscore"])
def test_a_judge_is_no_pipeline_of_diffusers(tmp_path, key):
    file = tmp_path / "model.safetensors"
    save_file({"a": np.ones(2)}, file)
    for path in (str(file), "/no/such/folder"):
        message = refusal(resolve, path, parts=(ROOT,), key=key)
        assert "config.json, model.safetensors, tokenizer.json" in message
        for foreign in ("diffusers", "from_single_file", "StableDiffusion", "unet"):
            assert foreign not in message
    assert f"--config.{key}=FOLDER" in refusal(resolve, str(file), key=key)


@pytest.mark.parametrize(("variant", "weights"), [("", PLAIN), ("fp16", FP16)])
def test_only_one_variant_of_the_weights_is_downloaded(asked, variant, weights):
    refusal(resolve, "owner/name", "main", variant, PARTS)  # an empty folder came
    assert sorted(chosen(asked)) == sorted(JSON + weights)


def test_of_a_clip_only_the_weights_of_transformers_are_downloaded(asked):
    files = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors"]
    others = ["open_clip_model.safetensors", "pytorch_model.bin", "onnx/model.onnx"]
    refusal(resolve, "owner/name", parts=(ROOT,))
    assert chosen(asked, [*files, *others]) == files


def test_where_no_weights_are_wanted_none_are_downloaded(asked):
    resolve("owner/name")
    assert chosen(asked) == JSON


# ---- what can not be downloaded


def test_without_the_network_one_message_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refusal(resolve, "nobody/nothing", "v7")
    for part in ("nobody/nothing", "hf download", "v7", ":smoke", "HF_HUB_OFFLINE"):
        assert part in message


@pytest.mark.parametrize(
    "cause", [ConnectionError("no route to host"), ValueError("bad id"), RuntimeError()]
)
def test_whatever_a_download_raises_is_one_message(monkeypatch, cause):
    def fail(*args, **kwargs):
        raise cause

    monkeypatch.setattr(hub, "snapshot_download", fail)
    monkeypatch.setattr(hub, "hf_hub_download", fail)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for call, name in ((resolve, "owner/name"), (resolve_file, "owner/name:a.pth")):
        message = refusal(call, name)
        assert name in message and type(cause).__name__ in message


def run_hf(message: str, monkeypatch) -> dict:
    """What `hf` asks the hub for when the command of a message is given to it."""
    from huggingface_hub.cli import download, hf

    found = {}
    keep = lambda **asked: found.update(asked) or "/found"  # noqa: E731
    monkeypatch.setattr(download, "snapshot_download", keep)
    monkeypatch.setattr(download, "hf_hub_download", keep)
    command = re.search(r"`(hf download [^`]+)`", message)
    assert command, message
    monkeypatch.setattr(sys, "argv", shlex.split(command[1]))
    try:
        hf.main()
    except SystemExit as end:
        assert not end.code
    return found


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_the_command_of_the_message_downloads_the_same(asked, monkeypatch, variant):
    refusal(resolve, "owner/name", "v7", variant, PARTS)
    ours = dict(asked)
    monkeypatch.setattr(hub, "snapshot_download", fail)
    message = refusal(resolve, "owner/name", "v7", variant, PARTS, "model.init")
    theirs = run_hf(message, monkeypatch)
    assert (theirs["repo_id"], theirs["revision"]) == ("owner/name", "v7")
    assert chosen(theirs) == chosen(ours)
    assert theirs["local_dir"] == "FOLDER"
    assert "--config.model.init=FOLDER" in message


def test_the_command_for_a_file_downloads_it(monkeypatch):
    monkeypatch.setattr(hub, "hf_hub_download", fail)
    place, key = "owner/name:heads/best.pth", "rewards.aesthetic_head"
    message = refusal(resolve_file, place, key)
    theirs = run_hf(message, monkeypatch)
    assert (theirs["repo_id"], theirs["filename"]) == ("owner/name", "heads/best.pth")
    assert f"--config.{key}={theirs['local_dir']}/heads/best.pth" in message


def test_a_file_here_wins_over_the_hub(tmp_path, monkeypatch):
    got = {}
    bring = lambda repo, file: got.update(repo=repo, file=file) or "/found"  # noqa: E731
    monkeypatch.setattr(hub, "hf_hub_download", bring)
    monkeypatch.chdir(tmp_path)
    assert str(resolve_file("owner/name:a.pth")) == "/found"
    assert got == {"repo": "owner/name", "file": "a.pth"}
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name:a.pth").write_bytes(b"")
    assert str(resolve_file("owner/name:a.pth")) == "owner/name:a.pth"
    for path in ("/no/such.pth", "no.pth", "../a:b.pth"):  # for the reader to refuse
        assert str(resolve_file(path)) == path


# ---- repositories without the weights that are read


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A hub of one repository with these files; what is not filtered out comes."""

    def serve(*files):
        def download(repo, **asked):
            wanted = asked["allow_patterns"]
            for file in files:
                if any(fnmatch(file, pattern) for pattern in wanted):
                    (tmp_path / file).parent.mkdir(exist_ok=True)
                    (tmp_path / file).write_bytes(b"")
            return str(tmp_path)

        listed = lambda self, repo, revision: list(files)  # noqa: E731
        monkeypatch.setattr(hub, "snapshot_download", download)
        monkeypatch.setattr(hub.HfApi, "list_repo_files", listed)

    return serve


BINARY = ("unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin")
TEXT = "text_encoder/model.safetensors"


def test_pickles_are_named_and_are_to_be_converted(repository):
    repository(*BINARY, TEXT, "safety_checker/pytorch_model.bin")
    message = refusal(resolve, "owner/name", parts=PARTS, key="model.init")
    assert "of unet, vae" in message and ", ".join(BINARY) in message
    assert "text_encoder/" not in message and "safety_checker" not in message
    assert "safe_serialization=True" in message
    assert "--config.model.init=FOLDER" in message


def test_another_variant_of_every_part_is_named(repository):
    half = [f"{part}/diffusion_pytorch_model.fp16.safetensors" for part in PARTS[:2]]
    odd = "unet/diffusion_pytorch_model.non_ema.safetensors"
    repository(*half, odd, TEXT)
    message = refusal(resolve, "owner/name", parts=PARTS, key="model.init")
    assert all(name in message for name in (*half, odd))
    assert "choose the variant 'fp16' (config.model.variant)" in message
    repository(*half, TEXT)
    assert "of the variant 'bf16'" in refusal(
        resolve, "owner/name", variant="bf16", parts=PARTS[:2]
    )


def test_the_plain_weights_are_a_variant_too(repository):
    repository("model-00001-of-00002.safetensors", "config.json")
    message = refusal(resolve, "owner/name", variant="fp16", parts=(ROOT,))
    assert "choose the variant ''" in message


def test_a_judge_has_no_key_for_a_variant(repository):
    repository("model.fp16.safetensors", "pytorch_model.bin", "config.json")
    message = refusal(resolve, "owner/name", parts=(ROOT,), key="rewards.clip")
    assert "model.fp16.safetensors, pytorch_model.bin" in message
    assert "variant" not in message and "--config.rewards.clip=FOLDER" in message
    assert "wanted:  model.safetensors\n" in message


def test_what_the_cache_has_of_a_model_is_not_all_there_is(repository, monkeypatch):
    """Without a network only the JSON of an earlier plan comes."""
    repository("config.json")
    monkeypatch.setattr(hub.HfApi, "list_repo_files", fail)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refusal(resolve, "owner/name", parts=(ROOT,))
    assert "it is not in the cache" in message and "hf download" in message
