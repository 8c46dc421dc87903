"""Names and layouts: by hand, and there and back on what the libraries write."""

import numpy as np
import pytest
import tiny_sd

from ddrl_jax.errors import UserError
from ddrl_jax.models.convert import (
    Table,
    apply_table,
    check_leaves,
    invert_table,
    table,
    to_jax,
    to_torch_names,
)
from ddrl_jax.models.networks import network_shapes

TABLE = Table(
    kinds=(
        (r"(.+\.)?(fc\d|proj|conv\d?|linear_1)\.weight", "linear"),
        (r"(.+\.)?norm\.weight", "norm"),
        (r"words\.weight", "embedding"),
        (r".+\.bias", "bias"),
        (r"(.+\.)?temperature", "raw"),
    ),
    stacked=(r"encoder\.layers",),
    ignored=(r"ids",),
)
TOWER = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
TEXT = {**TOWER, "num_hidden_layers": 11, "vocab_size": 9, "max_position_embeddings": 5}
VISION = {**TOWER, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}


def normal(*shape):
    return np.random.default_rng(abs(hash(shape)) % 1000).normal(size=shape)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_each_kind_gets_its_layout():
    linear, conv = normal(2, 3), normal(2, 3, 4, 5)
    tensors = {
        "a.fc1.weight": linear,
        "a.conv1.weight": conv,
        "a.norm.weight": normal(4),
        "words.weight": normal(7, 2),
        "a.fc1.bias": normal(2),
        "temperature": normal(),
        "ids": normal(3),
    }
    params = apply_table(TABLE, "x", tensors)
    assert params["a"]["fc1"]["kernel"][1, 0] == linear[0, 1]
    # y_o = sum_ihw W_oihw x_ihw: ours keeps the order h w i o.
    assert params["a"]["conv1"]["kernel"][3, 4, 2, 1] == conv[1, 2, 3, 4]
    assert params["a"]["norm"]["scale"] is tensors["a.norm.weight"]
    assert params["words"]["embedding"].shape == (7, 2)
    assert params["a"]["fc1"]["bias"].shape == (2,)
    assert params["temperature"].shape == ()
    assert "ids" not in params
    del tensors["ids"]
    same(invert_table(TABLE, "x", params), tensors)


@pytest.mark.parametrize(
    ("torch_name", "path"),
    [
        ("down.0.fc1.weight", ("down_0", "fc1", "kernel")),
        ("net.0.1.proj.weight", ("net_0_1", "proj", "kernel")),
        ("time.linear_1.weight", ("time", "linear_1", "kernel")),
        ("a.12.norm.weight", ("a_12", "norm", "scale")),
    ],
)
def test_numbers_join_the_word_before_them(torch_name, path):
    params = apply_table(TABLE, "x", {torch_name: normal(2, 2)})
    node = params
    for word in path:
        node = node[word]
    assert list(invert_table(TABLE, "x", params)) == [torch_name]


def test_blocks_are_stacked_in_the_order_of_their_numbers():
    names = [f"encoder.layers.{i}.fc1.weight" for i in range(12)]
    tensors = {name: np.full((2, 3), i) for i, name in enumerate(names)}
    shuffled = dict(sorted(tensors.items()))  # 10 and 11 come before 2
    params = apply_table(TABLE, "x", shuffled)
    kernel = params["encoder"]["layers"]["fc1"]["kernel"]
    assert kernel.shape == (12, 3, 2)
    assert list(kernel[:, 0, 0]) == list(range(12))
    same(invert_table(TABLE, "x", params), tensors)


def test_written_arrays_are_contiguous():
    params = apply_table(TABLE, "x", {"a.fc1.weight": normal(2, 3)})
    written = invert_table(TABLE, "x", params)["a.fc1.weight"]
    assert written.flags.c_contiguous


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"a.strange.weight": 1, "a.fc1.weight": 2}, "a.strange.weight"),
        ({f"a.b{i}.weight": 1 for i in range(13)}, "and 3 more"),
        ({f"encoder.layers.{i}.fc1.weight": 2 for i in (0, 2)}, "of block 1"),
        ({"a.fc1.weight": 1}, r"matrices or kernels.*\n.*a\.fc1\.weight \(2,\)"),
        ({"a.conv1.weight": 3}, r"a\.conv1\.weight \(2, 2, 2\)"),
    ],
)
def test_tensors_without_a_place_are_listed(tensors, named):
    tensors = {name: normal(*(2,) * rank) for name, rank in tensors.items()}
    with pytest.raises(UserError, match=named):
        apply_table(TABLE, "x", tensors)


