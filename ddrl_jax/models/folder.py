"""Folders in the diffusers layout: their JSON and their tensors.

Weights are read from safetensors only: nothing here can run code from a checkpoint.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddrl_jax.errors import UserError
from ddrl_jax.text import parse_json

STEMS = ("diffusion_pytorch_model", "model")  # of diffusers and of transformers
FOREIGN = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.h5")  # other formats
CONVERT = (
    "only safetensors are read, because other formats can run code. Where you trust "
    "the files, convert them once: load the model in torch with from_pretrained, save "
    "it with save_pretrained('FOLDER', safe_serialization=True)"
)

WHOLE_BYTES = 500_000_000  # of a file whose every byte enters the fingerprint
SAMPLES, SAMPLE_BYTES = 256, 1 << 16  # of a larger one; the first holds the header


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
      UserError: no such file, or not a JSON object.
    """
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        missing = not Path(path).is_file()
        raise UserError(
            f"{path} can not be read",
            got="no such file" if missing else str(e),
            wanted="a JSON object, as save_pretrained writes it",
            way_out="check the path, or download the model again",
        ) from e
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is no JSON object",
            got=type(content).__name__,
            wanted="an object { ... }",
            way_out="download the model again",
        )
    return content


def weight_files(
    folder: Path, variant: str | None = None, judge: bool = False
) -> list[Path]:
    """The safetensors files that hold the weights of a component, sorted.

    Args:
      folder: of the component.
      variant: None or "" for the plain files, else for example "fp16".
      judge: it is a model of a reward, for messages: no key chooses its variant.

    Raises:
      UserError: no folder, no such files, only files of other formats, a missing shard.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"the model has no folder {folder.name}",
            got=f"no such folder: {folder}",
            wanted="the component with its config.json and weights",
            way_out="download the whole model again",
        )
    if not (found := find_weights(folder, variant)):
        raise _no_weights(folder, variant, judge)
    return found


def find_weights(folder: Path, variant: str | None = None) -> list[Path]:
    """As `weight_files`, but [] where there are none of this variant."""
    if index := index_of(folder, variant):
        return _shards(index)
    singles = [folder / f"{stem}{end_of(variant)}.safetensors" for stem in STEMS]
    return [file for file in singles if file.is_file()][:1]


def end_of(variant: str | None) -> str:
    """What a variant adds to the name of a weight file."""
    return f".{variant}" if variant else ""


def index_of(folder: Path, variant: str | None = None) -> Path | None:
    """The file that says which shard holds which tensor; None if there are no shards.

    Arguments as `weight_files`.
    """
    names = [f"{stem}.safetensors.index{end_of(variant)}.json" for stem in STEMS]
    return next((folder / n for n in names if (folder / n).is_file()), None)


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    whole = isinstance(names, dict) and all(isinstance(n, str) for n in names.values())
    if not names or not whole:
        raise _damaged(index, "no weight_map")
    # A name of the index must stay a file beside it.
    files = [index.parent / Path(str(name)).name for name in sorted({*names.values()})]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(
            f"{len(missing)} of {len(files)} shards of {index} are missing",
            got=f"no {', '.join(missing[:10])}",
            wanted="every file that the index names",
            way_out="download the model again",
        )
    return files


def weight_names(variant: str | None, judge: bool) -> str:
    """What the weight file may be called, in words; arguments as `weight_files`."""
    stems = STEMS[1:] if judge else STEMS  # transformers wrote it, not diffusers
    return " or ".join(f"{stem}{end_of(variant)}.safetensors" for stem in stems)


def _no_weights(folder: Path, variant: str | None, judge: bool) -> UserError:
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    foreign = sorted(file.name for kind in FOREIGN for file in folder.glob(kind))
    way_out = f"download them; where the repository has other formats only: {CONVERT}"
    if others and judge:
        way_out = f"put {weight_names(variant, judge)} of the model beside them"
    elif others:
        way_out = "choose another variant (config.model.variant)"
    elif foreign:
        way_out = CONVERT
    return UserError(
        f"{folder} has no safetensors weights"
        + (f" of the variant {variant!r}" if variant else ""),
        got=", ".join((others or foreign)[:10]) or "no weights at all",
        wanted=weight_names(variant, judge),
        way_out=way_out,
    )


def read_tensors(
    folder: Path, variant: str | None = None, judge: bool = False
) -> dict[str, np.ndarray]:
    """The weights of a component, floats widened to float32.

    Args:
      folder: of the component; one file, or shards with an index.
      variant: None or "" for the plain files, else for example "fp16".
      judge: see `weight_files`.

    Returns:
      torch name -> array.

    Raises:
      UserError: files that are missing, torn or in other formats, or hold NaN.
    """
    tensors: dict[str, np.ndarray] = {}
    for file in weight_files(folder, variant, judge):
        tensors.update(_read_file(file, lambda c, name: _widen(c.get_tensor(name))))
    # A network of them draws black pictures, which a judge would score like any others.
    if broken := sorted(n for n, t in tensors.items() if not np.isfinite(t).all()):
        names = ", ".join(broken[:10])
        raise _damaged(Path(folder), f"{len(broken)} tensors not finite: {names}")
    if index := index_of(Path(folder), variant):
        lost = sorted(read_json(index)["weight_map"].keys() - tensors.keys())
        if lost:
            raise _damaged(index, f"no shard holds {', '.join(lost[:10])}")
    return tensors


def fingerprint(folders: Sequence[Path], variant: str | None = None) -> str:
    """A name of the weights of some components: 16 hexadecimal digits.

    Of files above WHOLE_BYTES only size, header and SAMPLES places are read, so that a
    start does not wait for gigabytes; two fine-tunings of one model still differ there.

    Raises:
      UserError: as `weight_files`.
    """
    digest = hashlib.sha256()
    for file in [f for folder in folders for f in weight_files(folder, variant)]:
        size = file.stat().st_size
        digest.update(f"{file.parent.name}/{size};".encode())
        with file.open("rb") as content:
            if size <= WHOLE_BYTES:
                hashed = hashlib.file_digest(content, "sha256")
                digest.update(hashed.digest())
                continue
            for place in range(SAMPLES):
                content.seek(place * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def tensor_shapes(
    folder: Path, variant: str | None = None
) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a component, from the headers of its files.

    Arguments and errors as `read_tensors`.
    """
    files = weight_files(folder, variant)
    read = lambda content, name: tuple(content.get_slice(name).get_shape())  # noqa: E731
    return {name: shape for file in files for name, shape in _read_file(file, read)}


