"""CLIP against transformers: each tower, with and without projection, and the pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddrl_jax.models import clip
from ddrl_jax.models.clip import (
    Clip,
    ClipConfig,
    ClipText,
    ClipTextConfig,
    ClipVision,
    ClipVisionConfig,
)
from ddrl_jax.models.convert import to_jax, to_torch_names

TEXT = {
    "vocab_size": 23,
    "hidden_size": 12,
    "intermediate_size": 20,
    "projection_dim": 6,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 9,
    "bos_token_id": 20,
    "pad_token_id": 21,
    "eos_token_id": 21,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "projection_dim": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
# Token 22 is larger than the end token: the two rules read different positions.
IDS = np.asarray(
    [[20, 3, 22, 7, 21, 21, 21, 21, 21], [20, 21, 5, 22, 6, 21, 3, 2, 1]], np.int32
)
MASK = np.asarray([[1] * 5 + [0] * 4, [1] * 6 + [0] * 3], bool)
PIXELS = np.random.default_rng(2).normal(size=(2, 12, 12, 3)).astype(np.float32)


def theirs(kind, **changes):
    """A network of the reference with random numbers, none of them 0, everywhere."""
    torch = pytest.importorskip("torch")
    import transformers as reference

    text = reference.CLIPTextConfig(**TEXT | changes)
    vision = reference.CLIPVisionConfig(
        **VISION | {k: v for k, v in changes.items() if k in ("hidden_act",)}
    )
    if kind == "CLIPModel":
        both = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
        config = reference.CLIPConfig(**both, projection_dim=5)
    else:
        config = text if "Text" in kind else vision
    network = getattr(reference, kind)(config).eval()
    network.config.architectures = [kind]  # as save_pretrained writes it
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in network.named_parameters():
            # Wide enough for attention to be far from uniform.
            size = 0.1 if name == "logit_scale" else 0.4
            p.add_(torch.randn(p.shape, generator=generator) * size)
    return network


def arrays(network, prefix=""):
    """Their tensors, under the names of a file of transformers 4 if prefixed."""
    return {prefix + k: v.numpy() for k, v in network.state_dict().items()}


def run(network, params, *inputs, method="__call__"):
    go = jax.jit(lambda p, *x: network.apply({"params": p}, *x, method=method))
    return go(params, *(jnp.asarray(x) for x in inputs))


def wanted_of(network, **inputs):
    import torch

    with torch.no_grad():
        return network(**{k: torch.from_numpy(v) for k, v in inputs.items()})


def nchw(pixels):
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def assert_close(found, wanted, relative=1e-5):
    """Largest error over the largest output."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape and found.dtype == np.float32
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert error < relative, error


# ---- text


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos_token_id", [2, 21])
def test_text_tower(hidden_act, eos_token_id):
    network = theirs("CLIPTextModel", hidden_act=hidden_act, eos_token_id=eos_token_id)
    config = ClipTextConfig.from_json(network.config.to_dict())
    params = to_jax("clip_text", arrays(network), config)
    found = run(ClipText(config), params, IDS)
    wanted = wanted_of(network, input_ids=IDS.astype(np.int64))
    assert_close(found.hidden, wanted.last_hidden_state)
    assert_close(found.pooled, wanted.pooler_output)
    end = [2, 3] if eos_token_id == 2 else [4, 1]  # largest id, or first end token
    np.testing.assert_array_equal(
        found.pooled, np.asarray(found.hidden)[np.arange(2), end]
    )


@pytest.fixture(scope="module")
def text():
    network = theirs("CLIPTextModelWithProjection")
    config = ClipTextConfig.from_json(network.config.to_dict())
    return network, config, to_jax("clip_text", arrays(network), config)


def test_text_with_projection_and_padding(text):
    network, config, params = text
    ids = IDS.astype(np.int64)
    found = run(ClipText(config), params, IDS, method="features")
    assert_close(found, wanted_of(network, input_ids=ids).text_embeds)
    padded = {"input_ids": ids, "attention_mask": MASK.astype(np.int64)}
    wanted = wanted_of(network, **padded)
    hidden = run(ClipText(config), params, IDS, MASK).hidden
    assert_close(hidden, wanted.last_hidden_state)
    unmasked = run(ClipText(config), params, IDS).hidden
    assert np.abs(hidden - unmasked)[~MASK].max() > 1e-2  # only the padding's own
    np.testing.assert_allclose(hidden[MASK], unmasked[MASK], atol=1e-5)


def test_a_token_does_not_see_the_next(text):
    _, config, params = text
    other = IDS.copy()
    other[:, 5] = 4
    found = run(ClipText(config), params, IDS).hidden
    changed = np.abs(found - run(ClipText(config), params, other).hidden).max((0, 2))
    assert (changed[:5] == 0).all() and (changed[5:] > 1e-3).all(), changed


