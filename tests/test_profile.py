"""--profile: which epochs are traced, what is written, and what is refused."""

import re
from pathlib import Path

import jax
import pytest

from ddrl_jax import main
from ddrl_jax.command_line import parse
from ddrl_jax.errors import UserError
from ddrl_jax.profile import Profile

QUICKSTART = ("main", "--config=configs/quickstart.py:smoke", "--workdir=w")


@pytest.fixture
def calls(monkeypatch) -> list:
    """What the profiler is asked for."""
    seen: list = []
    start = lambda folder: seen.append(("start", folder))  # noqa: E731
    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    return seen


def _traced(calls: list, epochs: tuple[int, int] | None, ran: range) -> list:
    """Which of the epochs ran between a start and a stop of the trace."""
    traced = []
    with Profile(Path("folder"), epochs) as profile:
        for epoch in ran:
            profile.begin(epoch)
            starts = sum(call != "stop" for call in calls)
            traced += [epoch] * (starts > calls.count("stop"))
    assert calls.count("stop") == len(calls) - calls.count("stop")
    return traced


@pytest.mark.parametrize(
    "epochs, ran, traced",
    [
        ((3, 5), range(1, 9), [3, 4, 5]),
        ((1, 1), range(1, 4), [1]),
        ((3, 5), range(1, 6), [3, 4, 5]),  # the run ends with the range
        ((3, 5), range(4, 9), [4, 5]),  # resumed within it
        ((3, 5), range(1, 5), [3, 4]),  # stopped within it
        ((3, 5), range(6, 9), []),  # resumed behind it
        (None, range(1, 4), []),
    ],
)
def test_only_the_epochs_of_the_range_are_traced(calls, epochs, ran, traced):
    assert _traced(calls, epochs, ran) == traced
    assert len(calls) == 2 * bool(traced)


def test_of_several_processes_only_the_first_traces(calls, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert _traced(calls, (1, 2), range(1, 4)) == []
    assert calls == []


def test_an_error_within_the_range_closes_the_trace(calls):
    with pytest.raises(ZeroDivisionError), Profile(Path("folder"), (1, 2)) as profile:
        profile.begin(1)
        raise ZeroDivisionError
    assert calls == [("start", "folder"), "stop"]


def test_the_trace_has_a_step_for_each_epoch_and_nothing_else(tmp_path, capsys):
    """The real profiler; the file is read back by JAX's own reader."""
    with Profile(tmp_path / "profile", (2, 3)) as profile:
        for epoch in range(1, 5):
            profile.begin(epoch)
            jax.block_until_ready(jax.numpy.ones(()) + epoch)
    [path] = (tmp_path / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    events = [e for plane in planes for line in plane.lines for e in line.events]
    steps = [dict(e.stats)["step_num"] for e in events if e.name == "epoch"]
    assert sorted(int(step) for step in steps) == [2, 3]
    assert f"xprof --logdir={tmp_path / 'profile'}" in capsys.readouterr().out


def test_the_command_line_reads_a_range():
    more = ("--profile=2:3", "--config.train.epochs=3")
    assert parse([*QUICKSTART, *more]).profile == (2, 3)
    assert parse(QUICKSTART).profile is None


@pytest.mark.parametrize(
    "text", ["0:2", "3:2", "1:4", "2", "a:b", "", "1:2:3", "-1:2", "1:"]
)
def test_what_is_no_range_of_its_epochs_is_refused(text):
    arguments = [*QUICKSTART, f"--profile={text}", "--config.train.epochs=3"]
    with pytest.raises(UserError, match="no range of epochs") as error:
        parse(arguments)
    assert "LAST <= 3" in error.value.wanted


@pytest.mark.parametrize("epochs", [1, 2, 3, 9])
@pytest.mark.parametrize("text", ["2:2", "0:2", "3:2", "2:12", "x", "10:10"])
def test_what_the_refusal_of_a_range_advises_is_taken(text, epochs):
    arguments = [*QUICKSTART, f"--config.train.epochs={epochs}"]
    try:
        parse([*arguments, f"--profile={text}"])
    except UserError as error:
        for advice in re.findall(r"--[\w.]+=[\d:]+", error.way_out):
            # A range on its own; more epochs beside the range that was asked for.
            range_ = [] if "profile" in advice else [f"--profile={text}"]
            assert parse([*arguments, advice, *range_]).profile is not None
        assert ("train.epochs" in error.way_out) == (text in ("2:2", "2:12", "10:10"))
    else:
        assert text == "2:2" and epochs > 1


@pytest.mark.parametrize("mode", ["evaluate", "sample", "export"])
def test_only_training_has_epochs(mode):
    with pytest.raises(UserError, match="no range of epochs") as error:
        parse([*QUICKSTART, "--profile=1:1", f"--mode={mode}"])
    assert error.value.way_out == "leave --profile away, or train"


def test_main_hands_the_range_to_training(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setitem(main._MODE_CALLS, "train", lambda *found: seen.append(found))
    workdir = f"--workdir={tmp_path}"
    assert main.run([*QUICKSTART, workdir]) == 0
    assert main.run([*QUICKSTART, workdir, "--profile=1:2"]) == 0
    assert [found[1:] for found in seen] == [(str(tmp_path),), (str(tmp_path), (1, 2))]
