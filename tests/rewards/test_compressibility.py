"""JPEG sizes against DDPO's published fixtures and against Pillow called by hand."""

import io

import numpy as np
import pytest
from PIL import Image

from ddrl_jax.errors import UserError
from ddrl_jax.rewards.compressibility import (
    compressibility,
    incompressibility,
    jpeg_kilobytes,
)


def _checker(tile: int) -> np.ndarray:
    y, x = np.mgrid[:512, :512]
    return np.where(((y // tile) + (x // tile)) % 2, 255, 0).astype(np.uint8)


FIXTURES = {  # kB at 512x512, measured with the reference implementation
    "black": (np.zeros((512, 512), np.uint8), 4.723),
    "grey": (np.full((512, 512), 128, np.uint8), 4.721),
    "checker_1": (_checker(1), 165.49),
    "checker_8": (_checker(8), 8.819),
}


@pytest.mark.parametrize("name", FIXTURES)
def test_the_published_sizes(name):
    """1 %: libjpeg builds differ in the rounding of the DCT, not in the tables.

    Quality 90 or 4:4:4 chroma moves the pictures by more than that (next test).
    """
    plane, wanted = FIXTURES[name]
    picture = np.repeat(plane[None, ..., None], 3, -1)
    np.testing.assert_allclose(jpeg_kilobytes(picture), [wanted], rtol=0.01)


def test_quality_and_chroma_are_ddpos():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)

    def size(**options):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "JPEG", **options)
        return len(buffer.getvalue()) / 1000

    ours = jpeg_kilobytes(noise[None])[0]
    assert ours == pytest.approx(size(quality=95, subsampling="4:2:0"), abs=1e-6)
    assert abs(ours / size(quality=90) - 1) > 0.05
    assert abs(ours / size(quality=95, subsampling="4:4:4") - 1) > 0.05


def test_upscale_repeats_whole_pixels():
    small = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), np.uint8)
    large = np.kron(small, np.ones((1, 4, 4, 1), np.uint8))
    np.testing.assert_array_equal(jpeg_kilobytes(small, 4), jpeg_kilobytes(large))


def test_the_two_rewards_are_plus_and_minus_the_size():
    images = np.random.default_rng(2).integers(0, 256, (3, 16, 16, 3), np.uint8)
    size = jpeg_kilobytes(images, 2)
    assert size.shape == (3,) and size.dtype == np.float32 and (size > 0.6).all()
    np.testing.assert_array_equal(incompressibility(2)(images, "abc"), size)
    np.testing.assert_array_equal(compressibility(2)(images, "abc"), -size)


def test_an_empty_batch_has_no_sizes():
    assert jpeg_kilobytes(np.zeros((0, 8, 8, 3), np.uint8)).shape == (0,)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((1, 3, 8, 8), np.uint8),
    ],
)
def test_other_pictures_are_an_error(images):
    with pytest.raises(UserError, match="wanted:  uint8") as error:
        jpeg_kilobytes(images)
    assert str(images.dtype) in error.value.got


@pytest.mark.parametrize("upscale", [0, -1, 1.5])
def test_a_broken_upscale_is_an_error(upscale):
    with pytest.raises((UserError, TypeError)):
        jpeg_kilobytes(np.zeros((1, 8, 8, 3), np.uint8), upscale)
