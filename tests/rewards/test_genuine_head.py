"""The published aesthetic head: its affine collapse everywhere, itself where it lies.

The file is not part of the project: ../shared/data/laion_aesthetic_head.pth. What it
collapses to is, in aesthetic_collapse.npy: w and then b of score = w e + b, 769 float32
(see NOTICE). The expected numbers are of DDPO's PyTorch code on the file, in float32.
"""

import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ddrl_jax.rewards.aesthetic import aesthetic_score, read_head

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT.parent / "shared" / "data" / "laion_aesthetic_head.pth"
COLLAPSE = Path(__file__).with_name("aesthetic_collapse.npy")
WIDTH = 768
WIDTHS = (WIDTH, 1024, 128, 64, 16, 1)


@pytest.fixture(scope="module")
def head():
    """The file's five layers."""
    if not FILE.is_file():
        pytest.skip(f"there is no {FILE}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its bytes are the published ones
        return read_head(FILE)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """Five layers of the published shapes, random but for what they collapse to."""
    w, b = stated()
    random = np.random.default_rng(1)
    pairs = list(zip(WIDTHS[1:], WIDTHS, strict=False))
    layers = [[random.normal(size=s) / s[1] ** 0.5, np.zeros(s[0])] for s in pairs]
    for layer in layers[:-1]:
        layer[1] = random.normal(size=layer[1].shape)
    rest = np.linalg.multi_dot([layer[0] for layer in layers[:0:-1]])  # W5 W4 W3 W2
    side = rest[0] / (rest[0] @ rest[0])  # rest @ side is 1
    layers[0][0] += np.outer(side, w - rest[0] @ layers[0][0])
    layers[-1][1] += b - collapsed(layers)[1]
    names = zip((0, 2, 4, 6, 7), layers, strict=True)
    tensors = {
        f"layers.{i}.{leaf}": value.astype(np.float32)
        for i, layer in names
        for leaf, value in zip(("weight", "bias"), layer, strict=True)
    }
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_file(tensors, path)
    return read_head(path)


@pytest.fixture(params=["stand_in", "head"])
def layers(request):
    """Either of the two: all that follows from the collapse is the same of both."""
    return request.getfixturevalue(request.param)


def stated():
    """(w, b) of the published head, in float64."""
    found = np.load(COLLAPSE).astype(np.float64)
    assert found.shape == (WIDTH + 1,)
    return found[:WIDTH], found[WIDTH]


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


def test_the_stated_collapse_is_that_of_the_file(head):
    for found, wanted in zip(stated(), collapsed(head), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-7)


def test_the_collapse_has_the_published_size():
    w, b = stated()
    assert np.linalg.norm(w) == pytest.approx(17.9956, abs=5e-5)
    assert b == pytest.approx(5.23665, abs=5e-6)


def test_the_score_of_the_normalised_vector_of_ones(layers):
    found = scores(layers, unit(np.ones((1, WIDTH))))
    np.testing.assert_allclose(found, [4.88328485], rtol=0, atol=5e-6)


def test_the_five_layers_are_their_collapse(layers):
    w, b = stated()
    e = unit(np.random.default_rng(0).normal(size=(64, WIDTH)))
    np.testing.assert_allclose(scores(layers, e), e @ w + b, rtol=0, atol=1e-5)
    # The best and the worst direction: 5.24 + 18 and 5.24 - 18.
    far = np.stack([w, -w]) / np.linalg.norm(w)
    np.testing.assert_allclose(scores(layers, far), far @ w + b, rtol=1e-5)
