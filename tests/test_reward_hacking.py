"""The arms of configs/hacking.py, and the benchmark that runs them, with stand-ins."""

import json
import os
import pathlib
import sys
import time

import pytest

from benchmarks import reward_hacking as bench
from configs.hacking import ARMS, get_config
from ddrl_jax.check_config import check_config
from ddrl_jax.config_rules import flatten

# An epoch is a line of metrics; what makes it good is config.json.
STAND_IN = """
import json, os, pathlib, sys, time
home, config, code, seconds = pathlib.Path(sys.argv[1]), *sys.argv[2:5]
home.mkdir(parents=True, exist_ok=True)
(home / "cores.json").write_text(json.dumps(sorted(os.sched_getaffinity(0))))
(home / "threads").write_text(os.environ["OMP_NUM_THREADS"])
print("said by", home.parent.name, flush=True)
time.sleep(float(seconds))
if int(code) == 0:
    (home / "config.json").write_text(config)
    with (home / "metrics.jsonl").open("a") as file:
        for step in (0, 1, 2):
            print(json.dumps({"step": step}), file=file)
sys.exit(int(code))
"""
CONFIG = {"train": {"epochs": 2}}


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch):
    monkeypatch.setattr(bench, "PAUSE", 0.02)


def job(root, arm, code=0, seconds=0.0, seed=0):
    home = root / arm / f"seed_{seed}"
    arguments = (str(home), json.dumps(CONFIG), str(code), str(seconds))
    command = (sys.executable, "-c", STAND_IN, *arguments)
    return bench.Job(arm, seed, command, home, CONFIG)


# ---- the arms


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("size", ["", "-smoke"])
def test_an_arm_passes_the_checks_and_differs_in_its_anchor_alone(arm, size):
    config = get_config(arm + size)
    check_config(config, 1)
    mine, other = flatten(config), flatten(get_config("ddpo" + size))
    differing = {key for key in mine if mine[key] != other[key]}
    anchors = {"policy.weight", "policy.kl_weight", "data_term.weight"}
    assert differing <= anchors | {"name", "evaluate.every"}
    # twice each prompt, or the diversity within a prompt could not be measured
    assert config.evaluate.samples == 2 * config.prompts.limit


def test_the_arms_are_what_they_are_called():
    def of(arm):
        c = get_config(arm)
        return c.policy.weight > 0, c.policy.kl_weight > 0, c.data_term.weight > 0

    assert of("ddpo") == (True, False, False)
    assert of("kl_low") == of("kl_high") == (True, True, False)
    assert of("ddrl_low") == of("ddrl_high") == (True, False, True)
    assert of("control") == (False, False, True)
    assert (
        get_config("kl_low").policy.kl_weight < get_config("kl_high").policy.kl_weight
    )
    low, high = get_config("ddrl_low"), get_config("ddrl_high")
    assert low.data_term.weight < high.data_term.weight


def test_all_arms_are_evaluated_at_the_end_of_the_shortest():
    every = {get_config(arm).evaluate.every for arm in ARMS}
    epochs = [get_config(arm).train.epochs for arm in ARMS]
    assert not any(min(epochs) % one for one in every)


def test_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match='unknown variant "ddro", there are ddpo'):
        get_config("ddro")
    with pytest.raises(ValueError, match="smoke"):
        get_config("ddpo-smke")


# ---- the runs


def test_the_first_seed_of_every_arm_comes_first():
    jobs = bench.make_jobs(
        ["ddpo", "kl_low"], [3, 4], "runs/x", False, ["--config.train.epochs=9"]
    )
    names = ["ddpo/seed_3", "kl_low/seed_3", "ddpo/seed_4", "kl_low/seed_4"]
    assert [one.name for one in jobs] == names
    assert jobs[1].command[1:] == (
        *("-m", "ddrl_jax.main", "--config=configs/hacking.py:kl_low"),
        *("--workdir=runs/x/kl_low/seed_3", "--config.seed=3"),
        "--config.train.epochs=9",
    )
    assert jobs[1].epochs == 9 and jobs[1].config["seed"] == 3
    assert jobs[1].workdir == bench.ROOT / "runs/x/kl_low/seed_3"


