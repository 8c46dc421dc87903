"""Alignment rewards: what is asked, what is scored, and what has no score."""

import math
import sys
import types

import ml_collections
import numpy as np
import pytest
from vlm_server import question_of, said, serving

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Reward
from ddrl_jax.rewards import alignment
from ddrl_jax.rewards.pool import RewardPool
from ddrl_jax.rewards.vlm import Refused

PICTURES = np.zeros((3, 16, 16, 3), np.uint8)
PROMPTS = ("a cat", "a dog", "an ant")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def rewards_section(url, timeout=30.0, **changes):
    vlm = {
        "base_url": url,
        "model": "judge",
        "api_key_env": "",
        "timeout": 5.0,
        "retries": 0,
        "backoff": 0.01,
        "threads": 1,
        "max_tokens": 64,
        "body": "",
        "scorer": "words",
        "bertscore_model": "none",
        "bertscore_layers": 0,
        "bertscore_device": "cpu",
        "questions": "counting",
        "match": "substring",
    }
    vlm.update(changes)
    return ml_collections.ConfigDict({"timeout": timeout, "vlm": vlm})


def test_the_reward_is_the_recall_of_ddpos_sentence():
    heard = []

    def scorer(answers, references):
        heard.append((list(answers), list(references)))
        return np.array([0.25, 0.5, 0.75], np.float32)

    with serving(lambda b, n: said(f"answer {n}")) as (url, seen):
        reward = alignment.vlm_alignment(rewards_section(url), scorer)
        assert isinstance(reward, Reward)
        scores = reward(PICTURES, PROMPTS)
    np.testing.assert_array_equal(scores, np.float32([0.25, 0.5, 0.75]))
    ((answers, references),) = heard
    assert answers == ["answer 0", "answer 1", "answer 2"]
    assert references == [f"The image contains {p}" for p in PROMPTS]
    assert {question_of(body) for body in seen.bodies} == {
        "Answer concisely: what is going on in this image?"
    }


def test_a_picture_without_an_answer_has_no_score():
    def reply(body, nth):
        return (500, "oops") if nth == 1 else said("a cat and an ant")

    with serving(reply) as (url, _):
        reward = alignment.vlm_alignment(rewards_section(url))
        scores = reward(PICTURES, PROMPTS)
    np.testing.assert_array_equal(scores, [1.0, np.nan, 1.0])
    assert reward.counters()["failures/status_500"] == 1


def test_the_scorer_is_not_asked_about_nothing():
    def scorer(answers, references):
        raise AssertionError

    with serving(lambda b, n: said("")) as (url, _):
        reward = alignment.vlm_alignment(rewards_section(url), scorer)
        assert np.isnan(reward(PICTURES, PROMPTS)).all()


def judged(reply, on_failure, scorer=None):
    """The scores of the three pictures through a pool."""
    with serving(reply) as (url, _):
        reward = alignment.vlm_alignment(rewards_section(url), scorer)
        with RewardPool({"vlm": reward}, 1, 30.0, on_failure) as pool:
            return pool.collect([pool.submit(PICTURES, PROMPTS)]), pool.failures


def test_the_pool_leaves_unanswered_pictures_out_or_stops(caplog):
    def reply(body, nth):
        return (200, "<html>") if nth == 1 else said("a cat and an ant")

    scores, failures = judged(reply, "mask")
    np.testing.assert_array_equal(scores.valid, [True, False, True])
    assert failures == {"vlm": 1}
    (told,) = caplog.messages
    assert "1 of 3 pictures" in told and "not_json" in told
    with pytest.raises(UserError, match=r"failed on samples \[1\]") as error:
        judged(reply, "error")
    assert len(caplog.messages) == 1  # the error says all of it
    assert "not_json: b'<html>'" in error.value.got and "nan" not in error.value.got
    assert "endpoint" in error.value.way_out and "vlm.retries" in error.value.way_out


def test_a_scorer_without_a_number_is_not_put_on_the_endpoint():
    with pytest.raises(UserError, match="one finite number") as error:
        judged(lambda b, n: said("a cat"), "error", scorer=lambda *_: [np.nan] * 3)
    assert error.value.got == "nan, nan, nan"


