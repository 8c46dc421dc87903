"""--mode=sample, and evaluate: a run as data, and judged again."""

import json
import shutil

import numpy as np
import pytest
from sampled_runs import no_build, save_epoch, settings
from tiny_runs import WORDS

from ddrl_jax import evaluate, sample
from ddrl_jax.check_config import check_config
from ddrl_jax.data.emoji import read_emoji
from ddrl_jax.errors import UserError
from ddrl_jax.export import export_mode
from ddrl_jax.lock import Lock
from ddrl_jax.program import build
from ddrl_jax.sample import sample_mode
from ddrl_jax.sources import without_data

# ---- samples of the policy


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sampled")
    sample_mode(settings(), str(workdir))
    return workdir


def test_two_runs_do_not_write_to_one_place(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "build", no_build)
    lock = Lock(tmp_path / ".set.lock")
    try:
        with pytest.raises(UserError, match="another run is writing"):
            config = settings(sample__output=str(tmp_path / "set"))
            sample_mode(config, str(tmp_path / "w"))
    finally:
        lock.close()


def test_every_prompt_has_its_samples_in_order(sampled):
    images, captions = read_emoji(sampled / "dataset")
    assert captions == tuple(np.repeat(WORDS[:2], 5))
    assert images.shape == (10, 16, 16, 3) and images.dtype == np.uint8
    assert len(np.unique(images.reshape(10, -1), axis=0)) == 10  # noise of their own
    # A new network says 0: its samples are the initial noise as pictures.
    assert np.abs((images / 127.5 - 1).std() - 0.72) < 0.05  # N(0, 1) clipped to +-1


def test_the_same_samples_wherever_they_go(sampled, tmp_path):
    # The folder is not part of what a run is, so it may change beside a run.
    output = tmp_path / "set"
    sample_mode(settings(sample__output=str(output)), str(tmp_path / "run"))
    there, here = read_emoji(sampled / "dataset"), read_emoji(output)
    np.testing.assert_array_equal(there[0], here[0])
    assert not (tmp_path / "run" / "dataset").exists()


def test_solver_steps_and_guidance_are_those_of_the_mode(sampled, tmp_path):
    # Noise, steps and guidance of the rollout belong to training.
    sample_mode(settings(evaluate__solver="rollout"), str(tmp_path))
    there, here = read_emoji(sampled / "dataset"), read_emoji(tmp_path / "dataset")
    np.testing.assert_array_equal(there[0], here[0])


def test_samples_are_never_overwritten(sampled, monkeypatch):
    before = read_emoji(sampled / "dataset")[0]
    monkeypatch.setattr("ddrl_jax.sample.build", no_build)
    with pytest.raises(UserError, match="already there"):
        sample_mode(settings(), str(sampled))
    np.testing.assert_array_equal(read_emoji(sampled / "dataset")[0], before)


def test_a_set_that_was_written_while_the_lock_waited_is_seen_before_building(
    tmp_path, monkeypatch
):
    output = tmp_path / "set"

    def waited(path):
        output.mkdir()
        return Lock(path)

    monkeypatch.setattr("ddrl_jax.sample.Lock", waited)
    monkeypatch.setattr("ddrl_jax.sample.build", no_build)
    with pytest.raises(UserError, match="already there"):
        sample_mode(settings(sample__output=str(output)), str(tmp_path / "run"))


def test_samples_anchor_a_data_term(sampled):
    edits = {"data.source": "samples", "data.path": str(sampled / "dataset")}
    config = settings(**edits, data_term__weight=0.5)
    program = build(config)
    assert program.source is not None
    assert program.source.captions == tuple(np.repeat(WORDS[:2], 5))
    assert [list(r) for r in program.records_of] == [list(range(5)), list(range(5, 10))]
    with pytest.raises(UserError, match="not of the model's size"):
        build(settings(**edits, data_term__weight=0.5, model__image_size=32))


def test_the_newest_checkpoint_is_sampled(sampled, tmp_path):
    program, state = save_epoch(settings(), tmp_path, 0.05)
    sample_mode(settings(), str(tmp_path))
    images = read_emoji(tmp_path / "dataset")[0].astype(int)
    assert np.abs(images - read_emoji(sampled / "dataset")[0]).max() > 20
    assert program.pipeline.fingerprint == "random" and int(state.step) == 0


def test_sampling_leaves_a_run_as_it_is(tmp_path, capfd):
    save_epoch(settings(), tmp_path, 0.05)
    config = (tmp_path / "config.json").read_bytes()
    (tmp_path / ".dataset.part" / "samples").mkdir(parents=True)  # of a killed one
    capfd.readouterr()
    sample_mode(settings(train__epochs=settings().train.epochs + 1), str(tmp_path))
    said = f"10 samples of 2 prompts: {tmp_path / 'dataset'}\n"
    assert capfd.readouterr().out == said
    assert (tmp_path / "config.json").read_bytes() == config
    starts = map(json.loads, (tmp_path / "starts.jsonl").read_text().splitlines())
    assert [start["mode"] for start in starts] == ["train", "sample"]
    assert not (tmp_path / ".dataset.part").exists()


