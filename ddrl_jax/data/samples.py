"""Samples of the base policy as a captioned data set: written once, read as data.

DDRL may anchor to real data or to samples of the policy it starts from; `--mode=sample`
writes such a set, `config.data.source = "samples"` reads it.
"""

import contextlib
import hashlib
import io
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8
from PIL import Image

from ddrl_jax.data.emoji import as_size, read_emoji
from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import DataSource


def sample_source(path: str, shape: tuple[int, ...]) -> DataSource:
    """Reads a data set that `write_samples` wrote; its pictures live on device.

    Args:
      path: of the data set.
      shape: height, width and channels of the pictures that the model works on.

    Raises:
      UserError: the folder is missing or can not be read, or its pictures have another
        shape.
    """
    pictures, captions = read_emoji(Path(path))
    if pictures.shape[1:] != shape:
        raise UserError(
            f"the pictures of the data set {path} are not of the model's size",
            got=as_size(pictures.shape[1:]),
            wanted=as_size(shape),
            way_out="--mode=sample of this model writes a set of its size; or set "
            "config.model.image_size to that of the pictures",
        )
    stack = jnp.asarray(pictures)

    def latents(
        records: Int[Array, " b"], keys: Key[Array, " b"]
    ) -> Float[Array, "b h w c"]:
        del keys  # the samples vary by themselves: nothing is augmented
        return stack[records].astype(jnp.float32) / 127.5 - 1.0

    digest = hashlib.sha256(pictures.tobytes()).hexdigest()[:16]
    return DataSource(captions=captions, latents=latents, digest=digest)


def write_samples(
    folder: Path,
    batches: Iterable[tuple[UInt8[np.ndarray, "b h w 3"], tuple[str, ...]]],
) -> int:
    """Writes (images, captions) batches as a TFDS data set over array_record.

    Args:
      folder: must not exist yet: a data set is never overwritten.
      batches: drained once.

    Returns:
      The number of records.

    Raises:
      UserError: the folder is already there, or the disk refuses.
    """
    # Whoever calls, and whatever was put there while the caller's model was built: the
    # rename at the end would take the place of an empty folder.
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that one rename puts the finished set there. What a kill left
    # of an earlier one is of no use: sampling starts anew.
    scratch = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    drawn = _Drawn(batches)
    try:
        builder = _builder(drawn)(data_dir=scratch, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # it names the scratch folder
            builder.download_and_prepare()
        Path(builder.data_dir).rename(folder)
    except (OSError, RuntimeError) as e:
        if drawn.failed:  # it is not the disk
            raise
        raise _unwritable(folder, e) from e
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return builder.info.splits["train"].num_examples


def refuse_existing(folder: Path) -> None:
    """Raises UserError where a data set can not be put: there, or above, is something.

    Args:
      folder: the place; its parents need not be there yet.
    """
    whole = folder.absolute()
    # The root has nothing above it, and is there itself.
    above = next((path for path in whole.parents if path.exists()), whole)
    if not above.is_dir():
        raise UserError(
            f"the data set {folder} can not lie there",
            got=f"{above}, which is a file",
            wanted="a folder",
            way_out="move it away or set --config.sample.output",
        )
    if folder.exists():
        raise UserError(
            f"the data set {folder} is already there",
            got="an existing folder",
            wanted="a new one",
            way_out="move it away or set --config.sample.output",
        )


class _Drawn:
    """Batches that remember whether it was drawing them that failed."""

    def __init__(self, batches: Iterable):
        self._batches, self.failed = batches, False

    def __iter__(self) -> Iterator:
        try:
            yield from self._batches
        except Exception:
            self.failed = True
            raise


def _unwritable(folder: Path, e: Exception) -> UserError:
    return UserError(
        f"the data set {folder} can not be written",
        got=f"{type(e).__name__}: {' '.join(str(e).split())[:300]}",
        wanted="a writable folder with enough space",
        way_out="make room or set another --config.sample.output, and start again; "
        "nothing of it is kept",
    )


def _builder(batches: Iterable):
    """A TFDS builder class that drains `batches`."""
    import tensorflow_datasets as tfds  # slow import, only where data is written

    tfds.disable_progress_bar()  # the caller has its own
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "caption": tfds.features.Text(),
        }
    )

    class Samples(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Samples of a policy with their prompts."""

        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # no script of its own, beside which TFDS looks for checksums

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=features, disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            del dl_manager  # nothing is downloaded
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            rows = (row for pair in batches for row in zip(*pair, strict=True))
            for index, (image, caption) in enumerate(rows):
                yield index, {"image": _png(image), "caption": caption}

    return Samples


def _png(image: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    file.seek(0)
    return file
