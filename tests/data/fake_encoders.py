"""Encoders without weights: a row of their answer depends on its own input only."""

import zlib
from collections.abc import Sequence

import numpy as np

from ddrl_jax.interfaces import Cond

WEIGHTS = {"vae": "vae-hash", "text": "text-hash"}


class FakeImages:
    """uint8 [b 16 16 3] -> mean, logvar [b 2 2 4]; counts its calls and rows."""

    def __init__(self, gain: float = 1.0):
        self.batches: list[int] = []
        self.gain = gain

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert images.dtype == np.uint8
        self.batches.append(len(images))
        x = images.astype(np.float32) / 127.5 - 1
        blocks = x.reshape(len(x), 2, 8, 2, 8, 3).mean((2, 4), dtype=np.float32)
        mean = np.concatenate([3 * blocks, blocks[..., :1] ** 2], -1) * self.gain
        return mean.astype(np.float32), -4 + np.sin(7 * mean).astype(np.float32)


class FakeTexts:
    """captions -> emb [b 3 5], pooled [b 2], seeded by each caption; counts calls."""

    def __init__(self):
        self.batches: list[tuple[str, ...]] = []

    def __call__(self, captions: Sequence[str]) -> Cond:
        self.batches.append(tuple(captions))
        seeds = [zlib.crc32(c.encode()) for c in captions]
        rows = [np.random.default_rng(s).normal(size=17) for s in seeds]
        values = np.stack(rows).astype(np.float32)
        return Cond(values[:, :15].reshape(-1, 3, 5), values[:, 15:])
