"""What a checkpoint says of its run beside the arrays, and what a start makes of it."""

import json
from types import SimpleNamespace

import pytest
from edited_config import configured
from tiny_runs import TINY, WORDS, flat_source, tiny_program

import ddrl_jax.train as loop
from ddrl_jax.checkpoint import Checkpoints
from ddrl_jax.errors import UserError
from ddrl_jax.evaluate import Evaluation, evaluate_mode
from ddrl_jax.export import export_mode
from ddrl_jax.preemption import Preemption
from ddrl_jax.resume import save, start
from ddrl_jax.workdir import open_workdir


@pytest.fixture(scope="module")
def program():
    return tiny_program()


@pytest.fixture
def checkpoints(tmp_path):
    """checkpoints(read_only): of one folder, closed at the end."""
    opened = []

    def of_the_run(read_only: bool = False) -> Checkpoints:
        opened.append(Checkpoints(tmp_path / "run", 1, 2, read_only=read_only))
        return opened[-1]

    yield of_the_run
    for each in opened:
        each.close()


def save_begin(program, checkpoints, epoch=1, **more):
    """A checkpoint of the state that the run begins with."""
    begin, kept = start(program, checkpoints), checkpoints
    save(kept, epoch, begin.state, begin.tracker, program, force=True, **more)
    kept.wait()


OTHERS = {
    "another text": (*WORDS[:3], "moon"),
    "another order": (*WORDS[1:], WORDS[0]),
    "one more": (*WORDS, "moon"),
    "one less": WORDS[:3],
    "another cut": (WORDS[0], *WORDS[2:], WORDS[1]),
}


def test_a_run_goes_on_with_its_own_prompts_alone(program, checkpoints):
    save_begin(program, checkpoints())
    assert start(program, checkpoints()).epoch == 1
    for others in OTHERS.values():
        changed = program._replace(prompts=others)
        with pytest.raises(UserError, match="prompts of the run have changed") as error:
            start(changed, checkpoints())
        assert error.value.got.startswith(f"count {len(others)}, digest ")
        assert error.value.wanted.startswith("count 4, digest ")
        assert error.value.got.split()[-1] != error.value.wanted.split()[-1]
        assert "--workdir" in error.value.way_out
    for others in OTHERS.values():  # it trains nothing
        changed = program._replace(prompts=others)
        found = start(changed, checkpoints(read_only=True))
        assert found.epoch == 1 and len(found.tracker.buffer) == 4  # as it was saved


def test_a_run_goes_on_with_its_own_data_alone(checkpoints):
    program = tiny_program(source=flat_source())
    assert program.source is not None
    save_begin(program, checkpoints())
    assert start(program, checkpoints()).epoch == 1
    captions = program.source.captions
    for other in ({"digest": "other"}, {"captions": captions[1:]}):
        changed = program._replace(source=program.source._replace(**other))
        with pytest.raises(UserError, match="data of the run have changed") as error:
            start(changed, checkpoints())
        assert error.value.got != error.value.wanted
        assert start(changed, checkpoints(read_only=True)).epoch == 1


def test_a_run_goes_on_with_the_json_of_its_model_alone(program, checkpoints):
    save_begin(program, checkpoints())
    other = program._replace(pipeline=program.pipeline._replace(described="v, 0.5"))
    with pytest.raises(UserError, match="JSON files of the starting model have") as e:
        start(other, checkpoints())
    assert "v, 0.5" in e.value.got


@pytest.mark.parametrize("wait", [True, False])
def test_a_save_is_waited_for_unless_the_configuration_says_otherwise(wait):
    called = []
    checkpoints = SimpleNamespace(
        save=lambda epoch, *_: called.append(epoch), wait=lambda: called.append("wait")
    )
    save(checkpoints, 3, {}, {}, tiny_program({"checkpoint.wait": wait}), force=False)
    assert called == ([3, "wait"] if wait else [3])


def test_a_checkpoint_that_says_nothing_of_prompts_is_taken(program, checkpoints):
    """As those of earlier versions."""
    kept = checkpoints()
    begin, cursor = start(program, kept), {"epoch": 1, "weights": "random"}
    state = {"train": begin.state, "tracker": begin.tracker}
    assert kept.save(1, state, cursor, force=True)
    kept.wait()
    assert start(program, checkpoints()).epoch == 1


class Judged(Evaluation):
    """An evaluation that takes no time; counts how often it was asked."""

    asked = 0

    def __init__(self, program, *_):
        self.program = program

    def run(self, *_):
        Judged.asked += 1
        return {"heldout": 3.0}


