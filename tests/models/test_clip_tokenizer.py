"""The tokenizer of CLIP under the threads of judges and encoders."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ddrl_jax.errors import UserError
from ddrl_jax.models import clip_tokenizer
from ddrl_jax.models.clip_config import ClipTextConfig

THREADS, CALLS = 4, 3
TINY = Path(clip_tokenizer.__file__).parents[1] / "assets" / "tiny_clip"


class Slow:
    """A tokenizer that says when a call begins and ends, by whom, and if it pads."""

    model_max_length = 4

    def __init__(self):
        self.seen: list[tuple[int, bool, str]] = []

    def __len__(self):
        return 100

    def __call__(self, prompts, **options):
        who, padded = threading.get_ident(), "padding" in options
        self.seen.append((who, padded, "begins"))
        time.sleep(0.002)  # in which any other thread would have its turn
        self.seen.append((who, padded, "ends"))
        width = options.get("max_length", 1)
        return {"input_ids": [[int(prompt)] * width for prompt in prompts]}


def test_one_tokenizer_is_one_threads_at_a_time(tmp_path, monkeypatch):
    """Padding and truncation are kept in it: another's call between two takes them."""
    slow = Slow()
    monkeypatch.setattr(clip_tokenizer, "_read", lambda folder: slow)
    tokenize = clip_tokenizer.clip_tokenize(tmp_path, ClipTextConfig())
    together = threading.Barrier(THREADS, timeout=60)

    def call(prompt: int):
        together.wait()
        return [tokenize([str(prompt)]) for _ in range(CALLS)]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(call, range(THREADS)))
    assert len(slow.seen) == 4 * THREADS * CALLS
    for first in range(0, len(slow.seen), 4):
        who = slow.seen[first][0]
        steps = [(padded, at) for padded in (False, True) for at in ("begins", "ends")]
        assert slow.seen[first : first + 4] == [(who, *step) for step in steps]
    for prompt, ids in enumerate(found):
        np.testing.assert_array_equal(ids, np.full((CALLS, 1, 4), prompt))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]", "[" * 10**5], ids=len)
def test_a_damaged_file_is_one_error_that_names_the_folder(tmp_path, name, content):
    folder = shutil.copytree(TINY, tmp_path / "clip")
    (folder / name).write_text(content)
    with pytest.raises(UserError, match="the tokenizer in .*clip can not be used"):
        clip_tokenizer.clip_tokenize(folder, ClipTextConfig())
