"""--mode=export: the weights of a run for other programs and other runs."""

import jax
import numpy as np
import pytest
from sampled_runs import no_build, save_epoch, settings

from ddrl_jax.errors import UserError
from ddrl_jax.export import export_mode
from ddrl_jax.models.emoji import emoji_pipeline, read_params
from ddrl_jax.workdir import open_workdir


def test_the_exported_weights_are_the_average_in_half(tmp_path, capsys, monkeypatch):
    config = settings()
    _, state = save_epoch(config, tmp_path, 0.05)
    export_mode(config, str(tmp_path))
    path = tmp_path / "export" / "000001.npz"
    assert str(path) in capsys.readouterr().out
    found = read_params(path)
    half = jax.tree.map(lambda a: np.asarray(a, np.float16), state.ema)
    assert jax.tree.structure(found) == jax.tree.structure(half)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(half), strict=True):
        np.testing.assert_array_equal(a, b)
    pipeline = emoji_pipeline(settings(model__init=str(path)))
    assert jax.tree.structure(pipeline.load()) == jax.tree.structure(half)
    with pytest.raises(UserError, match="other heads"):
        emoji_pipeline(settings(model__init=str(path), model__heads=4))
    monkeypatch.setattr("ddrl_jax.export.build", no_build)
    with pytest.raises(UserError, match="already there"):
        export_mode(config, str(tmp_path))
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("")
    with pytest.raises(UserError, match="can not lie there"):
        export_mode(config, str(tmp_path))


def test_a_lora_is_merged_on_export(tmp_path):
    config = settings(lora__rank=2, lora__alpha=4.0)
    program, state = save_epoch(config, tmp_path, 0.05)
    export_mode(config, str(tmp_path))
    found = read_params(tmp_path / "export" / "000001.npz")
    assert jax.tree.structure(found) == jax.tree.structure(program.frozen)
    factors, base = state.ema["blocks"]["up"], program.frozen["blocks"]["up"]["kernel"]
    product = np.asarray(factors["a"][0]) @ np.asarray(factors["b"][0])
    expected = np.asarray(base)[0] + 2.0 * product  # alpha / rank
    np.testing.assert_allclose(found["blocks"]["up"]["kernel"][0], expected, atol=2e-3)
    assert np.abs(product).max() > 0.05


OTHERS = {
    "lora.alpha: 4.0 there, 6.0 here": {"lora__rank": 2, "lora__alpha": 6.0},
    "lora.rank: 2 there, 0 here": {},
    "model.heads: 2 there, 1 here": {
        "lora__rank": 2, "lora__alpha": 4.0, "model__heads": 1
    },
}  # fmt: skip


@pytest.mark.parametrize("told", OTHERS)
def test_a_run_is_exported_with_the_scale_it_was_trained_with(
    told, tmp_path, monkeypatch
):
    monkeypatch.setattr("ddrl_jax.export.build", no_build)
    trained = {"lora__rank": 2, "lora__alpha": 4.0}
    with open_workdir(tmp_path, settings(**trained)):
        pass
    with pytest.raises(UserError, match=told):
        export_mode(settings(**OTHERS[told]), str(tmp_path))
    elsewhere = trained | {"model__init": "somewhere.npz", "model__dtype": "bfloat16"}
    with pytest.raises(UserError, match="no checkpoint to export"):
        export_mode(settings(**elsewhere), str(tmp_path))


def test_nothing_to_export(tmp_path, monkeypatch):
    monkeypatch.setattr("ddrl_jax.export.build", no_build)
    with open_workdir(tmp_path, settings()):
        pass
    with pytest.raises(UserError, match="no checkpoint to export"):
        export_mode(settings(), str(tmp_path))
    assert not (tmp_path / "export").exists()
