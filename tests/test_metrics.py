import json
import math
import sys
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from ddrl_jax.errors import UserError
from ddrl_jax.metrics import Metrics, ProgressBar, Timer, as_line

QUIET = ConfigDict({"tensorboard": False, "wandb": False, "progress": True})


def read(path) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (path / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_one_json_object_an_epoch_that_is_on_disk_at_once(tmp_path):
    with Metrics(tmp_path, QUIET) as metrics:
        metrics.write(1, {"reward/mean": jnp.float32(0.5), "count": np.int64(3)})
        assert read(tmp_path) == [{"step": 1, "reward/mean": 0.5, "count": 3}]
        metrics.write(2, {"device": "cpu"})
    with Metrics(tmp_path, QUIET) as metrics:  # a restart appends
        metrics.write(3, {})
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]


def test_what_is_not_finite_becomes_null_and_is_named(tmp_path):
    values = {"a": math.nan, "b": jnp.float32(jnp.inf), "c": -math.inf, "d": 1.0}
    with Metrics(tmp_path, QUIET) as metrics:
        metrics.write(7, values)
    assert read(tmp_path) == [
        {"step": 7, "a": None, "b": None, "c": None, "d": 1.0}
        | {"nonfinite": ["a", "b", "c"]}
    ]


def test_a_finite_line_lists_nothing():
    assert as_line(1, {"a": 0.0}) == {"step": 1, "a": 0.0}


