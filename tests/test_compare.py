"""Comparisons of runs: numbers by hand from curves that are written down."""

import numpy as np
import pytest
from synthetic_runs import DDPO, DDRL, EPOCHS, WEIGHTS, load, shifted, two_seeds, write

from ddrl_jax import compare
from ddrl_jax.compare.runs import role
from ddrl_jax.errors import UserError

# ---- reading


def test_a_run_is_its_evaluations_over_reward_calls(tmp_path):
    write(tmp_path, "ddrl", DDRL)
    (run,) = load(tmp_path, ["ddrl"])["ddrl"]
    assert run.calls.tolist() == [0, 576, 1152, 1728]
    assert run.steps.tolist() == list(EPOCHS)
    assert run.values["kilobytes"].tolist() == list(DDRL["size"])
    assert run.seconds == 3 * 1800.0
    assert (run.seed, run.epochs_left) == (0, 0)


def test_every_missing_run_is_named_at_once(tmp_path):
    write(tmp_path, "ddpo", DDPO)
    empty = tmp_path / "ddrl" / "seed_0"
    empty.mkdir(parents=True)
    begun = write(tmp_path, "kl", DDRL)
    (begun / "metrics.jsonl").write_text('{"step": 1, "reward/mean": -7.0}\n')
    wanted = {arm: [tmp_path / arm / "seed_0"] for arm in ("ddpo", "ddrl", "kl")}
    wanted["control"] = [tmp_path / "control" / "seed_0"]
    with pytest.raises(UserError) as caught:
        compare.load_runs(wanted)
    message = str(caught.value)
    assert "3 of 4 runs" in message
    assert "ddrl/seed_0: no config.json" in message
    assert "kl/seed_0: no evaluation/compressibility/mean of step 0" in message
    assert "control/seed_0: no such folder" in message
    assert "ddpo" not in message


@pytest.mark.parametrize("key", ["size", "loss"])
def test_runs_of_a_seed_that_judged_another_base_are_refused(tmp_path, key):
    write(tmp_path, "ddpo", DDPO)
    write(tmp_path, "ddrl", shifted(DDRL, **{key: (DDRL[key][0] * 1.01, 1, 1, 1)}))
    with pytest.raises(UserError, match="same evaluation"):
        load(tmp_path, ("ddpo", "ddrl"))


def test_another_seed_may_have_another_base(tmp_path):
    write(tmp_path, "ddpo", DDPO)
    write(tmp_path, "ddpo", shifted(DDPO, size=(7.0, 5, 4, 3)), seed=1)
    assert len(load(tmp_path, ["ddpo"], (0, 1))["ddpo"]) == 2


def test_a_seed_counts_once(tmp_path):
    path = write(tmp_path, "ddpo", DDPO)
    with pytest.raises(UserError, match="same seed twice"):
        compare.load_runs({"ddpo": [path, path]})


def test_arms_are_found_in_their_folders_and_put_in_order(tmp_path):
    for arm in ("control", "ddrl_more", "ddrl", "kl", "ddpo"):
        write(tmp_path, arm, DDRL)
    (tmp_path / "ddpo" / "seed_0.log").write_text("a file beside it")
    runs = compare.load_runs(compare.find_runs(tmp_path))
    assert list(runs) == ["ddpo", "kl", "ddrl", "ddrl_more", "control"]
    names = [summary.label for summary in compare.summarise(runs).values()]
    assert names == ["DDPO", "KL 0.1", "DDRL 0.01", "DDRL 0.03", "data only"]
    with pytest.raises(UserError, match="no runs to compare"):
        compare.find_runs(tmp_path / "ddpo")


def test_two_arms_of_one_weight_keep_their_own_names(tmp_path, monkeypatch):
    monkeypatch.setitem(WEIGHTS, "ddrl_again", WEIGHTS["ddrl"])
    for arm in ("ddrl", "ddrl_again"):
        write(tmp_path, arm, DDRL)
    summaries = compare.summarise(load(tmp_path, ("ddrl", "ddrl_again")))
    assert [s.label for s in summaries.values()] == ["ddrl", "ddrl_again"]


