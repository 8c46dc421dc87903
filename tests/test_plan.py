"""The plan against what is there: live arrays, hand counts, and bounds by hand."""

import math
import shutil

import jax
import pytest
from edited_config import configured
from planned_runs import ONE, made, stable_diffusion, tiny, with_memory
from tiny_runs import TINY as TINY_RUN
from tiny_runs import tiny_program

from ddrl_jax import plan
from ddrl_jax.chips import CHIPS
from ddrl_jax.draws import draw_chunks, prompts_of
from ddrl_jax.errors import UserError
from ddrl_jax.flops import Count, count
from ddrl_jax.models.stable_diffusion import TINY
from ddrl_jax.plan import search
from ddrl_jax.plan.hlo import Collective
from ddrl_jax.plan.links import lay
from ddrl_jax.plan.lowered import (
    compile_phase,
    describe,
)
from ddrl_jax.plan.memory import chunks_of_epoch, fits, resident
from ddrl_jax.plan.roofline import bounds, sent
from ddrl_jax.plan.search import Shown, meshes, suggest
from ddrl_jax.plan.sizes import bytes_per_device
from ddrl_jax.plan.target import HERE, Target
from ddrl_jax.program import build
from ddrl_jax.sharding import make_mesh

FLAGS = {"devices": "8", "chip": "v5p", "compiler": "cpu"}


@pytest.fixture(scope="module")
def planned():
    run = describe(tiny(fsdp=4, context=2))
    return run, [compile_phase(phase, run.mesh) for phase in run.phases]


# ---- memory


def draw_chunks_of(program):
    """The first chunk of the first epoch, before its rollout."""
    return draw_chunks(program, prompts_of(program, 0), 0, 0)[0]


def live_bytes(tree) -> int:
    device = jax.devices()[0]
    shards = (s for a in jax.tree.leaves(tree) for s in a.addressable_shards)
    return sum(s.data.nbytes for s in shards if s.device == device)


@pytest.mark.parametrize("lora", [0, 2])
def test_planned_bytes_are_those_of_live_arrays(lora):
    """Shapes and shardings of the plan against the arrays of a built program."""
    edits = {"mesh.data": 2, "mesh.fsdp": 4, "lora.rank": lora, "train.microbatch": 1}
    program = tiny_program(edits | {"prompts.per_epoch": 4})
    run = describe(program.config)
    state = program.new_state()
    assert bytes_per_device(run.weights.abstract) == live_bytes(state)
    assert bytes_per_device(run.frozen) == live_bytes(program.frozen)
    assert live_bytes(state) < sum(a.nbytes for a in jax.tree.leaves(state))


def test_the_compiler_sees_the_same_arguments(planned):
    """It packs them and rounds each up, by less than 128 bytes."""
    for found in planned[1]:
        shapes = bytes_per_device(found.phase.arguments)
        leaves = len(jax.tree.leaves(found.phase.arguments))
        # A key travels as two words; unused arguments are dropped.
        assert shapes - 64 * leaves <= found.arguments <= shapes + 128 * leaves


def test_weights_of_another_mesh(planned):
    run, compiled = planned
    scaling = Shown(run, compiled)
    for mesh in ({"data": 8}, {"fsdp": 8}, {"tensor": 2, "context": 2, "fsdp": 2}):
        other = describe(tiny(**mesh))
        found = scaling.weights(ONE | mesh)
        assert found == bytes_per_device(other.weights.abstract.params)


# ---- Stable Diffusion, and data


def test_stable_diffusion_is_planned_from_its_json_alone(tmp_path):
    """Shapes are those of the program that reads the weights."""
    folder = shutil.copytree(TINY, tmp_path / "model")
    config = stable_diffusion(folder, policy={"train_steps": 0})
    program = build(config)
    state, chunk = program.abstract_state(), draw_chunks_of(program)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    shutil.rmtree(folder / "tokenizer")
    run = describe(config)
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)  # noqa: E731
    assert shapes(run.weights.abstract) == shapes(state)
    planned = run.chunk._replace(trajectory=None, old_log_prob=None, advantages=None)
    assert shapes(planned) == shapes(chunk)
    rollout, update = run.phases
    found = jax.eval_shape(rollout.function, *rollout.arguments)[1]
    assert shapes(found) == shapes(run.chunk.trajectory)
    assert shapes(jax.eval_shape(update.function, *update.arguments)[0]) == shapes(
        state
    )


