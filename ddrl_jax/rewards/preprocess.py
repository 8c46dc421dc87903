"""The picture processor of CLIP in JAX: resize, crop, scale, normalise.

transformers resizes uint8 pictures by Pillow, and Pillow resamples in two passes, one
along each axis, both with 22-bit fixed-point weights and rounding to uint8. This is
integer arithmetic, so this file gives the same bytes on every device and not just
nearly the same picture.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt8

from ddrl_jax.errors import UserError

BICUBIC = 3  # Pillow's number of the filter
A = -0.5  # its free parameter, Keys 1981
SUPPORT = 2.0  # half its width in source pixels
PRECISION = 22  # fractional bits of Pillow's weights
PIECE = 8  # bits of a part of a weight, see `_weighted`
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, per channel
STD = (0.26862954, 0.26130258, 0.27577711)
# Keys of preprocessor_config.json that say nothing about the numbers.
SILENT = {
    "crop_to_patches",
    "data_format",
    "device",
    "disable_grouping",
    "do_convert_rgb",
    "feature_extractor_type",
    "image_processor_type",
    "input_data_format",
    "processor_class",
    "return_tensors",
    "auto_map",
}
STEPS = ("resize", "center_crop", "rescale", "normalize")  # each with a key do_...
HONOURED = {f"do_{step}" for step in STEPS}
HONOURED |= {"size", "resample", "crop_size", "rescale_factor"}
HONOURED |= {"image_mean", "image_std"}
LARGEST = 4096  # pixels of a side, several times what any CLIP looks at
SHOWN = 80  # characters of a setting in a message


def bicubic(x: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Keys' cubic convolution kernel (1981, eq. 15) with a = -1/2.

    w(x) = (a + 2) |x|^3 - (a + 3) |x|^2 + 1 for |x| < 1,
    a |x|^3 - 5 a |x|^2 + 8 a |x| - 4 a for 1 <= |x| < 2, else 0.
    """
    x = np.abs(x)
    near = ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * A
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def resize_weights(source: int, target: int) -> Int[np.ndarray, "source target"]:
    """The weights of one pass of Pillow's resampling, in units of 2**-22.

    Target pixel i is centred at c = (i + 1/2) source / target. The filter is stretched
    by max(source / target, 1), so that shrinking averages (no aliasing), cut at the
    border of the picture, and normalised to sum 1 before rounding.

    Args:
      source: pixels before.
      target: pixels after.

    Returns:
      int32; almost all zero, at most about 4 source / target + 1 in a column are not.
    """
    scale = source / target
    stretch = max(scale, 1.0)
    centre = (np.arange(target) + 0.5) * scale
    first = np.maximum((centre - SUPPORT * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + SUPPORT * stretch + 0.5).astype(np.int64), source)
    taps = first + np.arange((last - first).max())[:, None]  # [taps target]
    weight = bicubic((taps - centre + 0.5) * (1.0 / stretch))
    weight = np.where(taps < last, weight, 0.0)
    # Pillow adds the taps one after the other, as a sum along the first axis does
    weight = weight / weight.sum(0)
    fixed = np.trunc(weight * (1 << PRECISION) + np.copysign(0.5, weight))
    full = np.zeros((source, target), np.int32)
    columns = np.broadcast_to(np.arange(target), taps.shape)
    inside = taps < last
    full[taps[inside], columns[inside]] = fixed[inside].astype(np.int32)
    return full


def resize(
    images: UInt8[Any, "b h w c"], height: int, width: int
) -> UInt8[Array, "b height width c"]:
    """Resizes like `PIL.Image.resize((width, height), BICUBIC)`, byte for byte.

    Args:
      images: uint8 [b h w c].
      height: rows after.
      width: columns after.
    """
    x = jnp.asarray(images)
    rows, columns = x.shape[1] - height, x.shape[2] - width  # how many go
    # The order matters, as the first pass rounds. Pillow 13 begins with the columns of
    # pixels where that leaves much less to do; older ones always begin with the rows.
    passes = ((2, width), (1, height))
    for axis, side in passes[::-1] if rows > max(0, 2 * columns) else passes:
        if side != x.shape[axis]:
            weights = resize_weights(x.shape[axis], side)
            x = jnp.moveaxis(_weighted(jnp.moveaxis(x, axis, 3), weights), 3, axis)
    return x


