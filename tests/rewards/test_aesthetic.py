"""The aesthetic predictor against PyTorch: its five layers, and picture to score."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_clip

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Reward
from ddrl_jax.rewards.aesthetic import aesthetic, aesthetic_score, read_head
from ddrl_jax.rewards.clip_folder import CHUNK

torch = pytest.importorskip("torch")
OTHER_BYTES = "ignore:.*is not the published aesthetic head:UserWarning"
GENUINE = (768, 1024, 128, 64, 16, 1)
TINY = (tiny_clip.WIDTH, 8, 5, 4, 3, 1)


class Theirs(torch.nn.Module):
    """The published architecture: no activations, and dropout between the layers."""

    def __init__(self, widths):
        super().__init__()
        linear, dropout = torch.nn.Linear, torch.nn.Dropout
        a, b, c, d, e, f = widths
        self.layers = torch.nn.Sequential(
            linear(a, b),
            dropout(0.2),
            linear(b, c),
            dropout(0.2),
            linear(c, d),
            dropout(0.1),
            linear(d, e),
            linear(e, f),
        )

    def forward(self, x):
        return self.layers(x)


def write_head(path, widths=TINY):
    torch.manual_seed(1)
    model = Theirs(widths).eval()
    torch.save(model.state_dict(), path)
    return model


def unit(count, width):
    e = np.random.default_rng(0).normal(size=(count, width))
    return (e / np.linalg.norm(e, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    model = tiny_clip.make_clip()
    return model, tiny_clip.write_clip(tmp_path_factory.mktemp("clip"), model)


@pytest.mark.filterwarnings(OTHER_BYTES)
def test_the_genuine_layers_equal_torch_and_their_affine_collapse(tmp_path):
    model = write_head(tmp_path / "head.pth", GENUINE)
    assert sum(p.numel() for p in model.parameters()) == 927_969  # ddpo.md 7.2
    e = unit(5, 768)
    found = np.asarray(
        aesthetic_score(read_head(tmp_path / "head.pth"), jnp.asarray(e))
    )
    with torch.no_grad():
        wanted = model(torch.from_numpy(e))[:, 0].numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
    # w = W5 W4 W3 W2 W1, b = W5 (W4 (W3 (W2 b1 + b2) + b3) + b4) + b5 in float64
    w, b = np.eye(768), np.zeros(768)
    for layer in model.layers:
        if isinstance(layer, torch.nn.Linear):
            weight = layer.weight.detach().double().numpy()
            w, b = weight @ w, weight @ b + layer.bias.detach().double().numpy()
    np.testing.assert_allclose(found, e @ w[0] + b[0], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings(OTHER_BYTES)
def test_picture_to_score_equals_transformers_and_torch(tmp_path, clip):
    model, folder = clip
    head = write_head(tmp_path / "head.pth")
    reward = aesthetic(str(tmp_path / "head.pth"), str(folder))
    assert isinstance(reward, Reward)
    images = tiny_clip.pictures()
    seen, _ = tiny_clip.features_of(model, images)
    e = torch.from_numpy(seen / np.linalg.norm(seen, axis=-1, keepdims=True))
    with torch.no_grad():
        wanted = head(e)[:, 0].numpy()
    found = reward(images, [""] * 4)
    assert found.dtype == np.float32 and found.shape == (4,)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert np.ptp(found) > 1e-3  # the pictures do not all score the same


@pytest.mark.filterwarnings(OTHER_BYTES)
def test_any_number_of_pictures_from_host_or_device(tmp_path, clip):
    write_head(tmp_path / "head.pth")
    reward = aesthetic(str(tmp_path / "head.pth"), str(clip[1]))
    images = tiny_clip.pictures(CHUNK + 3)
    many = reward(images, [""] * len(images))
    np.testing.assert_array_equal(reward(jnp.asarray(images), [""] * len(images)), many)
    np.testing.assert_allclose(reward(images[-2:], ["", ""]), many[-2:], rtol=1e-6)
    assert reward(images[:0], []).shape == (0,)
    # without the text tower in memory
    assert reward.judge.prompts is None


@pytest.mark.filterwarnings(OTHER_BYTES)
def test_floats_are_refused_instead_of_seen_as_black(tmp_path, clip):
    write_head(tmp_path / "head.pth")
    reward = aesthetic(str(tmp_path / "head.pth"), str(clip[1]))
    floats = tiny_clip.pictures().astype(np.float32) / 255.0
    for images in (floats, tiny_clip.pictures()[..., :1]):
        with pytest.raises(UserError, match="can not look at these pictures"):
            reward.judge.pictures(images)


def test_other_bytes_than_the_published_are_told(tmp_path):
    write_head(tmp_path / "head.pth")
    with pytest.warns(UserWarning, match="not the published aesthetic head.*sha256"):
        read_head(tmp_path / "head.pth")


def test_safetensors_hold_the_same_layers(tmp_path):
    from safetensors.torch import save_file

    model = write_head(tmp_path / "head.pth")
    save_file(model.state_dict(), tmp_path / "head.safetensors")
    found = read_head(tmp_path / "head.safetensors")  # and no warning
    linear = [x for x in model.layers if isinstance(x, torch.nn.Linear)]
    for (weight, bias), theirs in zip(found, linear, strict=True):
        np.testing.assert_array_equal(weight, theirs.weight.detach().numpy())
        np.testing.assert_array_equal(bias, theirs.bias.detach().numpy())


def _changed(name, value):
    state = Theirs(TINY).state_dict()
    if value is None:
        del state[name]
    else:
        state[name] = value
    return state


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("layers.4.bias", None, "missing: layers.4.bias"),
        ("layers.1.weight", torch.ones(1), "extra: layers.1.weight"),
        ("layers.4.weight", torch.ones(4, 9), "layers.4"),
        ("layers.6.bias", torch.ones(9), "layers.6"),
        ("layers.0.weight", torch.full((8, 6), torch.nan), "layers.0 is not finite"),
    ],
)
def test_another_network_is_no_head(tmp_path, name, value, told):
    torch.save(_changed(name, value), tmp_path / "head.pth")
    with pytest.raises(UserError, match=told):
        read_head(tmp_path / "head.pth")


def test_a_head_of_two_scores_is_none(tmp_path):
    write_head(tmp_path / "head.pth", (6, 8, 5, 4, 3, 2))
    with pytest.raises(UserError, match="2 outputs"):
        read_head(tmp_path / "head.pth")


@pytest.mark.filterwarnings(OTHER_BYTES)
def test_what_is_missing_is_told_before_anything_is_loaded(tmp_path, clip):
    with pytest.raises(UserError, match="aesthetic_head=''"):
        aesthetic("", str(clip[1]))
    with pytest.raises(UserError, match="no such file"):
        aesthetic(str(tmp_path / "none.pth"), str(clip[1]))
    write_head(tmp_path / "head.pth")
    with pytest.raises(UserError, match="no_folder/clip"):
        aesthetic(str(tmp_path / "head.pth"), "no_folder/clip")
    write_head(tmp_path / "wide.pth", GENUINE)
    with pytest.raises(UserError, match="768 numbers, embeddings of 6"):
        aesthetic(str(tmp_path / "wide.pth"), str(clip[1]))