def test_a_refused_key_is_the_pools_message():
    """Also under masking: no later batch can fare better."""
    for on_failure in ("error", "mask"):
        with pytest.raises(Refused, match="refuses no key"):
            judged(lambda b, n: (401, "who are you"), on_failure)


# ---- the strict variant ----

COUNTING = {
    "How many cats are there in this image?": "I see two.",
    "What animal is in this image?": "Some DOGS, I think",
    "How many dogs are there in this image?": "Three",
}


def right_answers(reply, prompts, **changes):
    with serving(reply) as (url, seen):
        section = rewards_section(url, **changes)
        reward = alignment.vlm_questions(section)
        reward.check_prompts(prompts)
        assert isinstance(reward, Reward)
        return reward(PICTURES[: len(prompts)], prompts), seen


def test_the_share_of_right_answers():
    def reply(body, nth):
        return said(COUNTING[question_of(body)])

    prompts = ("two cats", "three dogs", "two dogs")
    scores, seen = right_answers(reply, prompts)
    np.testing.assert_array_equal(scores, [0.5, 1.0, 0.5])
    assert len(seen.bodies) == 6
    scores, _ = right_answers(reply, prompts, match="word")
    np.testing.assert_array_equal(scores, [0.5, 0.5, 0.0])


def test_a_missing_answer_is_not_a_wrong_one():
    def reply(body, nth):
        return (500, "") if nth == 1 else said("two cats")

    scores, _ = right_answers(reply, ("two cats", "two cats"))
    np.testing.assert_array_equal(scores, [np.nan, 1.0])


def test_prompts_without_questions_are_found_before_training():
    reward = alignment.vlm_questions(rewards_section("http://127.0.0.1:9"))
    with pytest.raises(UserError, match="have no questions"):
        reward.check_prompts(("a cat",))


def test_prompts_without_a_word_that_counts_are_found_before_training():
    section = rewards_section("http://127.0.0.1:9")
    alignment.vlm_alignment(section).check_prompts(PROMPTS)
    silent = (*PROMPTS, "\U0001f981", "the image", "\U0001f981")
    with pytest.raises(UserError, match="2 prompts have no word") as error:
        alignment.vlm_alignment(section).check_prompts(silent)
    assert error.value.got == "'\U0001f981', 'the image'"
    # a scorer that reads sentences can judge them
    alignment.vlm_alignment(section, lambda *_: np.zeros(1)).check_prompts(silent)


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [
        (alignment.vlm_questions, {"match": "regex"}, "matched like this"),
        (alignment.vlm_questions, {"questions": "nothing"}, "question file"),
        (alignment.vlm_alignment, {"scorer": "bleu"}, "no such scorer"),
        (alignment.vlm_alignment, {"model": ""}, "no vision-language model"),
    ],
)
def test_settings_that_make_no_sense(build, changes, message):
    with pytest.raises(UserError, match=message):
        build(rewards_section("http://127.0.0.1:9", **changes))


def test_the_check_asks_the_endpoint():
    with serving(lambda b, n: said("white")) as (url, seen):
        alignment.vlm_alignment(rewards_section(url)).check()
        alignment.vlm_questions(rewards_section(url)).check()
    assert len(seen.bodies) == 2


# ---- scorers ----


def test_word_recall():
    cases = {
        ("A dog is riding a bike.", "The image contains a dog riding a bike"): 1.0,
        (
            "A dog",
            "The image contains a dog riding a bike",
        ): 0.5,  # of a dog riding bike
        ("The image contains", "The image contains a cat"): 0.0,
        ("", "The image contains a cat"): 0.0,
        ("a caf\u00e9", "The image contains a cafe\u0301"): 1.0,
        ("A CAFE\u0301", "The image contains a caf\u00e9"): 1.0,
        ("a lion", "The image contains \U0001f981"): np.nan,
        ("the image", "The image contains the image"): np.nan,
    }
    answers, references = zip(*cases, strict=True)
    found = alignment.word_recall(answers, references)
    np.testing.assert_allclose(found, list(cases.values()))
    assert found.dtype == np.float32


def test_without_bert_score_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(UserError, match="bert-score") as error:
        alignment.bertscore_recall()
    assert "pip install -e '.[alignment]'" in error.value.way_out


