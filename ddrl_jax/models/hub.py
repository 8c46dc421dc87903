"""Where a model lies: a folder or file here, or one of the Hugging Face hub."""

import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ddrl_jax.errors import UserError
from ddrl_jax.models.folder import (
    CONVERT,
    FOREIGN,
    STEMS,
    end_of,
    find_weights,
    weight_names,
)

REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
PLACE = re.compile(rf"({REPO_ID.pattern}):([\w][\w./+-]*)")  # owner/name:file
SMALL = ("*.json", "*.txt")
UNUSED = ("safety_checker/*", "feature_extractor/*")  # parts nobody asks for
ROOT = "."  # the part that is the repository itself, as of a CLIP
# name.VARIANT, name.VARIANT-SHARD, or as older programs wrote it name-SHARD.VARIANT
SAFE = re.compile(
    rf"(?:{'|'.join(STEMS)})(?:\.(\w+))?(?:-\d{{5}}-of-\d{{5}}(?:\.(\w+))?)?\.safetensors"
)


def resolve(
    path_or_repo_id: str,
    revision: str = "main",
    variant: str = "",
    parts: Sequence[str] = (),
    key: str = "",
) -> Path:
    """The folder of a model: a local one as it is, a hub repository downloaded.

    Of a repository come the JSON and text files, and the safetensors of one variant
    where weights are wanted.

    Args:
      path_or_repo_id: a folder, or "owner/name" on the hub. A folder wins.
      revision: branch, tag or commit of the repository.
      variant: "" or for example "fp16".
      parts: folders inside it whose weights are wanted; ROOT for its own.
      key: of the configuration that names the model, for messages.

    Raises:
      UserError: no such folder or repository, no network or no access, or a repository
        without these weights.
    """
    path = Path(path_or_repo_id)
    if path.is_dir():
        return path
    if path.is_file():
        raise _single_file(path, key)
    if not REPO_ID.fullmatch(path_or_repo_id):
        raise UserError(
            f"there is no folder {path_or_repo_id}",
            got="no such folder, and no repository id either",
            wanted=f"{_layout(key)}, or 'owner/name' on the hub",
            way_out="correct the path, or first try the program with the :smoke "
            "variant of the config, which needs no weights",
        )
    patterns = [*SMALL, *(_weights(variant, ROOT in parts) if parts else ())]
    repository = (path_or_repo_id, revision)
    wanted = _Wanted(
        f"model {path_or_repo_id}", revision, _command(*repository, patterns),
        "FOLDER", key,
    )  # fmt: skip
    found = _asked(wanted, lambda: Path(_snapshot(*repository, patterns)))
    lacking = [part for part in parts if not find_weights(found / part, variant)]
    if lacking:
        files = _asked(wanted, lambda: _files(*repository))
        raise _other_weights(repository, variant, lacking, files, key)
    return found


def resolve_file(path_or_place: str, key: str = "") -> Path:
    """A single file: a local path as it is, or "owner/name:file" of the hub.

    Args:
      path_or_place: a file here wins.
      key: of the configuration that names the file, for messages.

    Raises:
      UserError: no such repository or file, no network or no access.
    """
    path, place = Path(path_or_place), PLACE.fullmatch(path_or_place)
    if path.is_file() or not place:
        return path
    repo_id, _, file = path_or_place.partition(":")
    command = ["hf", "download", repo_id, file, "--local-dir", "FOLDER"]
    wanted = _Wanted(f"file {path_or_place}", "main", command, f"FOLDER/{file}", key)

    def download() -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(repo_id, file)

    return Path(_asked(wanted, download))


def _of_a_judge(key: str) -> bool:
    """Whether a key names a CLIP, not a pipeline, and none beside it a variant."""
    return key.startswith("rewards.")


def _layout(key: str) -> str:
    """The kind of folder that a key of the configuration names."""
    if _of_a_judge(key):
        return "a folder of a CLIP: config.json, model.safetensors, tokenizer.json, ..."
    return "a folder in the diffusers layout: model_index.json, unet/, ..."


def _single_file(path: Path, key: str) -> UserError:
    convert = "convert it once where torch is installed: StableDiffusionPipeline"
    convert += f".from_single_file({str(path)!r}).save_pretrained('FOLDER')"
    beside = "name the folder that holds it together with its other files, as"
    beside += f" transformers saves them: --config.{key}=FOLDER"
    return UserError(
        f"the model {path} is a single file",
        got="a file",
        wanted=_layout(key),
        way_out=beside if _of_a_judge(key) else convert,
    )


