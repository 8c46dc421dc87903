"""The values that cross modules, and the one legend of axis letters.

Axes: `b` samples, `g` prompt groups, `t` denoising steps kept for training, `n` steps
of the sampler, `h w c` pixels, `l d` text tokens and their width, `*x` latent axes.
Time runs from noise to data: `t` is the current and `s` the next noise level.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

Params = Any  # a nested dict of arrays with string keys
Metrics = dict[str, Float[Array, ""]]
# A named scope, with a number: what is in it, so many devices all do alike.
ON_EACH = "on_each_of_"


class Cond(NamedTuple):
    """What the network is told of a prompt; every leaf has a leading batch axis.

    `emb` holds text states [b l d], or token ids [b l] where the network owns the
    embedding; `pooled` holds one vector a prompt, or None.
    """

    emb: Array
    pooled: Array | None = None


@runtime_checkable  # the tests check the types of every call
class GaussianLike(Protocol):
    """The distribution of the next state: `mean` [b *x] and `std` [b]."""

    @property
    def mean(self) -> Array: ...

    @property
    def std(self) -> Array: ...

    def sample(self, key: Array) -> Float[Array, "b *x"]: ...

    def log_prob(self, x: Array, reduction: str = "mean") -> Float[Array, " b"]: ...


class Memory(NamedTuple):
    """What a multistep kernel keeps of the step before: x0 [b *x] and its level [b]."""

    x0: Array
    level: Array


class Kernel(NamedTuple):
    """One sampler: its grid, its transition and what the network sees of a state.

    Attributes:
      levels: [n 2] float64, the (current, next) noise level of each step, in the
        kernel's own units (sigma of the flow, alpha_bar of DDIM, EDM sigma).
      init_scale: the initial state is this times N(0, I).
      to_network: (x [b *x], t [b]) -> (z [b *x], time [b]), the state and time in the
        coordinates of the network (rectified flow: z = (1 - time) x0 + time eps).
      step: (x, prediction, t, s, memory) -> Gaussian of the next state.
      remember: (x, prediction, t) -> Memory for the next step; None for a one-step
        kernel, whose memory is None too.
      stochastic: [n] bool, False where the transition has no noise: such a step can
        not be trained on.
    """

    levels: np.ndarray
    init_scale: float
    to_network: Callable[..., tuple[Array, Array]]
    step: Callable[..., GaussianLike]
    remember: Callable[..., Memory] | None
    stochastic: np.ndarray


class Transition(NamedTuple):
    """One trained step of a batch: from x_t to x_s, at the levels (t, s)."""

    x_t: Float[Array, "b *x"]
    x_s: Float[Array, "b *x"]
    time: Float[Array, "b 2"]
    memory: Memory | None


class Trajectory(NamedTuple):
    """The trained transitions of a rollout, float32, on device, sharded over `b`.

    A state that ends one step and begins the next is stored once where most steps are
    kept: step i of a sample goes from states[rows[i]] to states[rows[i] + 1]. `index`
    is the step of the sampler, `time` its (t, s) levels; `memory` is None for one-step
    kernels.
    """

    states: Float[Array, "k b *x"]
    rows: Int[Array, "t b"]
    log_prob: Float[Array, "t b"]
    time: Float[Array, "t b 2"]
    index: Int[Array, "t b"]
    memory: Memory | None

    @property
    def x_t(self) -> Float[Array, "t b *x"]:
        """The states before the steps, copied."""
        return _rows(self.states, self.rows)

    @property
    def x_s(self) -> Float[Array, "t b *x"]:
        """The states after the steps, copied."""
        return _rows(self.states, self.rows + 1)

    def at(self, step: Int[Array, ""]) -> Transition:
        """One of the t steps."""
        pick = partial(lax.dynamic_index_in_dim, index=step, keepdims=False)
        rows = pick(self.rows)[None]
        x_t, x_s = (_rows(self.states, r)[0] for r in (rows, rows + 1))
        return Transition(x_t, x_s, pick(self.time), jax.tree.map(pick, self.memory))


def _rows(states: Array, rows: Array) -> Array:
    """states[rows[i, j], j] for each i and sample j."""
    rows = rows.reshape(*rows.shape, *(1,) * (states.ndim - 2))
    return jnp.take_along_axis(states, rows, axis=0)


class Prompts(NamedTuple):
    """The prompts of one epoch on the host: text, index in the prompt list, group."""

    text: tuple[str, ...]
    index: np.ndarray  # [b] int32, position of the prompt in the prompt list
    group: np.ndarray  # [b] int32, 0..g-1, samples of one group share a prompt


class Scores(NamedTuple):
    """Rewards of a batch: values [b] float32 a name, and which of them are valid."""

    values: dict[str, np.ndarray]
    valid: np.ndarray  # [b] bool


@runtime_checkable
class Reward(Protocol):
    """A judge: uint8 images [b h w c] and their prompts -> one score an image."""

    def __call__(
        self, images: UInt8[np.ndarray, "b h w c"], prompts: Sequence[str]
    ) -> Float[np.ndarray, " b"]: ...


class DataSource(NamedTuple):
    """Captioned training data, already on device or loaded by record.

    Attributes:
      captions: the caption of each record.
      latents: (records, keys [b]) -> [b *x] float32, jitted with the update; the key
        draws the augmentation, so the same record and key give the same picture
        anywhere. `records` are numbers [b] int32, or what `fetch` gave for them.
      fetch: record numbers [b] -> a tree of host arrays with leading axis b, for data
        that is too large for the device; None: it is there already.
      cond: what `fetch` gave -> the records' own captions as the network is told;
        None: they are encoded once into a table.
      announce: takes the record numbers of the batches that `fetch` will be asked for
        next, so that they are read meanwhile; None: nothing can be read ahead.
      skipped: how many pictures or captions were no use and left out.
      digest: of the records' contents; a resumed run refuses other ones.
    """

    captions: tuple[str, ...]
    latents: Callable[[Any, Key[Array, " b"]], Float[Array, "b *x"]]
    fetch: Callable[[Int[np.ndarray, " b"]], Any] | None = None
    cond: Callable[[Any], Cond] | None = None
    announce: Callable[[Iterable[np.ndarray]], None] | None = None
    skipped: int = 0
    digest: str = ""


class Pipeline(NamedTuple):
    """A model as the rest of the program sees it: four callables and a tree.

    Attributes:
      encode: prompts -> Cond. Raises UserError for a prompt it can not read.
      uncond: Cond with batch 1, the empty prompt.
      init: key -> {"params": tree, "lora": tree or None}.
      denoise: (params, lora, z [b *x], time [b], cond) -> prediction [b *x] float32.
      decode: x0 [b *x] -> uint8 [b h w c], a `jax.tree_util.Partial` whose leaves are
        the weights of a decoder: handed to a jitted function it brings them along.
      axes: the trees of init with a tuple of logical axis names as each leaf.
      latent_shape: the shape *x of one latent.
      prediction: what denoise returns: "velocity", "eps", "v" or "x0".
      load: () -> params of the starting checkpoint, or None for a random start.
      fingerprint: names the weights of the starting checkpoint.
      encode_images: uint8 [b h w c] -> (mean, logvar) [b *x] of their latents; None
        where a latent is the picture itself.
      precise: pattern of the names of params ("a/b/kernel") that denoise uses in
        float32 whatever its dtype; all others it converts before it uses them.
      described: names what the files of the starting checkpoint say of the model beside
        its weights; "" where the configuration says it all.
    """

    encode: Callable[[Sequence[str]], Cond]
    uncond: Cond
    init: Callable[[Array], dict[str, Params]]
    denoise: Callable[..., Array]
    decode: Callable[[Array], UInt8[Array, "b h w c"]]
    axes: dict[str, Any]
    latent_shape: tuple[int, ...]
    prediction: str
    load: Callable[[], Params | None]
    fingerprint: str
    encode_images: Callable[[Any], tuple[Array, Array]] | None = None
    precise: str = ".*"
    described: str = ""

    @property
    def params(self) -> Params | None:
        """The starting checkpoint, read at each access: keep it where it is needed
        twice. It is no field, as a run reads its shards without the whole."""
        return self.load()


class Rollout(NamedTuple):
    """What one chunk of rollouts gives: pictures, kept transitions and latents."""

    images: UInt8[Array, "b h w c"]
    trajectory: Trajectory
    x0: Float[Array, "b *x"]


Mask = Bool[Array, " b"]