class FakeScorer:
    """Stands where bert_score.BERTScorer would: keeps what it is given."""

    made: list = []

    def __init__(self, model, **settings):
        if model == "absent":
            raise OSError("not in the cache")
        self.model, self.settings = model, settings
        self._tokenizer = types.SimpleNamespace(model_max_length=int(1e30))
        self.made.append(self)

    def score(self, candidates, references):
        count = np.arange(len(candidates))
        return 0.1 + count, 0.2 + count, 0.3 + count  # precision, recall, F1


@pytest.fixture
def fake_bert_score(monkeypatch):
    module = types.SimpleNamespace(BERTScorer=FakeScorer)
    monkeypatch.setitem(sys.modules, "bert_score", module)
    monkeypatch.setattr(FakeScorer, "made", [])
    return FakeScorer


def test_bert_score_is_asked_for_ddpos_recall(fake_bert_score):
    section = rewards_section(
        "http://127.0.0.1:9", scorer="bertscore", bertscore_model=alignment.MODEL
    )
    reward = alignment.vlm_alignment(section)
    (scorer,) = fake_bert_score.made
    assert scorer.model == "microsoft/deberta-xlarge-mnli"
    assert scorer.settings["idf"] is scorer.settings["rescale_with_baseline"] is False
    assert scorer.settings["num_layers"] is None  # bert-score's own choice: 40
    assert scorer.settings["device"] == "cpu"  # or it takes CUDA where torch sees it
    assert scorer._tokenizer.model_max_length == 512
    found = reward.scorer(["a", "b"], ["c", "d"])
    np.testing.assert_allclose(found, [0.2, 1.2], rtol=1e-6)


def test_a_model_that_can_not_be_loaded(fake_bert_score):
    with pytest.raises(UserError, match="'absent'") as error:
        alignment.bertscore_recall("absent")
    assert "hf download absent" in error.value.way_out
    assert "not in the cache" in error.value.got


@pytest.mark.parametrize(("layers", "device"), [(99, "cpu"), (1, "cuda")])
def test_layers_or_a_device_that_are_not_there(layers, device, tiny_encoder):
    if pytest.importorskip("torch").cuda.is_available() and device == "cuda":
        pytest.skip("the device is there")
    with pytest.raises(UserError, match="AssertionError: ") as error:
        alignment.bertscore_recall(tiny_encoder, layers, device)
    for key in ("bertscore_layers", "bertscore_device"):
        assert key in error.value.way_out


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory):
    """A random DeBERTa of two layers over bytes, as transformers writes it."""
    pytest.importorskip("bert_score")
    transformers = pytest.importorskip("transformers")
    from tokenizers.pre_tokenizers import ByteLevel

    folder = str(tmp_path_factory.mktemp("deberta"))
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    vocab = {t: i for i, t in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    transformers.DebertaTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    config = transformers.DebertaConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_position_embeddings=64,
        initializer_range=1.0,
    )
    transformers.DebertaModel(config).save_pretrained(folder)
    return folder


def test_bert_score_itself_gives_the_recall_of_its_paper(tiny_encoder):
    """Equation 2 of arXiv 1904.09675 in NumPy, [CLS] and [SEP] without weight.

    One pair at a time: in a batch, bert-score gives padding a similarity of 0, which
    wins over the negative ones of random weights.
    """
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_encoder)
    model = transformers.AutoModel.from_pretrained(tiny_encoder).eval()

    def states(text):
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            found = model(ids, output_hidden_states=True).hidden_states[1][0].numpy()
        return found / np.linalg.norm(found, axis=-1, keepdims=True)

    answers = ["A dog.", "a cat that plays chess with another cat", "x"]
    references = [f"The image contains {p}" for p in ("a dog", "a cat", "an ant")]
    expected = []
    for answer, reference in zip(answers, references, strict=True):
        similarity = states(reference)[1:-1] @ states(answer).T
        expected.append(similarity.max(axis=1).mean())
    scorer = alignment.bertscore_recall(tiny_encoder, 1)
    pairs = zip(answers, references, strict=True)
    found = np.concatenate([scorer([a], [r]) for a, r in pairs])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.dtype == np.float32 and all(map(math.isfinite, found))
