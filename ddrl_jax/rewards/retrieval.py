"""The held-out judge: which of all captions does a picture show, if any?

A small convolutional network of our own over 256 captions and one reject class. It
was trained on the data, never on samples, with blobs, blurred and shuffled pictures
as the reject class (assets/build_judge.py), so that the right colour in the right
outline is not enough. It is never a training reward in the shipped experiments.
"""

import difflib
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Params

JUDGE = Path(__file__).parent.parent / "assets" / "judge.npz"
SIZE = 32  # pixels of a picture the judge reads
CHUNK = 64  # pictures a call: one shape, so it compiles once
WIDTHS = (48, 96, 192)  # channels at 16, 8 and 4 pixels; about 0.7 M parameters
DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, zlib.error)
NORM_EPSILON = 1e-6  # a channel vector of zeros stays zero instead of NaN
# name: (kernel, rows a kernel position, columns); see `judge_features` for the order
LAYERS = {
    "stem": (3, 12, WIDTHS[0]),
    "block0": (3, WIDTHS[0], WIDTHS[0]),
    "down1": (1, 4 * WIDTHS[0], WIDTHS[1]),
    "block1": (3, WIDTHS[1], WIDTHS[1]),
    "block2": (3, WIDTHS[1], WIDTHS[1]),
    "down2": (1, 4 * WIDTHS[1], WIDTHS[2]),
    "block3": (3, WIDTHS[2], WIDTHS[2]),
}


class Judge(NamedTuple):
    """A trained judge; both callables take uint8 [b size size 3] of any batch size.

    Attributes:
      captions: all captions, in the order of the logits.
      logits: pictures -> float32 [b, captions + 1]; the last class is "none of them".
      features: pictures -> float32 [b d], for held-out diversity.
      size: pixels of a side of the pictures that it reads.
    """

    captions: tuple[str, ...]
    logits: Callable[[UInt8[np.ndarray, "b h w c"]], Float[np.ndarray, "b k"]]
    features: Callable[[UInt8[np.ndarray, "b h w c"]], Float[np.ndarray, "b d"]]
    size: int = SIZE


def init_judge(key: Key[Array, ""], classes: int) -> Params:
    """Returns random weights for a judge of so many classes (reject included)."""
    params = {}
    for i, (name, (kernel, rows, columns)) in enumerate(LAYERS.items()):
        shape = (kernel, kernel, rows, columns)
        weight = jax.random.normal(jax.random.fold_in(key, i), shape)
        params[name] = {
            "kernel": weight * (kernel * kernel * rows) ** -0.5,
            "bias": jnp.zeros(columns),
            "scale": jnp.ones(rows),
        }
    head = jax.random.normal(jax.random.fold_in(key, len(LAYERS)), (WIDTHS[2], classes))
    params["head"] = {"kernel": head * WIDTHS[2] ** -0.5, "bias": jnp.zeros(classes)}
    params["final"] = {"scale": jnp.ones(WIDTHS[2])}
    return params


