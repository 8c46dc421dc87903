"""The embedded data, and how a picture is drawn at random size, place and angle."""

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ddrl_jax.data import emoji as emoji_module
from ddrl_jax.data.emoji import draw, emoji_source, read_emoji
from ddrl_jax.errors import UserError
from ddrl_jax.models.emoji import read_vocabulary, tokenize

RNG = np.random.default_rng(4)
KEYS = jax.random.split(jax.random.key(6), 64)


def pages(picture, low, high, rotation, keys=KEYS, size=32):
    one = lambda k: draw(  # noqa: E731
        jnp.asarray(picture, jnp.float32),
        k,
        size=size,
        min_scale=low,
        max_scale=high,
        rotation=rotation,
    )
    return np.asarray(jax.jit(jax.vmap(one))(keys))


def ink(page):
    """How dark each pixel is: 0 on white, 1 on black."""
    return (1.0 - page.mean(-1)) / 2.0


def test_full_size_without_rotation_is_the_mean_of_2_by_2_pixels():
    picture = RNG.uniform(-1, 1, (64, 64, 3)).astype(np.float32)
    found = pages(picture, 1.0, 1.0, 0.0, KEYS[:2])
    blocks = picture.astype(np.float64).reshape(32, 2, 32, 2, 3).mean((1, 3))
    np.testing.assert_allclose(found, np.stack([blocks, blocks]), atol=1e-6)


def test_a_picture_of_one_pixel_a_sample_is_the_picture():
    picture = RNG.uniform(-1, 1, (8, 8, 3)).astype(np.float32)
    found = pages(np.kron(picture, np.ones((2, 2, 1))), 1.0, 1.0, 0.0, KEYS[:1], size=8)
    np.testing.assert_allclose(found[0], picture, atol=1e-6)


def test_half_size_without_rotation_by_hand():
    # A black square shrunk to half: 16 x 16 pixels of ink anywhere on the page, its
    # edges spread over the pixels that the place cuts.
    found = ink(pages(np.full((64, 64, 3), -1.0), 0.5, 0.5, 0.0))
    np.testing.assert_allclose(found.sum((1, 2)), 256.0, rtol=0.02)
    corner = np.stack(
        [(found.max(2) > 0.5).argmax(1), (found.max(1) > 0.5).argmax(1)], 1
    )
    assert corner.min() >= 0 and corner.max() <= 16 and np.ptp(corner, 0).min() >= 12
    for page, (y, x) in zip(found, corner, strict=True):
        np.testing.assert_allclose(page[y + 1 : y + 15, x + 1 : x + 15], 1.0, atol=1e-5)
        outside = page.copy()
        outside[max(0, y - 1) : y + 18, max(0, x - 1) : x + 18] = 0.0
        np.testing.assert_array_equal(outside, 0.0)  # the rest is exactly white


def test_sizes_fill_their_range():
    side = np.sqrt(ink(pages(np.full((64, 64, 3), -1.0), 0.5, 1.0, 0.0)).mean((1, 2)))
    assert 0.49 < side.min() < 0.55 and 0.95 < side.max() < 1.005


def test_angles_fill_their_range():
    bar = np.ones((64, 64, 3), np.float32)
    bar[8:56, 28:36] = -1.0  # an upright bar: its long axis shows the angle
    y, x = np.mgrid[:32, :32]
    angles = []
    for page in ink(pages(bar, 0.9, 0.9, 15.0)):
        w = page / page.sum()
        dy, dx = y - (w * y).sum(), x - (w * x).sum()
        skew, spread = (w * dx * dy).sum(), (w * (dy**2 - dx**2)).sum()
        angles.append(np.degrees(0.5 * np.arctan2(2 * skew, spread)))
    assert -15.5 < min(angles) < -11 and 11 < max(angles) < 15.5


def test_values_stay_in_range_and_the_rim_is_white():
    picture = np.ones((64, 64, 3), np.float32)
    picture[16:48, 16:48] = RNG.uniform(-1, 1, (32, 32, 3))
    found = pages(picture, 0.5, 1.0, 15.0)
    assert found.min() >= -1.0 and found.max() <= 1.0 and found.min() < -0.5
    for rim in (found[:, 0], found[:, -1], found[:, :, 0], found[:, :, -1]):
        np.testing.assert_array_equal(rim, 1.0)