def test_a_run_is_sampled_with_other_prompts_which_are_told(tmp_path, capsys):
    save_epoch(settings(), tmp_path, 0.05)
    sample_mode(settings(prompts__list=WORDS[2:3]), str(tmp_path))
    assert read_emoji(tmp_path / "dataset")[1] == (WORDS[2],) * 5
    assert "prompts.list: ['cat', 'dog'] there" in capsys.readouterr().err
    with pytest.raises(UserError, match="seed: 0 there, 1 here"):
        sample_mode(settings(seed=1, sample__output="elsewhere"), str(tmp_path))


@pytest.mark.parametrize("captions", ["data", "list"])
def test_what_was_trained_on_data_alone_is_used_without_them(
    sampled, captions, tmp_path
):
    data = shutil.copytree(sampled / "dataset", tmp_path / "data")
    trained = {"policy__weight": 0.0, "data_term__weight": 1.0, "rewards__weights": {}}
    trained |= {"data__source": "samples", "data__path": str(data)}
    trained |= {"evaluate__pictures": 0}
    config = settings(**trained, prompts__source=captions)
    save_epoch(config, tmp_path / "w", 0.05)
    shutil.rmtree(data)
    with pytest.raises(UserError, match="data.path is no folder"):
        check_config(config, 1)
    check_config(without_data(config, "export"), 1, trains=False)
    export_mode(config, str(tmp_path / "w"))
    assert (tmp_path / "w" / "export" / "000001.npz").is_file()
    listed = settings(**trained)  # where the captions were the prompts, others are
    check_config(without_data(listed, "sample"), 1, trains=False)
    sample_mode(listed, str(tmp_path / "w"))
    assert len(read_emoji(tmp_path / "w" / "dataset")[0]) == 10


def black(finite):
    """A sampler of black pictures; of each batch, which of them are finite."""
    batches = iter(finite)

    def make(program, *_):
        pictures = np.zeros((program.chunk, 16, 16, 3), np.uint8)
        return lambda *_: (pictures, np.array(next(batches), bool))

    return make


def test_the_embeddings_are_placed_a_batch_at_a_time(tmp_path, monkeypatch):
    placed, seen = [], []

    def counted(*arguments):
        for part in evaluate.chunks_of(*arguments):
            placed.append(part)
            yield part

    def written(_, batches):
        return sum(seen.append(len(placed)) or len(images) for images, _ in batches)

    monkeypatch.setattr(sample, "chunks_of", counted)
    monkeypatch.setattr(sample, "write_samples", written)
    monkeypatch.setattr(sample, "make_sampler", black([[1] * 4] * 3))
    sample_mode(settings(), str(tmp_path))
    assert seen == [1, 2, 3]


def test_samples_that_are_no_pictures_are_told_by_their_prompts(tmp_path, monkeypatch):
    # The second batch is a fifth cat and three dogs.
    broken = black([[1, 1, 1, 1], [0, 1, 0, 1]])
    monkeypatch.setattr(sample, "make_sampler", broken)
    with pytest.raises(UserError, match="NaN or infinite") as error:
        sample_mode(settings(), str(tmp_path))
    assert error.value.got == "2 of a batch, of the prompts 'cat', 'dog'"
    assert "config.sample.steps" in error.value.way_out
    assert "rewards.on_failure" not in str(error.value)
    left = {path.name for path in tmp_path.iterdir()}
    assert not {"dataset", ".dataset.part"} & left
    # Of the last batch only the first two are samples: the others fill it up.
    broken = black([[1] * 4, [1] * 4, [1, 1, 0, 0]])
    monkeypatch.setattr(sample, "make_sampler", broken)
    sample_mode(settings(), str(tmp_path))
    assert len(read_emoji(tmp_path / "dataset")[0]) == 10


# ---- a run judged again


class Features:
    """Stands in for the judge, which reads pictures of 32 pixels only."""

    size = 16

    @staticmethod
    def features(images):
        return images.reshape(len(images), -1)[:, :5]


def contents(folder):
    """The files of a workdir, but for the checkpoint, which is only read."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    beside = {"checkpoints", "evaluations"}
    return {p: p.read_bytes() for p in files if not beside & set(p.parts)}


def test_evaluating_again_replaces_nothing_of_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_judge", lambda: Features)
    save_epoch(settings(), tmp_path, 0.05)
    shown = tmp_path / "samples" / "evaluation_000001.png"
    shown.parent.mkdir()
    shown.write_bytes(b"what the report shows")
    before = contents(tmp_path)
    evaluate.evaluate_mode(settings(evaluate__pictures=3), str(tmp_path))
    said = capsys.readouterr()
    first = tmp_path / "evaluations" / "000001.png"
    assert f"pictures: {first}" in said.out and "epoch 1" in said.out
    assert said.err == ""  # keys of evaluate are free
    kept = first.read_bytes()
    more = settings(evaluate__pictures=2, sampler__steps=5)
    evaluate.evaluate_mode(more, str(tmp_path))
    said = capsys.readouterr()
    assert "sampler.steps: 4 there, 5 here" in said.err
    assert "evaluate.pictures" not in said.err
    names = sorted(path.name for path in first.parent.iterdir())
    assert names == ["000001.png", "000001_2.png"]
    assert first.read_bytes() == kept and contents(tmp_path) == before