def _norm(x: Array, scale: Array) -> Array:
    """Root-mean-square normalisation over the channels."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + NORM_EPSILON) * scale


def _conv(x: Array, layer: Params) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x, layer["kernel"], (1, 1), "SAME", dimension_numbers=numbers
    )
    return y + layer["bias"]


def _halve(x: Array) -> Array:
    """Moves 2x2 pixels into the channels."""
    n, h, w, c = x.shape
    cells = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return cells.reshape(n, h // 2, w // 2, 4 * c)


def judge_features(params: Params, x: Float[Array, "b 32 32 3"]) -> Float[Array, "b d"]:
    """Returns what the judge sees of pictures with values in [-1, 1]."""

    def residual(x: Array, name: str) -> Array:
        layer = params[name]
        return x + _conv(jax.nn.relu(_norm(x, layer["scale"])), layer)

    def down(x: Array, name: str) -> Array:
        layer = params[name]
        return _conv(_norm(_halve(x), layer["scale"]), layer)

    # the page is white (1): measured from there, padding and background are both 0
    x = _conv(_halve(x - 1.0), params["stem"])
    x = down(residual(x, "block0"), "down1")
    x = down(residual(residual(x, "block1"), "block2"), "down2")
    x = residual(x, "block3")
    return jax.nn.relu(_norm(x, params["final"]["scale"])).mean((1, 2))


def judge_logits(params: Params, x: Float[Array, "b 32 32 3"]) -> Float[Array, "b k"]:
    """Returns one logit a caption and a last one for the reject class."""
    head = params["head"]
    return judge_features(params, x) @ head["kernel"] + head["bias"]


def _check_pictures(shape: tuple[int, ...], dtype: Any = np.uint8) -> None:
    """Refuses pictures [h w c] that the judge was not trained on."""
    if dtype != np.uint8 or shape != (SIZE, SIZE, 3):
        raise UserError(
            "the retrieval judge can not read these pictures",
            got=f"{np.dtype(dtype)} {list(shape)}",
            wanted=f"uint8 {[SIZE, SIZE, 3]}",
            way_out="use it with the emoji model and model.image_size "
            f"{SIZE}, or take 'retrieval' and 'retrieval_log_prob' out of"
            " --config.rewards.heldout and --config.rewards.weights",
        )


def _in_chunks(
    function: Callable[[np.ndarray], Array], images: UInt8[np.ndarray, "b h w c"]
) -> np.ndarray:
    """Applies a jitted function to chunks of one shape; the padding is cut off."""
    _check_pictures(images.shape[1:], images.dtype)
    rows = []
    for start in range(0, max(len(images), 1), CHUNK):  # once for an empty batch too
        chunk = images[start : start + CHUNK]
        missing = CHUNK - len(chunk)
        padded = np.pad(chunk, ((0, missing), (0, 0), (0, 0), (0, 0)))
        rows.append(np.asarray(function(padded))[: len(chunk)])
    return np.concatenate(rows)


def load_judge(path: Path = JUDGE) -> Judge:
    """Reads a judge written by assets/build_judge.py.

    Raises:
      UserError: the file is missing, damaged or of another network.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            captions = tuple(str(caption) for caption in file["captions"])
            params: dict = {}
            for name in set(file.files) - {"captions"}:
                layer, leaf = name.split("/")
                params.setdefault(layer, {})[leaf] = jnp.asarray(file[name], "float32")
        wanted = jax.eval_shape(
            lambda: init_judge(jax.random.key(0), len(captions) + 1)
        )
        jax.tree.map(lambda a, b: a.reshape(b.shape), params, wanted)
    except DAMAGE as e:
        raise UserError(
            f"the judge {path} can not be read ({type(e).__name__}: {e})",
            got=f"{'a file' if Path(path).is_file() else 'nothing'} at {path}",
            wanted="the .npz that ddrl_jax/assets/build_judge.py writes",
            way_out="reinstall ddrl_jax, or run python -m ddrl_jax.assets.build_judge",
        ) from e

    def scaled(x: Any) -> Array:
        return jnp.asarray(x, jnp.float32) / 127.5 - 1.0

    # A judge must not depend on the fast modes of a device.
    @jax.jit
    def logits(x: Any) -> Array:
        with jax.default_matmul_precision("highest"):
            return judge_logits(params, scaled(x))

    @jax.jit
    def features(x: Any) -> Array:
        with jax.default_matmul_precision("highest"):
            return judge_features(params, scaled(x))

    return Judge(captions, partial(_in_chunks, logits), partial(_in_chunks, features))


def _classes(judge: Judge, prompts: Sequence[str]) -> Int[np.ndarray, " b"]:
    """Returns the class of each prompt."""
    index = {caption: i for i, caption in enumerate(judge.captions)}
    for prompt in prompts:
        if prompt not in index:
            near = difflib.get_close_matches(prompt, judge.captions, n=3, cutoff=0.4)
            raise UserError(
                "the retrieval judge does not know a prompt",
                got=repr(prompt),
                wanted=f"one of its {len(index)} captions, near: {', '.join(near)}"
                if near
                else f"one of its {len(index)} captions",
                way_out="use captions of the embedded emoji as prompts, or take"
                " 'retrieval' out of --config.rewards.heldout",
            )
    return np.array([index[prompt] for prompt in prompts], np.int32)


class Retrieval(NamedTuple):
    """A Reward: 1 if the prompt wins among all captions and the reject.

    Attributes:
      judge: see `load_judge`.
    """

    judge: Judge

    def __call__(
        self, images: UInt8[np.ndarray, "b h w c"], prompts: Sequence[str]
    ) -> Float[np.ndarray, " b"]:
        """Returns 1 or 0 for each picture."""
        wanted = _classes(self.judge, prompts)
        return (self.judge.logits(images).argmax(-1) == wanted).astype(np.float32)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises UserError unless the judge knows every prompt."""
        _classes(self.judge, prompts)

    def check_pictures(self, shape: tuple[int, ...]) -> None:
        """Raises UserError unless the judge reads pictures of this shape [h w c]."""
        _check_pictures(shape)


class RetrievalLogProb(NamedTuple):
    """A Reward: log p(prompt | picture), a smoother form of `Retrieval`.

    Attributes:
      judge: see `load_judge`.
    """

    judge: Judge

    def __call__(
        self, images: UInt8[np.ndarray, "b h w c"], prompts: Sequence[str]
    ) -> Float[np.ndarray, " b"]:
        """Returns the log-probability for each picture."""
        wanted = _classes(self.judge, prompts)
        logits = self.judge.logits(images).astype(np.float64)
        high = logits.max(-1, keepdims=True)
        total = high[:, 0] + np.log(np.exp(logits - high).sum(-1))
        return (logits[np.arange(len(wanted)), wanted] - total).astype(np.float32)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises UserError unless the judge knows every prompt."""
        _classes(self.judge, prompts)

    def check_pictures(self, shape: tuple[int, ...]) -> None:
        """Raises UserError unless the judge reads pictures of this shape [h w c]."""
        _check_pictures(shape)
