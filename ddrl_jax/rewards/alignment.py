"""Alignment of picture and prompt as a vision-language model sees it.

DDPO (arXiv 2305.13301, section 5.2): the model says what is going on in the picture,
and the reward is how much of "The image contains {prompt}" its answer recalls
(BERTScore). The strict variant asks questions and counts right answers.
"""

import importlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from ddrl_jax.errors import UserError
from ddrl_jax.rewards.endpoint import endpoint_of
from ddrl_jax.rewards.questions import (
    SHOWN,
    Question,
    folded,
    is_right,
    questions_of,
    read_questions,
)
from ddrl_jax.rewards.vlm import VlmClient

QUESTION = "Answer concisely: what is going on in this image?"
REFERENCE = "The image contains {}"
MODEL = "microsoft/deberta-xlarge-mnli"
# What the encoders of BERTScore were trained with. The tokenizer of DeBERTa names no
# limit, and its stand-in of 1e30 overflows in current transformers.
LONGEST = 512
MATCHES = ("substring", "word")

# (answers, references) -> recall [b]
Scorer = Callable[[Sequence[str], Sequence[str]], Float[np.ndarray, " b"]]


class Alignment(NamedTuple):
    """A Reward: recall of the prompt in what the model says of the picture.

    Attributes:
      client: asks the model.
      scorer: compares its answers with the reference sentences.
    """

    client: VlmClient
    scorer: Scorer

    def __call__(
        self, images: UInt8[np.ndarray, "b h w c"], prompts: Sequence[str]
    ) -> Float[np.ndarray, " b"]:
        """Returns the recall of each picture's prompt, NaN where no answer came."""
        answers = [
            row[0] for row in self.client.ask_all(images, [[QUESTION]] * len(images))
        ]
        scores = np.full(len(images), np.nan, np.float32)
        told = [i for i, answer in enumerate(answers) if answer is not None]
        if told:
            candidates = [answers[i] or "" for i in told]
            references = [REFERENCE.format(prompts[i]) for i in told]
            scores[told] = self.scorer(candidates, references)
        return scores

    def check(self) -> None:
        """Asks the endpoint one question; see `VlmClient.check_endpoint`."""
        self.client.check_endpoint()

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises UserError if words are counted and a prompt has none that counts."""
        if self.scorer is word_recall:
            _check_words(prompts)

    def counters(self) -> dict[str, int]:
        """Returns requests, retries and failures so far, see `VlmClient.counters`."""
        return self.client.counters()

    def why_missing(self) -> UserError | None:
        """Says why pictures have no score; the pool only sees that they have none."""
        return self.client.why_missing()


class RightAnswers(NamedTuple):
    """A Reward: the share of a prompt's questions that the model answers right.

    Attributes:
      client: asks the model.
      table: prompt -> its questions.
      match: see `questions.is_right`.
    """

    client: VlmClient
    table: Mapping[str, tuple[Question, ...]]
    match: str = "substring"

    def __call__(
        self, images: UInt8[np.ndarray, "b h w c"], prompts: Sequence[str]
    ) -> Float[np.ndarray, " b"]:
        """Returns the share of each picture, NaN where an answer is missing."""
        asked = questions_of(self.table, prompts)
        texts = [[q.text for q in questions] for questions in asked]
        answers = self.client.ask_all(images, texts)
        pairs = zip(asked, answers, strict=True)
        scores = np.array([self._share(*pair) for pair in pairs], np.float32)
        return scores

    def check(self) -> None:
        """Asks the endpoint one question; see `VlmClient.check_endpoint`."""
        self.client.check_endpoint()

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises UserError unless every prompt has questions."""
        questions_of(self.table, prompts)

    def counters(self) -> dict[str, int]:
        """Returns requests, retries and failures so far, see `VlmClient.counters`."""
        return self.client.counters()

    def why_missing(self) -> UserError | None:
        """Says why pictures have no score; the pool only sees that they have none."""
        return self.client.why_missing()

    def _share(
        self, questions: Sequence[Question], answers: Sequence[str | None]
    ) -> float:
        if None in answers:  # a share of fewer questions would be another reward
            return np.nan
        pairs = zip(questions, answers, strict=True)
        return float(
            np.mean([is_right(a or "", q.words, self.match) for q, a in pairs])
        )


def vlm_alignment(config: Any, scorer: Scorer | None = None) -> Alignment:
    """Builds DDPO's alignment reward from the `rewards` section.

    Args:
      config: vlm (see `endpoint.endpoint_of`; scorer, and bertscore_model, _layers
        and _device) and timeout.
      scorer: in place of the one that the configuration names.

    Raises:
      UserError: a setting makes no sense, or BERTScore can not be had.
    """
    client = VlmClient(endpoint_of(config.vlm, config.timeout))
    if scorer is not None:
        return Alignment(client, scorer)
    if config.vlm.scorer == "words":
        return Alignment(client, word_recall)
    if config.vlm.scorer != "bertscore":
        raise UserError(
            "there is no such scorer of answers",
            got=f"rewards.vlm.scorer={config.vlm.scorer!r}",
            wanted="'bertscore' (as in DDPO) or 'words' (share of the prompt's words"
            " that the answer has)",
            way_out="change --config.rewards.vlm.scorer",
        )
    vlm = config.vlm
    layers, device = vlm.bertscore_layers or None, vlm.bertscore_device
    return Alignment(client, bertscore_recall(vlm.bertscore_model, layers, device))


