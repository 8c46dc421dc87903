"""CLIPScore, and the CLIP behind every judge, against transformers' CLIPModel."""

import json

import numpy as np
import pytest
import tiny_clip

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Reward
from ddrl_jax.rewards.clip_folder import CHUNK, load_clip
from ddrl_jax.rewards.clip_score import ClipScore, clip_score

pytest.importorskip("torch")


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def model():
    return tiny_clip.make_clip()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return tiny_clip.write_clip(tmp_path_factory.mktemp("clip"), model)


@pytest.fixture(scope="module")
def judge(folder):
    return load_clip(str(folder))


def test_embeddings_and_temperature_equal_transformers(model, judge):
    images = tiny_clip.pictures()
    seen, read = tiny_clip.features_of(model, images)
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(judge.pictures(images), unit(seen), **close)
    np.testing.assert_allclose(judge.prompts(tiny_clip.PROMPTS), unit(read), **close)
    assert judge.scale == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)
    assert judge.width == tiny_clip.WIDTH


def test_the_score_is_100_times_the_cosine_and_never_below_0(model, judge, folder):
    reward = clip_score(str(folder))
    assert isinstance(reward, Reward)
    images = tiny_clip.pictures()
    seen, read = (unit(x) for x in tiny_clip.features_of(model, images))
    cosine = np.sum(seen * read, -1)
    found = reward(images, tiny_clip.PROMPTS)
    assert found.dtype == np.float32 and found.shape == (4,)
    np.testing.assert_allclose(found, 100 * np.maximum(cosine, 0), rtol=1e-5, atol=1e-4)
    # the same pictures seen from behind: the sign of every cosine turns
    behind = ClipScore(judge._replace(pictures=lambda x: -judge.pictures(x)))
    turned = behind(images, tiny_clip.PROMPTS)
    np.testing.assert_allclose(
        turned, 100 * np.maximum(-cosine, 0), rtol=1e-5, atol=1e-4
    )
    assert ((found == 0) | (turned == 0)).all() and (found + turned > 0).all()


def test_more_prompts_than_a_chunk_in_their_order(judge):
    words = [f"a {word} {number}" for word in ("cat", "dog") for number in range(10)]
    assert len(words) > CHUNK
    alone = np.concatenate([judge.prompts([word]) for word in words])
    np.testing.assert_allclose(
        judge.prompts(words + words[::-1])[:20], alone, rtol=1e-5
    )
    found = judge.prompts(words + words[::-1])
    np.testing.assert_array_equal(found[20:], found[:20][::-1])
    assert judge.prompts([]).shape == (0, tiny_clip.WIDTH)


def test_a_long_prompt_loses_its_end_as_in_transformers(model, judge):
    long = "a photo of a cat of a cat of a cat of a cat of a dog"
    with pytest.warns(UserWarning, match="longer than the 10 tokens"):
        found = judge.prompts([long])
    images = tiny_clip.pictures(1)
    _, read = tiny_clip.features_of(model, images, [long])
    np.testing.assert_allclose(found, unit(read), rtol=1e-5, atol=1e-6)


def copy(folder, tmp_path, without=()):
    for file in folder.iterdir():
        if file.name not in without:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("without", "told"),
    [
        ("config.json", "config.json"),
        ("model.safetensors", "no safetensors"),
        ("preprocessor_config.json", "preprocessor_config.json"),
        ("tokenizer.json", "tokenizer"),
    ],
)
def test_a_missing_file_is_named(folder, tmp_path, without, told):
    with pytest.raises(UserError, match=told):
        load_clip(str(copy(folder, tmp_path, (without,))))


def test_pictures_of_another_size_than_the_tower_takes(folder, tmp_path):
    other = copy(folder, tmp_path)
    tiny_clip.make_processor(crop_size=16).save_pretrained(other)
    with pytest.raises(UserError, match=r"do not belong together.*\n.*\(16, 16\)"):
        load_clip(str(other))


def test_the_newer_place_of_the_picture_processing(folder, tmp_path, judge):
    older = "preprocessor_config.json"
    other = copy(folder, tmp_path, (older,))
    part = {"image_processor": json.loads((folder / older).read_text())}
    (other / "processor_config.json").write_text(json.dumps(part))
    images = tiny_clip.pictures(1)
    found = load_clip(str(other), text=False).pictures(images)
    np.testing.assert_array_equal(found, judge.pictures(images))
    (other / "processor_config.json").write_text("{}")
    with pytest.raises(UserError, match="no image_processor"):
        load_clip(str(other), text=False)
