import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from configs.base import get_config
from ddrl_jax.config_difference import differing_keys
from ddrl_jax.errors import UserError
from ddrl_jax.workdir import open_workdir, tell_differences


def start(path: Path, **changes) -> None:
    """Opens a workdir with some keys of the base config changed, and begins a run."""
    config = get_config()
    config.update_from_flattened_dict(changes)
    with open_workdir(path, config) as home:
        home.metrics.write_text('{"step": 0}\n')


def test_a_new_workdir_holds_the_whole_config_and_notes_the_start(tmp_path):
    with open_workdir(tmp_path / "a" / "b", get_config()) as home:
        stored = json.loads(home.config.read_text())
        noted = [json.loads(line) for line in home.starts.read_text().splitlines()]
    assert os.fspath(home) == str(tmp_path / "a" / "b")
    assert stored["rewards"]["weights"] == {"compressibility": 1.0}
    assert stored["prompts"]["list"] == [] and stored["seed"] == 0
    assert (
        home.config.read_text() == json.dumps(stored, indent=2, sort_keys=True) + "\n"
    )
    assert len(noted) == 1 and noted[0]["versions"]["python"].startswith("3.")
    assert "ddrl_jax.main" in noted[0]["command"]


def test_the_same_config_opens_it_again(tmp_path):
    start(tmp_path)
    start(tmp_path)
    assert len((tmp_path / "starts.jsonl").read_text().splitlines()) == 2


def test_another_config_is_refused_with_every_differing_key(tmp_path):
    start(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError) as error:
        start(tmp_path, **{"optimizer.lr": 3e-4, "policy.beta": 2.0, "seed": 0})
    assert "optimizer.lr: 0.0001 there, 0.0003 here" in error.value.got
    assert "policy.beta: 1.0 there, 2.0 here" in error.value.got
    assert "seed" not in error.value.got
    assert "--workdir" in error.value.way_out
    assert (tmp_path / "config.json").read_bytes() == before
    start(tmp_path)  # the refusal has let go of the lock


def open_to_sample(path: Path, **changes) -> None:
    config = get_config()
    config.update_from_flattened_dict(changes)
    open_workdir(path, config, mode="sample").close()


def test_another_mode_leaves_the_config_of_a_run_as_it_is(tmp_path):
    start(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    open_to_sample(tmp_path, **{"train.epochs": 31, "sample.per_prompt": 9})
    with pytest.raises(UserError) as error:
        open_to_sample(tmp_path, **{"seed": 7, "sample.steps": 9})
    assert error.value.got == "seed: 0 there, 7 here"
    assert (tmp_path / "config.json").read_bytes() == before
    starts = map(json.loads, (tmp_path / "starts.jsonl").read_text().splitlines())
    assert [line["mode"] for line in starts] == ["train", "sample"]
    start(tmp_path, **{"train.epochs": 31})  # training may still go on for longer


def test_another_mode_writes_the_config_where_no_run_has_begun(tmp_path):
    for seed in (3, 7):
        open_to_sample(tmp_path, seed=seed)
        assert json.loads((tmp_path / "config.json").read_text())["seed"] == seed


@pytest.mark.parametrize("left", ["nothing", "no line", "a line", "a checkpoint"])
def test_a_start_that_came_to_nothing_binds_no_later_one(left, tmp_path, capsys):
    """Its prompts, data or judges were refused: the command may be mended."""
    with open_workdir(tmp_path, get_config()) as home:
        if left.endswith("line"):
            home.metrics.write_text("{}\n" if left == "a line" else "")
        if left == "a checkpoint":
            (home.checkpoints / "1").mkdir(parents=True)
    bound = left.startswith("a ")
    with pytest.raises(UserError) if bound else nullcontext():
        start(tmp_path, seed=7)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["seed"] == (0 if bound else 7)
    assert bound or "seed: 0 there, 7 here" in capsys.readouterr().err


def test_another_reward_is_a_differing_key(tmp_path):
    start(tmp_path)
    config = get_config()
    config.rewards.weights = {"incompressibility": 1.0}
    with pytest.raises(UserError) as error:
        open_workdir(tmp_path, config)
    assert "rewards.weights.compressibility: 1.0 there" in error.value.got
    assert "rewards.weights.incompressibility: '(no such key)' there" in error.value.got


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("log.progress", False),
        ("checkpoint.keep", 7),
        ("checkpoint.resume", "last_good"),
        ("rewards.on_failure", "mask"),
        ("rewards.threads", 5),
        ("rewards.timeout", 1.0),
        ("evaluate.pictures", 3),
        ("train.microbatch", 8),
        ("data.cache", "/elsewhere"),
        ("mesh.fsdp", 2),
        ("train.epochs", 31),
        ("rewards.vlm.base_url", "http://other:8000/v1"),
        ("rewards.vlm.api_key_env", "KEY"),
        ("rewards.vlm.timeout", 9.0),
        ("rewards.vlm.retries", 1),
        ("rewards.vlm.backoff", 2.0),
        ("rewards.vlm.threads", 3),
        ("data.cache", "/elsewhere"),
        ("export.merge_lora", True),
        ("policy.ratio_tolerance", 1e-6),
    ],
)
def test_what_does_not_change_the_numbers_may_change_and_is_stored(
    tmp_path, key, value
):
    start(tmp_path)
    start(tmp_path, **{key: value})
    stored = json.loads((tmp_path / "config.json").read_text())
    for name in key.split("."):
        stored = stored[name]
    assert stored == value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.cache_dtype", "float32"),
        ("rewards.vlm.model", "other"),
        ("rewards.vlm.max_tokens", 8),
    ],
)
def test_names_that_begin_alike_may_not(tmp_path, key, value):
    start(tmp_path)
    with pytest.raises(UserError, match=key.rpartition(".")[2]):
        start(tmp_path, **{key: value})


