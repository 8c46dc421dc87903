"""What becomes of the bytes of a picture, against NumPy; bad bytes are bad pictures."""

import hashlib
import struct
import zlib

import numpy as np
import pytest
from drawn_pictures import drawing, encoded
from PIL import Image

from ddrl_jax.data.images import (
    BadPicture,
    Row,
    UnreadPicture,
    decode_picture,
    make_pictures,
)
from ddrl_jax.errors import UserError

SQUARE = drawing(3, 16, 16)
ORIENTED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def cubic(x, a=-0.5):
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def lanczos(x):
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def kernel_matrix(old: int, new: int, kernel, support: float) -> np.ndarray:
    """[new old] weights: the kernel stretched by the shrinkage, cut at the border."""
    stretch = max(old / new, 1.0)
    centre = (np.arange(new)[:, None] + 0.5) * old / new
    x = (np.arange(old)[None] + 0.5 - centre) / stretch
    weights = np.where(np.abs(x) < support, kernel(x), 0.0)
    return weights / weights.sum(1, keepdims=True)


def resized(image, height, width, kernel, support):
    rows = kernel_matrix(image.shape[0], height, kernel, support)
    columns = kernel_matrix(image.shape[1], width, kernel, support)
    # Along the rows first, to 8 bits, then along the columns: so Pillow does it.
    found = np.clip(np.einsum("xw,hwc->hxc", columns, image.astype(np.float64)), 0, 255)
    return np.clip(np.einsum("yh,hxc->yxc", rows, np.round(found)), 0, 255)


