"""Records are read on threads while the device works."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Int

READERS = 2  # threads
# Batches read before they are asked for, at most: 200 MB of eight samples each of
# Stable Diffusion's latents and text at 512 px.
AHEAD = 64


class ReadAhead:
    """A `fetch` whose next batches are read before they are asked for.

    Call it from one thread.

    Args:
      fetch: record numbers [b] -> a tree of arrays; called in threads.

    Attributes:
      waits: batches that were not there yet when they were asked for.
    """

    def __init__(self, fetch: Callable[[Int[np.ndarray, " b"]], Any]):
        self._fetch, self.waits = fetch, 0
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="records")
        self._queue: deque[np.ndarray] = deque()
        self._ahead: dict[bytes, Future] = {}

    def __call__(self, records: Int[np.ndarray, " b"]) -> Any:
        """Returns what `fetch` gives for these records, and raises what it raises."""
        future = self._ahead.pop(_name(records), None)
        self._top_up()
        self.waits += future is None or not future.done()
        return self._fetch(records) if future is None else future.result()

    def announce(self, batches: Iterable[Int[np.ndarray, " b"]]) -> None:
        """Says which batches will be fetched next, so that threads read them ahead.

        A limited number is held, whatever is announced. Announcing again forgets what
        was announced before, so that none, (), ends the reading ahead; a batch that was
        not announced is simply read.
        """
        for future in self._ahead.values():
            future.cancel()
        self._ahead, self._queue = {}, deque(batches)
        self._top_up()

    def _top_up(self) -> None:
        while self._queue and len(self._ahead) < AHEAD:
            records = self._queue.popleft()
            if _name(records) not in self._ahead:
                self._ahead[_name(records)] = self._pool.submit(self._fetch, records)


def _name(records: np.ndarray) -> bytes:
    return np.asarray(records, np.int64).tobytes()
