"""Bad input of Stable Diffusion ends in one message before anything is trained.

The whole program in this process, on the tiny shipped model: its folder, the hub, data
and endpoint are what is bad.
"""

import json
import shutil
import socket
from pathlib import Path

import pytest
from one_message import check_message
from PIL import Image

from ddrl_jax import train
from ddrl_jax.main import run
from ddrl_jax.models.stable_diffusion import TINY

ROOT = Path(__file__).resolve().parents[1]
ASKED = ("rewards.weights={'vlm_alignment': 1.0}", "rewards.vlm.model=judge")
ASKED += ("rewards.vlm.retries=0",)


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """refused(word, spec, *keys): the program says `word`, and trains nothing."""
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("training began"))
    monkeypatch.setenv("no_proxy", "*")

    def check(word: str, spec: str, *keys: str) -> None:
        flags = [f"--config.{key}" for key in keys]
        config = f"--config={ROOT}/configs/{spec}"
        code = run(["main", config, f"--workdir={tmp_path}/run", *flags])
        check_message(code, capsys.readouterr().err, word)

    return check


@pytest.fixture
def model(tmp_path):
    """A copy of the tiny shipped pipeline, to be damaged."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def test_a_model_of_the_hub_without_a_network(refused):
    keys = ("model.init=nobody/nothing",)
    refused("hf download nobody/nothing", "aesthetic.py:smoke", *keys)


def test_a_model_folder_without_weights(refused, model):
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    refused("unet", "aesthetic.py:smoke", f"model.init={model}")


@pytest.mark.parametrize(
    ("key", "value"), [("prediction_type", "sample"), ("beta_schedule", "sigmoid")]
)
def test_a_scheduler_that_is_not_known(key, value, refused, model):
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refused(repr(value), "compressibility.py:smoke", f"model.init={model}")


@pytest.mark.parametrize(
    ("file", "content", "word"),
    [
        ("1.txt", None, "without a caption: 1.png"),
        ("1.png", b"\x89PNG\r\n\x1a\n", "1.png"),
    ],
)
def test_data_that_are_bad(file, content, word, refused, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, text in enumerate(("a cat", "a dog")):
        Image.new("RGB", (40, 40), (100 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(text)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    keys = (f"data.path={folder}", f"data.cache={tmp_path}/cache")
    refused(word, "aesthetic.py:ddrl-smoke", *keys)


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        (("data.source=tfds", "data.path="), "data.path is empty"),
        (("data.source=tfds", "data.path=no_such_set"), "no_such_set"),
        (("data.source=samples", "data.path=."), "can not be opened"),
    ],
)
def test_a_data_set_that_is_not_there_is_told_before_a_model_is_built(
    keys, word, refused, monkeypatch, tmp_path
):
    monkeypatch.setattr(train, "build", lambda *_: pytest.fail("a model was built"))
    monkeypatch.chdir(tmp_path)
    refused(word, "aesthetic.py:ddrl-smoke", *keys)


def test_an_endpoint_that_does_not_answer(refused):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    keys = (*ASKED, f"rewards.vlm.base_url={url}")
    refused("can not be reached", "prompt_alignment.py:smoke", *keys)


@pytest.mark.parametrize(
    "url", ["http://a..b:80/v1", "http://[::1/v1", "http://h/\xfc"]
)
def test_an_endpoint_that_is_no_address(url, refused):
    keys = (*ASKED, f"rewards.vlm.base_url={url}")
    refused("can not be used", "prompt_alignment.py:smoke", *keys)
