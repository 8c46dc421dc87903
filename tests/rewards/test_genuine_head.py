"""The published aesthetic head itself, where it lies beside the repository.

The file is not part of the project: ../shared/data/laion_aesthetic_head.pth. The
expected numbers are of DDPO's PyTorch code on the same file, in float32.
"""

import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.rewards.aesthetic import aesthetic_score, read_head

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT.parent / "shared" / "data" / "laion_aesthetic_head.pth"
WIDTH = 768

pytestmark = pytest.mark.skipif(not FILE.is_file(), reason=f"there is no {FILE}")


@pytest.fixture(scope="module")
def head():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its bytes are the published ones
        return read_head(FILE)


def collapsed(head):
    """(w, b) of score = w e + b, in float64: W5 W4 W3 W2 W1 and what biases become."""
    w, b = np.eye(WIDTH), np.zeros(WIDTH)
    for weight, bias in head:
        weight, bias = np.asarray(weight, np.float64), np.asarray(bias, np.float64)
        w, b = weight @ w, weight @ b + bias
    return w[0], b[0]


def unit(vectors) -> np.ndarray:
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def scores(head, e) -> np.ndarray:
    return np.asarray(aesthetic_score(head, jnp.asarray(e, jnp.float32)))


def test_it_has_the_published_layers(head):
    assert [weight.shape for weight, _ in head] == [
        (1024, 768),
        (128, 1024),
        (64, 128),
        (16, 64),
        (1, 16),
    ]
    assert sum(leaf.size for layer in head for leaf in layer) == 927_969


def test_the_score_of_the_normalised_vector_of_ones(head):
    found = scores(head, unit(np.ones((1, WIDTH))))
    np.testing.assert_allclose(found, [4.88328485], rtol=0, atol=5e-6)


def test_its_affine_collapse_has_the_stated_size(head):
    w, b = collapsed(head)
    assert np.linalg.norm(w) == pytest.approx(17.9956, abs=5e-5)
    assert b == pytest.approx(5.23665, abs=5e-6)


def test_the_five_layers_are_their_collapse(head):
    w, b = collapsed(head)
    e = unit(np.random.default_rng(0).normal(size=(64, WIDTH)))
    np.testing.assert_allclose(scores(head, e), e @ w + b, rtol=0, atol=1e-5)
    # The best and the worst direction: 5.24 + 18 and 5.24 - 18.
    far = np.stack([w, -w]) / np.linalg.norm(w)
    np.testing.assert_allclose(scores(head, far), far @ w + b, rtol=1e-5)
