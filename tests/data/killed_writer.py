"""Writes a cache of latents in children that kill themselves: STAGE, NUMBER of call.

Usage: killed_writer.py PICTURES CACHES STAGE:NUMBER ...
Each child writes to CACHES/STAGE-NUMBER. One process, so that JAX is imported once.
"""

import os
import signal
import sys
from pathlib import Path

from fake_encoders import WEIGHTS, FakeImages, FakeTexts

from ddrl_jax.data import latent_writer, record_table
from ddrl_jax.data.picture_folder import read_folder


def deadly(function, number):
    """The function, but its call of this number is a SIGKILL."""
    calls = 0

    def call(*args):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    return call


def write(pictures: str, folder: Path, stage: str, number: int) -> None:
    images, texts = FakeImages(), FakeTexts()
    if stage == "images":
        images = deadly(images, number)
    if stage == "texts":
        texts = deadly(texts, number)
    if stage == "settle":  # the bytes are written, the file has not got its name
        record_table._settle = deadly(record_table._settle, number)
    if stage == "rename":
        Path.rename = deadly(Path.rename, number)
    found = read_folder(pictures, 16)
    latent_writer.write_latents(folder, found, images, texts, 2, WEIGHTS, shard=4)


def main() -> None:
    pictures, caches, *stages = sys.argv[1:]
    for each in stages:
        stage, number = each.split(":")
        if child := os.fork():
            _, status = os.waitpid(child, 0)
            print(each, os.WIFSIGNALED(status) and os.WTERMSIG(status), flush=True)
            continue
        write(pictures, Path(caches) / f"{stage}-{number}", stage, int(number))
        os._exit(0)


if __name__ == "__main__":
    main()
