"""Rewards by name."""

import ml_collections
import numpy as np
import pytest

from ddrl_jax.errors import UserError
from ddrl_jax.rewards import registry
from ddrl_jax.rewards.compressibility import jpeg_kilobytes


def _config(weights, heldout=()):
    return ml_collections.ConfigDict(
        {"weights": weights, "heldout": heldout, "jpeg_upscale": 2}
    )


def test_the_names_of_a_configuration_become_rewards():
    config = _config({"incompressibility": 1.0}, ("compressibility",))
    rewards = registry.make_rewards(config)
    assert list(rewards) == ["incompressibility", "compressibility"]
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    size = jpeg_kilobytes(images, 2)
    np.testing.assert_array_equal(rewards["incompressibility"](images, "ab"), size)
    np.testing.assert_array_equal(rewards["compressibility"](images, "ab"), -size)


def test_only_the_names_asked_for_are_built():
    config = _config({"compressibility": 1.0}, ("retrieval",))
    names = tuple(config.weights)
    assert list(registry.make_rewards(config, names=names)) == ["compressibility"]


def test_the_upscale_is_the_configurations():
    config = _config({"compressibility": 1.0})
    config.jpeg_upscale = 5
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    found = registry.make_rewards(config)["compressibility"](images, "a")
    np.testing.assert_array_equal(found, -jpeg_kilobytes(images, 5))


def test_a_misspelt_name_lists_near_ones():
    with pytest.raises(UserError) as error:
        registry.make_rewards(_config({"compresibility": 1.0}))
    assert "'compresibility'" in error.value.got
    assert "did you mean compressibility" in error.value.way_out
    assert "retrieval" in error.value.wanted


def test_a_misspelt_heldout_name_is_found_too():
    with pytest.raises(UserError, match="did you mean retrieval"):
        registry.make_rewards(_config({"compressibility": 1.0}, ("retreival",)))


def test_a_caption_the_judge_does_not_know_is_found_before_training():
    rewards = registry.make_rewards(_config({"compressibility": 1.0}, ("retrieval",)))
    registry.check_prompts(rewards, ("sheep",))
    with pytest.raises(UserError) as error:
        registry.check_prompts(rewards, ("sheep", "a sheeep"))
    assert "'a sheeep'" in error.value.got and "sheep" in error.value.wanted


def test_a_new_reward_is_one_line(monkeypatch):
    def whiteness(images, prompts):
        return (images > 250).all(-1).mean((1, 2)).astype(np.float32)

    monkeypatch.setitem(registry.REWARDS, "whiteness", lambda *_: whiteness)
    rewards = registry.make_rewards(_config({"whiteness": 1.0}))
    page = np.full((1, 4, 4, 3), 255, np.uint8)
    np.testing.assert_array_equal(rewards["whiteness"](page, ["a"]), [1.0])