def test_what_holds_a_run_back_is_read_from_its_weights():
    def of(policy, kl, data):
        keys = ("policy.weight", "policy.kl_weight", "data_term.weight")
        return role(dict(zip(keys, (policy, kl, data), strict=True)))

    assert of(1, 0, 0) == "DDPO"
    assert of(1, 0.1, 0) == "KL"
    assert of(1, 0.1, 0.1) == of(1, 0, 0.1) == "DDRL"
    assert of(0, 0, 1) == "data only"


# ---- numbers


def test_mean_and_spread_over_seeds_by_hand(tmp_path):
    ddrl = compare.summarise(two_seeds(tmp_path))["ddrl"]
    assert ddrl.seeds == (0, 1)
    np.testing.assert_allclose(ddrl.mean["kilobytes"], [6.0, 5.2, 4.9, 4.6])
    np.testing.assert_allclose(ddrl.low["kilobytes"], [6.0, 5.2, 4.8, 4.4])
    np.testing.assert_allclose(ddrl.high["kilobytes"], [6.0, 5.2, 5.0, 4.8])
    np.testing.assert_allclose(ddrl.std["kilobytes"], [0.0, 0.0, 0.1, 0.2], atol=1e-12)
    np.testing.assert_allclose(ddrl.mean["retrieval"], [0.55, 0.52, 0.45, 0.38])


def test_a_summary_has_the_evaluations_that_all_seeds_have(tmp_path):
    write(tmp_path, "ddrl", DDRL)
    write(tmp_path, "ddrl", DDRL | {"epochs": (0, 9, 18, 20)}, seed=1)
    ddrl = compare.summarise(load(tmp_path, ["ddrl"], (0, 1)))["ddrl"]
    assert ddrl.calls.tolist() == [0, 576, 1152]
    np.testing.assert_allclose(ddrl.mean["kilobytes"], [6.0, 5.2, 5.0])


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (5.1, 0.33),  # half way from 5.4 to 4.8: (0.42 + 0.24) / 2
        (5.4, 0.42),  # an evaluation itself
        (3.9, 0.15),  # half way from 4.8 to 3.0
        (6.0, 0.60),  # the base
        (7.0, 0.60),  # above the base: small enough from the start
        (2.9, None),  # never so small
    ],
)
def test_retrieval_at_a_size_by_hand(tmp_path, size, expected):
    write(tmp_path, "ddpo", DDPO)
    (run,) = load(tmp_path, ["ddpo"])["ddpo"]
    found = compare.at_matched_size(run, size)
    assert found == (expected if expected is None else pytest.approx(expected))


def test_of_a_wandering_curve_the_first_crossing_counts(tmp_path):
    curve = shifted(DDPO, size=(6.0, 5.0, 5.8, 4.0))
    write(tmp_path, "ddpo", curve)
    (run,) = load(tmp_path, ["ddpo"])["ddpo"]
    assert compare.at_matched_size(run, 5.5) == pytest.approx(0.51)  # 0.60 to 0.42
    assert compare.at_matched_size(run, 5.5, "data_loss") == pytest.approx(0.22)


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({}, 576),  # 0.06 < 0.60 / 3, and 0.50 > 2 x 0.20, both at 9 epochs
        ({"retrieval": (0.60, 0.19, 0.5, 0.5)}, 192),  # retrieval alone
        ({"loss": (0.20, 0.24, 0.41, 0.2)}, 384),  # data loss alone
        ({"retrieval": (0.6, 0.2, 0.2, 0.2), "loss": (0.2, 0.4, 0.4, 0.4)}, None),
    ],
)
def test_collapse_by_hand(tmp_path, changes, calls):
    write(tmp_path, "ddpo", shifted(DDPO, **changes))
    (run,) = load(tmp_path, ["ddpo"])["ddpo"]
    assert compare.first_collapse(run) == calls


# ---- bars