def _read_file(file: Path, read: Callable[[Any, str], Any]) -> Iterator[tuple]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as content:
            for name in content.keys():  # noqa: SIM118 (no mapping)
                yield name, read(content, name)
    except (SafetensorError, OSError, ValueError, TypeError) as e:
        raise _damaged(file, str(e)) from e


def _widen(tensor: np.ndarray) -> np.ndarray:
    """Any kind of float to float32; bfloat16 has no kind of NumPy's own."""
    exact = tensor.dtype.kind in "biu"
    return tensor if exact else tensor.astype(np.float32, copy=False)


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(
        f"{file} is damaged",
        got=reason,
        wanted="a complete file",
        way_out="download it again; an interrupted download leaves such files",
    )


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] = {}
) -> None:
    """Writes one safetensors file, whole or not at all.

    Args:
      path: of a file that does not exist yet.
      tensors: torch name -> array.
      metadata: further text for the header.

    Raises:
      UserError: the file exists, or can not be written.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    if path.exists():
        raise exists(path)
    # The format stores memory as it lies: a transposed view would be written wrong.
    whole = {name: np.asarray(t, order="C") for name, t in tensors.items()}
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(whole, part, metadata={"format": "pt", **metadata})
        os.replace(part, path)
    # A full disk is an exception of the library's own.
    except Exception as e:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(
            f"{path} can not be written",
            got=str(e),
            wanted="a folder that can be written, with enough room",
            way_out="free some space, or choose another folder",
        ) from e


def exists(path: Path) -> UserError:
    """The error for a target that is already there: nothing is overwritten."""
    return UserError(
        f"{path} is already there",
        got="an existing file or folder",
        wanted="a new one",
        way_out="move it away, or choose another target",
    )