def _weighted(
    x: UInt8[Array, "*rest source"], weights: Int[np.ndarray, "source target"]
) -> UInt8[Array, "*rest target"]:
    """clip((x @ weights + 1/2) / 2**22), all in integers.

    Matrix units multiply floats. Bytes and 8-bit parts of the weights are exact even
    in bfloat16 and TF32, and up to 2**8 products below 2**16 add up exactly in
    float32 (a side may shrink 63 times), so three products of floats do for integers.
    """
    pieces = [((weights >> (PIECE * i)) & 0xFF).astype(np.float32) for i in range(2)]
    pieces.append((weights >> (2 * PIECE)).astype(np.float32))  # carries the sign
    floats = x.astype(jnp.float32)
    total = jnp.full((), 1 << (PRECISION - 1), jnp.int32)
    for i, piece in enumerate(pieces):
        total += (floats @ piece).astype(jnp.int32) << (PIECE * i)
    return jnp.clip(total >> PRECISION, 0, 255).astype(jnp.uint8)


def crop(
    images: Shaped[Array, "b h w c"], height: int, width: int
) -> Shaped[Array, "b height width c"]:
    """Cuts out the centre; a side that is too short is filled up with zeros.

    An odd rest leaves the smaller half before the picture when it cuts, and the larger
    when it fills, as transformers does.
    """
    for axis, target in ((1, height), (2, width)):
        rest = images.shape[axis] - target
        if rest < 0:
            before = (-rest + 1) // 2
            pad = [(0, 0)] * 4
            pad[axis] = (before, -rest - before)
            images = jnp.pad(images, pad)
        else:
            start = [0] * 4
            start[axis] = rest // 2
            stop = list(images.shape)
            stop[axis] = rest // 2 + target
            images = images[tuple(map(slice, start, stop))]
    return images


class Processor(NamedTuple):
    """What happens to a picture before CLIP sees it; every field is static.

    Attributes:
      shortest: the shorter side after resizing, the longer in proportion; or None.
      longest: the longer side after resizing, the rest black; or None.
      exact: (height, width) after resizing; or None.
      crop: (height, width) of the centre that is kept; or None.
      factor: of the pixel values, 1/255; 1 where they are not scaled.
      mean: of each channel, subtracted.
      std: of each channel, divided by.
    """

    shortest: int | None = 224
    longest: int | None = None
    exact: tuple[int, int] | None = None
    crop: tuple[int, int] | None = (224, 224)
    factor: float = 1.0 / 255.0
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __call__(self, images: UInt8[Any, "b h w c"]) -> Float[Array, "b p q c"]:
        """Returns float32 pixels (x factor - mean) / std.

        Args:
          images: uint8 [b h w 3] of one size; may be traced.
        """
        height, width = self.resized(images.shape[1], images.shape[2])
        x = resize(images, height, width)
        if self.longest is not None:
            x = _pad_to_square(x, self.longest)
        if self.crop is not None:
            x = crop(x, *self.crop)
        # a table of the 256 values in float64: no rounding but the last
        value = np.arange(256.0)[:, None] * self.factor
        table = (value - np.array(self.mean)) / np.array(self.std)
        channels = jnp.arange(len(self.mean))
        return jnp.asarray(table, jnp.float32)[x.astype(jnp.int32), channels]

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing a picture of this size."""
        if self.exact is not None:
            return self.exact
        if self.longest is not None:
            scale = self.longest / max(height, width)
            return max(round(height * scale), 1), max(round(width * scale), 1)
        if self.shortest is None:
            return height, width
        # the longer side is rounded down, as transformers and torchvision do
        long = int(self.shortest * max(height, width) / min(height, width))
        return (long, self.shortest) if width <= height else (self.shortest, long)

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of what comes out; None where it depends on the picture."""
        square = (self.longest, self.longest) if self.longest else None
        return self.crop or self.exact or square

    @classmethod
    def from_json(cls, config: Mapping[str, Any], name: str) -> "Processor":
        """Reads a preprocessor_config.json of CLIP, of any version of transformers.

        Args:
          config: its contents.
          name: of the file, for messages.

        Raises:
          UserError: it asks for something that is not done here.
        """
        quiet = {k for k, v in config.items() if k in SILENT or k[:1] == "_"}
        rest = {k: v for k, v in config.items() if k not in quiet and v is not None}
        if asked := {k: v for k, v in rest.items() if v and k not in HONOURED}:
            raise _refusal(name, asked)
        fields: dict[str, Any] = {"shortest": None, "crop": None}
        does = {step: rest.get(f"do_{step}", True) for step in STEPS}
        if odd := {f"do_{k}": v for k, v in does.items() if not isinstance(v, bool)}:
            raise _refusal(name, odd)
        if does["resize"]:
            if rest.get("resample", BICUBIC) != BICUBIC:
                raise _refusal(name, {"resample": rest["resample"]})
            fields |= _resize_fields(name, rest.get("size", 224))
        if does["center_crop"]:
            fields["crop"] = _sides(name, "crop_size", rest.get("crop_size", 224))
        factor = rest.get("rescale_factor", 1.0 / 255.0)
        if does["rescale"] and not (_is_number(factor) and factor > 0):
            raise _refusal(name, {"rescale_factor": factor})
        fields["factor"] = float(factor) if does["rescale"] else 1.0
        normal = does["normalize"]
        mean, std = rest.get("image_mean", MEAN), rest.get("image_std", STD)
        fields["mean"] = _channels(name, "image_mean", mean) if normal else (0.0,) * 3
        fields["std"] = _channels(name, "image_std", std) if normal else (1.0,) * 3
        return cls(**fields)


