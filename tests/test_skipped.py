"""Skipped updates: the first bad leaf is named, and too many in a row stop the run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_runs import apply, batch, objective, params

from ddrl_jax.errors import UserError
from ddrl_jax.learner import apply_gradients, init_state, make_update
from ddrl_jax.skipped import leaf_names, report_skipped

TREE = {"a": [jnp.ones(3), jnp.ones(2)], "b": jnp.ones((2, 2))}


def after(grads, state=None):
    tx = optax.adam(0.1)
    state = init_state(TREE, tx, 0.9) if state is None else state
    return jax.jit(lambda s, g: apply_gradients(s, g, tx, 0.9, {}))(state, grads)


def with_bad(path: str, value: float):
    spoil = lambda p, a: (  # noqa: E731
        a.at[..., -1].set(value)
        if jax.tree_util.keystr(p, simple=True, separator="/") == path
        else a
    )
    return jax.tree_util.tree_map_with_path(spoil, TREE)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("path", ["a/0", "a/1", "b"])
def test_the_bad_leaf_is_found_on_device(path, value):
    _, metrics = after(with_bad(path, value))
    assert metrics["bad_leaf"].dtype == jnp.int32
    assert leaf_names(TREE)[int(metrics["bad_leaf"])] == path


def test_the_first_of_several_is_named_and_a_good_update_names_none():
    both = jax.tree.map(lambda a, b: a * b, with_bad("b", np.inf), with_bad("a/1", 2.0))
    both["a"][1] = both["a"][1].at[0].set(jnp.nan)
    assert leaf_names(TREE)[int(after(both)[1]["bad_leaf"])] == "a/1"
    state, metrics = after(TREE)
    assert int(metrics["bad_leaf"]) == -1 and int(state.step) == 1


def test_the_norm_is_that_of_all_leaves():
    grads = jax.tree.map(lambda a: 3.0 * a, TREE)  # 9 numbers of 3: root of 81
    assert float(after(grads)[1]["grad_norm"]) == pytest.approx(9.0)


def test_squares_that_overflow_only_together_are_said_to():
    # 3 and 2 and 4 numbers of 8e18: 1.9e38, 1.3e38, 2.6e38; float32 ends at 3.4e38
    state, metrics = after(jax.tree.map(lambda a: 8e18 * a, TREE))
    assert "all weights together" in leaf_names(TREE)[int(metrics["bad_leaf"])]
    assert int(state.step) == 0 and int(state.bad_updates) == 1


def test_a_weight_whose_gradient_alone_is_no_number_is_named_after_an_update():
    # The value of sqrt(c) * 0 is 0 at c = 0, its slope 0 * infinity.
    network = lambda p, *rest: apply(p, *rest) + 0 * jnp.sqrt(p["c"])  # noqa: E731
    trained, tx = params() | {"c": jnp.float32(0.0)}, optax.sgd(1.0)
    update = jax.jit(make_update(objective(network=network), tx, 0.0))
    state, metrics = update(init_state(trained, tx, 0.0), {}, None, (batch(),))
    assert np.isfinite(metrics["policy/loss"]) and int(state.step) == 0
    assert leaf_names(trained)[int(metrics["bad_leaf"])] == "c"


def history(*leaves: int) -> list[dict]:
    found, row = [], 0
    for leaf in leaves:
        row = row + 1 if leaf >= 0 else 0
        found.append({"bad_leaf": np.int32(leaf), "bad_updates": np.int32(row)})
    return found


def test_single_skips_are_a_line_each(capsys):
    report_skipped(history(-1, 2, -1, 0), ["x", "y", "z"], 2, 7)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "epoch 7" in lines[0] and "update 2 of 4" in lines[0] and "of z" in lines[0]
    assert "update 4 of 4, 1 in a row" in lines[1] and "of x" in lines[1]


def test_of_several_processes_one_says_it(capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    report_skipped(history(-1, 2, -1, 0), ["x", "y", "z"], 2, 7)
    assert not capsys.readouterr().err


def test_too_many_in_a_row_stop_though_a_good_one_follows():
    with pytest.raises(UserError, match="(?s)2 updates in a row.*is z.*nan_limit"):
        report_skipped(history(-1, 1, 2, -1), ["x", "y", "z"], 2, 7)
    report_skipped(history(-1, 1, -1, 2), ["x", "y", "z"], 2, 7)