@pytest.mark.parametrize("name,kernel,support", [
    ("bicubic", cubic, 2.0), ("lanczos", lanczos, 3.0),
])  # fmt: skip
@pytest.mark.parametrize("width,height,side", [(60, 40, 16), (31, 50, 20), (9, 7, 21)])
def test_shorter_side_is_resized_and_the_middle_cut_out(
    name, kernel, support, width, height, side
):
    image = drawing(1, width, height)
    short = min(width, height)
    new = [round(n * side / short) for n in (height, width)]
    whole = resized(image, *new, kernel, support)
    top, left = ((n - side) // 2 for n in new)
    expected = whole[top : top + side, left : left + side]
    found = decode_picture(encoded(image), side, name)
    assert found.shape == (side, side, 3) and found.dtype == np.uint8
    # Half a level of rounding, and that of Pillow's fixed-point weights.
    assert np.abs(found - expected).max() <= 1
    assert np.abs(found - expected).mean() < 0.3


def test_a_square_of_the_right_size_is_untouched():
    np.testing.assert_array_equal(decode_picture(encoded(SQUARE), 16), SQUARE)
    webp = encoded(SQUARE, "WEBP", lossless=True)
    np.testing.assert_array_equal(decode_picture(webp, 16), SQUARE)
    jpeg = decode_picture(encoded(SQUARE, "JPEG", quality=95, subsampling=0), 16)
    assert 0 < np.abs(jpeg.astype(int) - SQUARE).mean() < 4


def test_an_odd_margin_is_smaller_on_the_left_and_top():
    wide, high = drawing(2, 21, 16), drawing(2, 16, 19)
    np.testing.assert_array_equal(decode_picture(encoded(wide), 16), wide[:, 2:18])
    np.testing.assert_array_equal(decode_picture(encoded(high), 16), high[1:17])


@pytest.mark.parametrize("orientation", ORIENTED)
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode_picture(encoded(SQUARE, exif=exif.tobytes()), 16)
    np.testing.assert_array_equal(found, ORIENTED[orientation](SQUARE))


def test_transparency_is_put_on_white():
    alpha = np.linspace(0, 255, 256).round().astype(np.uint8).reshape(16, 16)
    content = encoded(np.dstack([SQUARE, alpha]))
    share = alpha[..., None] / 255.0
    expected = share * SQUARE + (1 - share) * 255
    assert np.abs(decode_picture(content, 16) - expected).max() <= 1
    assert (decode_picture(content, 16)[0, 0] == 255).all()


def test_transparency_of_gray_and_palette_pictures_is_put_on_white():
    gray = np.full((8, 8), 40, np.uint8)
    hole = np.where(np.arange(64).reshape(8, 8) < 32, 0, 255).astype(np.uint8)
    la = decode_picture(encoded(np.dstack([gray, hole])), 8)
    palette = Image.fromarray((hole > 0).astype(np.uint8), "P")
    palette.putpalette([9, 9, 9, 200, 100, 50])
    p = decode_picture(encoded(palette, transparency=0), 8)
    key = decode_picture(encoded(Image.fromarray(hole), transparency=0), 8)
    assert (la[:4] == 255).all() and (la[4:] == 40).all()
    assert (p[:4] == 255).all() and (p[4:] == [200, 100, 50]).all()
    assert (key == 255).all()  # black was declared transparent, the rest is white


def test_gray_and_one_bit_pictures_become_rgb():
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    found = decode_picture(encoded(gray), 8)
    np.testing.assert_array_equal(found, np.dstack([gray] * 3))
    bits = Image.fromarray(gray > 100)
    found = decode_picture(encoded(bits), 8)
    np.testing.assert_array_equal(found[..., 0], np.where(gray > 100, 255, 0))


def png16(values: np.ndarray) -> bytes:
    """A 16-bit PNG written out by hand: gray [h w] or RGB [h w 3]."""
    height, width = values.shape[:2]
    kind = 2 if values.ndim == 3 else 0
    lines = [b"\0" + row.astype(">u2").tobytes() for row in values]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = [
        (b"IHDR", header),
        (b"IDAT", zlib.compress(b"".join(lines))),
        (b"IEND", b""),
    ]
    chunks = [
        struct.pack(">I", len(data)) + tag + data
        + struct.pack(">I", zlib.crc32(tag + data))
        for tag, data in parts
    ]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_sixteen_bits_are_scaled_and_not_clipped():
    levels = np.arange(256, dtype=np.uint32).reshape(16, 16)
    gray = decode_picture(png16(levels * 257), 16)
    np.testing.assert_array_equal(gray, np.dstack([levels] * 3))
    between = decode_picture(png16(np.full((4, 4), 1000)), 4)
    assert (between == round(1000 / 257)).all()
    colour = SQUARE.astype(np.uint32) * 257
    np.testing.assert_array_equal(decode_picture(png16(colour), 16), SQUARE)


@pytest.mark.parametrize("ink,colour", [
    ((0, 0, 0, 0), (255, 255, 255)), ((0, 0, 0, 255), (0, 0, 0)),
    ((255, 0, 0, 0), (0, 255, 255)), ((0, 128, 255, 51), (204, 102, 0)),
])  # fmt: skip
def test_cmyk_becomes_rgb(ink, colour):
    page = Image.new("CMYK", (8, 8), ink)
    found = decode_picture(encoded(page, "JPEG", quality=100), 8)
    assert np.abs(found - np.array(colour)).max() <= 3


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_cut_off_picture_is_bad(form, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = encoded(noise, form)
    assert decode_picture(content, 64).shape == (64, 64, 3)
    with pytest.raises(BadPicture):
        decode_picture(content[: int(share * len(content))], 64)


@pytest.mark.parametrize("content,reason", [
    (b"", "empty"),
    (b"<html>404</html>", "not a PNG, JPEG or WebP"),
    (encoded(SQUARE, "GIF"), "not a PNG, JPEG or WebP"),
    (encoded(np.zeros((2, 41, 3), np.uint8)), "41x2 is too elongated"),
])  # fmt: skip
def test_bytes_that_are_no_usable_picture_say_why(content, reason):
    with pytest.raises(BadPicture, match=reason):
        decode_picture(content, 16)


def rows(*contents: bytes) -> list[Row]:
    return [
        Row(f"{i}.png", f"caption {i}", lambda c=c: c, hashlib.sha256(c).hexdigest())
        for i, c in enumerate(contents)
    ]


def test_pictures_are_a_list_of_image_and_caption():
    pictures = make_pictures("here", rows(encoded(SQUARE), encoded(SQUARE)), {}, 8)
    image, caption = pictures[1]
    assert len(pictures) == 2 and caption == "caption 1"
    np.testing.assert_array_equal(image, decode_picture(encoded(SQUARE), 8))
    assert pictures.checked() == pictures and pictures.skipped == {}
    with pytest.raises(IndexError):
        pictures[2]


def test_one_error_has_both_the_faults_of_the_list_and_of_the_pixels():
    content = rows(encoded(SQUARE), b"torn", encoded(SQUARE))
    with pytest.raises(UserError) as e:
        make_pictures("here", content, {"empty captions": ("9.png",)}, 8)
    assert "2 faults" in e.value.what and "usable pictures: 2" in str(e.value.got)
    assert "1 empty captions: 9.png" in str(e.value.got)
    assert "1 pictures that can not be decoded: 1.png (not a" in str(e.value.got)


def test_skipped_pictures_are_counted_and_told(capsys):
    content = rows(encoded(SQUARE), *[b"torn"] * 8)
    pictures = make_pictures("here", content, {}, 8, on_bad="skip").checked()
    assert pictures.captions == ("caption 0",)
    assert pictures.skipped == {"pictures that can not be decoded": 8}
    told = capsys.readouterr().err
    assert "8 pictures that can not be decoded: 1.png" in told and "3 more" in told


def refuse() -> bytes:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("on_bad", ["error", "skip"])
@pytest.mark.parametrize("read,why", [
    (refuse, "Input/output error"), (lambda: encoded(SQUARE[::-1]), "it was replaced"),
    (lambda: b"", "it was replaced"),
])  # fmt: skip
def test_a_picture_that_is_not_as_it_was_listed_is_never_skipped(on_bad, read, why):
    one, two = rows(encoded(SQUARE), encoded(SQUARE))
    pictures = make_pictures(
        "here", [one, two._replace(read=read)], {}, 8, "bicubic", on_bad
    )
    with pytest.raises(UserError, match="1 pictures of here changed while") as e:
        pictures.checked()
    assert e.value.got == f"1.png ({why})"
    with pytest.raises(UnreadPicture, match=why):
        pictures[1]


def test_nothing_usable_is_an_error_even_where_bad_ones_are_skipped():
    pictures = make_pictures("here", rows(b"torn"), {}, 8, on_bad="skip")
    with pytest.raises(UserError, match="no usable picture"):
        pictures.checked()
    with pytest.raises(UserError, match="no usable picture"):
        make_pictures("here", [], {}, 8, on_bad="skip")


@pytest.mark.parametrize("key,value", [("resample", "nearest"), ("on_bad", "ignore")])
def test_an_unknown_setting_is_named(key, value):
    with pytest.raises(UserError, match=f"config.data.{key}") as e:
        make_pictures("here", rows(encoded(SQUARE)), {}, 8, **{key: value})
    assert value in str(e.value.got)
