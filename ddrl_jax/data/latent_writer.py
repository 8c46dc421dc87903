"""Writes the cache that `latents` reads: every picture through the VAE, once.

Interrupted at any moment it goes on after the last complete shard: it writes beside its
place, in FOLDER/.latents-DIGEST.partial, and one rename puts the finished cache there.
"""

import fcntl
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ddrl_jax.data.images import THREADS, Pictures, UnreadPicture, changed
from ddrl_jax.data.latents import check_card, read_card
from ddrl_jax.data.record_table import (
    SHARD,
    Rows,
    read_json,
    unwritable,
    write_json,
    write_table,
)
from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Cond

FORMAT = 1  # of the files; a later one gets folders of its own
_DTYPES = ("float16", "float32")

# uint8 [b r r 3] -> posterior mean and log-variance [b h w c], not scaled
EncodeImages = Callable[[np.ndarray], tuple[Any, Any]]
EncodeText = Callable[[Sequence[str]], Cond]


def write_latents(
    folder: str | Path,
    pictures: Pictures,
    encode_images: EncodeImages,
    encode_text: EncodeText,
    batch: int,
    fingerprint: Mapping[str, Any],
    *,
    scale: float = 1.0,
    dtype: str = "float16",
    text_dtype: str = "float32",
    shard: int = SHARD,
) -> Path:
    """Writes the cache of these pictures, or goes on writing it, or finds it there.

    z = scale * posterior, so mean * scale and logvar + 2 log(scale) are kept. The
    encoders always see `batch` rows: the last ones are filled up by repeating one.

    Args:
      folder: of caches; created if it is not there.
      pictures: all of them are decoded once before anything is encoded.
      encode_images: uint8 [batch r r 3] -> unscaled (mean, logvar) [batch h w c].
      encode_text: captions -> Cond, whose leaves are kept; integer ones as they are.
      batch: rows an encoder call.
      fingerprint: JSON values that name the weights of both encoders. The data, the
        resolution, scale and dtypes are added here.
      scale: the scaling factor of the VAE.
      dtype: of the latents on disk, "float16" (relative error 2^-11) or "float32".
      text_dtype: of the text embeddings; float32 keeps the rollout's bits.
      shard: records a file.

    Returns:
      The folder of this cache, for `latent_source`.

    Raises:
      UserError: bad pictures (see `Pictures.checked`), numbers that are not finite in
        their dtype, a caption the encoder refuses, a folder of this name that holds
        something else, or a disk that refuses or has no locks.
    """
    _check_dtype("cache_dtype", dtype)
    _check_dtype("cache_text_dtype", text_dtype)
    job = _Job(encode_images, encode_text, batch, scale, dtype, text_dtype)
    whole = _whole(fingerprint, pictures, job)
    final, scratch = _places(Path(folder), whole)
    with _locked(Path(folder)):
        if final.exists():
            _check_found(final, whole, pictures)
            return final
        pictures = pictures.checked()
        texts = _start(scratch, pictures, shard)
        with ThreadPoolExecutor(THREADS) as pool:
            encode = partial(_encode_span, job, pictures, pool)
            write_table(scratch, "latents", len(pictures), encode, shard)
        write_table(scratch, "texts", len(texts), partial(_say_span, job, texts), shard)
        card = {"fingerprint": whole, "skipped": pictures.skipped}
        write_json(scratch / "cache.json", card)
        scratch.rename(final)
    return final


class _Job(NamedTuple):
    """How rows are made; everything but the functions and `batch` decides the bytes."""

    images: EncodeImages
    text: EncodeText
    batch: int
    scale: float
    dtype: str
    text_dtype: str


def _check_dtype(key: str, got: str) -> None:
    if got not in _DTYPES:
        raise UserError(
            f"config.data.{key} is unknown",
            got=repr(got),
            wanted=" or ".join(repr(d) for d in _DTYPES),
            way_out=f"set --config.data.{key}={_DTYPES[0]}",
        )


def _whole(fingerprint: Mapping[str, Any], pictures: Pictures, job: _Job) -> dict:
    ours = {
        "format": FORMAT,
        "data": pictures.fingerprint,
        "resolution": pictures.resolution,
        "resample": pictures.resample,
        "scale": job.scale,
        "dtype": job.dtype,
        "text_dtype": job.text_dtype,
    }
    assert not ours.keys() & fingerprint.keys(), "these names are added here"
    return json.loads(json.dumps({**fingerprint, **ours}))


def _places(folder: Path, whole: dict) -> tuple[Path, Path]:
    text = json.dumps(whole, sort_keys=True)
    name = "latents-" + hashlib.sha256(text.encode()).hexdigest()[:16]
    return folder / name, folder / f".{name}.partial"


def _check_found(final: Path, whole: dict, pictures: Pictures) -> None:
    """A cache that is there holds what is wanted, and hides no fault of the data."""
    check_card(final, whole)
    if read_card(final)["skipped"] and pictures.on_bad == "error":
        pictures.checked()  # raises
    tell_skipped(final)