def test_a_model_of_the_hub_is_one_error_without_a_network():
    config = stable_diffusion("nobody/nothing")
    with pytest.raises(UserError, match="nobody/nothing is not here"):
        describe(config)


@pytest.mark.parametrize("every_step", [False, True])
def test_a_data_term_is_planned(every_step):
    """One more network call of each sample, or of each trained step.

    Beside a frozen base it is two forward passes, itself and the gradient of its input;
    a call of the policy term is three, one of them again for the ratio of exactly 1."""
    term = {"weight": 0.01, "weighting": "eps", "every_step": every_step}
    with_data = describe(stable_diffusion("assets", data_term=term)).phases[-1]
    without = describe(stable_diffusion("assets")).phases[-1]
    steps = without.arguments[-1][0].old_log_prob.shape[0]
    calls, rows = 2 * steps, steps if every_step else 1  # guidance: two rows a step
    found = [count(p.function, *p.arguments).flops for p in (with_data, without)]
    assert found[0] / found[1] - 1 == pytest.approx(2 / 3 * rows / calls, rel=0.02)
    assert compile_phase(with_data, make_mesh(ONE)).temporaries > 0


def test_sparse_rwr_rolls_out_all_samples_and_fits_the_kept_ones():
    """Of 4 prompts of 20 samples the best 2 each: 8, in updates of one chunk of 2."""
    edits = {"prompts.per_epoch": 4, "prompts.group_size": 20, "train.microbatch": 2}
    edits |= {"policy.term": "sparse_rwr", "advantages.kind": "group"}
    edits |= {"policy.rwr_percentile": 0.9, "mesh.data": 1, "train.minibatches": 2}
    plan = describe(configured(TINY_RUN | edits))
    rollout, update = plan.phases
    assert (rollout.calls, plan.chunks, len(update.arguments[-1])) == (40, 2, 2)
    assert chunks_of_epoch(plan) == 40  # all, until the last is judged


