"""Names and layouts of PyTorch checkpoints to ours and back, by tables.

Each network file owns its table: KINDS says what a tensor is, STACKED which numbered
blocks become one leading axis, IGNORED which buffers of a file carry no weight. This
file only applies them, in both directions, and lists whatever they do not cover.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Params
from ddrl_jax.models.networks import network_file, network_shapes

LISTED = 10  # names shown of a longer list
# Words that end in a number of their own: `linear_1` is one module, not child 1 of
# `linear`.
WHOLE_WORDS = ("linear_1", "linear_2")
LEAF = {
    "linear": "kernel",
    "conv2d": "kernel",
    "norm": "scale",
    "embedding": "embedding",
    "bias": "bias",
}
# What older files call the same tensors: the attention of autoencoders before
# diffusers 0.17, and the wrapper around a lone CLIP tower before transformers 5.
RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "vae": (
        (r"(.*\.attentions\.\d+)\.query\.(.*)", r"\1.to_q.\2"),
        (r"(.*\.attentions\.\d+)\.key\.(.*)", r"\1.to_k.\2"),
        (r"(.*\.attentions\.\d+)\.value\.(.*)", r"\1.to_v.\2"),
        (r"(.*\.attentions\.\d+)\.proj_attn\.(.*)", r"\1.to_out.0.\2"),
    ),
    "clip_text": ((r"text_model\.(.*)", r"\1"),),
    "clip_vision": ((r"vision_model\.(.*)", r"\1"),),
}


class Table(NamedTuple):
    """How one network's tensors are named.

    Attributes:
      kinds: (regex of a torch name, kind); exactly one row matches each tensor.
      stacked: regexes of torch prefixes whose numbered children share one array.
      ignored: regexes of buffers that a file may hold and nobody needs.
      renamed: (regex, replacement) of names that older files use.
    """

    kinds: Sequence[tuple[str, str]]
    stacked: Sequence[str] = ()
    ignored: Sequence[str] = ()
    renamed: Sequence[tuple[str, str]] = ()

    def kind(self, torch_name: str) -> str | None:
        """The kind of a tensor; None where no row of the table knows it.

        Raises:
          ValueError: two rows match, which is a mistake in the table.
        """
        rows = [k for pattern, k in self.kinds if re.fullmatch(pattern, torch_name)]
        if len(rows) > 1:
            raise ValueError(f"{torch_name} matches {len(rows)} rows of KINDS: {rows}")
        return rows[0] if rows else None

    def current(self, torch_name: str) -> str:
        """The name that newer files give the same tensor."""
        for pattern, replacement in self.renamed:
            torch_name = re.sub(f"^{pattern}$", replacement, torch_name)
        return torch_name

    def is_ignored(self, torch_name: str) -> bool:
        """True for a buffer that is not read."""
        return any(re.fullmatch(pattern, torch_name) for pattern in self.ignored)

    def is_stacked(self, torch_prefix: str) -> bool:
        """True where the numbered children of a module share one array."""
        return any(re.fullmatch(pattern, torch_prefix) for pattern in self.stacked)


def table(name: str) -> Table:
    """The table of a network: "unet", "vae", "clip_text", "clip_vision" or "clip"."""
    module = network_file(name)
    return Table(module.KINDS, module.STACKED, module.IGNORED, RENAMED.get(name, ()))


def to_jax(name: str, tensors: Mapping[str, np.ndarray], config: Any = None) -> Params:
    """A PyTorch state dict as the parameter tree of our network.

    Args:
      name: of the network.
      tensors: torch name -> array in torch's layout.
      config: of the network, as its dataclass or the JSON of the checkpoint; with it
        the tree is held against the network, leaf by leaf.

    Returns:
      A nested dict of arrays with the dtypes of the input.

    Raises:
      UserError: a tensor no row of the table knows, a block missing from a stack, a
        leaf of the network that no tensor fills, or one of another shape.
    """
    params = apply_table(table(name), name, tensors)
    if config is not None:
        check_leaves(name, params, network_shapes(name, config))
    return params


def apply_table(rows: Table, name: str, tensors: Mapping[str, np.ndarray]) -> Params:
    """`to_jax` with a table at hand."""
    flat: dict[tuple[str, ...], Any] = {}
    stacks: dict[tuple[str, ...], dict[int, np.ndarray]] = {}
    unknown = []
    for original, tensor in tensors.items():
        torch_name = rows.current(original)
        if rows.is_ignored(original) or rows.is_ignored(torch_name):
            continue
        if (kind := rows.kind(torch_name)) is None:
            unknown.append(original)
            continue
        matrix = LEAF.get(kind) == "kernel"
        if matrix and tensor.ndim not in (2, 4):
            what = "that should be matrices or kernels"
            raise _left_over(name, [f"{original} {tensor.shape}"], what)
        array = _kernel_to_jax(tensor) if matrix else tensor
        path, index = _flax_path(rows, torch_name, kind)
        home = flat if index is None else stacks.setdefault(path, {})
        key = path if index is None else index
        if key in home:
            raise _left_over(name, [original], "a second tensor of the same name")
        home[key] = array  # type: ignore[index]
    if unknown:
        raise _left_over(name, unknown, "tensors that this network has no place for")
    flat.update({path: _stack(name, path, parts) for path, parts in stacks.items()})
    return traverse_util.unflatten_dict(flat)


def to_torch_names(
    name: str, params: Params, config: Any = None
) -> dict[str, np.ndarray]:
    """The inverse of `to_jax`: a parameter tree as a PyTorch state dict.

    Args:
      name: of the network.
      params: nested dict of arrays.
      config: as for `to_jax`.

    Returns:
      torch name -> contiguous array in torch's layout, same dtypes.

    Raises:
      UserError: a leaf that no row of the table knows, or, with a config, a tree that
        is not that of the network.
    """
    if config is not None:
        check_leaves(name, params, network_shapes(name, config))
    return invert_table(table(name), name, params)


def invert_table(rows: Table, name: str, params: Params) -> dict[str, np.ndarray]:
    """`to_torch_names` with a table at hand."""
    tensors: dict[str, np.ndarray] = {}
    unknown = []
    for path, leaf in traverse_util.flatten_dict(params).items():
        names = torch_names(rows, path, leaf)
        if any(rows.kind(torch_name) is None for torch_name, _ in names):
            unknown.append("/".join(path))
            continue
        for torch_name, part in names:
            kernel = path[-1] == "kernel"
            array = _kernel_to_torch(part) if kernel else np.asarray(part)
            # not ascontiguousarray, which gives a scalar an axis
            tensors[torch_name] = np.asarray(array, order="C")
    if unknown:
        raise _left_over(name, unknown, "leaves that the file format has no name for")
    return tensors


def check_leaves(name: str, params: Params, shapes: Params) -> None:
    """Raises UserError unless a tree has exactly the leaves and shapes of a network."""
    got, want = _leaf_shapes(params), _leaf_shapes(shapes)
    if missing := sorted(want.keys() - got.keys()):
        raise _left_over(name, missing, "leaves of the network that no tensor fills")
    if extra := sorted(got.keys() - want.keys()):
        raise _left_over(name, extra, "tensors that this configuration has no use for")
    differ = [f"{k}: {got[k]}, not {want[k]}" for k in want if got[k] != want[k]]
    if differ:
        raise _left_over(name, sorted(differ), "tensors of another shape")


def _flax_path(
    rows: Table, torch_name: str, kind: str
) -> tuple[tuple[str, ...], int | None]:
    """(path in our tree, position in its stack or None) of a torch tensor."""
    path: list[str] = []
    index = None
    parts = torch_name.split(".")
    for depth, part in enumerate(parts[:-1]):
        if not part.isdecimal():
            path.append(part)
        elif rows.is_stacked(".".join(parts[:depth])):
            index = int(part)
        else:
            path[-1] += f"_{part}"
    return (*path, LEAF.get(kind, parts[-1])), index


def torch_names(rows: Table, path: tuple[str, ...], leaf: Any) -> list[tuple[str, Any]]:
    """(torch name, its part of the leaf), one a block where blocks are stacked.

    Args:
      rows: the table of the network.
      path: of the leaf in our tree.
      leaf: the array, in our layout.
    """
    modules: list[str] = []
    stack = None
    for word in path[:-1]:
        modules += _unglue(word)
        if rows.is_stacked(".".join(modules)):
            stack = len(modules)
    last = path[-1]
    end = "weight" if last in ("kernel", "scale", "embedding") else last
    if stack is None:
        return [(".".join((*modules, end)), leaf)]
    before, after = modules[:stack], modules[stack:]
    return [
        (".".join((*before, str(i), *after, end)), leaf[i])
        for i in range(leaf.shape[0])
    ]


def _unglue(word: str) -> list[str]:
    """ "resnets_1" -> ["resnets", "1"]: the inverse of gluing a number on a word."""
    head, _, number = word.rpartition("_")
    if not head or not number.isdecimal() or word in WHOLE_WORDS:
        return [word]
    return [*_unglue(head), number]


def _kernel_to_jax(tensor: np.ndarray) -> np.ndarray:
    """[o i] -> [i o] and [o i h w] -> [h w i o].

    The rank decides and not the row: `proj_in` is a convolution in Stable Diffusion 1
    and a linear layer in 2, under the same name.
    """
    return tensor.T if tensor.ndim == 2 else tensor.transpose(2, 3, 1, 0)


def _kernel_to_torch(kernel: Any) -> np.ndarray:
    kernel = np.asarray(kernel)
    return kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)


def _stack(name: str, path: tuple[str, ...], parts: dict[int, np.ndarray]) -> Any:
    missing = sorted(set(range(max(parts) + 1)) - parts.keys())
    if missing:
        label = "/".join(path)
        raise _left_over(
            name, [f"{label} of block {i}" for i in missing], "missing blocks"
        )
    if len({part.shape for part in parts.values()}) > 1:
        shapes = [f"{'/'.join(path)} {parts[i].shape}" for i in sorted(parts)]
        raise _left_over(name, shapes, "blocks of unequal shapes")
    return np.stack([parts[i] for i in sorted(parts)])


def _leaf_shapes(tree: Params) -> dict[str, tuple[int, ...]]:
    flat: Any = traverse_util.flatten_dict(tree, sep="/").items()
    return {name: tuple(leaf.shape) for name, leaf in flat}


def _left_over(name: str, names: Sequence[str], what: str) -> UserError:
    shown = ", ".join(names[:LISTED])
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return UserError(
        f"the weights of {name} do not fit ({len(names)} {what})",
        got=shown + more,
        wanted="every tensor in exactly one leaf of the network and back",
        way_out="check that weights and config.json belong together, and that it is a "
        "Stable Diffusion 1.x or 2.x model",
    )