@pytest.mark.parametrize(
    ("stored", "wanted", "schedule", "allowed"),
    [
        (10, 20, "constant", True),
        (10, 20, "cosine", False),  # the schedule ends at the last epoch
        (20, 10, "constant", False),
        (10, 10, "cosine", True),
    ],
)
def test_epochs_may_grow_unless_the_schedule_is_made_for_them(
    stored, wanted, schedule, allowed
):
    common = {"optimizer.schedule": schedule}
    found = differing_keys(
        {"train.epochs": stored} | common, {"train.epochs": wanted} | common
    )
    assert found == ({} if allowed else {"train.epochs": (stored, wanted)})


def test_the_precision_of_a_cache_is_no_place_of_it():
    keys = {"data.cache": "a", "data.cache_dtype": "float16"}
    found = differing_keys(keys, {"data.cache": "b", "data.cache_dtype": "float32"})
    assert list(found) == ["data.cache_dtype"]


def test_the_microbatch_does_not_decide_what_sparse_rwr_fits(tmp_path):
    start(tmp_path, **{"policy.term": "sparse_rwr"})
    start(tmp_path, **{"policy.term": "sparse_rwr", "train.microbatch": 8})


def test_a_reader_is_told_what_differs_from_the_run(tmp_path, capsys):
    start(tmp_path)
    config = get_config()
    config.update_from_flattened_dict({"evaluate.samples": 9, "log.progress": False})
    with open_workdir(tmp_path, config, exclusive=False) as home:
        tell_differences(home, config, ("evaluate.",))
        assert capsys.readouterr().err == ""
        config.lora.alpha = 8.0
        tell_differences(home, config, ("evaluate.",))
    said = capsys.readouterr().err
    assert said.splitlines()[1:] == ["  lora.alpha: 0.0 there, 8.0 here"]
    assert str(tmp_path) in said


def test_keys_of_another_version_are_named():
    found = differing_keys({"old": 1, "same": 2}, {"new": 3, "same": 2})
    assert found == {"new": ("(no such key)", 3), "old": (1, "(no such key)")}


def test_a_run_from_before_there_was_a_choice_of_optimizer_goes_on(tmp_path):
    start(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["optimizer"]["name"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="optimizer.name"):
        start(tmp_path, **{"optimizer.name": "muon"})
    start(tmp_path)


def test_a_run_from_before_float32_was_exact_goes_on_as_it_was(tmp_path):
    start(tmp_path, **{"model.matmul_precision": "default"})
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["model"]["matmul_precision"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="model.matmul_precision: 'default'"):
        start(tmp_path)
    start(tmp_path, **{"model.matmul_precision": "default"})


SET = "use another --workdir, or set these keys as stored"
VERSION = "go on with the version of the stored run"
WAYS = {  # keys that only the run has, those that are set otherwise, and the way out
    "set otherwise": ({}, {"seed": 7}, SET),
    "another version": ({"old": 1}, {}, f"use another --workdir, or {VERSION}"),
    "both": ({"old": 1}, {"seed": 7}, f"{SET}; one that is not there: {VERSION}"),
    "other rewards": ({}, {"rewards.weights": {"incompressibility": 1.0}}, SET),
}


@pytest.mark.parametrize("kind", WAYS)
def test_each_kind_of_difference_has_its_way_out(tmp_path, kind):
    old, changes, way_out = WAYS[kind]
    start(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["optimizer"] |= old
    (tmp_path / "config.json").write_text(json.dumps(stored))
    config = get_config()
    for key, value in changes.items():
        *section, last = key.split(".")
        (config[section[0]] if section else config)[last] = value
    with pytest.raises(UserError) as error:
        open_workdir(tmp_path, config)
    assert error.value.way_out == way_out


@pytest.mark.parametrize(
    "content", ['{"seed": ', pytest.param('{"seed": ' * 100_000, id="nested")]
)
def test_a_torn_config_is_refused(tmp_path, content):
    start(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json is not readable"):
        start(tmp_path)


def test_a_run_without_its_config_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="without its config.json"):
        start(tmp_path)


@pytest.mark.parametrize("place", ["file/run", "file", "/proc/run"])
def test_a_folder_that_can_not_be_made_is_one_error(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        start(tmp_path / place)
    assert "can not be used" in error.value.what and place in error.value.what


def test_a_reader_needs_an_existing_folder_and_changes_nothing(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_workdir(tmp_path / "absent", get_config(), exclusive=False)
    start(tmp_path / "run")
    files = sorted(p.name for p in (tmp_path / "run").iterdir())
    with open_workdir(tmp_path / "run", get_config()):  # a run that goes on
        open_workdir(tmp_path / "run", get_config(), exclusive=False).close()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == files


# --- The lock


def test_two_runs_can_not_share_a_workdir(tmp_path):
    with open_workdir(tmp_path, get_config()):
        with pytest.raises(UserError, match="another run is using") as error:
            start(tmp_path)
        assert str(os.getpid()) in error.value.got
    start(tmp_path)