def verdict(root, ddrl=DDRL, ddpo=DDPO):
    write(root, "ddpo", ddpo)
    write(root, "ddrl", ddrl)
    (found,) = compare.verdicts(load(root, ("ddpo", "ddrl")))
    return found


def test_both_bars_met_by_hand(tmp_path):
    found = verdict(tmp_path)
    assert (found.arm, found.seeds, found.calls) == ("ddrl", 1, 1728)
    assert found.horizon == 1728  # 3 x 576
    assert found.collapsed == (None,)
    assert found.data_loss == pytest.approx(1.2)  # 0.24 / 0.20
    assert found.fall == pytest.approx(1 / 6)  # the end is (5.2 + 5.0 + 4.8) / 3 = 5.0
    assert found.retrieval == pytest.approx(0.50)  # (0.54 + 0.50 + 0.46) / 3
    assert found.reference == pytest.approx(0.30)  # two thirds from 5.4 to 4.8
    assert (found.anchored, found.kept, found.seeds_above) == (True, True, 1)


@pytest.mark.parametrize(
    ("ddrl", "ddpo", "expected"),
    [
        ({"epochs": (0, 9, 18, 26)}, {}, None),  # 1664 calls of 1728
        ({"retrieval": (0.6, 0.19, 0.5, 0.5)}, {}, False),  # collapsed, and recovered
        ({"loss": (0.20, 0.22, 0.26, 0.2)}, {}, False),  # +30 %
        ({"loss": (0.20, 0.22, 0.25, 0.2)}, {}, True),  # +25 %
        ({}, {"loss": (0.2, 0.2, 0.3, 0.39)}, False),  # DDPO's does not double
        ({}, {"loss": (0.2, 0.2, 0.3, 0.3), "retrieval": (0.6, 0.6, 0.5, 0.4)}, None),
    ],
)
def test_bar_a(tmp_path, ddrl, ddpo, expected):
    found = verdict(tmp_path, shifted(DDRL, **ddrl), shifted(DDPO, **ddpo))
    assert found.anchored is expected


@pytest.mark.parametrize(
    ("ddrl", "expected"),
    [
        ({"size": (6.0, 5.5, 5.2, 5.2)}, False),  # falls by 11.7 % only
        ({"retrieval": (0.6, 0.5, 0.44, 0.38)}, False),  # 0.44 < 1.5 x 0.30
        ({"retrieval": (0.6, 0.5, 0.46, 0.42)}, True),  # 0.46 > 1.5 x 0.30
        ({"size": (6.0, 3.0, 2.9, 2.8)}, None),  # 2.9: DDPO never gets there
        ({"size": (6.0, 3.0, 3.0, 3.0), "retrieval": (0.6, 0.0, 0.0, 0.0)}, False),
    ],
)
def test_bar_b(tmp_path, ddrl, expected):
    assert verdict(tmp_path, shifted(DDRL, **ddrl)).kept is expected


def test_the_last_seed_to_collapse_sets_the_horizon(tmp_path):
    for seed, size in ((0, DDPO), (1, shifted(DDPO, retrieval=(0.6, 0.1, 0.1, 0.0)))):
        write(tmp_path, "ddpo", size, seed)
        write(tmp_path, "kl", DDRL, seed)
    (found,) = compare.verdicts(load(tmp_path, ("ddpo", "kl"), (0, 1)))
    assert found.horizon == 3 * 576  # seed 1 collapsed at 192
    assert found.seeds == 2


def test_without_an_arm_without_an_anchor_there_are_no_bars(tmp_path):
    write(tmp_path, "ddrl", DDRL)
    runs = load(tmp_path, ["ddrl"])
    assert compare.verdicts(runs) == []
    text = compare.write_table(runs, tmp_path / "t.md").read_text()
    assert "Not computed: there is no arm without an anchor" in text


def bars_of(root, **curves):
    """The verdicts of these arms, and what the table says of them."""
    for arm, curve in curves.items():
        write(root, arm, curve)
    runs = load(root, curves)
    text = compare.write_table(runs, root / "t.md").read_text()
    return compare.verdicts(runs), text.split("## Bars")[1].split("\n## ")[0], text