def test_the_devices_are_there_before_a_check_starts_jax(monkeypatch):
    called = []
    for name in ("placeholders", "check_shapes"):
        monkeypatch.setattr(plan, name, lambda *_, name=name: called.append(name))
    monkeypatch.setattr(plan, "_whole_mesh", lambda *_: called.append("end") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plan.plan_mode(tiny(), {"devices": "2", "chip": "H100"})
    assert called == ["placeholders", "check_shapes", "end"]


# ---- work


def test_flops_of_the_rollout_by_hand(planned):
    """4 steps of 4 samples: blocks, prompt, patches, output and time."""
    run, (found, _) = planned
    d, tokens, words, mlp, text = 32, 2 * 4 * 4, 4, 64, 16
    products = 6 * tokens * d * d + 2 * words * d * d  # q k v out, prompt_q, prompt_out
    attention = 2 * tokens * tokens * d + 2 * tokens * words * d
    block = products + attention + 2 * tokens * d * mlp
    ends = 2 * tokens * 16 * d + words * (text * d + d * d)
    time = 256 * d + d * d + 6 * d * d + 2 * d * d
    samples = run.config.sampler.steps * 4
    assert found.count.flops == samples * 2 * (2 * block + ends + time)


def test_an_update_is_four_and_more_rollout_calls(planned):
    """Two trained steps, forward once, again for the ratio, again for the blocks, and
    twice a forward's work for the gradients: 5 forward passes or a little less."""
    _, (rollout, update) = planned
    forward = rollout.count.flops / (4 * 4)
    passes = update.count.flops / (2 * 16 * forward)
    assert 4.8 < passes <= 5.0


# ---- time


def test_bounds_by_hand():
    links = lay(CHIPS["v5p"], ONE | {"fsdp": 4})
    gather = Collective("all-gather", ("fsdp",), 2, 3e9, True, "")
    found = made(arguments=10, flops=8e15, dot_bytes=4e12, collectives=[gather])
    options = {"efficiency": 0.5, "widened": False, "weights": 1000, "items": 3}
    b = bounds(found, links, **options)
    assert b.flops == pytest.approx(2e15 / (459e12 / 2))
    assert b.memory == pytest.approx((1e12 + 4 * 3 * 1000 + 20) / 2765e9)
    assert b.links == {("fsdp",): pytest.approx(3e9 / 200e9)}  # 2 of 6 links
    assert b.term == "compute" and b.seconds == b.flops
    slow = bounds(found._replace(count=Count()), links, **options)
    assert slow.term == "fsdp" and slow.seconds == pytest.approx(0.015)


def test_what_a_cpu_widened_is_halved():
    loop = Collective("all-gather", ("fsdp",), 40, 8e9, True, "")
    once = Collective("all-reduce", ("fsdp",), 1, 1e9, True, "")
    found = made(collectives=[loop, once])
    gathered, reduced = (("fsdp",), "all-gather"), (("fsdp",), "all-reduce")
    assert sent(found, True) == {gathered: 4e9, reduced: 1e9}
    assert sent(found, False) == {gathered: 8e9, reduced: 1e9}


# ---- the search


def test_meshes_are_all_factorisations():
    found = list(meshes(12))
    # 2^2: ten ways over four axes, 3: four ways
    assert len(found) == 40 and len({tuple(m.values()) for m in found}) == 40
    assert all(math.prod(m.values()) == 12 for m in found)


def test_the_suggestion_is_compiled_and_small(planned):
    """With room for anything one device does, and nothing is computed again: both
    phases on its mesh, then the update with each of three policies."""
    run, compiled = planned
    shown = Shown(run, compiled)
    chip = with_memory(20.0 * shown.peak)
    found = suggest(shown, 8, chip)
    assert found is not None and fits(found.peak, chip)
    assert found.mesh == ONE and found.remat == "none" and found.compilations == 5
    assert suggest(shown, 8, with_memory(shown.peak / 1000)) is None


@pytest.mark.parametrize(
    ("target", "policies"),
    [
        (HERE, ["full", "named"]),
        (Target("tpu", CHIPS["v5p"]), ["full", "named", "offload"]),
    ],
)
def test_little_memory_means_more_devices_and_full_remat(
    monkeypatch, planned, target, policies
):
    """One device does not hold it; two do, but not what another policy would keep.

    A compiler that knows the host's memory can show that this is kept there."""
    run, compiled = planned
    compilations, made_for, real = [], [], search.described

    def compile_less(phase, mesh):
        compilations.append(phase.name)
        kept = alone if phase.name == "update" and made_for[-1] == "named" else 0
        return made(phase.name)._replace(phase=phase, temporaries=int(kept))

    def describe_here(plan, mesh, remat):
        made_for.append(remat)
        return real(plan._replace(target=HERE), mesh, remat)._replace(target=target)

    monkeypatch.setattr(search, "compile_phase", compile_less)
    monkeypatch.setattr(search, "described", describe_here)
    alone = sum(resident(describe(tiny())).values())
    bare = [found._replace(temporaries=0) for found in compiled]
    found = suggest(Shown(run._replace(target=target), bare), 8, with_memory(alone))
    assert found is not None and math.prod(found.mesh.values()) == 2
    # The last that was tried is chosen, but for one that keeps too much.
    assert (
        made_for == policies and found.remat == {2: "full", 3: "offload"}[len(policies)]
    )
    assert compilations == ["update", "rollout", *["update"] * (len(policies) - 1)]
    assert found.compilations == len(compilations)


# ---- the mode


def test_the_whole_mode(capsys):
    c = tiny(fsdp=4)
    c.mesh.data = -1
    plan.plan_mode(c.lock(), FLAGS)
    text = capsys.readouterr().out
    words = ("8 x v5p: mesh data 2, fsdp 4", "parameters", "optimizer", "trajectories")
    words += ("temporaries of the update", "fits, with", "FLOPs", "sent along fsdp")
    words += ("bound by", "samples an hour", "accelerator hours", "suggestion: ")
    assert all(word in text for word in words), text


def test_a_sampler_without_noise_is_refused_as_in_training():
    config = stable_diffusion("assets", sampler={"kernel": "ddim", "eta": 0.0})
    with pytest.raises(UserError, match="no noise at any step"):
        plan.plan_mode(config, {"devices": "1", "chip": "H100"})


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"chip": "v5p"}, "plan.devices is missing"),
        ({"devices": "8"}, "plan.chip is missing"),
        (FLAGS | {"devices": "0"}, "plan.devices"),
        (FLAGS | {"devices": "x"}, "plan.devices"),
        (FLAGS | {"chip": "v99"}, "no such chip"),
        (FLAGS | {"efficiency": "1.5"}, "plan.efficiency"),
        (FLAGS | {"suggest": "perhaps"}, "plan.suggest"),
    ],
)
def test_wrong_flags(flags, word):
    with pytest.raises(UserError, match=word):
        plan.plan_mode(tiny(), flags)
