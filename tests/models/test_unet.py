"""The UNet against diffusers' own in PyTorch, its sizes, and what it refuses."""

import inspect
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.extend.core.primitives import remat_p
from jax.sharding import PartitionSpec as P

from ddrl_jax.models.convert import to_jax, to_torch_names
from ddrl_jax.models.lora import merge_lora
from ddrl_jax.models.unet import UNet2DConditionModel, UNetConfig, timestep_features
from ddrl_jax.sharding import make_mesh, params_shardings, place_batch

BASE = {  # as diffusers writes it; everything it leaves out has its default
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.42.1",
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 6,
    "attention_head_dim": 4,
}
ONE_LEVEL = BASE | {
    "block_out_channels": [8],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
}
GRID = {  # name: (changes to BASE, height and width)
    "sd1": ({}, (8, 8)),
    "sd2": (  # and sizes that are odd at every level
        {
            "block_out_channels": [8, 8, 16],
            "down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2,
            "attention_head_dim": [1, 2, 4],
            "use_linear_projection": True,
            "upcast_attention": True,
            "layers_per_block": 2,
        },
        (7, 10),
    ),
    "all_else": (
        {
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": [2, 8],
            "only_cross_attention": [False, True],
            "transformer_layers_per_block": 2,
            "center_input_sample": True,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-2,
            "norm_num_groups": 2,
            "in_channels": 5,
            "out_channels": 3,
        },
        (8, 8),
    ),
}
FULL = {  # what the config.json of each family says beside the defaults
    "1.x": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "2.x": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
}
PARAMETERS = {"1.x": 859_520_964, "2.x": 865_910_724}
# Tests run a network once: most of the time is LLVM's.
QUICK = {"xla_backend_optimization_level": 0}


def inputs(config, size):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, *size, config.in_channels)).astype(np.float32)
    emb = rng.normal(size=(2, 5, config.cross_attention_dim)).astype(np.float32)
    return x, np.asarray([999.0, 20.0], np.float32), emb


