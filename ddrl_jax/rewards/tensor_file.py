"""Single files of tensors: safetensors, and torch.save without running its pickle.

What torch.save writes is a zip: the raw bytes of each storage, and a pickle that says
which tensor lies where. A pickle can call any function it can name, so this one may
name only the few things a state dict is made of, each of which stands for a plain
record here.
"""

import io
import math
import pickle
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from ddrl_jax.errors import UserError

LARGEST_PICKLE = 1 << 26  # bytes: names and shapes of a state dict are kilobytes
DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
DAMAGE = (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, EOFError)
DAMAGE += (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError)
DAMAGE += (OSError, NotImplementedError, MemoryError, OverflowError, RuntimeError)


class _Refused(Exception):
    """The pickle names something that a state dict has no use for."""


class _Storage(NamedTuple):
    kind: str
    key: str


class _Tensor(NamedTuple):
    """Where a tensor lies; nothing of it is read while the pickle runs."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Call:
    """Stands for one of torch's functions; carries no state a pickle could change."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise _Refused("a pickle that changes what it calls")


class _RebuildTensor(_Call):
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any):
        return _Tensor(storage, offset, tuple(shape), tuple(stride))


class _RebuildParameter(_Call):
    __slots__ = ()

    def __call__(self, tensor: Any, *_: Any):
        return tensor


class _Unpickler(pickle.Unpickler):
    """Resolves the names of a state dict and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _RebuildTensor()
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _RebuildParameter()
        if module == "torch" and name in DTYPES:
            return name
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        what, kind, key, _, _ = pid
        if what != "storage" or kind not in DTYPES or not isinstance(key, str):
            raise _Refused(f"a storage {pid!r}")
        return _Storage(kind, key)


def read_tensor_file(path: Path) -> dict[str, Any]:
    """The dict in a .safetensors, .pth or .pt file, floats as they are stored.

    Raises:
      UserError: no such file, damaged, or a pickle that asks for more than tensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return read_torch_file(path)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise _unreadable(path, "no such file")
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as e:
        raise _unreadable(path, f"{type(e).__name__}: {e}") from e


def read_torch_file(path: Path) -> dict[str, Any]:
    """What torch.save wrote, with NumPy arrays for its tensors.

    Args:
      path: a .pth or .pt of torch 1.6 or later.

    Returns:
      The dict in it: tensors as arrays (bfloat16 as float32), nested dicts, lists,
      numbers and text as they are.

    Raises:
      UserError: no such file, damaged, of the older format, not a dict of tensors, or
        one whose pickle names anything else: nothing it names is ever imported.
    """
    path = Path(path)
    if not path.is_file():
        raise _unreadable(path, "a folder" if path.is_dir() else "no such file")
    if not zipfile.is_zipfile(path):
        raise _unreadable(path, "not the zip that torch.save writes since torch 1.6")
    try:
        with zipfile.ZipFile(path) as archive:
            found = _read(archive)
    except _Refused as e:
        raise UserError(
            f"{path} holds more than tensors and is not read",
            got=f"its pickle asks for {e}",
            wanted="tensors, dicts, lists, numbers and text: no code is run",
            way_out="where you trust the file, load it in torch once and save the"
            " tensors alone with safetensors.torch.save_file",
        ) from None
    except DAMAGE as e:
        raise _unreadable(path, f"{type(e).__name__}: {e}") from e
    if not isinstance(found, dict):
        raise _unreadable(path, f"a {type(found).__name__} and no dict")
    return found


def _read(archive: zipfile.ZipFile) -> Any:
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise ValueError(f"{len(names)} pickles instead of 1")
    root = names[0].removesuffix("data.pkl")
    if root + "byteorder" in archive.namelist():
        order = _member(archive, root + "byteorder", 16)
        if order != b"little":
            raise ValueError(f"byte order {order!r}")
    plan = _Unpickler(io.BytesIO(_member(archive, names[0], LARGEST_PICKLE))).load()
    storages: dict[_Storage, np.ndarray] = {}

    def filled(node: Any) -> Any:
        if type(node) is _Tensor:
            return _array(archive, root, storages, node)
        if isinstance(node, dict):
            return {key: filled(value) for key, value in node.items()}
        if type(node) in (list, tuple):
            return type(node)(filled(value) for value in node)
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise _Refused(f"a {type(node).__name__}")

    return filled(plan)


def _member(archive: zipfile.ZipFile, name: str, limit: int | None = None) -> bytes:
    """The bytes of a member; torch stores them as they are, so nothing can swell."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    if limit is not None and entry.file_size > limit:
        raise ValueError(f"{name} has {entry.file_size} bytes, at most {limit}")
    return archive.read(entry)


def _array(
    archive: zipfile.ZipFile,
    root: str,
    storages: dict[_Storage, np.ndarray],
    tensor: _Tensor,
) -> Shaped[np.ndarray, "..."]:
    storage, offset, shape, stride = tensor
    if type(storage) is not _Storage:
        raise _Refused("a tensor without storage")
    if storage not in storages:
        raw = _member(archive, f"{root}data/{storage.key}")
        storages[storage] = np.frombuffer(raw, DTYPES[storage.kind])
    flat = storages[storage]
    numbers = (offset, *shape, *stride)
    if not all(type(n) is int and n >= 0 for n in numbers) or len(shape) != len(stride):
        raise ValueError(f"a tensor of shape {shape}, stride {stride}")
    # Strides of a file are not to be believed: no byte beside the storage is read, and
    # no number is used twice, so that a few bytes can not become gigabytes.
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    count = math.prod(shape)
    if count and (last >= flat.size or count > flat.size):
        raise ValueError(f"a tensor of {count} numbers in a storage of {flat.size}")
    first = flat[offset:] if count else flat
    steps = tuple(s * flat.itemsize for s in stride)
    view = np.lib.stride_tricks.as_strided(first, shape, steps)
    return np.array(view, np.float32 if flat.dtype == ml_dtypes.bfloat16 else None)


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} can not be read",
        got=reason,
        wanted="a whole .safetensors, or .pth or .pt of torch.save since torch 1.6",
        way_out="download it again, or load it in torch once and save its tensors with"
        " safetensors.torch.save_file",
    )
