"""The picture processor against Pillow and transformers, byte for byte where it can."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL
import pytest
from PIL import Image

from ddrl_jax.errors import UserError
from ddrl_jax.rewards.preprocess import (
    STEPS,
    Processor,
    crop,
    resize,
    resize_weights,
)

ORIGINAL = {  # what repositories of 2021 hold
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}


HUGE = 10**400  # which JSON can hold, and no float


def pictures(height, width, count=2):
    """Noise, the worst case, and extremes: the filter overshoots and is clipped."""
    rng = np.random.default_rng(height * 1000 + width)
    noise = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    noise[0] = np.where(noise[0] > 127, 255, 0)
    return noise


def resized(images, height, width):
    return np.asarray(jax.jit(lambda x: resize(x, height, width))(images))


def pillow(images, height, width):
    size, bicubic = (width, height), Image.Resampling.BICUBIC
    return np.stack(
        [np.asarray(Image.fromarray(x).resize(size, bicubic)) for x in images]
    )


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((96, 96), (40, 40)),
        ((7, 9), (30, 31)),
        ((40, 56), (24, 33)),
        ((33, 50), (33, 20)),
        ((50, 33), (20, 33)),
        ((20, 90), (25, 30)),
        ((24, 24), (24, 24)),
        ((2, 3), (1, 1)),
    ],
)
def test_resizing_gives_the_bytes_of_pillow(source, target):
    images = pictures(*source)
    assert (resized(images, *target) == pillow(images, *target)).all()


@pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="older ones start with the rows"
)
@pytest.mark.parametrize(
    ("source", "target"), [((90, 20), (30, 25)), ((60, 20), (30, 10))]
)
def test_a_tall_picture_loses_its_height_first(source, target):
    images = pictures(*source)
    assert (resized(images, *target) == pillow(images, *target)).all()


def test_the_sizes_of_stable_diffusion_agree_in_every_weight():
    """512 and 768 px to 224: one bright pixel in a row shows one row of weights."""
    for source in (512, 768):
        columns = np.zeros((source, source, 3), np.uint8)
        columns[np.arange(source), np.arange(source)] = 255  # a different one each row
        wide = np.asarray(Image.fromarray(columns).resize((224, source), 3))[..., 0]
        weights = resize_weights(source, 224).astype(np.int64)
        assert (np.clip((255 * weights + (1 << 21)) >> 22, 0, 255) == wide).all()
        assert abs(weights.sum(0) - (1 << 22)).max() <= 8  # a rounding a tap


def test_the_products_are_exact_on_every_matrix_unit():
    """bfloat16, the coarsest there is, must hold every factor without rounding."""
    weights = resize_weights(512, 224)
    pieces = [(weights >> 8 * i) & 0xFF for i in range(2)] + [weights >> 16]
    assert (sum(piece << 8 * i for i, piece in enumerate(pieces)) == weights).all()
    for piece in (*pieces, np.arange(256)):
        assert (piece.astype(jnp.bfloat16).astype(np.int64) == piece).all()
    # and the sums stay below the 2**24 up to which float32 counts one by one
    assert max(255 * np.abs(piece).sum(0).max() for piece in pieces) < 1 << 24


@pytest.mark.parametrize("size", [(4, 7), (5, 9), (9, 6), (8, 5)])
def test_cropping_cuts_or_fills_like_transformers(size):
    transforms = pytest.importorskip("transformers.image_transforms")
    image, sides = pictures(*size)[1], (5, 6, 8)
    found = jax.jit(lambda x: [crop(x[None], n, n)[0] for n in sides])(image)
    for side, ours in zip(sides, found, strict=True):
        wanted = transforms.center_crop(
            image, (side, side), input_data_format="channels_last"
        )
        assert (np.asarray(ours) == wanted).all()


def theirs(**settings):
    module = "transformers.models.clip.image_processing_pil_clip"
    return pytest.importorskip(module).CLIPImageProcessorPil(**settings)


def assert_like_transformers(processor, reference, images):
    wanted = np.stack(reference(list(images), return_tensors="np")["pixel_values"])
    found = np.asarray(jax.jit(lambda x: processor(x))(images))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted.transpose(0, 2, 3, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(512, 512), (32, 32), (260, 301), (301, 260)])
def test_the_default_is_that_of_transformers(size):
    assert_like_transformers(Processor(), theirs(), pictures(*size))


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 20}, "crop_size": {"height": 18, "width": 14}},
        {"size": {"shortest_edge": 12}, "crop_size": 16},
        {"size": {"height": 10, "width": 24}, "do_center_crop": False},
        {"do_resize": False, "crop_size": 16, "image_mean": [0, 0.5, 1.0]},
        {"size": 20, "crop_size": 20, "do_normalize": False},
        {"size": 20, "crop_size": 20, "do_rescale": False, "image_std": [50, 60, 70]},
        {"size": 20, "crop_size": 20, "rescale_factor": 1 / 127.5},
    ],
)
def test_settings_of_the_file_are_honoured(settings, tmp_path):
    reference = theirs(**settings)
    reference.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    processor = Processor.from_json(saved, "preprocessor_config.json")
    assert processor == Processor.from_json(settings, "by hand")
    assert_like_transformers(processor, reference, pictures(31, 26))


def test_the_oldest_files_mean_the_default():
    found = Processor.from_json(ORIGINAL, "x")
    assert found == Processor() and found.size == (224, 224)


@pytest.mark.parametrize(
    "config",
    [
        {"resample": 2},
        {"size": {"longest_edge": 224}},
        {"size": {"shortest_edge": 224, "longest_edge": 300}},
        {"size": 0},
        {"size": "224"},
        {"crop_size": {"shortest_edge": 224}},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0.0, 1.0, 1.0]},
        {"do_pad": True},
        {"do_flip_channel_order": True},
        {"resample": "bicubic"},
        {"resample": [3]},
        {"resample": float("inf")},
        {"size": True},
        {"size": [224]},
        {"size": HUGE},
        {"crop_size": {"height": 224, "width": 224.0}},
        {"crop_size": HUGE},
        *({f"do_{step}": ["yes"]} for step in STEPS),
        *({f"do_{step}": 1} for step in STEPS),
        {"rescale_factor": "1/255"},
        {"rescale_factor": HUGE},
        {"rescale_factor": float("nan")},
        {"rescale_factor": 0},
        {"image_mean": HUGE},
        {"image_mean": [0.5, 0.5, HUGE]},
        {"image_mean": [0.5, 0.5, float("nan")]},
        {"image_mean": [0.5, 0.5, "0.5"]},
        {"image_std": [True, 1.0, 1.0]},
        {"image_std": {"r": 1.0}},
    ],
    ids=lambda config: ascii(config)[:40],
)
def test_what_is_not_done_here_is_refused_by_name(config):
    with pytest.raises(UserError) as error:
        Processor.from_json(ORIGINAL | config, "preprocessor_config.json")
    assert error.value.got.startswith(next(iter(config)) + "=")
    assert len(error.value.got) < 100


def test_longest_side_with_black_borders():
    """Keeps the whole picture: resized by hand with Pillow, pasted into black."""
    processor = Processor(None, longest=20, crop=None, mean=(0,) * 3, std=(1,) * 3)
    images = pictures(30, 60)
    page = np.zeros((2, 20, 20, 3), np.uint8)
    page[:, 5:15] = pillow(images, 10, 20)
    found = np.asarray(jax.jit(lambda x: processor(x))(images)) * 255.0
    np.testing.assert_allclose(found, page, atol=1e-4)
    assert processor.size == (20, 20)