def torch_network(changes):
    """diffusers' network with every weight random: nothing is 0 or 1 any more."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    skip = ("_class_name", "_diffusers_version")
    config = {k: v for k, v in (BASE | changes).items() if k not in skip}
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel(**config).eval()
    with torch.no_grad():
        for name, p in network.named_parameters():
            fan_in = p[0].numel()
            scale = 0.3 if p.ndim == 1 else fan_in**-0.5
            p.copy_(torch.randn(p.shape) * scale + ("norm" in name and p.ndim == 1))
    return network


def tensors(network):
    return {k: v.numpy() for k, v in network.state_dict().items()}


def torch_output(network, x, time, emb):
    import torch

    picture = torch.from_numpy(x).permute(0, 3, 1, 2)
    out = network(picture, torch.from_numpy(time), torch.from_numpy(emb)).sample
    return out.permute(0, 2, 3, 1)


def abstract(json, **options):
    """The trees of a network, boxed with their logical axes, without a computation."""
    config = UNetConfig.from_json(json)
    network = UNet2DConditionModel(config, **options)
    rngs = {"params": jax.random.key(0), "lora": jax.random.key(1)}
    return jax.eval_shape(network.init, rngs, *inputs(config, (8, 8)))


def draw(shapes):
    """Random weights everywhere, around 1 for the scales of norms."""
    rng = np.random.default_rng(5)

    def one(path, leaf):
        scale = path[-1].key == "scale"
        return jnp.asarray(rng.normal(scale, 0.3, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(one, nn.meta.unbox(shapes))


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def relative(found, want):
    return np.abs(np.asarray(found) - want).max() / np.abs(want).max()


def quick(function, *args):
    return jax.jit(function, compiler_options=QUICK)(*args)


@pytest.fixture(scope="module")
def boxed():
    return abstract(BASE, rank=2)


@pytest.fixture(scope="module")
def tiny():
    """(config, trees with LoRA factors, inputs, compiled network without factors)."""
    config = UNetConfig.from_json(ONE_LEVEL)
    trees, example = draw(abstract(ONE_LEVEL, rank=2)), inputs(config, (4, 4))
    plain = jax.jit(UNet2DConditionModel(config).apply, compiler_options=QUICK)
    return config, trees, example, lambda p: np.asarray(plain({"params": p}, *example))


@pytest.mark.parametrize("name", GRID)
def test_equals_pytorch(name):
    changes, size = GRID[name]
    network = torch_network(changes)
    config = UNetConfig.from_json(BASE | changes)
    example = inputs(config, size)
    want = torch_output(network, *example).detach().numpy()
    params = to_jax("unet", tensors(network), config)
    found = quick(UNet2DConditionModel(config).apply, {"params": params}, *example)
    assert found.shape == want.shape and found.dtype == jnp.float32
    assert relative(found, want) < 1e-5


@pytest.mark.parametrize("name", GRID)
def test_weights_return_to_pytorch_as_they_came(name):
    want = tensors(torch_network(GRID[name][0]))
    found = to_torch_names("unet", to_jax("unet", want))
    assert found.keys() == want.keys()
    for key in want:
        np.testing.assert_array_equal(found[key], want[key])


def test_time_features_equal_pytorch_to_the_last_timestep():
    torch = pytest.importorskip("torch")
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    time = np.asarray([0.0, 0.5, 1.0, 501.0, 999.0], np.float32)
    for flip, shift in [(True, 0.0), (False, 1.0)]:
        want = embeddings.get_timestep_embedding(
            torch.from_numpy(time), 320, flip, shift
        )
        found = timestep_features(jnp.asarray(time), 320, flip, shift)
        # torch's exp is one unit in the last place off for some frequencies.
        bound = 2.0**-23 * (1 + time[:, None])
        assert np.all(np.abs(found - want.numpy()) <= bound)


def test_absent_keys_have_the_defaults_of_diffusers():
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    init = diffusers.UNet2DConditionModel.__init__
    parameters = inspect.signature(init).parameters
    defaults = {k: p.default for k, p in parameters.items() if k != "self"}
    assert UNetConfig.from_json(defaults) == UNetConfig.from_json({}) == UNetConfig()


@pytest.mark.parametrize("family", FULL)
def test_size_of_the_published_networks(family):
    trees = abstract(FULL[family], rank=4)
    assert count(trees["params"]) == PARAMETERS[family]
    if family == "1.x":  # the DDPO of the paper's authors, 32 attentions
        assert count(trees["lora"]) == 797_184


def test_low_rank_factors_stand_at_the_projections_of_attention(boxed):
    lora = traverse_util.flatten_dict(nn.meta.unbox(boxed["lora"]))
    homes = {path[-3:-1] for path in lora}
    projections = ("to_q", "to_k", "to_v", "to_out_0")
    assert homes == {(a, p) for a in ("attn1", "attn2") for p in projections}
    transformers = 4  # one down, one in the middle, two up
    assert len(lora) == transformers * 2 * 4 * 2


def test_low_rank_factors_equal_merged_weights(tiny):
    config, trees, example, plain = tiny
    network = UNet2DConditionModel(config, rank=2, alpha=6.0)
    found = quick(network.apply, trees, *example)
    lora = SimpleNamespace(rank=2, alpha=6.0)
    want = plain(merge_lora(trees["params"], trees["lora"], lora))
    assert relative(found, want) < 1e-5
    assert relative(found, plain(trees["params"])) > 1e-2


def test_half_precision_is_of_the_products_only(tiny):
    config, trees, example, plain = tiny
    network = UNet2DConditionModel(config, dtype="bfloat16")
    found = quick(network.apply, {"params": trees["params"]}, *example)
    assert found.dtype == jnp.float32
    assert 1e-4 < relative(found, plain(trees["params"])) < 5e-2
    # The last layer is not rounded to the eight bits of bfloat16.
    assert np.any(np.asarray(found) != np.asarray(found.astype(jnp.bfloat16)))


def loss_of(config, example, **options):
    network = UNet2DConditionModel(config, **options)
    example = tuple(map(jnp.asarray, example))
    return lambda trees: jnp.sum(jnp.square(network.apply(trees, *example)))


def test_recomputed_gradients_equal_pytorch(tiny):
    config, trees, example, _ = tiny
    network = torch_network(ONE_LEVEL)
    params = jax.tree.map(np.array, to_jax("unet", tensors(network), config))
    # In double precision: PyTorch's own float32 gradients are 0.7e-5 off these.
    exact = [array.astype(np.float64) for array in example]
    torch_output(network.double(), *exact).square().sum().backward()
    gradients = {k: p.grad.numpy() for k, p in network.named_parameters()}
    want = traverse_util.flatten_dict(to_jax("unet", gradients))
    silent = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (path[-1].key != "b"), trees["lora"]
    )
    loss = loss_of(config, example, remat="full", rank=2)
    found = quick(jax.grad(loss), {"params": params, "lora": silent})
    for path, leaf in traverse_util.flatten_dict(found["params"]).items():
        assert np.abs(leaf - want[path]).max() <= 2e-5 * np.abs(want[path]).max(), path
    for path, leaf in traverse_util.flatten_dict(found["lora"]).items():
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0) == (path[-1] == "b")


def test_only_full_recomputation_recomputes(tiny):
    config, trees, example, _ = tiny
    for remat in ("none", "full"):
        jaxpr = jax.make_jaxpr(loss_of(config, example, remat=remat))(trees)
        names = [equation.primitive.name for equation in jaxpr.eqns]
        blocks = 5 + 4  # resnets and transformers of the one level
        assert names.count(remat_p.name) == (blocks if remat == "full" else 0)


def test_every_parameter_has_logical_axes(boxed):
    specs = traverse_util.flatten_dict(nn.get_partition_spec(boxed), sep="/")
    flat = traverse_util.flatten_dict(nn.meta.unbox(boxed), sep="/")
    for name, leaf in flat.items():
        assert isinstance(specs[name], P) and len(specs[name]) == len(leaf.shape)
    conv = "params/down_blocks_0/resnets_0/conv1/kernel"
    assert specs[conv] == P(None, None, "embed", "mlp")
    attention = "params/mid_block/attentions_0/transformer_blocks_0/attn1/to_q/kernel"
    assert specs[attention] == P("embed", "heads")
    assert {None, "embed", "mlp", "heads"} == {a for s in specs.values() for a in s}


@pytest.fixture(scope="module")
def in_a_loop(boxed):
    """(mesh axis -> size) -> the network's output in a loop, weights on their shards.

    As in a rollout: XLA lays activations out otherwise than outside of a loop.
    """
    config, params = UNetConfig.from_json(BASE), draw(boxed)["params"]
    names = nn.get_partition_spec(boxed)["params"]
    axes = jax.tree.map(tuple, names, is_leaf=lambda a: isinstance(a, P))
    x, _, emb = (np.concatenate([a, -a]) for a in inputs(config, (4, 4)))
    batch = (x, np.asarray([999.0, 20.0, 500.0, 0.0], np.float32), emb)

    def run(**sizes):
        mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | sizes)
        network = UNet2DConditionModel(config, impl="auto", mesh=mesh)
        placed = jax.device_put(params, params_shardings(axes, params, mesh))

        def loop(params, x, time, emb):
            def body(_, scale):
                return None, network.apply({"params": params}, scale * x, time, emb)

            return jax.lax.scan(body, None, jnp.asarray([1.0, 2.0]))[1]

        return np.asarray(quick(loop, placed, *place_batch(mesh, batch)))

    return run, run()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{"data": 4, "context": 2}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
def test_any_mesh_gives_the_numbers_of_one_device(sizes, in_a_loop):
    run, want = in_a_loop
    assert relative(run(**sizes), want) < 1e-5
