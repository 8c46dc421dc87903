"""What belongs together in an evaluation: picture, prompt, group, record and noise."""

import jax
import numpy as np
import pytest
from tiny_runs import WORDS, flat_source, tiny_program

from ddrl_jax import evaluate
from ddrl_jax.draws import draw_records
from ddrl_jax.rewards.diversity import diversity
from ddrl_jax.rewards.registry import make_rewards

SAMPLES = 6
TEXTS = [*WORDS, *WORDS[:2]]
OWN = {
    "data.source": "emoji",
    "data_term.weight": 0.5,
    "data_term.captions": "own",
    "data.heldout": 4,
}
CAPTIONS = ("cat", "dog", "dog", "cat", "red apple", "dog", "cat", "shaved ice")


class Features:
    """Stands in for the judge: the first five numbers of a picture."""

    size = 16

    @staticmethod
    def features(images):
        return images.reshape(len(images), -1)[:, :5]


@pytest.fixture(scope="module")
def program():
    return tiny_program({"evaluate.samples": SAMPLES}, flat_source())


@pytest.fixture
def evaluation(program, monkeypatch):
    monkeypatch.setattr(evaluate, "load_judge", lambda: Features)
    config = program.config.copy_and_resolve_references()
    config.rewards.on_failure = "mask"
    judges = make_rewards(config.rewards)
    return evaluate.Evaluation(program._replace(config=config), judges)


def noise(seed):
    """Pictures of which the first number is that of the sample."""
    images = np.random.default_rng(seed).integers(0, 256, (SAMPLES, 16, 16, 3))
    images[:, 0, 0, 0] = np.arange(SAMPLES)
    return images.astype(np.uint8)


def test_a_picture_is_judged_by_its_own_prompt(evaluation):
    seen = {}

    def judge(images, prompts):
        seen.update(zip(images[:, 0, 0, 0].tolist(), prompts, strict=True))
        return np.zeros(len(images), np.float32)

    evaluation.judges = {"compressibility": judge}
    evaluation.judged(noise(0))
    assert [seen[number] for number in range(SAMPLES)] == TEXTS


@pytest.mark.parametrize("lost", [None, 2])
def test_diversity_is_within_the_pictures_of_a_prompt(evaluation, lost):
    images, groups = noise(1), np.asarray([0, 1, 2, 3, 0, 1])
    finite = np.arange(SAMPLES) != lost
    found = evaluation.judged(images, finite)
    wanted = diversity(Features.features(images[finite]), groups[finite])
    assert len({*wanted.values()}) == 2
    assert {k: found[f"diversity/{k}"] for k in wanted} == pytest.approx(wanted)


def asked(program, monkeypatch, count):
    """(keys, cond, records) that the loss of `count` data samples is asked about."""
    config = program.config.copy_and_resolve_references()
    config.evaluate.data_samples = count
    found = evaluate.Evaluation(program._replace(config=config), {})
    rows = []

    def noted(params, frozen, keys, cond, records):
        rows.append((jax.random.key_data(keys), cond.emb, records))
        return np.zeros(len(records))

    monkeypatch.setattr(found, "_loss", noted)
    found.data_loss(program.new_state().params)
    parts = [np.concatenate(part)[:count] for part in zip(*rows, strict=True)]
    keys, emb, records = parts
    root = jax.random.fold_in(jax.random.key(config.seed), evaluate.DATA_STREAM)
    own = [jax.random.key_data(jax.random.fold_in(root, i)) for i in range(count)]
    np.testing.assert_array_equal(keys, own)
    return emb, records


def test_a_record_is_told_by_its_prompt_with_noise_of_its_own(program, monkeypatch):
    emb, records = asked(program, monkeypatch, SAMPLES)
    # of flat_source record i is the one picture of prompt i
    np.testing.assert_array_equal(records, [0, 1, 2, 3, 0, 1])
    np.testing.assert_array_equal(emb, program.pipeline.encode(tuple(TEXTS)).emb)


def test_the_heldout_loss_is_of_records_that_are_held_out(monkeypatch):
    program = tiny_program(OWN, flat_source(captions=CAPTIONS))
    emb, records = asked(program, monkeypatch, 64)
    assert set(records) == {4, 5, 6, 7}
    texts = tuple(CAPTIONS[record] for record in records)
    np.testing.assert_array_equal(emb, program.pipeline.encode(texts).emb)
    index = np.zeros(64, np.int32)  # and training draws none of these
    assert max(draw_records(program, index, 0)[0]) < 4
