"""The embedded text-to-emoji pipeline: a vocabulary, a DiT and pixels in [-1, 1]."""

import difflib
import hashlib
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, UInt8

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Cond, Params, Pipeline
from ddrl_jax.models.denoiser import make_denoiser
from ddrl_jax.models.dit import PRECISE, DiT
from ddrl_jax.sharding import table

ASSETS = Path(__file__).parent.parent / "assets"
BASE = ASSETS / "emoji_base.npz"
BASE_HEADS = 6  # those of configs/emoji_pretrain.py: the file is older than its comment
HEADS = b"ddrl_jax heads=%b"  # the comment of an archive of weights
LENGTH = 6  # words of a prompt; the longest caption has five
# What reading an empty, torn or foreign file in place of an .npz raises.
DAMAGE = (OSError, ValueError, EOFError, TypeError, IndexError)
DAMAGE += (zipfile.BadZipFile, zlib.error)


def read_vocabulary(path: Path = ASSETS / "emoji" / "words.txt") -> dict[str, int]:
    """Word -> token id, from 1; id 0 is padding."""
    words = path.read_text(encoding="utf-8").split()
    return {word: index + 1 for index, word in enumerate(words)}


def tokenize(
    prompts: Sequence[str], vocabulary: dict[str, int]
) -> Int[np.ndarray, "b l"]:
    """Token ids of prompts, padded with 0.

    Raises:
      UserError: an unknown word (near ones are listed), an empty or too long prompt.
    """
    ids = np.zeros((len(prompts), LENGTH), np.int32)
    for row, prompt in enumerate(prompts):
        words = prompt.lower().split()
        if not 1 <= len(words) <= LENGTH:
            raise UserError(
                f"the prompt {prompt!r} can not be read",
                got=f"{len(words)} words",
                wanted=f"1 to {LENGTH} words",
                way_out="shorten the prompt, or drop the empty line",
            )
        for column, word in enumerate(words):
            if word not in vocabulary:
                near = difflib.get_close_matches(word, vocabulary, n=5, cutoff=0.5)
                raise UserError(
                    f"the prompt {prompt!r} has a word this model does not know",
                    got=repr(word),
                    wanted="words of the captions" + f" (near: {', '.join(near)})"
                    if near
                    else f"one of the {len(vocabulary)} words of the captions",
                    way_out="use other words; all are in "
                    "ddrl_jax/assets/emoji/words.txt",
                )
            ids[row, column] = vocabulary[word]
    return ids


