"""A start that does not read the data again trains on what is there."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edited_config import configured
from PIL import Image
from tiny_runs import DIFFUSION

from ddrl_jax import sources
from ddrl_jax.data import picture_folder
from ddrl_jax.interfaces import Cond, Pipeline


@jax.tree_util.Partial
def encode_images(pixels):
    mean = pixels.reshape(-1, 4, 8, 4, 8, 3).mean((2, 4)) / 255
    return mean, -4 - mean


def encode(texts):
    return Cond(np.array([[len(text), 2.0] for text in texts], np.float32))


def nothing(*_):
    """What nobody asks of a pipeline whose pictures are cached."""
    raise AssertionError


PIPELINE = Pipeline(
    encode=encode,
    uncond=encode([""]),
    init=nothing,
    denoise=nothing,
    decode=lambda x: (255 * jnp.repeat(jnp.repeat(x, 8, 1), 8, 2)).astype(jnp.uint8),
    axes={},
    latent_shape=(4, 4, 3),
    prediction="eps",
    load=nothing,
    fingerprint="",
    encode_images=encode_images,
)


@pytest.fixture
def opened(tmp_path):
    """opened(): the data of three pictures, as a start finds them."""
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(3):
        page = np.full((32, 32, 3), 60 * i, np.uint8)
        Image.fromarray(page).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"caption {i}")
    data = {"data.source": "folder", "data.path": str(root), "data.on_bad": "skip"}
    data |= {"data.cache": str(tmp_path / "cache"), "data.cache_batch": 2}
    config = configured(DIFFUSION | data)
    return lambda: sources.make_source(config, PIPELINE)


def test_a_picture_that_could_not_be_read_once_is_there_the_next_time(
    opened, monkeypatch
):
    digest = picture_folder._digest

    def fail(root, name):
        broken = OSError(5, "Input/output error")
        return broken if name == "1.png" else digest(root, name)

    with monkeypatch.context() as patch:
        patch.setattr(picture_folder, "_digest", fail)
        assert opened().captions == ("caption 0", "caption 2")
    assert opened().captions == ("caption 0", "caption 1", "caption 2")


def test_a_picture_that_is_put_back_is_not_taken_for_another(
    opened, monkeypatch, tmp_path
):
    picture, read = tmp_path / "pictures" / "0.png", sources.read_folder
    before, times = picture.read_bytes(), picture.stat()

    def replaced(*arguments):
        picture.write_bytes((tmp_path / "pictures" / "2.png").read_bytes())
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "read_folder", replaced)
        other = opened().digest
    picture.write_bytes(before)
    os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))
    first = opened().digest
    assert first != other
    unread = lambda *_: pytest.fail("unchanged data were read again")  # noqa: E731
    monkeypatch.setattr(sources, "read_folder", unread)
    assert opened().digest == first