def _pad_to_square(x: UInt8[Array, "b h w c"], side: int) -> UInt8[Array, "b s s c"]:
    """Black around the picture; an odd rest puts the larger half behind it."""
    pad = [(0, 0)]
    for length in x.shape[1:3]:
        before = (side - length) // 2
        pad.append((before, side - length - before))
    return jnp.pad(x, [*pad, (0, 0)])


def _resize_fields(name: str, size: Any) -> dict[str, Any]:
    if isinstance(size, Mapping):
        size = {k: v for k, v in size.items() if v is not None}
        if size.keys() == {"height", "width"}:
            return {"exact": _sides(name, "size", size)}
        if size.keys() != {"shortest_edge"}:
            raise _refusal(name, {"size": size})
        size = size["shortest_edge"]
    return {"shortest": _sides(name, "size", size)[0]}


def _sides(name: str, key: str, size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        size = {k: v for k, v in size.items() if v is not None}
        if size.keys() != {"height", "width"}:
            raise _refusal(name, {key: size})
        sides = (size["height"], size["width"])
    else:
        sides = (size, size)
    if not all(type(side) is int and 0 < side <= LARGEST for side in sides):
        raise _refusal(name, {key: size})
    return sides


def _channels(name: str, key: str, value: Any) -> tuple[float, ...]:
    value = [value] * 3 if isinstance(value, int | float) else value
    good = isinstance(value, Sequence) and len(value) == 3
    if not good or not all(map(_is_number, value)):
        raise _refusal(name, {key: value})
    if key == "image_std" and not all(v > 0 for v in value):
        raise _refusal(name, {key: value})
    return tuple(float(v) for v in value)


def _is_number(value: object) -> bool:
    """Whether it is a number of JSON that a float can hold; true is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def _refusal(name: str, asked: Mapping[str, Any]) -> UserError:
    return UserError(
        f"the picture processing that {name} asks for is not available",
        got=", ".join(f"{key}={value!r}"[:SHOWN] for key, value in asked.items()),
        wanted="do_... true or false, bicubic resizing (resample 3) to a shortest_edge"
        f" or to height and width, a centre crop, sides of 1 to {LARGEST}, one factor"
        " above 0, mean and std (above 0) of three channels",
        way_out="name a CLIP checkpoint with the usual preprocessor_config.json",
    )