def tell_skipped(final: Path) -> None:
    """Says what was left out of a cache when it was written.

    Raises:
      UserError: the cache is damaged.
    """
    for kind, count in read_card(final)["skipped"].items():
        print(f"ddrl_jax: left out of {final}: {count} {kind}", file=sys.stderr)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one program at a time write below `folder`; a killed one frees it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as e:
        raise unwritable(folder, e) from e
    with file:
        try:
            _wait_for(file, folder)
        except OSError as e:  # a workdir's beats would refuse who is to wait here
            raise UserError(
                f"the cache {folder} lies where no file can be locked",
                got=f"{type(e).__name__}: {e}",
                wanted="a file system with locks: only one program may write a cache",
                way_out="set --config.data.cache to a folder of a local disk; each"
                " machine then keeps its own",
            ) from e
        yield


def _wait_for(file: IO[str], folder: Path) -> None:
    """Locks a file, and says so if another has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"ddrl_jax: waiting for another run in {folder}", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)


def _start(scratch: Path, pictures: Pictures, shard: int) -> tuple[str, ...]:
    """The unique captions; makes the folder, or keeps one of the same plan."""
    captions = pictures.captions
    row_of = {text: row for row, text in enumerate(dict.fromkeys(captions))}
    digests = "".join(row.digest for row in pictures.rows)
    plan = {
        "texts": list(row_of),
        "record": [row_of[c] for c in captions],
        # Another Pillow may leave out others of the same data.
        "pictures": hashlib.sha256(digests.encode()).hexdigest()[:16],
        "shard": shard,
    }
    path = scratch / "captions.json"
    try:
        kept = path.exists() and read_json(path) == plan
    except ValueError:
        kept = False
    try:
        if not kept:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
        for torn in scratch.glob("*.tmp"):
            torn.unlink()
    except OSError as e:
        raise unwritable(scratch, e) from e
    if not kept:
        write_json(path, plan)
    return tuple(row_of)


def _encode_span(
    job: _Job, pictures: Pictures, pool: ThreadPoolExecutor, start: int, stop: int
) -> Rows:
    """Latents of the records start..stop; a batch is decoded while one is encoded."""

    def load(begin: int | None) -> list[Future]:
        if begin is None:
            return []
        # Beyond `stop` the last picture is repeated, so that no shape is new.
        span = [min(i, stop - 1) for i in range(begin, begin + job.batch)]
        return [pool.submit(pictures.__getitem__, i) for i in span]

    begins = range(start, stop, job.batch)
    parts, ahead = [], load(start)
    for begin, after in zip_longest(begins, begins[1:]):
        here, ahead = ahead, load(after)
        images = _stack(pictures, here, begin)
        mean, logvar = (np.asarray(a, np.float32) for a in job.images(images))
        parts.append((mean[: stop - begin], logvar[: stop - begin]))
    mean, logvar = (np.concatenate(part) for part in zip(*parts, strict=True))
    gain = np.float32(2 * math.log(job.scale))  # of the log-variance, by scaling
    rows = {"mean": mean * np.float32(job.scale), "logvar": logvar + gain}
    rows = {name: _narrow(value, job.dtype) for name, value in rows.items()}
    names = [pictures.rows[i].name for i in range(start, stop)]
    _check_finite(rows, names, "VAE", "cache_dtype", job.dtype)
    return rows


def _stack(pictures: Pictures, futures: list[Future], begin: int) -> np.ndarray:
    images = []
    for i, future in enumerate(futures):
        try:
            images.append(future.result()[0])
        except UnreadPicture as e:
            name = pictures.rows[min(begin + i, len(pictures) - 1)].name
            raise changed(pictures.root, [f"{name} ({e})"]) from e
    return np.stack(images)


def _check_finite(rows: Rows, names: list[str], who: str, key: str, dtype: str) -> None:
    good = [np.isfinite(v).reshape(len(v), -1).all(axis=1) for v in rows.values()]
    bad = [names[i] for i in np.flatnonzero(~np.all(good, axis=0))]
    if bad:
        raise UserError(
            f"what the {who} says of {len(bad)} records is not finite in {dtype}",
            got=", ".join(bad[:5]),
            wanted="finite numbers",
            way_out="check its weights; numbers beyond the range of float16 need "
            f"--config.data.{key}=float32",
        )


def _say_span(job: _Job, texts: tuple[str, ...], start: int, stop: int) -> Rows:
    """What the text encoder says of the captions start..stop."""
    parts: list[Rows] = []
    for begin in range(start, stop, job.batch):
        span = [min(i, stop - 1) for i in range(begin, begin + job.batch)]
        try:
            cond = job.text([texts[i] for i in span])
        except ValueError as e:
            raise UserError(
                "the text encoder refuses a caption of the data",
                got=str(e),
                wanted="captions it can read",
                way_out="correct the caption files",
            ) from e
        leaves = {k: v for k, v in cond._asdict().items() if v is not None}
        narrow = {k: _narrow(v, job.text_dtype) for k, v in leaves.items()}
        parts.append({k: v[: stop - begin] for k, v in narrow.items()})
    rows = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    names = [repr(text) for text in texts[start:stop]]
    _check_finite(rows, names, "text encoder", "cache_text_dtype", job.text_dtype)
    return rows


def _narrow(leaf: Any, dtype: str) -> np.ndarray:
    """Floats in `dtype`, infinite beyond its range; token ids stay integers."""
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    with np.errstate(over="ignore"):
        return np.asarray(leaf).astype(dtype) if floating else np.asarray(leaf)