def test_blocks_of_unequal_shapes_are_refused():
    blocks = {f"encoder.layers.{i}.fc1.weight": normal(2, 2 + i) for i in range(2)}
    with pytest.raises(UserError, match="unequal shapes"):
        apply_table(TABLE, "x", blocks)


def test_leaves_without_a_name_are_listed():
    with pytest.raises(UserError, match="a/strange/kernel"):
        invert_table(TABLE, "x", {"a": {"strange": {"kernel": normal(2, 2)}}})


def test_a_table_whose_rows_overlap_is_a_mistake_of_ours():
    rows = Table(kinds=((r"a\..*", "norm"), (r".*\.bias", "bias")))
    with pytest.raises(ValueError, match="2 rows"):
        apply_table(rows, "x", {"a.bias": normal(2)})


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"a": normal(2)}, "no tensor fills.*\n.*got: *b$"),
        ({"a": normal(2), "b": normal(3), "c": normal(1)}, "no use for.*\n.*got: *c$"),
        ({"a": normal(2), "b": normal(4)}, r"another shape.*\n.*b: \(4,\), not \(3,\)"),
    ],
)
def test_a_tree_is_held_against_the_network(params, named):
    with pytest.raises(UserError, match=f"(?m){named}"):
        check_leaves("x", params, {"a": normal(2), "b": normal(3)})


def test_an_unknown_network_is_refused():
    with pytest.raises(UserError, match="'gan'"):
        table("gan")


PARTS = ("unet", "vae")


def numbers(network):
    return {name: t.detach().numpy() for name, t in network.state_dict().items()}


def networks():
    """name -> (tensors, config) of tiny networks, as the libraries write them."""
    pytest.importorskip("torch")
    pipe = tiny_sd.make_pipeline(sd2=True)
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

    clip = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION))
    vision = CLIPVisionModel(CLIPVisionConfig(**VISION))
    made = {part: (numbers(n := getattr(pipe, part)), dict(n.config)) for part in PARTS}
    text = pipe.text_encoder
    made["clip_text"] = (numbers(text), text.config.to_dict())
    made["clip_vision"] = (numbers(vision), vision.config.to_dict())
    made["clip"] = (numbers(clip), clip.config.to_dict())
    first = tiny_sd.make_pipeline().unet
    made["unet of 1.x"] = (numbers(first), dict(first.config))
    return made


@pytest.fixture(scope="module")
def written():
    return networks()


NAMES = ("unet", "unet of 1.x", "vae", "clip_text", "clip_vision", "clip")


@pytest.mark.parametrize("name", NAMES)
def test_every_network_converts_there_and_back(written, name):
    (tensors, config), name = written[name], name.split()[0]
    tensors = {k: v for k, v in tensors.items() if "position_ids" not in k}
    params = to_jax(name, tensors, config)
    same(to_torch_names(name, params, config), tensors)


@pytest.mark.parametrize("name", NAMES)
def test_each_tensor_is_needed(written, name):
    """Without its last tensor no network is complete; with one more it is too much."""
    (tensors, config), name = written[name], name.split()[0]
    last = [key for key in tensors if "position_ids" not in key][-1]
    fewer = {key: t for key, t in tensors.items() if key != last}
    shapes = network_shapes(name, config)
    with pytest.raises(UserError):
        check_leaves(name, to_jax(name, fewer), shapes)
    with pytest.raises(UserError, match="surplus.weight"):
        to_jax(name, {**tensors, "surplus.weight": normal(2)})
    surplus = {**to_jax(name, tensors), "surplus": {"bias": normal(2)}}
    with pytest.raises(UserError, match="surplus/bias"):
        check_leaves(name, surplus, shapes)


def test_older_names_of_the_autoencoder_are_read(written):
    tensors, config = written["vae"]
    new_to_old = {"to_q": "query", "to_k": "key", "to_v": "value"}
    new_to_old["to_out.0"] = "proj_attn"
    old = {}
    for name, tensor in tensors.items():
        for new, before in new_to_old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        old[name] = tensor
    assert any("proj_attn" in name for name in old)
    same(to_torch_names("vae", to_jax("vae", old, config)), tensors)


def test_a_text_tower_with_its_wrapper_and_positions_is_read(written):
    tensors, config = written["clip_text"]
    old = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    old["text_model.embeddings.position_ids"] = np.arange(5)[None]
    params = to_jax("clip_text", old, config)
    same(to_torch_names("clip_text", params), tensors)
    with pytest.raises(UserError, match="second tensor"):
        to_jax("clip_text", {**old, **tensors}, config)
