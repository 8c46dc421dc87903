"""Rewards, terms and trained steps that do not go together, each with its remedy."""

import pytest
from edited_config import configured, refused, told_by_plan

from ddrl_jax.check_config import check_config
from ddrl_jax.diffusion import kernels

GROUP_OF_ONE = {"prompts.group_size": 1, "prompts.per_epoch": 64}
PRETRAIN = {"policy.weight": 0.0, "data_term.weight": 1.0}
EDM = {"sampler.kernel": "edm", "policy.train_steps": 0}
ROUNDED = {"rollout.dtype": "bfloat16"}
# edits, words of the message, and an edit that puts it right
COMBINATIONS = {
    # rewards and terms
    "nothing to train": ({"policy.weight": 0.0}, "nothing to train",
                         {"data_term.weight": 1.0}),
    "no reward": ({"rewards.weights": {}}, "reward", PRETRAIN),
    "rewards of weight 0": ({"rewards.weights": {"compressibility": 0.0}}, "reward",
                            {"rewards.weights": {"incompressibility": 1.0}}),
    "one of weight 0": (
        {"rewards.weights": {"compressibility": 1.0, "incompressibility": 0.0}},
        "leave out incompressibility", {"rewards.weights": {"compressibility": 1.0}}),
    "held out": ({"rewards.weights": {"retrieval": 1.0}}, "held-out",
                 {"rewards.heldout": ()}),
    "held out, nothing rewarded": ({"rewards.weights": {"retrieval": 1.0}}, "held-out",
                                   PRETRAIN),
    "kl without rollouts": (PRETRAIN | {"policy.kl_weight": 0.1}, "policy.kl_weight",
                            {"policy.kl_weight": 0.0}),
    "group of one": (GROUP_OF_ONE, "group_size", {"advantages.kind": "batch"}),
    "group of one, tracker": (GROUP_OF_ONE, "group_size",
                              {"advantages.kind": "tracker"}),
    "one sample": ({"prompts.group_size": 1, "prompts.per_epoch": 1,
                    "train.minibatches": 1, "train.microbatch": 1,
                    "advantages.kind": "batch"}, "one sample",
                   {"prompts.group_size": 2}),
    "tracker": ({"advantages.kind": "tracker", "advantages.tracker_min": 17},
                "tracker_min", {"advantages.tracker_size": 17}),
    "reinforce, minibatches": ({"policy.term": "reinforce"}, "REINFORCE",
                               {"train.minibatches": 1}),
    "reinforce, inner": ({"policy.term": "reinforce", "train.minibatches": 1,
                          "train.inner_epochs": 2}, "REINFORCE",
                         {"train.inner_epochs": 1}),
    "exact, inner": ({"policy.old_log_prob": "exact", "train.minibatches": 1,
                      "train.inner_epochs": 2},
                     "inner_epochs", {"train.inner_epochs": 1}),
    "exact, minibatches": ({"policy.old_log_prob": "exact"}, "minibatches",
                           {"train.minibatches": 1}),
    "drawn and named": ({"policy.train_on": (0,), "policy.per_sample_steps": True},
                        "per_sample_steps", {"policy.per_sample_steps": False}),
    "rounded rollout": (ROUNDED, "rollout.dtype", {"policy.old_log_prob": "recompute"}),
    "rounded rollout, lora": (
        ROUNDED | {"lora.rank": 4, "optimizer.master": "bfloat16"}, "rollout.dtype",
        {"model.dtype": "bfloat16"}),
    "weights kept rounded": (ROUNDED, "rollout.dtype",
                             {"optimizer.master": "bfloat16"}),
    "tolerated": (ROUNDED, "rollout.dtype", {"policy.ratio_tolerance": 1e-3}),
    "data": ({"data_term.weight": 0.1, "data.source": "none",
              "prompts.source": "list", "prompts.list": ("a dog",)},
             "data.source", {"data_term.weight": 0.0}),
    "levels": (PRETRAIN | {"data_term.levels": "rollout"}, "levels",
               {"policy.weight": 1.0}),
    "every step": (PRETRAIN | {"data_term.every_step": True}, "every",
                   {"policy.weight": 1.0}),
    # trained steps
    "beyond": ({"policy.train_on": (0, 10)}, "step 10", {"policy.train_on": (0, 8)}),
    "last step": ({"policy.train_on": (9,)}, "0-8",
                  {"sampler.last_step": "stochastic"}),
    "last step of dance": ({"sampler.kernel": "dance", "policy.train_on": (9,)}, "0-8",
                           {"sampler.last_step": "stochastic"}),
    "last step of cps": ({"sampler.kernel": "cps", "policy.train_on": (9,),
                          "sampler.last_step": "stochastic"}, "0-8",
                         {"policy.train_on": (8,)}),
    "last step of edm": (EDM | {"policy.train_on": (9,)}, "0-8",
                         {"policy.train_on": (8,)}),
    "out of the window": ({"sampler.window": (2, 5), "policy.train_on": (1,)}, "2-4",
                          {"policy.train_on": (2, 4)}),
    "more than the window": ({"sampler.window": (0, 2)}, "at most 2",
                             {"policy.train_steps": 2}),
    "window of ddim": ({"sampler.kernel": "ddim", "sampler.window": (0, 4)},
                       "sampler.window", {"sampler.window": ()}),
    "a window backwards": ({"sampler.window": (5, 4)}, "first < stop",
                           {"sampler.window": (4, 7)}),
    "a window at the last step": ({"sampler.window": (9, 10)}, "no noise",
                                  {"sampler.last_step": "stochastic",
                                   "policy.train_steps": 1}),
    "more steps": ({"policy.train_steps": 10}, "at most 9", {"policy.train_steps": 9}),
    "all of ddim": ({"sampler.kernel": "ddim", "policy.train_steps": 11}, "at most 10",
                    {"policy.train_steps": 10}),
    "one step": ({"sampler.steps": 1, "policy.train_steps": 1}, "no noise",
                 {"sampler.last_step": "stochastic"}),
    "one step of edm": (EDM | {"sampler.steps": 1}, "no noise", {"sampler.steps": 2}),
    "eta 0": ({"sampler.kernel": "ddim", "sampler.eta": 0.0}, "eta 0", PRETRAIN),
    "eta 0 of dance": ({"sampler.kernel": "dance", "sampler.eta": 0.0}, "eta 0",
                       {"sampler.eta": 0.3}),
    "noise 0": ({"sampler.noise_level": 0.0}, "noise_level 0",
                {"sampler.noise_level": 0.1}),
    "churn 0": (EDM | {"sampler.churn": 0.0}, "churn 0", {"sampler.churn": 0.5}),
    "eta above 1": ({"sampler.kernel": "ddim", "sampler.eta": 1.1}, "sampler.eta",
                    {"sampler.kernel": "dance"}),
    "cps above 1": ({"sampler.kernel": "cps", "sampler.noise_level": 1.1},
                    "noise_level", {"sampler.kernel": "flow_grpo"}),
    "sigmas": (EDM | {"sampler.sigma_min": 90.0}, "sigma",
               {"sampler.sigma_max": 200.0}),
    "ddim steps": ({"sampler.kernel": "ddim", "sampler.steps": 1000}, "sampler.steps",
                   {"sampler.steps": 999}),
}  # fmt: skip


