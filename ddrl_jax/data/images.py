"""Captioned pictures of any size, read one at a time as squares of one size.

Where they come from is another module's matter (`picture_folder`, `picture_tfds`): here
is what a picture becomes, and how bad data are reported. Nothing is dropped silently:
all that is wrong is told in one error, or, with `on_bad="skip"`, left out and counted.
"""

import dataclasses
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from ddrl_jax.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP")  # no other decoder of Pillow is let near the bytes
RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MAX_ASPECT = 20  # beyond it a centre crop shows next to nothing, and costs memory
THREADS = 8  # Pillow decodes without the interpreter lock
_SHOWN = 5  # names an error shows of each kind

CORRUPT = "pictures that can not be decoded"
NO_CAPTION = "pictures without a caption"
EMPTY_CAPTION = "empty captions"
NOT_UTF8 = "captions that are not UTF-8"
Faults = Mapping[str, tuple[str, ...]]


class BadPicture(Exception):
    """Bytes that are no usable picture; the message is the reason."""


class UnreadPicture(Exception):
    """A picture that can not be had as it was listed; the message is the reason.

    No fault of the data, which is skipped: another start may find it as it was.
    """


class Row(NamedTuple):
    """One captioned picture: its name in reports, where its bytes come from, and their
    SHA-256."""

    name: str
    caption: str
    read: Callable[[], bytes]
    digest: str


def decode_picture(
    content: bytes, resolution: int, resample: str = "bicubic"
) -> UInt8[np.ndarray, "{resolution} {resolution} 3"]:
    """Decodes a picture, turns it upright, and cuts a square from its middle.

    The EXIF orientation is applied; transparency is put on white; 16-bit values are
    scaled to 8; CMYK becomes RGB without a colour profile. Then the shorter side is
    resized to `resolution` with Pillow's antialiased kernel (enlarging if need be) and
    the longer one, floor((longer - resolution) / 2) pixels in, is cropped to it.

    Args:
      content: a PNG, JPEG or WebP file.
      resolution: pixels of a side.
      resample: "bicubic" (a = -0.5) or "lanczos" (3 lobes).

    Raises:
      BadPicture: the bytes are not such a picture, or not all of it.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as file:
            file.load()  # all of it: a cut-off file is found here
            return _square(_rgb(ImageOps.exif_transpose(file)), resolution, resample)
    except BadPicture:
        raise
    except UnidentifiedImageError:
        raise BadPicture("not a PNG, JPEG or WebP" if content else "empty") from None
    except Exception as e:  # Pillow raises what its plug-ins raise: any kind
        raise BadPicture(f"{type(e).__name__}: {e}") from e


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadPicture("gray values beyond 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _square(image: Image.Image, resolution: int, resample: str) -> np.ndarray:
    short, long = min(image.size), max(image.size)
    if long > MAX_ASPECT * short:
        raise BadPicture(f"{image.width}x{image.height} is too elongated to crop")
    width, height = (
        max(resolution, round(side * resolution / short)) for side in image.size
    )
    resized = image.resize((width, height), RESAMPLE[resample])
    left, top = (width - resolution) // 2, (height - resolution) // 2
    box = (left, top, left + resolution, top + resolution)
    return np.array(resized.crop(box), np.uint8)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Captioned pictures; item i is (uint8 [r r 3], caption), decoded when asked for.

    Attributes:
      root: the folder or data set they come from, for messages.
      rows: those that can be used.
      faults: kind of fault -> the names, of what can not be used.
      fingerprint: of the bytes and captions of all rows; the same after `checked`.
      resolution: pixels of a side.
      resample: see `decode_picture`.
      on_bad: "error" or "skip".
    """

    root: str
    rows: tuple[Row, ...]
    faults: Faults
    fingerprint: str
    resolution: int
    resample: str
    on_bad: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, record: int) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
        """Reads one picture.

        Raises:
          BadPicture: it can not be decoded; not after `checked`.
          UnreadPicture: it can not be read, or is another than was listed.
        """
        row = self.rows[record]
        return self._decoded(row), row.caption

    def _decoded(self, row: Row) -> UInt8[np.ndarray, "h w 3"]:
        try:
            content = row.read()
        except OSError as e:
            raise UnreadPicture(e.strerror or str(e)) from e
        # The fingerprint, by which a cache of these pictures is found again, is that of
        # the bytes that were listed: of no others may anything get into it.
        if hashlib.sha256(content).hexdigest() != row.digest:
            raise UnreadPicture("it was replaced")
        return decode_picture(content, self.resolution, self.resample)

    @property
    def captions(self) -> tuple[str, ...]:
        """The caption of each record."""
        return tuple(row.caption for row in self.rows)

    @property
    def skipped(self) -> dict[str, int]:
        """How many were left out, for each kind of fault."""
        return {kind: len(names) for kind, names in self.faults.items()}

    def checked(self) -> "Pictures":
        """Decodes every picture once, in threads, and leaves out the corrupt ones.

        Raises:
          UserError: with on_bad="error" all that is wrong, in one message; always
            where nothing usable is left, or a picture is not as it was listed.
        """

        def fault(row: Row) -> tuple[type | None, str]:
            try:
                self._decoded(row)
            except (BadPicture, UnreadPicture) as e:
                return type(e), f"{row.name} ({e})"
            return None, ""

        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(fault, self.rows))
        if unread := [text for kind, text in found if kind is UnreadPicture]:
            raise changed(self.root, unread)
        bad = tuple(text for kind, text in found if kind is BadPicture)
        pairs = zip(self.rows, found, strict=True)
        good = tuple(row for row, (kind, _) in pairs if kind is None)
        faults = {**self.faults, CORRUPT: bad} if bad else self.faults
        checked = dataclasses.replace(self, rows=good, faults=faults)
        if not good or (faults and self.on_bad == "error"):
            raise _refusal(checked)
        if faults:
            print(f"ddrl_jax: skipped in {_report(checked)}", file=sys.stderr)
        return checked