# ---- the data set itself


@pytest.fixture(scope="module")
def emoji():
    return read_emoji()


def test_many_pictures_each_with_a_name_of_its_own(emoji):
    pictures, captions = emoji
    assert pictures.shape == (len(captions), 64, 64, 3) and pictures.dtype == np.uint8
    assert len(captions) >= 250 and len(set(captions)) == len(captions)
    assert len(np.unique(pictures.reshape(len(captions), -1), axis=0)) == len(captions)
    drawn = (pictures < 240).any(-1).mean((1, 2))
    assert drawn.min() > 0.05 and drawn.max() < 0.95  # something, on a white page


def test_every_caption_can_be_read_and_every_word_is_used(emoji):
    _, captions = emoji
    vocabulary = read_vocabulary()
    assert tokenize(captions, vocabulary).any(1).all()
    assert {w for c in captions for w in c.lower().split()} == set(vocabulary)


def test_a_record_and_a_key_are_one_picture_anywhere(emoji):
    source = emoji_source(32, 0.5, 1.0, 15.0)
    assert source.captions == emoji[1]
    latents = jax.jit(source.latents)
    records = jnp.asarray([3, 200, 3, 17], jnp.int32)
    found = np.asarray(latents(records, KEYS[:4]))
    again = np.asarray(latents(records[::-1], KEYS[:4][::-1]))
    np.testing.assert_allclose(found, again[::-1], atol=1e-6)
    assert found.shape == (4, 32, 32, 3) and found.dtype == np.float32
    assert np.abs(found[0] - found[2]).mean() > 0.01  # another key, another picture
    still = emoji_source(32, 1.0, 1.0, 0.0).latents(records[:1], KEYS[:1])
    page = emoji[0][3].astype(np.float64) / 127.5 - 1.0
    blocks = page.reshape(32, 2, 32, 2, 3).mean((1, 3))
    np.testing.assert_allclose(still[0], blocks, atol=1e-5)


@pytest.mark.parametrize("damage", ["no folder", "an empty folder"])
def test_data_that_can_not_be_read(damage, tmp_path):
    root = tmp_path / "data"
    if damage != "no folder":
        root.mkdir()
    with pytest.raises(UserError) as caught:
        read_emoji(root)
    assert str(root) in str(caught.value) and "data.path" in caught.value.way_out
    assert "reinstall" not in caught.value.way_out


def test_shipped_data_that_can_not_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji_module, "ASSETS", tmp_path)
    with pytest.raises(UserError) as caught:
        read_emoji(tmp_path / "data")
    assert "reinstall ddrl_jax" in caught.value.way_out


CAPTIONS = {  # feature and value of a record's caption, and a word of the message
    "none": (None, None, "'caption'"),
    "a number": (np.int64, 3, "decode"),
    "not UTF-8": (tfds.features.Text(), b"caf\xe9", "UnicodeDecodeError"),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_a_set_without_captions_that_are_text(case, tmp_path):
    feature, value, word = CAPTIONS[case]
    caption = {} if feature is None else {"caption": (feature, value)}
    root = write_record(tmp_path, caption)
    with pytest.raises(UserError, match="can not be read") as caught:
        read_emoji(root)
    assert word in str(caught.value) and "data.path" in caught.value.way_out


def write_record(data_dir, features):
    """Writes a set of one record, a white picture and these features with values."""

    class One(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # no script beside which TFDS looks for checksums

        def _info(self):
            kinds = {name: kind for name, (kind, _) in features.items()}
            kinds["image"] = tfds.features.Image(encoding_format="png")
            kinds = tfds.features.FeaturesDict(kinds)
            return tfds.core.DatasetInfo(builder=self, features=kinds)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            file = io.BytesIO()
            Image.new("RGB", (8, 8), "white").save(file, "PNG")
            file.seek(0)
            values = {name: value for name, (_, value) in features.items()}
            yield 0, values | {"image": file}

    builder = One(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)
