"""Trained weights in the formats of diffusers: a whole folder, or a LoRA file."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util

from ddrl_jax.errors import UserError
from ddrl_jax.file_tree import walk
from ddrl_jax.interfaces import Params
from ddrl_jax.models.convert import table, to_torch_names, torch_names
from ddrl_jax.models.folder import (
    FOREIGN,
    exists,
    index_of,
    read_json,
    tensor_shapes,
    weight_files,
    write_tensors,
)

DTYPES: Mapping[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
LORA_FILE = "pytorch_lora_weights.safetensors"  # what load_lora_weights looks for
INDEX = "model_index.json"
COPIED = (".json", ".txt", ".safetensors", ".md")
NEEDED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
FACTORS = {"a": "lora_A.weight", "b": "lora_B.weight"}


def write_pipeline(
    source_folder: Path,
    target: Path,
    unet_params: Params,
    dtype: str = "float32",
    variant: str = "",
) -> Path:
    """A copy of a pipeline folder with the weights of its UNet replaced.

    Shards and names of files stay those of the source, and the folder loads with the
    same `variant` as the source. Configurations are not touched, but model_index.json
    names only the components that are there: a download from the hub leaves out the
    safety checker.

    Args:
      source_folder: the folder the training started from.
      target: a folder that does not exist yet.
      unet_params: the trained UNet, without a LoRA beside it.
      dtype: of the written UNet: "float32", "float16" or "bfloat16".
      variant: of the weight files that were read.

    Returns:
      target.

    Raises:
      UserError: the target exists or can not be written, or the parameters are not
        those of the source's UNet.
    """
    source_folder, target = Path(source_folder), Path(target)
    if target.exists():
        raise exists(target)
    tensors = to_torch_names("unet", unet_params)
    _check_same_network(tensors, tensor_shapes(source_folder / "unet", variant))
    tensors = {name: _cast(name, t, dtype) for name, t in tensors.items()}
    files = weight_files(source_folder / "unet", variant)
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _copy_all_but_unet_weights(source_folder, part)
        _write_unet(source_folder / "unet", part / "unet", files, tensors, variant)
        _write_index(source_folder, part)
        part.rename(target)
    except OSError as e:
        raise UserError(
            f"{target} can not be written",
            got=str(e),
            wanted="a folder that can be written, with room for the whole pipeline",
            way_out="free some space, or choose another folder",
        ) from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def write_lora(path: Path, lora: Params, config: Any, bake_alpha: bool = True) -> Path:
    """A LoRA of the UNet as the file that `pipe.load_lora_weights` takes.

    The effective weight is W + (alpha / r) B A with A [r i] and B [o r]. The scale is
    multiplied into B, which means the same to every reader. It can stand in the header
    instead, as newer versions of diffusers and peft read it; diffusers 0.33 and
    programs that read no header take alpha = r.

    Args:
      path: a folder, in which the file gets the name that diffusers looks for, or the
        path of a new .safetensors file.
      lora: tree with leaves "a" [.. i r] and "b" [.. r o].
      config: config.lora, with rank and alpha (0 for the rank).
      bake_alpha: write B alpha / r and alpha = r; False: B, and alpha in the header.

    Returns:
      The path of the file.

    Raises:
      UserError: the file exists or can not be written, the tree is no such LoRA, or a
        number in it is not finite.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / LORA_FILE
    alpha = float(config.alpha or config.rank)
    scale = alpha / config.rank if bake_alpha else 1.0
    tensors, modules = _lora_tensors(lora, config.rank, scale)
    adapter = {
        "r": int(config.rank),
        "lora_alpha": float(config.rank) if bake_alpha else alpha,
        "target_modules": modules,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "lora_bias": False,
        "bias": "none",
    }
    header = {f"unet.{key}": value for key, value in adapter.items()}
    metadata = {"lora_adapter_metadata": json.dumps(header, indent=2, sort_keys=True)}
    write_tensors(file, tensors, metadata)
    return file


def _lora_tensors(
    lora: Params, rank: int, scale: float
) -> tuple[dict[str, np.ndarray], list[str]]:
    """(tensors by name, names of the modules they belong to)."""
    rows = table("unet")
    tensors, modules, wrong = {}, set(), []
    leaves: Any = traverse_util.flatten_dict(lora).items()
    for path, leaf in leaves:
        side = -1 if path[-1] == "a" else -2
        if path[-1] not in FACTORS or leaf.ndim < 2 or leaf.shape[side] != rank:
            wrong.append(f"{'/'.join(path)} {leaf.shape}")
            continue
        factor = np.asarray(leaf, np.float32) * (scale if path[-1] == "b" else 1.0)
        for name, part in torch_names(rows, (*path[:-1], "kernel"), factor):
            module = name.removesuffix(".weight")
            modules.add(module)
            key = f"unet.{module}.{FACTORS[path[-1]]}"
            tensors[key] = _cast(key, part.T, "float32")
    if wrong or not tensors:
        raise UserError(
            "the LoRA can not be written",
            got=", ".join(wrong[:10]) or "an empty tree",
            wanted=f"factors a [i {rank}] and b [{rank} o] beside layers of the UNet",
            way_out="set config.lora.rank to that of the run",
        )
    return tensors, sorted(modules)


