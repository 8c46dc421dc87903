"""What each key of the configuration accepts, and what is said when it does not."""

import pytest
from edited_config import configured, refused
from ml_collections import ConfigDict

from configs import base
from ddrl_jax.check_config import check_config
from ddrl_jax.config_rules import RULES, flatten, near
from ddrl_jax.errors import UserError
from ddrl_jax.models import remat
from ddrl_jax.objectives import advantages, data, policy


def test_the_defaults_pass_and_every_key_has_a_rule():
    check_config(base.get_config(), 1)
    assert set(flatten(base.get_config())) == set(RULES)


def wrong_values(path: str) -> list:
    """Values that this key can not have, by the kind of its default."""
    default, rule = flatten(base.get_config())[path], RULES[path]
    if rule.names and isinstance(default, str):
        return [None, 1, "", default.upper(), default + "s"]
    if isinstance(default, bool):
        return [None, 0, 1, "true"]
    if isinstance(default, int):
        return [None, True, 1.5, "1", -2, float("nan")]
    if isinstance(default, float):
        return [None, "1", -0.5, float("nan"), float("inf"), float("-inf")]
    if isinstance(default, tuple):
        return [None, "compressibility", 3, (None,), (-1,), (1.5,), (1, 1), ("", "")]
    if isinstance(default, ConfigDict):
        wrong = ({"compressibility": -1.0}, {"x": True}, {"x": 10**400})
        return [None, ("compressibility",), *wrong]
    return [None, 1, ("a",)]


@pytest.mark.parametrize("path", RULES)
def test_a_key_refuses(path):
    for value in wrong_values(path):
        error = refused({path: value})
        assert path in error.what, value
        assert repr(value) in str(error.got), value
        assert error.wanted == RULES[path].wanted
        assert path in error.way_out


def test_true_is_no_number():
    numbers = [p for p in RULES if "number" in RULES[p].wanted]
    assert len(numbers) > 60
    assert not [p for p in numbers if RULES[p].accepts(True)]


@pytest.mark.parametrize("path", [p for p, rule in RULES.items() if rule.names])
def test_a_misspelt_choice_brings_the_near_one(path):
    name = RULES[path].names[0]
    assert f'did you mean "{name}"?' in refused({path: name[:-1]}).way_out


@pytest.mark.parametrize(
    ("path", "edge"),
    [
        ("seed", 2**32 - 1),
        ("optimizer.ema_decay", 0.0),
        ("optimizer.b1", 0),
        ("data_term.text_dropout", 0.0),
        ("advantages.clip", 0.0),
        ("optimizer.grad_clip", 0.0),
        ("evaluate.every", 0),
        ("evaluate.pictures", 0),
        ("data.rotation", 180.0),
        ("rewards.heldout", ()),
        ("optimizer.lr", 1),
        ("data_term.weight", 0.01),
        ("prompts.limit", 3),
        ("sampler.guidance_scale", 0.0),
        ("policy.kl_weight", 0.04),
        ("log.wandb", False),
    ],
)
def test_the_edge_of_a_range_belongs_to_it(path, edge):
    check_config(configured({path: edge}), 1)


@pytest.mark.parametrize(
    ("path", "beyond"),
    [
        ("seed", 2**32),
        ("optimizer.ema_decay", 1.0),
        ("optimizer.b2", 1.0),
        ("data_term.text_dropout", 1.0),
        ("advantages.epsilon", 0.0),
        ("policy.clip_range", 0.0),
        ("optimizer.lr", 0.0),
        ("optimizer.eps", 0.0),
        ("rewards.timeout", 0.0),
        ("rewards.jpeg_upscale", 0),
        ("checkpoint.every", 0),
        ("checkpoint.keep", 0),
        ("train.epochs", 0),
        ("sampler.steps", 0),
        ("evaluate.steps", 0),
        ("sample.steps", 0),
        ("train.minibatches", 0),
        ("train.microbatch", 0),
        ("train.inner_epochs", 0),
        ("prompts.per_epoch", 0),
        ("sampler.shift", 0.0),
        ("data.min_scale", 0.0),
        ("prompts.group_size", 0),
        ("data.max_scale", 1.5),
        ("data.rotation", 181.0),
        ("mesh.data", 0),
        ("mesh.data", -1.0),
        ("name", " "),
        ("sample.output", " "),
    ],
)
def test_what_is_just_beyond_a_range_does_not(path, beyond):
    assert path in refused({path: beyond}).what


def test_an_unknown_key_and_a_missing_one():
    config = base.get_config()
    config.optimizer.weigth_decay = 0.1
    with pytest.raises(UserError, match="optimizer.weigth_decay") as caught:
        check_config(config, 1)
    assert 'did you mean "optimizer.weight_decay"?' in caught.value.way_out
    config = base.get_config()
    del config.optimizer.weight_decay
    with pytest.raises(UserError, match="lacks the key optimizer.weight_decay"):
        check_config(config, 1)
    assert "mesh" in refused({"mesh": 4}).what


def test_near_is_silent_when_nothing_is_near():
    assert near("adamw", ("adamw", "muon")) == 'did you mean "adamw"? '
    assert near("zzz", ("adamw", "muon")) == ""


def test_the_names_are_those_of_the_code():
    assert RULES["advantages.std"].names == advantages.STD_KINDS
    assert RULES["policy.transform"].names == policy.TRANSFORMS
    assert RULES["data_term.weighting"].names == data.WEIGHTINGS
    assert RULES["model.remat"].names == remat.POLICIES