def test_a_line_that_a_notice_left_is_written_once(
    program, checkpoints, tmp_path, monkeypatch, capsys
):
    """Told to end in the last update: the next start ends the run, others say so."""
    for name, stand_in in {
        "Evaluation": Judged,
        "check_ratio": lambda *_: None,
    }.items():
        monkeypatch.setattr(loop, name, stand_in)
    monkeypatch.setattr(loop, "collect", lambda *_: None)  # as if told to end again
    config = program.config.copy_and_resolve_references()
    config.evaluate.every = 0
    config.train.epochs = 1
    program = program._replace(config=config)
    rewards = dict.fromkeys(config.rewards.weights, lambda images, prompts: None)
    save_begin(program, checkpoints(), line={"reward": 0.5})
    with open_workdir(tmp_path / "home", config) as home:

        def again():
            loop.run(program, rewards, home, checkpoints(), Preemption())
            return home.metrics.read_text(), Judged.asked, capsys.readouterr().out

        whole = {"step": 1, "reward": 0.5, "heldout": 3.0, "only_at_end": ["heldout"]}
        text, asked, said = again()
        assert json.loads(text) == whole and asked == 1 and "are done" not in said
        for _ in range(2):
            assert again()[:2] == (text, 1)
        assert "all 1 epochs are done" in again()[2]
        assert not home.discarded.exists()
        config.train.epochs = (
            2  # made longer: the line is that of an epoch among others
        )
        shorter, asked, _ = again()
        assert json.loads(shorter) == {"step": 1, "reward": 0.5} and asked == 1
        assert json.loads(home.discarded.read_text())["heldout"] == 3.0


class Failing(Judged):
    """An evaluation whose judge fails at epoch 1."""

    def run(self, state, metrics, epoch):
        if epoch:
            raise UserError("the judge failed", got="x", wanted="y", way_out="z")
        return super().run()


def test_an_epoch_is_saved_before_its_evaluation_which_may_fail(
    program, checkpoints, tmp_path, monkeypatch
):
    config, trained = program.config.copy_and_resolve_references(), []
    config.evaluate.every = config.train.epochs = 1
    program = program._replace(config=config)
    tracker = start(program, checkpoints()).tracker
    batch = SimpleNamespace(tracker=tracker, metrics={}, chunks=[])

    def update(program, state, batch, epoch):
        trained.append(epoch)
        return state, {"loss": 1.0}

    stand_ins = {
        "Evaluation": Failing, "update_epoch": update, "collect": lambda *_: batch
    }  # fmt: skip
    stand_ins |= dict.fromkeys(("check_ratio", "check_epoch"), lambda *_: None)
    stand_ins["Utilization"] = lambda *_: lambda *_: {}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(loop, name, stand_in)
    rewards = dict.fromkeys(config.rewards.weights, lambda images, prompts: None)
    with open_workdir(tmp_path / "home", config) as home:
        with pytest.raises(UserError, match="the judge failed"):
            loop.run(program, rewards, home, checkpoints(), Preemption())
        assert [json.loads(x)["step"] for x in home.metrics.open()] == [0]
        monkeypatch.setattr(loop, "Evaluation", Judged)
        loop.run(program, rewards, home, checkpoints(), Preemption())
        last = [json.loads(x) for x in home.metrics.open()][-1]
    assert trained == [0]  # and not a second time
    assert (last["step"], last["loss"], last["heldout"]) == (1, 1.0, 3.0)


# What of a run is drawn anew from its seed, when another mode looks at it.
DRAWN = {
    "the base under a LoRA": (True, {"lora.rank": 2}, "seed: 0 there, 1 here"),
    "the first weights": (False, {}, "seed: 0 there, 1 here|no checkpoint"),
    "nothing": (True, {}, None),
    "nothing of loaded ones": (True, {"lora.rank": 2, "model.init": "x.npz"}, None),
}


@pytest.mark.parametrize("mode", [export_mode, evaluate_mode])
@pytest.mark.parametrize("drawn", DRAWN)
def test_weights_are_never_drawn_from_another_seed(mode, drawn, tmp_path, monkeypatch):
    saved, edits, told = DRAWN[drawn]
    for module in ("export", "program"):
        monkeypatch.setattr(f"ddrl_jax.{module}.build", lambda *_: 1 / 0)
    with open_workdir(tmp_path, configured(TINY | edits)) as home:
        if saved:
            (home.checkpoints / "1").mkdir(parents=True)
    with pytest.raises(UserError if told else ZeroDivisionError, match=told):
        mode(configured(TINY | edits | {"seed": 1}), str(tmp_path))