def test_a_full_disk_is_one_error(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    metrics = Metrics(tmp_path, QUIET)
    with pytest.raises(UserError, match="(?s)could not be written.*No space left"):
        metrics.write(1, {"a": 1.0})


def test_a_picture_is_written_as_it_is_and_leaves_no_draft(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    with Metrics(tmp_path, QUIET) as metrics:
        path = metrics.images(12, "evaluation", picture)
    assert path == tmp_path / "samples" / "evaluation_000012.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_wandb_that_is_not_installed_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError
    with pytest.raises(UserError, match="log.wandb") as error:
        Metrics(tmp_path, ConfigDict({"tensorboard": False, "wandb": True}))
    assert "pip install" in error.value.way_out


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for the package, and lists what it is asked: (what, ...)."""
    asked = []

    class Run:
        def log(self, values, step):
            asked.append(("log", step, values))

        def finish(self):
            asked.append(("finish",))

    def init(**settings):
        asked.append(("init", settings))
        return Run()

    package = SimpleNamespace(init=init, Image=lambda path: ("picture", path))
    package.errors = SimpleNamespace(Error=type("Error", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "wandb", package)
    return asked


def test_wandb_gets_every_epoch_once_and_a_restart_goes_on_in_its_run(tmp_path, wandb):
    log = ConfigDict({"tensorboard": False, "wandb": True})
    config = {"seed": 3, "train": {"epochs": 2}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    values = {"reward/mean": jnp.float32(0.5), "device": "cpu", "loss": math.nan}
    with pytest.raises(KeyboardInterrupt), Metrics(tmp_path, log) as metrics:
        path = metrics.images(1, "evaluation", np.zeros((2, 2, 3), np.uint8))
        metrics.write(1, values)
        raise KeyboardInterrupt  # stopped
    with Metrics(tmp_path, log, resume_step=1) as metrics:
        metrics.write(2, {"reward/mean": 0.75, "count": 3})
    first, second = (call[1] for call in wandb if call[0] == "init")
    assert first == second
    assert len(first.pop("id")) == 32
    assert first == {
        "project": "ddrl_jax",
        "name": tmp_path.name,
        "dir": str(tmp_path),
        "config": config,
        "resume": "allow",  # without it the id of a restart would be refused
    }
    assert [call for call in wandb if call[0] != "init"] == [
        ("log", 1, {"evaluation": ("picture", str(path))}),
        ("log", 1, {"reward/mean": 0.5}),
        ("finish",),
        ("log", 2, {"reward/mean": 0.75, "count": 3}),
        ("finish",),
    ]


def test_wandb_that_does_not_start_is_one_error(tmp_path, wandb, monkeypatch):
    package = sys.modules["wandb"]

    def init(**settings):
        raise type("UsageError", (package.errors.Error,), {})("api_key not\nconfigured")

    monkeypatch.setattr(package, "init", init)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="wandb does not start") as error:
        Metrics(tmp_path, ConfigDict({"tensorboard": False, "wandb": True}))
    assert error.value.got == "api_key not configured"
    assert "WANDB_MODE=offline" in error.value.way_out


def test_two_runs_are_two_runs_of_wandb(tmp_path, wandb):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        log = ConfigDict({"tensorboard": False, "wandb": True})
        Metrics(tmp_path / name, log).close()
    first, second = (call[1] for call in wandb if call[0] == "init")
    assert first["id"] != second["id"]
    assert (first["name"], second["name"]) == ("a", "b")


def test_wandb_is_finished_where_closing_the_files_fails(tmp_path, wandb, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    metrics = Metrics(tmp_path, ConfigDict({"tensorboard": True, "wandb": True}))

    def refuse(board):
        raise OSError("a full disk")

    monkeypatch.setattr("ddrl_jax.metrics.Board.close", refuse)
    with pytest.raises(UserError, match="a full disk"):
        metrics.close()
    assert wandb[-1] == ("finish",)


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with Metrics(tmp_path, ConfigDict({"tensorboard": True, "wandb": True})) as metrics:
        metrics.write(1, {"a": 1.0})
        assert metrics.images(1, "x", np.zeros((2, 2, 3), np.uint8)) is None
    assert list(tmp_path.iterdir()) == []


# --- Progress

VALUES = {"reward/mean": -1.25, "data/loss": 0.5, "samples_per_second": 12.34}


def test_without_a_terminal_it_is_a_line_an_epoch(capsys):
    with ProgressBar(3, True, initial=1) as bar:
        bar.stage("rollout")
        bar.update(2, VALUES)
        bar.update(3, {"reward/mean": -1.0})
    first, second = capsys.readouterr().err.splitlines()
    assert "epoch 2/3" in first and "reward -1.25" in first
    assert "data loss 0.5" in first and "12.3 samples/s" in first and "left" in first
    assert "epoch 3/3" in second and "data loss" not in second
    assert second.endswith("0:00 left")


def test_on_a_terminal_it_is_one_line_that_is_redrawn(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with ProgressBar(2, True) as bar:
        bar.stage("rollout")
        bar.update(1, VALUES)
    drawn = capsys.readouterr().err
    assert "rollout" in drawn and "1/2" in drawn and "reward -1.25" in drawn
    assert "data loss 0.5" in drawn and "samples/s" in drawn and "left" in drawn
    assert drawn.count("\n") == 1 and "\r" in drawn


def test_disabled_it_is_silent(capsys):
    with ProgressBar(2, False) as bar:
        bar.stage("rollout")
        bar.update(1, VALUES)
    assert capsys.readouterr() == ("", "")


def test_time_left_is_the_median_epoch_times_the_epochs_left(monkeypatch):
    clock = iter([0.0, 100.0, 102.0, 104.0])  # the first epoch compiles
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    bar = ProgressBar(10, False)
    assert math.isnan(bar.seconds_left())
    for step in (1, 2, 3):
        bar.update(step, {})
    assert bar.seconds_left() == 7 * 2.0


# --- Timer


def test_the_timer_books_every_second_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    timer = Timer()
    spend(1)
    with timer("rollout"):
        spend(2)
        with timer("reward"):  # the rollout stands still meanwhile
            spend(4)
        spend(8)
    with timer("rollout"):
        spend(16)
    with timer("evaluate"):
        spend(32)
    spend(64)
    assert timer.epoch() == {
        "time/rollout": 26.0,
        "time/reward": 4.0,
        "time/update": 0.0,
        "time/evaluate": 32.0,
        "time/rest": 65.0,
        "time/epoch": 127.0,
    }
    spend(3)
    again = timer.epoch()
    assert again["time/rest"] == again["time/epoch"] == 3.0
    assert again["time/rollout"] == 0.0


def test_what_is_done_aside_is_no_part_of_an_epoch(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    timer = Timer()
    now[0] += 1
    with timer("update"):
        now[0] += 2
    timer.epoch()
    now[0] += 4  # as writing the metrics that were read just now
    with timer.aside():
        now[0] += 8
    now[0] += 16
    found = timer.epoch()
    assert found["time/rest"] == found["time/epoch"] == 20.0


def test_a_stage_that_raises_is_closed():
    timer = Timer()
    with pytest.raises(RuntimeError), timer("update"):
        raise RuntimeError
    assert timer.epoch()["time/update"] > 0
    assert timer.epoch()["time/update"] == 0
