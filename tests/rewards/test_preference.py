"""PickScore against CLIPModel, HPSv2 against a CLIP of open_clip's parts in PyTorch."""

from collections import OrderedDict

import numpy as np
import pytest
import tiny_clip
import tiny_sd
from PIL import Image

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Reward
from ddrl_jax.rewards.open_clip import from_open_clip
from ddrl_jax.rewards.preference import hpsv2, pickscore

torch = pytest.importorskip("torch")
nn = torch.nn
SIDE, LENGTH, WIDTH = tiny_clip.SIDE, tiny_clip.LENGTH, tiny_clip.WIDTH


@pytest.fixture(scope="module")
def model():
    return tiny_clip.make_clip("gelu")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return tiny_clip.write_clip(tmp_path_factory.mktemp("clip"), model)


def test_pickscore_is_the_logit_of_the_pair(model, folder, tmp_path):
    # as on the hub: weights in one folder, tokenizer and processing in another
    model.save_pretrained(tmp_path)
    reward = pickscore(str(tmp_path), str(folder))
    assert isinstance(reward, Reward)
    images = tiny_clip.pictures()
    pixels = tiny_clip.make_processor()(list(images), return_tensors="pt")
    tokens = tiny_sd.make_tokenizer(LENGTH)(
        list(tiny_clip.PROMPTS), padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        wanted = model(**tokens, **pixels).logits_per_image.diagonal().numpy()
    found = reward(images, tiny_clip.PROMPTS)
    assert found.dtype == np.float32 and np.ptp(found) > 1e-2
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


class Block(nn.Module):
    """A residual block with the names of open_clip."""

    def __init__(self, width, hidden):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        parts = [("c_fc", nn.Linear(width, hidden)), ("gelu", nn.GELU())]
        parts.append(("c_proj", nn.Linear(hidden, width)))
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, hidden) for _ in range(2))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 4, 4, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(10, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, 16)
        self.proj = nn.Parameter(torch.randn(width, WIDTH))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([first, x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """The two-tower model of open_clip, from PyTorch's own parts."""

    def __init__(self, vocabulary, width=8):
        super().__init__()
        self.visual, self.transformer = Visual(), Transformer(width, 16)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.randn(LENGTH, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, WIDTH))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def text(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        # the end token has the largest number, and zeros follow it
        return x[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection


def open_clip():
    torch.manual_seed(0)
    model = OpenClip(len(tiny_sd.make_tokenizer(LENGTH))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return model


def whole_picture(image):
    """The longer side becomes SIDE, the rest is black."""
    height, width = image.shape[:2]
    size = (
        round(width * SIDE / max(image.shape)),
        round(height * SIDE / max(image.shape)),
    )
    small = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    page = Image.new("RGB", (SIDE, SIDE))
    page.paste(small, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    mean, std = (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    )
    return ((np.asarray(page) / 255.0 - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_hpsv2_is_100_times_the_cosine(folder, tmp_path, kind):
    from safetensors.torch import save_file

    theirs, path = open_clip(), tmp_path / f"HPS.{kind}"
    if kind == "pt":
        content = {"epoch": 1, "state_dict": theirs.state_dict()}
        torch.save(content, path)
    else:
        save_file(theirs.state_dict(), path)
    images = tiny_clip.pictures()
    ids = torch.zeros((4, LENGTH), dtype=torch.long)
    for row, prompt in zip(ids, tiny_clip.PROMPTS, strict=True):
        found = tiny_sd.make_tokenizer(LENGTH)(prompt)["input_ids"]
        row[: len(found)] = torch.tensor(found)
    pixels = torch.from_numpy(np.stack([whole_picture(x) for x in images])).float()
    with torch.no_grad():
        seen, read = theirs.visual(pixels), theirs.text(ids)
        wanted = 100 * nn.functional.cosine_similarity(seen, read).numpy()
    reward = hpsv2(str(path), str(folder))
    assert isinstance(reward, Reward)
    found = reward(images, tiny_clip.PROMPTS)
    assert np.ptp(wanted) > 1
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


def test_names_of_several_devices_and_an_old_buffer():
    state = {k: v.numpy() for k, v in open_clip().state_dict().items()}
    plain = from_open_clip(state, "x")
    wrapped = {f"module.{k}": v for k, v in state.items()} | {"attn_mask": np.ones(2)}
    again = from_open_clip(wrapped, "x")
    assert plain.keys() == again.keys()
    # every number is used exactly once
    count = sum(v.size for v in state.values())
    assert sum(v.size for v in plain.values()) == count


def test_what_hpsv2_can_not_be(folder, tmp_path):
    path = tmp_path / "HPS.pt"
    with pytest.raises(UserError, match="--config.rewards.hpsv2=xswu/HPSv2:HPS_v2.1"):
        hpsv2("", str(folder))
    with pytest.raises(UserError, match="no such file"):
        hpsv2(str(path), str(folder))
    torch.save({"state_dict": 3}, path)
    with pytest.raises(UserError, match="no state dict"):
        hpsv2(str(path), str(folder))
    torch.save({"state_dict": {"visual.score_head": torch.ones(1)}}, path)
    with pytest.raises(UserError, match="visual.score_head"):
        hpsv2(str(path), str(folder))
    state = open_clip().state_dict()
    del state["transformer.resblocks.1.ln_2.bias"]
    torch.save(state, path)
    with pytest.raises(UserError, match="layer_norm2|block 1"):
        hpsv2(str(path), str(folder))
