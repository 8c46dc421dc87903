"""Where arrays live: specs that always divide, and the same numbers on any mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from edited_config import configured
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_epochs import EDITS, compare, epoch
from tiny_runs import (
    assert_the_network_speaks,
    flat_source,
    perturbed,
    perturbed_state,
    same_bits,
    tiny_program,
)

from ddrl_jax.draws import each_chunk, prompts_of
from ddrl_jax.errors import UserError
from ddrl_jax.self_test import check_ratio
from ddrl_jax.sharding import (
    RULES,
    make_mesh,
    params_shardings,
    place_batch,
    replicated,
    spec_for,
    table,
    to_host,
    without,
)
from ddrl_jax.weights import undivided


def mesh_of(data=1, fsdp=1, tensor=1, context=1):
    return make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor, "context": context})


CUBE = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (4, 6), P("fsdp", "tensor")),
        (("batch", None), (8, 5), P(("data", "fsdp"), None)),
        (("batch",), (6,), P("data")),  # 4 does not divide 6, 2 does
        (("batch",), (3,), P(None)),
        (("embed", "mlp"), (3, 6), P(None, "tensor")),
        (("embed",), (4, 6, 7), P("fsdp", None, None)),  # missing names are None
        (("layers", "mlp", "embed"), (2, 6, 4), P(None, "tensor", "fsdp")),
        (("batch", "embed"), (8, 8), P(("data", "fsdp"), None)),  # fsdp is taken
        (("batch", "embed"), (2, 8), P("data", "fsdp")),  # fsdp is free again
        (("mlp", "heads"), (4, 4), P("tensor", None)),
        (("no such name",), (4,), P(None)),
        ((), (), P()),
    ],
)
def test_spec_by_hand(axes, shape, expected):
    assert spec_for(axes, shape, mesh_of(**CUBE)) == expected


def test_any_spec_divides_and_uses_a_mesh_axis_once():
    mesh, random = mesh_of(**CUBE), np.random.default_rng(0)
    names = [*RULES, None]
    placed = 0
    for _ in range(300):
        shape = tuple(int(n) for n in random.integers(1, 13, random.integers(1, 5)))
        axes = tuple(names[i] for i in random.integers(0, len(names), len(shape)))
        spec = spec_for(axes, shape, mesh)
        used = [
            a for part in spec for a in (part if isinstance(part, tuple) else [part])
        ]
        used = [a for a in used if a is not None]
        assert len(used) == len(set(used))
        NamedSharding(mesh, spec).shard_shape(shape)  # raises where it does not divide
        placed += len(used)
    assert placed > 300


def test_one_size_may_be_left_open():
    assert dict(mesh_of(data=-1, tensor=2).shape) == {
        "data": 4, "fsdp": 1, "tensor": 2, "context": 1
    }  # fmt: skip
    assert mesh_of(data=2).devices.size == 2


def test_parameters_follow_their_logical_axes():
    mesh = mesh_of(fsdp=2, tensor=2)
    shapes = {"a": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}, "b": None}
    axes = {"a": {"kernel": ("embed", "mlp")}, "b": None}
    found = params_shardings(axes, shapes, mesh)
    assert found["a"]["kernel"].spec == P("fsdp", "tensor") and found["b"] is None


@pytest.mark.parametrize("axis", [0, 1])
def test_batches_are_split_along_their_axis(axis):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    rows = np.arange(48.0).reshape((8, 6) if axis == 0 else (6, 8))
    placed = place_batch(mesh, {"x": rows}, axis)["x"]
    shape = [*rows.shape]
    shape[axis] //= 4
    assert {s.data.shape for s in placed.addressable_shards} == {tuple(shape)}
    np.testing.assert_array_equal(to_host({"x": placed})["x"], rows)


def test_replicated_is_whole_everywhere():
    mesh = mesh_of(data=4)
    placed = jax.device_put(np.arange(5.0), replicated(mesh))
    assert [s.data.shape for s in placed.addressable_shards] == [(5,)] * 4


# ---- whole programs: the same numbers on one device and on eight

MESHES = {
    "fsdp": {"mesh.fsdp": 8},
    "tensor": {"mesh.tensor": 2},
    "data, tensor": {"mesh.data": 4, "mesh.tensor": 2},
    "context": {"mesh.context": 2},
    "data, fsdp, tensor": {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
    "data, tensor, context": {"mesh.data": 2, "mesh.tensor": 2, "mesh.context": 2},
    "fsdp, tensor, context": {"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.context": 2},
}


@pytest.fixture(scope="module")
def alone():
    return epoch()


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_changes_no_number(name, alone):
    program, before, trajectory, _, after, metrics = epoch(**MESHES[name])
    assert same_bits(before, alone[1])
    compare(trajectory._replace(index=0), alone[2]._replace(index=0), 1e-5)
    np.testing.assert_array_equal(trajectory.index, alone[2].index)
    moved = jax.tree.map(lambda a, b: a - b, to_host(alone[4].params), alone[1][0])
    assert max(np.abs(a).max() for a in jax.tree.leaves(moved)) > 1e-6
    compare(to_host(after.params), to_host(alone[4].params), 1e-5)
    compare(metrics, alone[5], 1e-5)


def slopes(**mesh):
    """Gradients of the network by its weights, on a batch of 8."""
    wide = {"model.width": 64, "model.heads": 4, "train.minibatches": 1}
    program = tiny_program(wide | {"mesh.data": 1} | mesh)
    state, random = perturbed_state(program), np.random.default_rng(0)
    z = random.normal(size=(8, *program.pipeline.latent_shape)).astype(np.float32)
    batch = (z, np.linspace(0.1, 0.9, 8).astype(np.float32))
    z, time, cond = place_batch(
        program.mesh, (*batch, program.pipeline.encode(2 * program.prompts))
    )

    def loss(params):
        out = program.objective.apply(params, program.frozen, z, time, cond)
        return jnp.mean(jnp.sin(out))

    return to_host(jax.jit(jax.grad(loss))(state.params))


@pytest.mark.slow
def test_fsdp_divides_no_channel_of_an_activation():
    """XLA, left to itself, does so from some width on, and adds up wrongly."""
    found = slopes(**{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    for a, b in zip(jax.tree.leaves(slopes()), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())


def test_moments_and_average_live_with_their_weights():
    program = tiny_program({"mesh.fsdp": 2, "mesh.tensor": 2})
    state = program.new_state()
    specs = jax.tree.map(lambda a: a.sharding.spec, state.params)
    split = [s for s in jax.tree.leaves(specs) if s != P() and any(s)]
    assert len(split) > 5
    is_adam = lambda part: isinstance(part, optax.ScaleByAdamState)  # noqa: E731
    parts = jax.tree.leaves(state.opt_state, is_leaf=is_adam)
    adam = next(part for part in parts if is_adam(part))
    for tree in (state.ema, adam.mu, adam.nu):
        assert jax.tree.map(lambda a: a.sharding.spec, tree) == specs
    for a, wanted in zip(
        jax.tree.leaves(state), jax.tree.leaves(program.abstract_state()), strict=True
    ):
        assert (a.shape, a.dtype) == (wanted.shape, wanted.dtype)
        assert a.sharding.is_equivalent_to(wanted.sharding, a.ndim)
    assert adam.count.sharding.is_fully_replicated


# ---- the table of the configuration, and the rollout's own layout


def test_the_table_is_the_configuration_and_its_default_the_rules():
    config = configured({"sharding.mlp": ("fsdp", "tensor"), "sharding.embed": ()})
    found = table(config.sharding)
    assert found["mlp"] == ("fsdp", "tensor") and found["embed"] == ()
    assert found["batch"] == ("data", "fsdp")
    plain = table(configured({}).sharding)
    names = [*RULES, "layers"]
    assert all(plain[n] == RULES.get(n, ()) for n in names if n != "length")
    assert without(found, "fsdp")["mlp"] == ("tensor",)
    assert spec_for(("embed", "mlp"), (4, 8), mesh_of(**CUBE), found) == P(
        None, ("fsdp", "tensor")
    )


def test_what_does_not_divide_is_named():
    mesh = mesh_of(fsdp=2, tensor=2)
    struct = jax.ShapeDtypeStruct
    shapes = {"a": {"kernel": struct((4, 6), "f4")}, "b": struct((4, 5, 7), "f4")}
    axes = {"a": {"kernel": ("embed", "mlp")}, "b": ("embed", "mlp", None)}
    assert undivided(axes, shapes, mesh) == ["b [4, 5, 7]: mlp 5 over tensor 2"]
    assert undivided(axes, shapes, mesh_of(fsdp=2)) == []
    twice = RULES | {"embed": ("fsdp", "tensor")}  # of a weight, the first axis has it
    line = "mlp {} over tensor 2, which embed has"
    wanted = [f"a.kernel [4, 6]: {line.format(6)}", f"b [4, 5, 7]: {line.format(5)}"]
    assert undivided(axes, shapes, mesh, twice) == wanted
    assert undivided(axes, shapes, mesh_of(fsdp=2), twice) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["replicated", "tensor"])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_rollout_has_its_own_copy_of_the_weights(layout, rank, alone):
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "lora.rank": rank}
    program = tiny_program(EDITS | mesh | {"rollout.layout": layout}, flat_source())
    state = perturbed_state(program)
    axes = {
        axis
        for leaf in jax.tree.leaves(program.sampling(state.params, program.frozen))
        for part in leaf.sharding.spec
        for axis in (part if isinstance(part, tuple) else (part,))
    }
    assert axes - {None} == ({"tensor"} if layout == "tensor" else set())
    trained = jax.tree.map(lambda a: a.sharding.spec, state.params)
    assert any("fsdp" in spec for spec in jax.tree.leaves(trained))
    found = program.sampling(state.params, program.frozen)
    for a, b in zip(
        jax.tree.leaves(found),
        jax.tree.leaves((state.params, program.frozen)),
        strict=True,
    ):
        np.testing.assert_array_equal(to_host(a), to_host(b))
    if not rank:
        _, _, trajectory, *_ = epoch(**mesh | {"rollout.layout": layout})
        compare(trajectory._replace(index=0), alone[2]._replace(index=0), 1e-5)


def test_of_a_whole_copy_no_device_sends_a_part():
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    program = tiny_program(mesh | {"rollout.layout": "replicated"})
    state = program.new_state()
    chunk = next(each_chunk(program, prompts_of(program, 0), 0, 0))
    trained = place_batch(program.mesh, np.zeros((1, program.chunk), np.int32), axis=1)
    weights = program.sampling(state.params, program.frozen)
    lowered = jax.jit(program.rollout).lower(*weights, chunk.keys, chunk.cond, trained)
    text = lowered.compile().as_text() or ""
    assert "while" in text and not re.search("all-reduce|all-gather|all-to-all", text)


@pytest.mark.slow
def test_a_rollout_in_bfloat16_trains_with_the_recomputed_log_prob():
    edits = {"rollout.dtype": "bfloat16", "mesh.data": 2}
    refused = tiny_program(edits)
    with pytest.raises(UserError, match="policy ratio"):
        check_ratio(refused, perturbed_state(refused))
    program = tiny_program(edits | {"policy.old_log_prob": "recompute"})
    state = perturbed_state(program)
    copy, _ = program.sampling(state.params, program.frozen)
    assert copy["words"].dtype == "float32"  # as the network uses them
    assert {a.dtype.name for a in jax.tree.leaves(copy)} == {"bfloat16", "float32"}
    check_ratio(program, state)


@pytest.mark.optimised
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rounded_rollout_of_a_rounded_network_is_on_policy(rank):
    edits = {"rollout.dtype": "bfloat16", "model.dtype": "bfloat16", "lora.rank": rank}
    program = tiny_program(edits)
    if rank:  # the zero output layer of the base has no factors
        program = program._replace(frozen=perturbed(program.frozen))
    assert_the_network_speaks(program, perturbed_state(program))
    check_ratio(program, perturbed_state(program))
