"""What the curves of a report draw: steps across, values up, each key by its name."""

import numpy as np
import pytest

from ddrl_jax import curves

ROWS = [
    {"step": 0, "heldout/a/mean": 0.75, "heldout/b/mean": 0.25, "reward/mean": None},
    {"step": 2, "reward/mean": -1.5, "reward/a/mean": 3.5, "grad_norm": 0.5},
    {"step": 4, "reward/mean": -1.25, "grad_norm": 0.25, "heldout/a/mean": 0.5},
    {"step": 5, "reward/mean": float("nan"), "note": "text", "data/loss": 0.125},
]
TIMES = [
    {"step": 1, "time/rollout": 2.0, "time/update": 5.0, "time/rest": 1.0},
    {"step": 2, "time/rollout": 1.0, "time/update": 1.0, "time/epoch": 9.0},
    {"step": 3, "time/rollout": 0.0},
]


@pytest.fixture
def drawn(monkeypatch):
    """drawn(rows): title -> the axes of its picture."""
    kept = []

    def keep(figure):
        kept.append(figure)
        return b"%d" % (len(kept) - 1)

    monkeypatch.setattr(curves, "_png", keep)

    def draw(rows):
        return {title: kept[int(n)].axes[0] for title, n in curves.curves(rows)[0]}

    return draw


def lines(axes):
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.lines
    }


def test_a_panel_draws_its_keys_over_their_own_steps(drawn):
    panels = drawn(ROWS)
    assert lines(panels["Reward (trained)"]) == {
        "reward/mean": ([2, 4], [-1.5, -1.25]),
        "reward/a/mean": ([2], [3.5]),
    }
    held_out = panels["Held-out judge (never trained on)"]
    assert lines(held_out) == {
        "heldout/a/mean": ([0, 4], [0.75, 0.5]),
        "heldout/b/mean": ([0], [0.25]),
    }
    assert lines(panels["Data loss"]) == {"data/loss": ([5], [0.125])}
    assert lines(panels["Gradient norm"]) == {"grad_norm": ([2, 4], [0.5, 0.25])}
    assert len(panels) == 4
    for title, axes in panels.items():
        assert axes.get_title().startswith(title) and axes.get_xlabel() == "epoch"
        words = [text.get_text() for text in axes.get_legend().get_texts()]
        assert words == [*lines(axes)]
        assert not axes.xaxis_inverted() and not axes.yaxis_inverted()


def test_one_epoch_alone_is_seen_as_a_point(drawn):
    (line,) = drawn(ROWS)["Data loss"].lines
    assert line.get_marker() == "."


@pytest.mark.parametrize(("norm", "scale"), [(0.25, "log"), (0.0, "linear")])
def test_only_the_gradient_norm_is_logarithmic_and_where_it_can_be(drawn, norm, scale):
    rows = [{"step": 1, "grad_norm": 0.5, "data/loss": 0.5}]
    panels = drawn([*rows, {"step": 2, "grad_norm": norm, "data/loss": 0.25}])
    assert panels["Gradient norm"].get_yscale() == scale
    assert panels["Data loss"].get_yscale() == "linear"


def test_the_shares_of_an_epoch_lie_on_each_other_up_to_100_percent(drawn):
    axes = drawn(TIMES)["where the time goes"]
    bars = {bar.get_label(): bar.patches for bar in axes.containers}
    wanted = {  # share of epochs 1, 2 and 3; time/epoch is their sum and no share
        "time/rollout": [25.0, 50.0, 0.0],
        "time/update": [62.5, 50.0, 0.0],
        "time/rest": [12.5, 0.0, 0.0],
    }
    assert {k: [p.get_height() for p in found] for k, found in bars.items()} == wanted
    below = np.zeros(3)
    for key, found in bars.items():
        middles = [patch.get_x() + patch.get_width() / 2 for patch in found]
        assert middles == [1, 2, 3]
        assert [patch.get_y() for patch in found] == list(below)
        below += wanted[key]
    words = [text.get_text() for text in axes.get_legend().get_texts()]
    assert words == [*wanted]


def test_what_has_no_number_is_named_and_not_drawn(drawn):
    panels = drawn(ROWS + TIMES)
    absent = curves.curves(ROWS + TIMES)[1]
    assert "diversity" in absent and "data loss" not in absent
    assert not {title.lower() for title in panels} & set(absent)
    assert "time per stage" in curves.curves(ROWS)[1]
