"""The pictures the judge learns from: real emoji, and what must not pass for one.

Every kind is drawn like the data (size, place, rotation), so that only what it shows
tells it apart.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ddrl_jax.data.emoji import draw
from ddrl_jax.rewards.retrieval import SIZE

REAL = 66  # pictures of a batch that show their caption
# Pictures of a batch that must be rejected, by kind.
NEGATIVES = {
    "silhouette": 8,  # the emoji's outline filled with its mean colour
    "soft_silhouette": 4,  # its outline over its strongly blurred inside
    "blur_5": 3,  # sigma in pixels of the 64 px original: half of it on a 32 px page
    "blur_7": 3,
    "blur_10": 2,
    "ellipse": 3,
    "shuffle_4": 4,
    "shuffle_8": 4,
    "blank": 1,
    "noise": 1,
}
STACKED = ("silhouette", "soft_silhouette", "blur_5", "blur_7", "blur_10")
FOREGROUND = 0.94  # a pixel whose darkest channel is below this is not background
# A single-coloured emoji is its own silhouette: a stand-in this close (root mean
# square over the emoji's pixels, values in [-1, 1]) is not shown as a fake.
SAME = 0.25
INSIDE_BLUR = 10.0  # pixels of the 64 px original: of the inside of soft_silhouette


class Sources(NamedTuple):
    """What pictures are drawn from, all with values in [-1, 1].

    Attributes:
      real: [r 64 64 3].
      fakes: the same shape for each of STACKED.
      different: [r] bool a kind, False where a fake is too like the real one.
      colour: [r 3], the mean colour of each emoji.
    """

    real: Array
    fakes: dict[str, Array]
    different: dict[str, Array]
    colour: Array


def _blurred(x: Float[np.ndarray, "r h h c"], sigma: float) -> np.ndarray:
    """Gaussian blur over height and width, cut at 3 sigma; outside is white."""
    radius = int(3 * sigma)
    total = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2).sum()
    place = np.arange(x.shape[1])
    distance = place[:, None] - place[None]
    band = np.exp(-0.5 * (distance / sigma) ** 2) * (abs(distance) <= radius) / total
    band = band.astype(np.float32)
    down = np.einsum("ih,rhwc->riwc", band, x - 1.0, optimize=True)
    return np.einsum("jw,riwc->rijc", band, down, optimize=True) + 1.0


def build_sources(pictures: np.ndarray) -> Sources:
    """Makes the stand-ins that must be rejected from uint8 pictures [r 64 64 3]."""
    real = (pictures / 127.5 - 1.0).astype(np.float32)
    mask = (real.min(-1, keepdims=True) < FOREGROUND).astype(np.float32)
    area = mask.sum((1, 2))
    colour = (real * mask).sum((1, 2)) / area
    # the blur sees only the emoji: white around it would bleach the inside
    weight = 1.0 - _blurred(1.0 - mask, INSIDE_BLUR)
    inside = _blurred((real - 1.0) * mask + 1.0, INSIDE_BLUR) - 1.0
    inside = inside / np.maximum(weight, 0.05) + 1.0
    fakes = {
        "silhouette": mask * colour[:, None, None] + (1.0 - mask),
        "soft_silhouette": mask * np.clip(inside, -1.0, 1.0) + (1.0 - mask),
        "blur_5": _blurred(real, 5.0),
        "blur_7": _blurred(real, 7.0),
        "blur_10": _blurred(real, 10.0),
    }
    different = {}
    for name, fake in fakes.items():
        square = (((fake - real) ** 2) * mask).sum((1, 2, 3)) / area[:, 0] / 3
        different[name] = jnp.asarray(square**0.5 > SAME)
    stack = {k: jnp.asarray(v, jnp.float32) for k, v in fakes.items()}
    return Sources(jnp.asarray(real), stack, different, jnp.asarray(colour))


def _page(picture: Array, key: Array, scales: tuple[float, float]) -> Array:
    low, high = scales
    return draw(picture, key, size=SIZE, min_scale=low, max_scale=high, rotation=15.0)


def _shuffled(page: Array, key: Array, tile: int) -> Array:
    """Permutes the tiles of a page."""
    n = SIZE // tile
    tiles = page.reshape(n, tile, n, tile, 3).transpose(0, 2, 1, 3, 4)
    tiles = jax.random.permutation(key, tiles.reshape(n * n, tile, tile, 3))
    tiles = tiles.reshape(n, n, tile, tile, 3).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(SIZE, SIZE, 3)


def _ellipse(colour: Array, key: Array) -> Array:
    """Draws one ellipse with an edge between sharp and soft."""
    place, axes, turn, edge = jax.random.split(key, 4)
    yx = (jnp.stack(jnp.mgrid[:SIZE, :SIZE], -1) + 0.5) / SIZE
    offset = yx - jax.random.uniform(place, (2,), minval=0.3, maxval=0.7)
    angle = jax.random.uniform(turn, (), maxval=jnp.pi)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned = offset @ jnp.array([[cos, -sin], [sin, cos]])
    radius = jax.random.uniform(axes, (2,), minval=0.15, maxval=0.5)
    distance = jnp.sqrt(jnp.sum((turned / radius) ** 2, -1, keepdims=True))
    softness = jax.random.uniform(edge, (), minval=0.02, maxval=0.3)
    inside = jax.nn.sigmoid((1.0 - distance) / softness)
    return inside * colour + (1.0 - inside)


def _noise(key: Array) -> Array:
    """Draws white noise or a single random colour."""
    level, grain = jax.random.split(key)
    mean = jax.random.uniform(level, (3,), minval=-1.0)
    sigma = jax.random.choice(level, jnp.array([0.0, 0.5, 1.0]))
    return mean * (sigma < 1.0) + sigma * jax.random.normal(grain, (SIZE, SIZE, 3))


def draw_kinds(
    sources: Sources,
    kinds: Mapping[str, int],
    key: Key[Array, ""],
    records: Int[Array, " b"],
    scales: tuple[float, float] = (0.5, 1.0),
) -> tuple[Float[Array, "b h w c"], Float[Array, " b"]]:
    """Draws pages of several kinds, all of them in one go: that compiles once.

    Args:
      sources: see `build_sources`.
      kinds: kind ("real" or one of NEGATIVES) -> pages of it, in order.
      key: decides everything random.
      records: the emoji of each page.
      scales: smallest and largest size, as a share of the page.

    Returns:
      The pages in [-1, 1], and 1 for those whose label is sure, 0 for stand-ins too
      like the real emoji to be called fakes.
    """
    keys = jax.random.split(key, len(records))
    ends = np.cumsum(list(kinds.values()))
    rows = {k: slice(e - n, e) for (k, n), e in zip(kinds.items(), ends, strict=True)}
    drawn = [k for k in kinds if k not in ("ellipse", "noise", "blank")]
    pages: dict[str, Array] = {}
    if drawn:
        pictures = [_pictures(sources, k)[records[rows[k]]] for k in drawn]
        seeds = jnp.concatenate([keys[rows[k]] for k in drawn])
        many = jax.vmap(partial(_page, scales=scales))(jnp.concatenate(pictures), seeds)
        cuts = np.cumsum([kinds[k] for k in drawn])[:-1].tolist()
        pages = dict(zip(drawn, jnp.split(many, cuts), strict=True))
    sure = []
    for kind, row in rows.items():
        pages[kind] = _finished(sources, kind, pages, records[row], keys[row])
        is_sure = sources.different.get(kind, jnp.ones(len(sources.real), bool))
        sure.append(is_sure[records[row]].astype(jnp.float32))
    return jnp.concatenate([pages[k] for k in kinds]), jnp.concatenate(sure)


def _pictures(sources: Sources, kind: str) -> Array:
    return sources.fakes[kind] if kind in STACKED else sources.real


def _finished(
    sources: Sources, kind: str, pages: dict[str, Array], records: Array, keys: Array
) -> Array:
    """Returns the pages of a kind: drawn already, still to shuffle, or not drawn."""
    if kind == "ellipse":
        return jax.vmap(_ellipse)(sources.colour[records], keys)
    if kind == "noise":
        return jnp.clip(jax.vmap(_noise)(keys), -1.0, 1.0)
    if kind == "blank":
        return jnp.ones((len(records), SIZE, SIZE, 3))
    if kind.startswith("shuffle_"):
        tile = int(kind.removeprefix("shuffle_"))
        again = jax.vmap(partial(jax.random.fold_in, data=1))(keys)
        return jax.vmap(partial(_shuffled, tile=tile))(pages[kind], again)
    return pages[kind]


def jitter(page: Float[Array, "h w c"], key: Key[Array, ""]) -> Float[Array, "h w c"]:
    """Mild changes that leave a picture what it is: tint, softness and grain."""
    tint, lift, soft, grain, patch, amount = jax.random.split(key, 6)
    gain = jax.random.uniform(tint, (3,), minval=0.88, maxval=1.1)
    page = 1.0 - (1.0 - page) * gain
    page = page + jax.random.uniform(lift, (3,), minval=-0.06, maxval=0.02)
    # three taps are enough of a Gaussian of at most half a pixel
    sigma = jax.random.uniform(soft, (), minval=0.1, maxval=0.5)
    side = jnp.exp(-0.5 / sigma**2)
    taps = jnp.array([side, 1.0, side]) / (1.0 + 2.0 * side)
    for axis in (0, 1):
        pad = [(1, 1) if axis == a else (0, 0) for a in range(3)]
        wide = jnp.pad(page, pad, mode="edge")
        shifted = [
            taps[i] * jax.lax.slice_in_dim(wide, i, i + SIZE, axis=axis)
            for i in range(3)
        ]
        page = shifted[0] + shifted[1] + shifted[2]
    level = jax.random.uniform(amount, (2,)) * jnp.array([0.08, 0.05])
    page = page + level[0] * jax.random.normal(grain, page.shape)
    blocks = jax.random.normal(patch, (SIZE // 4, SIZE // 4, 3))
    blocks = jnp.repeat(jnp.repeat(blocks, 4, 0), 4, 1)
    return jnp.clip(page + level[1] * blocks, -1.0, 1.0)


def training_batch(
    sources: Sources, key: Key[Array, ""]
) -> tuple[Float[Array, "b h w c"], Int[Array, " b"], Float[Array, " b"]]:
    """Returns pages, labels (the last class is the reject) and weights."""
    classes, kinds = len(sources.real), {"real": REAL, **NEGATIVES}
    count = sum(kinds.values())
    pick, paint, change = jax.random.split(key, 3)
    records = jax.random.randint(pick, (count,), 0, classes)
    pages, weights = draw_kinds(sources, kinds, paint, records)
    pages = jax.vmap(jitter)(pages, jax.random.split(change, count))
    labels = jnp.where(jnp.arange(count) < REAL, records, classes)
    return pages, labels, weights