def test_short_prompts_are_a_prefix_and_long_ones_an_error(text):
    _, config, params = text
    network = ClipText(config)
    found = run(network, params, IDS[:, :4]).hidden
    assert_close(found, run(network, params, IDS).hidden[:, :4])
    with pytest.raises(ValueError, match="10 tokens, 9 positions"):
        run(network, params, np.zeros((1, 10), np.int32))


def test_files_of_transformers_4_have_a_prefix_and_a_buffer():
    network = theirs("CLIPTextModel")
    config = ClipTextConfig.from_json(network.config.to_dict())
    old = arrays(network, "text_model.")
    old["text_model.embeddings.position_ids"] = np.arange(9)[None]
    new = to_jax("clip_text", arrays(network), config)
    jax.tree.map(np.testing.assert_array_equal, to_jax("clip_text", old, config), new)


# ---- vision and both


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_vision_tower(hidden_act):
    network = theirs("CLIPVisionModelWithProjection", hidden_act=hidden_act)
    config = ClipVisionConfig.from_json(network.config.to_dict())
    params = to_jax("clip_vision", arrays(network), config)
    found = run(ClipVision(config), params, PIXELS)
    wanted = wanted_of(network, pixel_values=nchw(PIXELS))
    assert_close(found.hidden, wanted.last_hidden_state)
    normed = wanted_of(network.vision_model, pixel_values=nchw(PIXELS)).pooler_output
    assert_close(found.pooled, normed)
    features = run(ClipVision(config), params, PIXELS, method="features")
    assert_close(features, wanted.image_embeds)


def test_vision_tower_without_projection():
    network = theirs("CLIPVisionModel")
    config = ClipVisionConfig.from_json(network.config.to_dict())
    params = to_jax("clip_vision", arrays(network, "vision_model."), config)
    wanted = wanted_of(network, pixel_values=nchw(PIXELS))
    assert_close(
        run(ClipVision(config), params, PIXELS).hidden, wanted.last_hidden_state
    )
    with pytest.raises(ValueError, match="16, 12, 3.*12, 12, 3"):
        run(ClipVision(config), params, np.zeros((1, 16, 12, 3), np.float32))


@pytest.fixture(scope="module")
def pair():
    network = theirs("CLIPModel")
    config = ClipConfig.from_json(network.config.to_dict())
    params = to_jax("clip", arrays(network), network.config.to_dict())
    ours = Clip(config.text, config.vision, config.projection_dim)
    return network, ours, params


def test_the_whole_model(pair):
    network, ours, params = pair
    wanted = wanted_of(
        network, input_ids=IDS.astype(np.int64), pixel_values=nchw(PIXELS)
    )
    pictures = run(ours, params, PIXELS, method="image_features")
    prompts = run(ours, params, IDS, method="text_features")
    assert_close(pictures, wanted.vision_model_output.pooler_output)
    assert_close(prompts, wanted.text_model_output.pooler_output)
    assert_close(run(ours, params, PIXELS, IDS), wanted.logits_per_image)
    assert float(params["logit_scale"]) == network.logit_scale.item()


def test_the_trees_go_back_to_the_same_file(pair, text):
    json = pair[0].config.to_dict()
    cases = [("clip", pair[0], pair[2], json), ("clip_text", *text[::2], text[1])]
    for name, network, params, config in cases:
        back, tensors = to_torch_names(name, params, config), arrays(network)
        prefix = "text_model." if name == "clip_text" else ""
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
        assert {k.removeprefix(prefix) for k in back} == tensors.keys()
        for key, tensor in back.items():
            np.testing.assert_array_equal(tensor, tensors[key.removeprefix(prefix)])


def test_bfloat16_returns_float32(pair):
    _, ours, params = pair
    half = Clip(
        ours.text_config, ours.vision_config, ours.projection_dim, dtype="bfloat16"
    )
    inputs = {"image_features": PIXELS, "text_features": IDS}
    for method, value in inputs.items():
        found = run(half, params, value, method=method)
        wanted = run(ours, params, value, method=method)
        assert found.dtype == jnp.float32
        assert 1e-4 < float(abs(found - wanted).max() / abs(wanted).max()) < 0.1
    half = ClipText(ours.text_config, dtype="bfloat16")
    out = run(half, params["text_model"], IDS)
    assert out.hidden.dtype == out.pooled.dtype == jnp.float32


def test_quick_gelu_by_hand():
    x = np.linspace(-4, 4, 9)
    wanted = x / (1 + np.exp(-1.702 * x))
    np.testing.assert_allclose(
        clip.quick_gelu(jnp.asarray(x, jnp.float32)), wanted, atol=1e-6
    )
