"""Pictures that change while the cache is written get into none."""

import dataclasses

import numpy as np
import pytest
from drawn_pictures import write_drawing, write_folder
from fake_encoders import WEIGHTS, FakeImages, FakeTexts

from ddrl_jax.data.latent_writer import write_latents
from ddrl_jax.data.latents import latent_source
from ddrl_jax.data.picture_folder import read_folder
from ddrl_jax.errors import UserError

CAPTIONS = ("a cat",) * 7


class Meddling(FakeImages):
    """Changes the data when the second batch is to be encoded."""

    def __init__(self, meddle):
        super().__init__()
        self.meddle = meddle

    def __call__(self, images):
        if len(self.batches) == 1:
            self.meddle()
        return super().__call__(images)


@pytest.fixture
def root(tmp_path):
    write_folder(tmp_path / "set", CAPTIONS)
    return tmp_path / "set"


def write(caches, pictures, images=None, texts=None):
    encoders = images or FakeImages(), texts or FakeTexts()
    return write_latents(
        caches, pictures, *encoders, 2, WEIGHTS, dtype="float32", shard=4
    )


def assert_holds(cache, pictures):
    records = range(len(pictures))
    wanted = FakeImages()(np.stack([pictures[i][0] for i in records]))[0]
    found = latent_source(cache).fetch(np.array(records))
    np.testing.assert_array_equal(found["mean"], wanted)


@pytest.mark.parametrize("on_bad", ["error", "skip"])
@pytest.mark.parametrize("content", [None, b"", "another"])
def test_a_picture_that_is_replaced_meanwhile(root, tmp_path, content, on_bad):
    caches, picture = tmp_path / "cache", root / "006.png"
    found, before = read_folder(str(root), 16, on_bad=on_bad), picture.read_bytes()

    def replace():
        picture.unlink()
        if content == "another":
            write_drawing(picture, 99)
        elif content is not None:
            picture.write_bytes(content)

    with pytest.raises(UserError, match="changed while the data were read") as e:
        write(caches, found, Meddling(replace))
    assert "006.png" in str(e.value.got) and not list(caches.glob("latents-*"))
    picture.write_bytes(before)
    images = FakeImages()
    assert_holds(write(caches, found, images), found)
    assert len(images.batches) == 2, "the complete shard is kept"


def test_shards_of_others_with_the_same_captions_are_not_taken_up(root, tmp_path):
    """As where another Pillow can not decode others of the same data."""
    whole = read_folder(str(root), 16, on_bad="skip")
    first, last = (
        dataclasses.replace(whole, rows=r) for r in (whole.rows[:6], whole.rows[1:])
    )

    def fail(captions):
        raise RuntimeError("after all the pictures")

    with pytest.raises(RuntimeError, match="after all the pictures"):
        write(tmp_path, first, texts=fail)
    assert_holds(write(tmp_path, last), last)