NOT_MEASURED = (None,) * 4
NO_LOSS = {"loss": NOT_MEASURED}
BLIND = NO_LOSS | {"retrieval": NOT_MEASURED}
BASE_ONLY = {"retrieval": (0.6, None, None, None), "loss": (0.2, None, None, None)}


@pytest.mark.parametrize(
    ("ddpo", "ddrl"),
    [
        (BLIND, BLIND),
        (BLIND, NO_LOSS),
        (BASE_ONLY, {}),
        ({}, BASE_ONLY),
        ({}, {"epochs": (0,)}),  # has only begun
    ],
)
def test_a_collapse_that_nobody_could_see_is_not_said_to_be_none(tmp_path, ddpo, ddrl):
    curves = {"ddpo": shifted(DDPO, **ddpo), "ddrl": shifted(DDRL, **ddrl)}
    found, bars, text = bars_of(tmp_path, **curves)
    assert found == []
    assert "Not computed" in bars and "loss was measured" in bars
    assert "never" not in bars and "nan" not in text


def test_an_arm_that_has_only_begun_is_not_the_reference(tmp_path):
    curves = {"ddpo_young": shifted(DDPO, epochs=(0,)), "ddpo": DDPO, "ddrl": DDRL}
    found, bars, _ = bars_of(tmp_path, **curves)
    assert [v.arm for v in found] == ["ddrl"] and found[0].horizon is not None
    assert "left out here: ddpo_young seed 0." in bars


@pytest.mark.parametrize("seed", [0, 1])
def test_a_loss_that_one_seed_lacks_decides_nothing(tmp_path, seed):
    lost = shifted(DDRL, loss=(0.2, 0.2, None, 0.2))
    for other in (0, 1):
        write(tmp_path, "ddpo", DDPO, other)
        write(tmp_path, "ddrl", lost if other == seed else DDRL, other)
    (found,) = compare.verdicts(load(tmp_path, ("ddpo", "ddrl"), (0, 1)))
    assert np.isnan(found.data_loss) and found.anchored is None


@pytest.mark.parametrize("arm", ["ddpo", "ddrl"])
def test_a_seed_that_has_only_begun_takes_no_verdict_away(tmp_path, arm):
    for name, curve in (("ddpo", DDPO), ("ddrl", DDRL)):
        write(tmp_path, name, curve, 0)
        write(tmp_path, name, shifted(curve, epochs=(0,)) if name == arm else curve, 1)
    runs = load(tmp_path, ("ddpo", "ddrl"), (0, 1))
    (found,) = compare.verdicts(runs)
    text = compare.write_table(runs, tmp_path / "t.md").read_text()
    assert found.seeds == 1 and "| never |" in text
    label = {"ddpo": "DDPO", "ddrl": "DDRL 0.01"}[arm]
    assert f"left out here: {label} seed 1." in text


def test_of_an_arm_that_was_not_judged_there_is_no_verdict(tmp_path):
    curves = {"ddpo": shifted(DDPO, **NO_LOSS), "ddrl": shifted(DDRL, **NO_LOSS)}
    found, bars, text = bars_of(tmp_path, control=shifted(DDRL, **BLIND), **curves)
    assert [v.arm for v in found] == ["ddrl"]
    assert "Neither retrieval nor data loss was measured of data only." in bars
    assert "| data only |" not in bars and "nan" not in text


@pytest.mark.parametrize("lost", ["retrieval", "loss"])
def test_a_bar_of_which_half_was_measured_has_no_made_up_number(tmp_path, lost):
    half = {lost: NOT_MEASURED}
    curves = {"ddpo": shifted(DDPO, **half), "ddrl": shifted(DDRL, **half)}
    (found,), bars, text = bars_of(tmp_path, **curves)
    assert (found.anchored, found.kept) == ((True, None), (None, True))[lost == "loss"]
    assert "not decided" in bars and "nan" not in text