@pytest.mark.parametrize("case", COMBINATIONS)
def test_keys_that_do_not_go_together(case):
    edits, word, remedy = COMBINATIONS[case]
    message = str(refused(edits))
    assert word in message
    check_config(configured(edits | remedy), 1)
    # A plan needs no data; all else it has to be told before it compiles.
    assert told_by_plan(edits) == ("" if case == "data" else message)


MODELS = {
    "emoji": 'data.source "emoji" or "samples"',
    "stable_diffusion": 'data.source "folder" or "tfds" or "samples"',
}


@pytest.mark.parametrize("model", MODELS)
def test_a_data_term_without_data_names_the_sources_of_its_model(model):
    edits, _, _ = COMBINATIONS["data"]
    if model == "stable_diffusion":
        edits = edits | {"model.name": model, "sampler.kernel": "ddim"}
        edits = edits | {"model.init": "assets", "evaluate.solver": "ddim"}
    assert MODELS[model] in str(refused(edits))


def test_steps_without_noise_are_of_no_concern_where_there_are_no_rollouts():
    check_config(configured(PRETRAIN | {"sampler.noise_level": 0.0}), 1)


def test_a_sampler_is_one_row_of_its_table(monkeypatch):
    """Its name is a choice, and its steps are those that its kernel says have noise."""
    monkeypatch.setitem(kernels._KERNELS, "mine", kernels._KERNELS["dance"])
    mine = {"sampler.kernel": "mine"}
    check_config(configured(mine), 1)
    found = refused(mine | {"policy.train_on": (9,)})
    assert "step 9 of kernel mine, steps 10" in str(found) and "0-8" in found.wanted
    assert "no noise" in refused(mine | {"sampler.eta": 0.0}).what
    assert 'did you mean "mine"?' in refused({"sampler.kernel": "min"}).way_out