def vlm_questions(config: Any) -> RightAnswers:
    """Builds the strict reward from the `rewards` section.

    Args:
      config: vlm (see `endpoint.endpoint_of`; questions and match) and timeout.

    Raises:
      UserError: a setting makes no sense, or the question file can not be read.
    """
    if config.vlm.match not in MATCHES:
        raise UserError(
            "answers can not be matched like this",
            got=f"rewards.vlm.match={config.vlm.match!r}",
            wanted="'substring' (as in DDPO) or 'word' (whole words only)",
            way_out="change --config.rewards.vlm.match",
        )
    client = VlmClient(endpoint_of(config.vlm, config.timeout))
    return RightAnswers(client, read_questions(config.vlm.questions), config.vlm.match)


def bertscore_recall(
    model: str = MODEL, layers: int | None = None, device: str = "cpu"
) -> Scorer:
    """Loads BERTScore (Zhang et al., arXiv 1904.09675) without idf or rescaling.

    R = mean over the reference's tokens of the largest cosine similarity to a token of
    the candidate, on the hidden states of one layer.

    Args:
      model: a model on the hub or a local folder.
      layers: whose output is compared; None: the one that bert-score recommends.
      device: of PyTorch. JAX takes most memory of the devices it sees for itself.

    Raises:
      UserError: bert-score is not installed, or the model can not be loaded.
    """
    try:
        # by name: whether it is installed is no matter of the type checker
        BERTScorer = importlib.import_module("bert_score").BERTScorer
    except ImportError as e:
        raise UserError(
            "the alignment reward needs the package bert-score",
            got=f"{type(e).__name__}: {e}",
            wanted="bert-score with PyTorch and transformers",
            way_out="pip install -e '.[alignment]' in the checkout, or"
            " --config.rewards.vlm.scorer=words",
        ) from e
    try:
        scorer = BERTScorer(
            model,
            num_layers=layers,
            device=device,
            idf=False,
            rescale_with_baseline=False,
            use_fast_tokenizer=True,
        )
    # bert-score asserts that there are so many layers, PyTorch that it has the device
    except (OSError, KeyError, ValueError, RuntimeError, AssertionError) as e:
        raise UserError(
            f"the model {model!r} of BERTScore can not be loaded",
            got=f"{type(e).__name__}: {str(e)[:300]}",
            wanted="a model in the hub's cache or a local folder; one that bert-score"
            " does not know needs rewards.vlm.bertscore_layers",
            way_out=f"run once with network access: hf download {model}; or correct"
            " --config.rewards.vlm.bertscore_model, .bertscore_layers (0: the one that"
            " bert-score recommends) or .bertscore_device",
        ) from e
    tokenizer = scorer._tokenizer
    tokenizer.model_max_length = min(tokenizer.model_max_length, LONGEST)
    lock = threading.Lock()  # a model and tokenizer that threads may not share

    def recall(
        answers: Sequence[str], references: Sequence[str]
    ) -> Float[np.ndarray, " b"]:
        with lock:
            _, found, _ = scorer.score(list(answers), list(references))
        return np.asarray(found, np.float32)

    return recall


def word_recall(
    answers: Sequence[str], references: Sequence[str]
) -> Float[np.ndarray, " b"]:
    """Returns the share of each prompt's words that its answer has too.

    The words that all references share do not count; where no word is left there is no
    share, but NaN. A stand-in for BERTScore that needs no model: synonyms count as
    misses.
    """
    pairs = zip(answers, references, strict=True)
    shares = [_share(_words(a), _words_that_count(r)) for a, r in pairs]
    return np.array(shares, np.float32)


def _check_words(prompts: Sequence[str]) -> None:
    silent = [p for p in dict.fromkeys(prompts) if not _words_that_count(p)]
    if silent:
        raise UserError(
            f"{len(silent)} prompts have no word that an answer could have too",
            got=", ".join(map(repr, silent[:SHOWN])),
            wanted="for --config.rewards.vlm.scorer=words a word other than"
            f" those of {REFERENCE.format('...')!r} in each",
            way_out="change them, or set --config.rewards.vlm.scorer=bertscore",
        )


def _words_that_count(text: str) -> set[str]:
    return _words(text) - _words(REFERENCE.format(""))


def _words(text: str) -> set[str]:
    kept = "".join(c if c.isalnum() else " " for c in folded(text))
    return set(kept.split())


def _share(found: set[str], wanted: set[str]) -> float:
    return len(found & wanted) / len(wanted) if wanted else np.nan