def _cast(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    if dtype not in DTYPES:
        raise UserError(
            "a pipeline can not be written in this precision",
            got=repr(dtype),
            wanted=f"one of {', '.join(DTYPES)}",
            way_out="choose one of these",
        )
    with np.errstate(over="ignore"):
        cast = tensor.astype(DTYPES[dtype])
    if not np.isfinite(cast.astype(np.float32)).all():
        raise UserError(
            f"the weights can not be written as {dtype}",
            got=f"{name} has values that are not finite or beyond its range",
            wanted="finite numbers",
            way_out="export an earlier checkpoint"
            + (", or choose float32" if dtype != "float32" else ""),
        )
    return cast


def _check_same_network(
    tensors: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    got = {name: tensor.shape for name, tensor in tensors.items()}
    names = got.keys() | wanted.keys()
    if differ := sorted(n for n in names if got.get(n) != wanted.get(n)):
        shown = ", ".join(f"{n} {got.get(n, 'missing')}" for n in differ[:10])
        raise UserError(
            f"the trained weights are not those of the source's UNet ({len(differ)} "
            "tensors differ)",
            got=shown,
            wanted=", ".join(f"{n} {wanted.get(n, 'absent')}" for n in differ[:10]),
            way_out="export over the model that config.model.init named",
        )


def _copy_all_but_unet_weights(source: Path, target: Path) -> None:
    """JSON, text and safetensors; other formats and single-file copies stay behind."""
    for file in _files(source):
        inside = file.relative_to(source)
        weights = ".safetensors" in inside.name
        skip = weights and inside.parts[0] in ("unet", inside.name)
        hidden = any(part.startswith(".") for part in inside.parts)
        if skip or hidden or not file.is_file() or file.suffix not in COPIED:
            continue
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / inside)  # a link of the hub's cache is followed


def _files(source: Path) -> list[Path]:
    """All files below a folder, behind links too."""
    return sorted(Path(top) / name for top, _, files in walk(source) for name in files)


def _write_unet(
    source: Path,
    target: Path,
    files: list[Path],
    tensors: dict[str, np.ndarray],
    variant: str,
) -> None:
    """The tensors in the files of the source, with an index where it has one."""
    index = index_of(source, variant)
    home = dict.fromkeys(tensors, files[0].name)
    if index:
        # As they were read: a name of the index stays a file beside it.
        names: Mapping[str, str] = read_json(index)["weight_map"]
        home |= {tensor: Path(file).name for tensor, file in names.items()}
    for file in sorted(set(home.values())):
        part = {name: t for name, t in tensors.items() if home[name] == file}
        write_tensors(target / file, part)
    if index:
        total = sum(t.nbytes for t in tensors.values())
        content = {"metadata": {"total_size": total}, "weight_map": home}
        (target / index.name).write_text(json.dumps(content, indent=2, sort_keys=True))


def _write_index(source: Path, target: Path) -> None:
    """model_index.json with what was not copied marked as absent, as diffusers does."""
    index = read_json(source / INDEX)
    pairs = {name for name, value in index.items() if isinstance(value, list)}
    gone = {name for name in pairs if not _is_whole(source / name, target / name)}
    if lost := [n for n in NEEDED if not _is_whole(source / n, target / n)]:
        raise UserError(
            f"a copy of {source} would lack components",
            got=f"no weights or no files of {', '.join(lost)} that can be copied",
            wanted=f"{', '.join(NEEDED)}, as safetensors and JSON",
            way_out="download the whole model again",
        )
    if "feature_extractor" in gone:
        gone.add("safety_checker")  # sees through it
    index |= dict.fromkeys(gone & pairs, [None, None])
    if "safety_checker" in gone:
        index["requires_safety_checker"] = False
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _is_whole(source: Path, target: Path) -> bool:
    """A component whose weights, if it has any, were copied too."""
    weights = [*FOREIGN, "*.safetensors"]
    any_of = lambda folder, kinds: any(list(folder.glob(k)) for k in kinds)  # noqa: E731
    copied = any_of(target, weights) or not any_of(source, weights)
    return target.is_dir() and copied