class _Wanted(NamedTuple):
    """Something of the hub, as messages name it.

    Attributes:
      what: its kind and name.
      revision: branch, tag or commit.
      command: that downloads it on another machine.
      place: where it then lies.
      key: of the configuration that names it, or "".
    """

    what: str
    revision: str
    command: Sequence[str]
    place: str
    key: str


def _weights(variant: str, root: bool) -> list[str]:
    """Patterns of the weight files of a variant, whole or in shards.

    In the repository itself only transformers' own name counts: open_clip, and those
    who put a pipeline in one file, have theirs beside it.
    """
    stem, shard = "model" if root else "*/*model", "-?????-of-?????"
    end = end_of(variant)
    kinds = [f"{stem}{end}.safetensors", f"{stem}{end}{shard}.safetensors"]
    return kinds + ([f"{stem}{shard}{end}.safetensors"] if variant else [])


def _command(repo_id: str, revision: str, patterns: Sequence[str]) -> list[str]:
    """The `hf` command for what `_snapshot` brings."""
    command = ["hf", "download", repo_id, "--revision", revision]
    command += [word for pattern in patterns for word in ("--include", pattern)]
    command += [word for pattern in UNUSED for word in ("--exclude", pattern)]
    return [*command, "--local-dir", "FOLDER"]


def _snapshot(repo_id: str, revision: str, patterns: list[str]) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(
        repo_id,
        revision=revision,
        allow_patterns=patterns,
        ignore_patterns=list(UNUSED),
    )


def _files(repo_id: str, revision: str) -> list[str]:
    from huggingface_hub import HfApi

    return HfApi().list_repo_files(repo_id, revision=revision)


def _asked(wanted: _Wanted, question: Callable[[], Any]) -> Any:
    """What the hub answers, or one error."""
    try:
        return question()
    # Five libraries under it raise as many families of exceptions, and each means the
    # same to the user.
    except Exception as e:
        raise _unreachable(wanted, e) from e


def _unreachable(wanted: _Wanted, cause: Exception) -> UserError:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    reason = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else ""
    reason = reason or f"{type(cause).__name__}: {str(cause).strip()}"
    return UserError(
        f"the {wanted.what} is not here and can not be downloaded "
        f"(revision {wanted.revision})",
        got=reason.splitlines()[0],
        wanted="a repository on the hub that this machine can reach and you may read",
        way_out=f"on a machine with access run `{shlex.join(wanted.command)}` (`hf auth"
        f" login` first if the repository asks for consent) and {_named(wanted)}; or "
        "try the program with the :smoke variant of the config, which needs no weights",
    )


def _named(wanted: _Wanted) -> str:
    if wanted.key:
        return f"set --config.{wanted.key}={wanted.place}"
    return f"name {wanted.place} in its place"


def _other_weights(
    repository: tuple[str, str],
    variant: str,
    parts: Sequence[str],
    files: Sequence[str],
    key: str,
) -> UserError:
    """Of a repository that was downloaded and has no weights of the wanted form."""
    found = sorted(file for file in files if _is_weights(file, parts))
    convert = CONVERT + (f", and set --config.{key}=FOLDER" if key else "")
    kinds = [{_variant(f) for f in found if str(Path(f).parent) == p} for p in parts]
    others = sorted(set.intersection(*kinds) - {None, variant})
    choose = f"choose the variant {' or '.join(map(repr, others))}"
    choose += " (config.model.variant)"
    judge = _of_a_judge(key)
    return UserError(
        f"{repository[0]} (revision {repository[1]}) has no safetensors weights"
        + (f" of the variant {variant!r}" if variant else "")
        + f" of {', '.join(parts)}".replace(f" of {ROOT}", ""),
        got=", ".join(found[:10]) or "no weights at all",
        wanted=weight_names(variant, judge),
        way_out=choose if others and not judge else convert,
    )


def _is_weights(file: str, parts: Sequence[str]) -> bool:
    kinds = ("*.safetensors", *FOREIGN)
    path = PurePosixPath(file)
    return str(path.parent) in parts and any(map(path.match, kinds))


def _variant(file: str) -> str | None:
    """The variant of a weight file of the hub, "" for a plain one; None for others."""
    found = SAFE.fullmatch(PurePosixPath(file).name)
    return (found[1] or found[2] or "") if found else None