def make_pictures(
    root: str,
    rows: Iterable[Row],
    faults: Faults,
    resolution: int,
    resample: str = "bicubic",
    on_bad: str = "error",
) -> Pictures:
    """Puts rows together; where their list has faults already, decodes them too.

    Args:
      root: the folder or data set, for messages.
      rows: those with a picture and a caption.
      faults: what was found wrong so far, kind -> names.
      resolution: pixels of a side.
      resample: "bicubic" or "lanczos".
      on_bad: "error" or "skip".

    Raises:
      UserError: a setting is unknown; no row; or faults and on_bad="error": then the
        message also has the pictures that can not be decoded.
    """
    _check_choice("resample", resample, tuple(RESAMPLE))
    _check_choice("on_bad", on_bad, ("error", "skip"))
    faults = {kind: tuple(names) for kind, names in faults.items() if names}
    rows = tuple(rows)
    what = [[row.name, row.caption, row.digest] for row in rows]
    fingerprint = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    found = Pictures(root, rows, faults, fingerprint, resolution, resample, on_bad)
    if not rows or (faults and on_bad == "error"):
        return found.checked()  # raises
    return found


def changed(root: str, names: Sequence[str]) -> UserError:
    """The error for pictures that are not as they were listed.

    Args:
      root: the folder or data set.
      names: those of the pictures, each with what happened to it.
    """
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return UserError(
        f"{len(names)} pictures of {root} changed while the data were read",
        got=", ".join(names[:_SHOWN]) + more,
        wanted="data that can be read and stay as they are until the cache is written",
        way_out="start again; complete shards of unchanged data are kept",
    )


def normal_caption(text: str) -> str:
    """A caption on one line: runs of white space become one blank."""
    return " ".join(text.split())


def _check_choice(key: str, got: str, wanted: tuple[str, ...]) -> None:
    if got not in wanted:
        raise UserError(
            f"config.data.{key} is unknown",
            got=repr(got),
            wanted=" or ".join(repr(w) for w in wanted),
            way_out=f"set --config.data.{key}={wanted[0]}",
        )


def _report(pictures: Pictures) -> str:
    """One line a kind: how many, and the first names."""
    lines = [f"{pictures.root} (usable pictures: {len(pictures)})"]
    for kind, names in pictures.faults.items():
        more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
        lines.append(f"  {len(names)} {kind}: {', '.join([*names[:_SHOWN], *more])}")
    return "\n           ".join(lines)


def _refusal(pictures: Pictures) -> UserError:
    total = sum(pictures.skipped.values())
    if pictures.rows:
        return UserError(
            f"{total} faults in the pictures of {pictures.root}",
            got=_report(pictures),
            wanted="a PNG, JPEG or WebP picture and one caption for every name",
            way_out="repair or remove them, or leave them out (and have them counted) "
            "with --config.data.on_bad=skip",
        )
    return UserError(
        f"there is no usable picture in {pictures.root}",
        got=_report(pictures) if total else "no picture at all",
        wanted="PNG, JPEG or WebP pictures with captions: NAME.txt beside each, "
        "metadata.jsonl, or a TFDS data set",
        way_out="correct --config.data.path",
    )
