"""The search for a mesh: what it guesses, and what it compiles again."""

import pytest
from edited_config import configured
from planned_runs import ONE, made, stable_diffusion, tiny, with_memory

from ddrl_jax import plan
from ddrl_jax.chips import CHIPS
from ddrl_jax.plan import search
from ddrl_jax.plan.lowered import describe
from ddrl_jax.plan.memory import MARGIN, resident
from ddrl_jax.plan.search import LEAST, LIKE_WEIGHTS, Shown, suggest, suitable
from ddrl_jax.plan.target import Target


def shown(plan, temporaries=10**6) -> Shown:
    """As if its phases had been compiled."""
    update = plan.phases[-1]
    found = made()._replace(phase=update, outputs=7, temporaries=temporaries)
    return Shown(plan, [found])


@pytest.fixture(scope="module")
def with_judges():
    """Stable Diffusion has all that stays: text encoder, autoencoder, judges."""
    edits = {"rewards": {"weights": {"aesthetic": 1.0}, "aesthetic_head": "assets"}}
    config = stable_diffusion("assets", model={"remat": LEAST}, **edits)
    run = describe(config)
    rows = resident(run)
    assert all(rows[name] for name in ("text encoder", "judges", "autoencoder"))
    return run


@pytest.mark.parametrize("temporaries", [0, 10**9])
def test_the_guess_of_what_was_compiled_is_its_peak(with_judges, temporaries):
    found = shown(with_judges, temporaries)
    assert found.guess(ONE) == pytest.approx(found.peak, rel=1e-12)


def test_what_stays_on_another_mesh():
    """Each row follows its law; the optimizer's count of updates is whole."""
    here = shown(describe(tiny(fsdp=4, context=2)))
    assert set(LIKE_WEIGHTS) < set(resident(here.plan))
    for mesh in ({"data": 8}, {"fsdp": 8}, {"fsdp": 2, "tensor": 2}):
        stays = sum(resident(describe(tiny(**mesh))).values())
        assert here.stays(ONE | mesh) == pytest.approx(stays, rel=1e-3)


def counted(monkeypatch) -> list[str]:
    """The phases that the search compiles, as if they needed nothing of their own."""
    compiled = []

    def compile_less(phase, mesh):
        compiled.append(phase.name)
        return made(phase.name)._replace(phase=phase)

    monkeypatch.setattr(search, "compile_phase", compile_less)
    return compiled


def test_a_mesh_that_was_compiled_and_does_not_fit_is_not_tried_again(
    monkeypatch, with_judges
):
    compiled, found = counted(monkeypatch), shown(with_judges)
    chip = with_memory((found.peak - 1) / MARGIN)
    assert suggest(found, 1, chip) is None and not compiled


def test_the_configured_mesh_where_it_fits_is_the_first_answer(
    monkeypatch, with_judges
):
    """Only the update with each policy that keeps more is compiled."""
    compiled, found = counted(monkeypatch), shown(with_judges)
    chip = with_memory((found.peak + 1) / MARGIN)
    suggestion = suggest(found, 1, chip)
    assert suggestion is not None and suggestion.mesh == ONE
    assert compiled == ["update"] * 3 and suggestion.remat == "none"


def test_a_policy_is_not_charged_the_rollouts_weights_again(monkeypatch, with_judges):
    """No policy matters to the rollout, which here needs most and just fits."""
    counted(monkeypatch)
    rollout, update = with_judges.phases
    found = Shown(
        with_judges,
        [
            made("rollout")._replace(phase=rollout, temporaries=10**6),
            made()._replace(phase=update),
        ],
    )
    suggestion = suggest(found, 1, with_memory((found.peak + 1) / MARGIN))
    assert suggestion is not None
    assert (suggestion.remat, suggestion.peak) == ("none", found.peak)


def test_the_command_names_once_what_does_not_divide(monkeypatch, capsys):
    """The search describes the configured mesh again, with remat, and others."""
    counted(monkeypatch)
    monkeypatch.setattr(plan, "compile_phase", search.compile_phase)
    config = tiny(tensor=4)
    config.model.remat = "none"
    config.model.video.mlp = 66
    flags = {"devices": "4", "chip": "v5p", "compiler": "cpu"}
    plan.plan_mode(config, flags)
    told = capsys.readouterr()
    assert "suggestion: " in told.out
    assert told.err.count("not split as config.sharding has it") == 1
    assert "mlp 66 over tensor 4" in told.err


def test_only_meshes_that_the_program_takes_are_suitable():
    """24 samples a minibatch: shares of 3 are one micro-batch, of 12 are none of 8."""
    config = configured(
        {
            "prompts.per_epoch": 12, "prompts.group_size": 4,
            "train.minibatches": 2, "train.microbatch": 8,
        }
    )  # fmt: skip
    v5p = CHIPS["v5p"]
    taken = [n for n in (1, 2, 3, 4, 5, 8) if suitable(config, ONE | {"data": n}, v5p)]
    assert taken == [1, 3, 4, 8]
    config.model.attention = "ring"  # with one shard of tokens there is none
    assert not suitable(config, ONE | {"data": 4}, v5p)
    assert suitable(config, ONE | {"context": 4}, v5p)


def test_a_tpu_compiler_is_only_asked_for_slices_that_it_knows():
    config = configured({"prompts.per_epoch": 12, "train.microbatch": 1})
    v5p, mesh = CHIPS["v5p"], ONE | {"data": 3}
    assert suitable(config, mesh, v5p)
    assert not suitable(config, mesh, v5p, Target("tpu", v5p, 0))
    assert suitable(config, ONE | {"data": 4}, v5p, Target("tpu", v5p, 0))


def test_the_planned_mesh_keeps_its_slices(monkeypatch):
    plan = describe(tiny(fsdp=2))._replace(target=Target("cpu", None, 3))

    def described(config, target):
        return plan._replace(config=config, target=target)

    monkeypatch.setattr(search, "describe", described)
    found = [search.described(plan, ONE | m, LEAST) for m in ({"fsdp": 2}, {})]
    assert [other.target.slices for other in found] == [3, 0]