def decode(x0: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """Pixels in [-1, 1] to uint8, rounded to nearest."""
    return jnp.clip(jnp.round((x0 + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def read_params(path: Path) -> Params:
    """Reads a nested dict of float32 arrays from an .npz with '/' in its names.

    Raises:
      UserError: no such file, or one that is not such an archive.
    """
    return _read(path, lambda file, name: np.asarray(file[name], np.float32))


def read_shapes(path: Path) -> Params:
    """The tree of `read_params` as shapes, from the headers alone."""
    return _read(path, _header)


def read_heads(path: Path) -> int | None:
    """Attention heads of the network of an .npz; None where the file does not say.

    No shape tells them, and with others the same weights are another function.
    """
    with zipfile.ZipFile(path) as archive:
        found = re.fullmatch(HEADS % rb"(\d+)", archive.comment)
    return int(found[1]) if found else None


def _header(file: Any, name: str) -> jax.ShapeDtypeStruct:
    with file.zip.open(f"{name}.npy") as member:
        np.lib.format.read_magic(member)
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    return jax.ShapeDtypeStruct(shape, dtype)


def _read(path: Path, leaf: Callable[[Any, str], Any]) -> Params:
    try:
        with np.load(path, allow_pickle=False) as file:
            flat = {name: leaf(file, name) for name in file.files}
        if not flat:
            raise ValueError("the archive is empty")
        return traverse_util.unflatten_dict(flat, sep="/")
    except DAMAGE as e:
        raise UserError(
            f"the weights {path} can not be read ({e})",
            got="a file" if path.is_file() else "no such file",
            wanted="an .npz written by --mode=export",
            way_out="set config.model.init to 'assets', 'random' or such a file",
        ) from e


def write_params(
    path: Path, params: Params, dtype: str = "float16", heads: int | None = None
) -> None:
    """Writes a nested dict of arrays as a compressed .npz, by default in half.

    Args:
      path: of the file.
      params: the tree.
      dtype: of the arrays in the file.
      heads: attention heads of the network, for `read_heads`. They stand in the
        archive's comment, which who reads the arrays alone does not meet.

    Raises:
      UserError: a value is not finite, or too large for `dtype`; nothing is written.
    """
    flat = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    with np.errstate(over="ignore"):
        arrays: dict[str, Any] = {k: np.asarray(v, dtype) for k, v in flat.items()}
    bad = sorted(k for k, v in arrays.items() if not np.isfinite(v).all())
    if bad:
        raise UserError(
            f"the weights can not be written as {dtype}",
            got=f"{bad[0]} has values that are not finite or beyond its range",
            wanted="finite numbers",
            way_out="export an earlier checkpoint",
        )
    draft = path.with_name(path.name + ".part")
    try:
        with draft.open("w+b") as file:  # by its path NumPy would add another ".npz"
            np.savez_compressed(file, **arrays)
            _note_heads(file, heads)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _note_heads(file: Any, heads: int | None) -> None:
    if heads is not None:
        with zipfile.ZipFile(file, "a") as archive:
            archive.comment = HEADS % str(heads).encode()


def check_params(params: Params, shapes: Params, source: Path) -> None:
    """Raises UserError unless a tree has exactly the leaves and shapes wanted."""
    got, want = _leaf_shapes(params), _leaf_shapes(shapes)
    if got == want:
        return
    names = sorted(k for k in got.keys() | want.keys() if got.get(k) != want.get(k))
    first = names[0]
    raise UserError(
        f"the weights {source} belong to another model ({len(names)} leaves differ)",
        got=f"{first}: {got.get(first, 'missing')}",
        wanted=f"{first}: {want.get(first, 'no such leaf')}",
        way_out="set config.model width, depth, heads, patch and image_size to those "
        "of the weights, or choose other weights with config.model.init",
    )


def _check_heads(heads: int, path: Path) -> None:
    told = BASE_HEADS if path == BASE else read_heads(path)  # an older file is silent
    if told in (None, heads):
        return
    raise UserError(
        f"the weights {path} were trained with other heads",
        got=f"model.heads {heads}",
        wanted=f"{told} heads",
        way_out=f"--config.model.heads={told}, or choose other weights with "
        "config.model.init",
    )


def _leaf_shapes(tree: Params) -> dict[str, tuple[int, ...]]:
    flat: Any = traverse_util.flatten_dict(tree, sep="/").items()
    return {name: leaf.shape for name, leaf in flat}


def emoji_pipeline(config, mesh: Mesh | None = None) -> Pipeline:
    """Builds the pipeline of config.model and config.lora; loads no weight yet.

    Args:
      config: the whole configuration.
      mesh: on which the network will run; None is one device.

    Raises:
      UserError: the starting weights are missing or of another model.
    """
    model, vocabulary = config.model, read_vocabulary()
    network = DiT(
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        patch=model.patch,
        vocabulary=len(vocabulary) + 1,
        length=LENGTH,
        dtype=model.dtype,
        remat=model.remat,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        impl=model.attention,
        mesh=mesh,
    )
    shape = (model.image_size, model.image_size, 3)
    example = (jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros((1, LENGTH), jnp.int32))
    made = make_denoiser(network, example, table(config.sharding))
    load, fingerprint = _starting_weights(model, made.shapes["params"])
    return Pipeline(
        encode=lambda prompts: Cond(jnp.asarray(tokenize(prompts, vocabulary))),
        uncond=Cond(jnp.zeros((1, LENGTH), jnp.int32)),
        init=made.init,
        denoise=made.denoise,
        decode=Partial(decode),
        axes=made.axes,
        latent_shape=shape,
        prediction="velocity",
        load=load,
        fingerprint=fingerprint,
        precise=PRECISE,
    )


def _starting_weights(model: Any, shapes: Params):
    """(load, fingerprint) of config.model.init."""
    if model.init == "random":
        return (lambda: None), "random"
    path = BASE if model.init == "assets" else Path(model.init)
    check_params(read_shapes(path), shapes, path)  # before anything is loaded
    _check_heads(model.heads, path)

    def load() -> Params:
        params = read_params(path)
        check_params(params, shapes, path)
        return params

    return load, hashlib.sha256(path.read_bytes()).hexdigest()[:16]
