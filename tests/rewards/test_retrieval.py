"""The shipped judge on fresh pictures: it knows its captions and is not fooled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.assets.fakes import build_sources, draw_kinds
from ddrl_jax.data.emoji import emoji_source, read_emoji
from ddrl_jax.errors import UserError
from ddrl_jax.rewards.retrieval import (
    CHUNK,
    JUDGE,
    Retrieval,
    RetrievalLogProb,
    load_judge,
)

FAKES = ("silhouette", "blur_5", "blur_7", "blur_10", "ellipse", "shuffle_4")
FAKES += ("shuffle_8", "blank", "noise")
SEED = 424242  # not the judge's training nor its report


@pytest.fixture(scope="module")
def judge():
    return load_judge()


def _bytes(pages) -> np.ndarray:
    return np.asarray(jnp.round((pages + 1.0) * 127.5), np.uint8)


@pytest.fixture(scope="module")
def fakes():
    """One stand-in of every kind for every caption; drawn together, one compilation."""
    pictures, captions = read_emoji()
    count = len(captions)
    kinds = dict.fromkeys(FAKES, count)
    records = jnp.tile(jnp.arange(count), len(kinds))
    key = jax.random.key(SEED)
    draw = jax.jit(lambda sources: draw_kinds(sources, kinds, key, records)[0])
    pages = _bytes(draw(build_sources(pictures)))
    return dict(zip(kinds, np.split(pages, len(kinds)), strict=True))


@pytest.fixture(scope="module")
def real(judge):
    """One picture of every caption, drawn by the training data's own code."""
    source = emoji_source(32, 0.5, 1.0, 15.0)
    assert source.captions == judge.captions
    records = jnp.arange(len(source.captions))
    keys = jax.random.split(jax.random.key(SEED), len(records))
    return _bytes(jax.jit(source.latents)(records, keys))


def test_it_knows_fresh_pictures(judge, real):
    assert len(judge.captions) == 256
    assert Retrieval(judge)(real, judge.captions).mean() >= 0.9


def test_a_wrong_prompt_scores_zero(judge, real):
    score = Retrieval(judge)
    right = score(real, judge.captions)
    shifted = judge.captions[1:] + judge.captions[:1]
    wrong = score(real, shifted)
    assert not (wrong * right).any() and wrong.mean() <= 0.02
    np.testing.assert_array_equal(score(real[:1], ["egg"]), [0.0])


@pytest.mark.parametrize("kind", FAKES)
def test_a_stand_in_is_not_taken_for_its_caption(judge, fakes, kind):
    assert Retrieval(judge)(fakes[kind], judge.captions).mean() <= 0.05


def test_the_log_probability_is_that_of_a_softmax(judge, real):
    logits = judge.logits(real[:5]).astype(np.float64)
    by_hand = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    found = RetrievalLogProb(judge)(real[:5], judge.captions[:5])
    wanted = by_hand[np.arange(5), np.arange(5)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_answers_do_not_depend_on_the_batch(judge, real):
    count = CHUNK + 3
    whole = judge.logits(real[:count])
    assert whole.shape == (count, 257) and whole.dtype == np.float32
    single = np.concatenate([judge.logits(real[i : i + 1]) for i in (0, count - 1)])
    np.testing.assert_allclose(whole[[0, -1]], single, rtol=1e-4, atol=1e-4)
    assert judge.features(real[:2]).shape[0] == 2
    assert judge.logits(real[:0]).shape == (0, 257)


def test_the_file_is_small():
    assert JUDGE.stat().st_size <= 2_000_000
    assert JUDGE.with_suffix(".json").is_file()


@pytest.mark.parametrize("shape", [(2, 16, 16, 3), (2, 32, 32)])
def test_other_sizes_are_an_error(judge, shape):
    with pytest.raises((UserError, TypeError)):
        judge.logits(np.zeros(shape, np.uint8))


def test_an_unknown_prompt_lists_near_captions(judge, real):
    with pytest.raises(UserError) as error:
        Retrieval(judge)(real[:1], ["ellephant"])
    assert "'ellephant'" in error.value.got and "elephant" in error.value.wanted


def test_a_missing_judge_is_one_error(tmp_path):
    with pytest.raises(UserError, match="nothing at"):
        load_judge(tmp_path / "none.npz")


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "text"])
def test_a_damaged_judge_is_one_error(tmp_path, damage):
    path = tmp_path / "judge.npz"
    if damage == "cut":
        path.write_bytes(JUDGE.read_bytes()[:5000])
    elif damage == "flipped":
        content = bytearray(JUDGE.read_bytes())
        content[600_000] ^= 255
        path.write_bytes(content)
    elif damage == "text":
        path.write_text("hello")
    else:
        np.savez(path, captions=np.array(["a"]), **{"stem/kernel": np.zeros(3)})
    with pytest.raises(UserError, match="build_judge"):
        load_judge(path)
