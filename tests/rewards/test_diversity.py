"""Diversity of pictures, worked out by hand."""

import numpy as np
import pytest

from ddrl_jax.rewards.diversity import diversity, pixel_diversity


def test_cosine_distances_by_hand():
    # lengths differ on purpose: only directions count
    features = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-1.0, 0.0]])
    found = diversity(features, np.array([0, 0, 1, 1]))
    half = np.sqrt(0.5)
    assert found["within_prompt"] == pytest.approx((1 + (1 + half)) / 2)
    # pairs 0-2, 0-3, 1-2, 1-3
    across = ((1 - half) + 2 + (1 - half) + 1) / 4
    assert found["across_prompts"] == pytest.approx(across)


def test_copies_of_one_picture_have_no_diversity_within():
    features = np.repeat(np.array([[1.0, 2.0], [2.0, -1.0]]), 3, 0)
    found = diversity(features, np.array([0, 0, 0, 1, 1, 1]))
    assert found["within_prompt"] == pytest.approx(0, abs=1e-12)
    assert found["across_prompts"] == pytest.approx(1)


def test_a_kind_without_pairs_is_left_out():
    features = np.eye(3)
    assert set(diversity(features, np.arange(3))) == {"across_prompts"}
    assert set(diversity(features, np.zeros(3, int))) == {"within_prompt"}
    assert diversity(features[:1], np.zeros(1, int)) == {}


def test_a_feature_of_zeros_is_not_nan():
    found = diversity(np.array([[0.0, 0.0], [1.0, 0.0]]), np.zeros(2, int))
    assert found["within_prompt"] == 1.0


def test_pixel_distance_by_hand():
    images = np.zeros((3, 2, 2, 1), np.uint8)
    images[1] = 255
    images[2, 0] = 255  # half of the pixels
    found = pixel_diversity(images, np.array([0, 0, 1]))
    assert found["pixel_within_prompt"] == pytest.approx(1)
    assert found["pixel_across_prompts"] == pytest.approx(np.sqrt(0.5))