@pytest.mark.parametrize(
    ("cores", "processes", "expected"),
    [
        ([0, 1], 2, [(0,), (1,)]),
        ([4, 2, 3, 5], 2, [(2, 4), (3, 5)]),
        ([0, 1, 2], 2, [(0, 2), (1,)]),
        ([0, 1], 1, [(0, 1)]),
        ([7], 2, [(7,), (7,)]),
    ],
)
def test_the_cores_are_shared_out(cores, processes, expected):
    assert bench.shares(cores, processes) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_every_run_is_done_on_its_own_cores_and_booked(tmp_path):
    mine = os.sched_getaffinity(0)
    jobs = [job(tmp_path, arm, seconds=0.3) for arm in ("a", "b", "c")]
    bench.run_all(jobs, 2, tmp_path / "walls.jsonl")
    assert all(one.finished() for one in jobs)
    assert os.sched_getaffinity(0) == mine
    shares = [list(share) for share in bench.shares(sorted(mine), 2)]
    seen = [json.loads((j.workdir / "cores.json").read_text()) for j in jobs]
    assert seen[:2] == shares and seen[2] in shares
    assert (jobs[0].workdir / "threads").read_text() == str(len(shares[0]))
    assert jobs[0].log.read_text() == "said by a\n"
    lines = (tmp_path / "walls.jsonl").read_text().splitlines()
    walls = {line["run"]: line for line in map(json.loads, lines)}
    assert sorted(walls) == ["a/seed_0", "b/seed_0", "c/seed_0"]
    assert all(0.3 <= line["seconds"] < 60 for line in walls.values())


def test_what_is_finished_is_not_started_again(tmp_path):
    jobs = [job(tmp_path, "a"), job(tmp_path, "b")]
    bench.run_all(jobs[:1], 1, tmp_path / "walls.jsonl")
    bench.run_all(jobs, 1, tmp_path / "walls.jsonl")
    assert jobs[0].log.read_text() == "said by a\n"
    longer = jobs[0]._replace(config={"train": {"epochs": 3}})
    other = jobs[0]._replace(config={"train": {"epochs": 2}, "seed": 1})
    assert [longer.finished(), other.finished(), jobs[0].finished()] == [0, 0, 1]


def test_a_failed_run_stops_the_others_and_names_its_log(tmp_path):
    slow = job(tmp_path, "slow", seconds=120.0)
    jobs = [job(tmp_path, "bad", code=7, seconds=1.0), slow, job(tmp_path, "later")]
    began = time.monotonic()
    with pytest.raises(bench.Failed) as caught:
        bench.run_all(jobs, 2, tmp_path / "walls.jsonl")
    message = str(caught.value)
    assert "bad/seed_0 failed with status 7" in message
    assert str(tmp_path / "bad" / "seed_0.log") in message
    assert "said by bad" in message
    assert time.monotonic() - began < 60
    assert not slow.finished() and not jobs[2].log.exists()


def test_a_run_that_was_told_to_stop_is_no_result(tmp_path):
    one = job(tmp_path, "a")
    half = one._replace(command=(sys.executable, "-c", "print('saved')"))
    with pytest.raises(bench.Failed, match="stopped before its last epoch"):
        bench.run_all([half], 1, tmp_path / "walls.jsonl")


def test_progress_tells_what_is_done_and_what_runs(tmp_path, capsys):
    bench.run_all([job(tmp_path, "a")], 1, tmp_path / "walls.jsonl")
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "0 of 1 runs, 0 of 2 epochs, ? left; now a/seed_0 0/2" in first
    assert "1 of 1 runs, 2 of 2 epochs, 0:00:00 left; now nothing" in last


@pytest.mark.parametrize(
    "arguments",
    [
        ["--arms", "ddrl"],
        ["--processes", "0"],
        ["--seed", "1"],
        ["--config.train.epochs"],
        ["runs/there"],
    ],
)
def test_a_bad_command_line_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        bench.parse(arguments)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


def test_a_misspelt_key_is_one_message_before_anything_runs(tmp_path, capsys):
    keys = ["--workdir", str(tmp_path), "--config.train.epoch=9"]
    assert bench.main(keys) == 1
    assert "train.epoch" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_results_name_command_and_hours(tmp_path):
    jobs = []
    for arm in ("ddpo", "ddrl_low"):
        config = json.loads(json.dumps(get_config(arm).to_dict()))
        home = tmp_path / arm / "seed_0"
        home.mkdir(parents=True)
        (home / "config.json").write_text(json.dumps(config))
        row = {"evaluation/compressibility/mean": -6.0, "data/heldout_loss": 0.2}
        rows = [{"step": 0} | row, {"step": 3, "samples_seen": 192} | row]
        lines = "\n".join(json.dumps(line) for line in rows)
        (home / "metrics.jsonl").write_text(lines)
        jobs.append(bench.Job(arm, 0, (), home, config))
    walls = tmp_path / "walls.jsonl"
    for name, cores in (("ddpo", 1), ("ddpo", 1), ("ddrl_low", 2), ("other", 1)):
        line = {"run": f"{name}/seed_0", "seconds": 1800.0, "cores": cores}
        with walls.open("a") as file:
            print(json.dumps(line), file=file)
    path = bench.compare(jobs, tmp_path / "out", "python x.py", walls)
    text = path.read_text()
    assert path == pathlib.Path(tmp_path / "out" / "reward_hacking.md")
    assert "- command: `python x.py`" in text
    assert "restarts included: 1.50, 2.00 core hours" in text
    assert (tmp_path / "out" / "reward_hacking.png").exists()
    assert (tmp_path / "out" / "reward_hacking_fronts.png").exists()
