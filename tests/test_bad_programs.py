"""Bad input seen by a real process: exit status, streams, and the real pipeline.

The last ones run in this process, to see that no weight was read.
"""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from one_message import check_message

from ddrl_jax.checkpoint import Checkpoints
from ddrl_jax.config_file import load_config
from ddrl_jax.main import run
from ddrl_jax.models import emoji
from ddrl_jax.workdir import open_workdir

ROOT = Path(__file__).resolve().parents[1]
SMOKE = f"--config={ROOT}/configs/quickstart.py:smoke"
TRAIN = "import sys\nfrom ddrl_jax.main import run\nsys.exit(run(sys.argv))"


def check_program(word: str, *arguments: str, before: str = "") -> None:
    """A real process refuses the arguments; `before` is code that it runs first."""
    result = subprocess.run(
        [sys.executable, "-c", f"{before}\n{TRAIN}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    check_message(result.returncode, result.stderr, word)


@pytest.mark.parametrize(
    ("word", "arguments"),
    [
        ('did you mean "train.epochs"?', [SMOKE, "--config.train.epoch=3"]),
        ("there is no such configuration file", ["--config=configs/none.py"]),
        ("the mesh does not cover", [SMOKE, "--config.mesh.data=3"]),
        ("step 3", [SMOKE, "--config.policy.train_on=(3,)"]),
    ],
)
def test_programs_end_the_same_way(word, arguments, tmp_path):
    check_program(word, *arguments, f"--workdir={tmp_path}")


REWARD = """
import numpy as np
from ddrl_jax.rewards import registry
def judge(images, prompts):
    return {}
registry.REWARDS["compressibility"] = lambda *_: judge
"""
LIST = "--config.prompts.source=list"


@pytest.mark.slow
def test_data_that_can_not_be_read(tmp_path):
    (tmp_path / "data").mkdir()
    samples = ("--config.data.source=samples", f"--config.data.path={tmp_path}/data")
    check_program("can not be read", SMOKE, f"--workdir={tmp_path}/run", *samples)


@pytest.mark.slow
def test_prompts_with_unknown_words(tmp_path):
    words = "--config.prompts.list=('a bannana', 'two')"
    command = (SMOKE, f"--workdir={tmp_path}", LIST, "--config.prompts.limit=0", words)
    check_program("bannana", *command, "--config.data_term.weight=0")


@pytest.mark.slow
def test_prompts_without_data(tmp_path):
    words = "--config.prompts.list=('red red red',)"
    keys = (LIST, "--config.prompts.limit=0", words, "--config.rewards.heldout=()")
    check_program("no picture in the data set", SMOKE, f"--workdir={tmp_path}", *keys)


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [{}, {"params/x": (3, 3)}])
def test_weights_of_another_model(shapes, tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, **{name: np.zeros(shape) for name, shape in shapes.items()})
    init = f"--config.model.init={path}"
    check_program(str(path), SMOKE, f"--workdir={tmp_path}/run", init)


@pytest.mark.slow
def test_a_checkpoint_of_another_model(tmp_path):
    config = load_config(SMOKE.removeprefix("--config="))
    with open_workdir(tmp_path, config) as home:
        checkpoints = Checkpoints(home.checkpoints, 1, 2)
        checkpoints.save(1, {"weights": np.zeros(3)}, {"epoch": 1}, force=True)
        checkpoints.close()
    check_program("checkpoint", SMOKE, f"--workdir={tmp_path}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("np.full(len(images), np.nan)", "nan"),
        ("np.zeros((len(images), 2))", "[8, 2]"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_reward_that_gives_no_number(value, word, tmp_path):
    # The evaluation before training judges too; its mean of anything is a number.
    before = REWARD.format(value)
    check_program(word, SMOKE, f"--workdir={tmp_path}", before=before)


# ---- what is known once prompts, data and weights are looked at

NO_JUDGE = ("rewards.heldout=()", "prompts.source=list", "prompts.limit=0")
PICTURES = ("data_term.captions=own", "data.heldout=256")
BUILT = {
    "unknown word": ((*NO_JUDGE, "prompts.list=('red bannana',)"), "near: banana"),
    "unknown to a judge": (
        (*NO_JUDGE[1:], "prompts.list=('red bannana',)"),
        "does not know a prompt",
    ),
    "too many words": ((*NO_JUDGE, f"prompts.list=('{7 * 'red '}',)"), "7 words"),
    "no picture": ((*NO_JUDGE, "prompts.list=('red red',)"), "no picture in the data"),
    "limit": (("prompts.limit=257",), "at most 256"),
    "all held out": (PICTURES, "256 held out of 256 records"),
    "no data set": (("data.source=samples", "data.path=."), "can not be read"),
    "other width": (("model.width=96",), "belong to another model"),
    "other heads": (("model.heads=4",), "model.heads=6"),
    "weights of something else": (("model.init=other.npz",), "other.npz"),
    "pictures no judge reads": (
        ("model.init=random", "model.image_size=64"),
        "can not read these pictures",
    ),
}


@pytest.mark.parametrize("case", BUILT)
def test_no_weight_is_read_before(case, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(emoji, "read_params", lambda _: pytest.fail("weights are read"))
    monkeypatch.setattr("ddrl_jax.train.run", lambda *_: pytest.fail("training began"))
    monkeypatch.chdir(tmp_path)
    np.savez("other.npz", x=np.zeros(3))
    keys, word = BUILT[case]
    flags = [f"--config.{key}" for key in keys]
    config = f"--config={ROOT}/configs/quickstart.py"  # with the shipped weights
    kept = jax.config.jax_compilation_cache_dir  # pyright: ignore
    code = run(["main", config, "--workdir=w", *flags])
    jax.config.update("jax_compilation_cache_dir", kept)
    check_message(code, capsys.readouterr().err, word)
