"""Rewards on a bounded thread pool, so that judging overlaps the next rollout.

A reward that fails never yields a made-up number: the run stops with one message, or
the sample is marked invalid and leaves its group.
"""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddrl_jax.errors import UserError
from ddrl_jax.interfaces import Reward, Scores
from ddrl_jax.rewards.problems import (
    SHOWN,
    Problem,
    checked,
    from_exception,
    late_problem,
)

POLL = 0.05  # seconds between two looks for overdue calls while waiting
QUEUE_PER_THREAD = 4  # calls that may wait a thread; beyond, submit waits
JOIN = 0.5  # seconds that closing waits for a thread; one that hangs is left behind


class _Pictures:
    """The pictures of a submission; the first thread that needs them fetches them."""

    def __init__(self, images: Any):
        self._images, self._host, self._lock = images, None, threading.Lock()

    def rows(self, rows: slice) -> np.ndarray:
        with self._lock:
            if self._host is None:
                self._host, self._images = np.asarray(self._images), None
        return self._host[rows]


class _Call:
    """One reward on some rows of a submission; the first outcome counts."""

    def __init__(
        self,
        name: str,
        reward: Reward,
        pictures: _Pictures,
        prompts: Sequence[str],
        rows: slice,
    ):
        self.name, self.rows = name, rows
        self._inputs: tuple = (reward, pictures, prompts[rows])
        self._lock = threading.Lock()
        self.done = threading.Event()
        self.begun: float | None = None  # set when the pictures have arrived
        self.values: np.ndarray | None = None
        self.problem: Problem | None = None
        self.lost: BaseException | None = None  # the pictures themselves failed

    @property
    def count(self) -> int:
        return self.rows.stop - self.rows.start

    def run(self) -> bool:
        """Runs the reward; False if it was given up on in the meantime."""
        reward, pictures, prompts = self._inputs
        try:
            images = pictures.rows(self.rows)
        except BaseException as e:  # also a thread's death must reach the waiter
            return self.finish(lost=e)
        self.begun = time.monotonic()
        try:
            found = np.asarray(reward(images, prompts))
            values, problem = checked(found, self.count, reward)
        except BaseException as e:
            if getattr(e, "fatal", False):  # no later batch can fare better
                return self.finish(lost=e)
            return self.finish(problem=from_exception(e, self.count))
        return self.finish(values=values, problem=problem)

    def finish(self, **outcome: Any) -> bool:
        """Stores the outcome; False if there was one already."""
        with self._lock:
            if self.done.is_set():
                return False
            for name, value in outcome.items():
                setattr(self, name, value)
            self._inputs = ()  # a handle must not keep pictures
            self.done.set()
            return True


class Handle(NamedTuple):
    """What `submit` returns: the calls under way for one batch."""

    calls: tuple[_Call, ...]
    count: int


class RewardPool:
    """Runs rewards on threads; use it as a context manager.

    Args:
      rewards: name -> Reward; may be empty. One with a true attribute `splittable`
        is given a batch in parts, one for each thread; one with a `why_missing` tells
        by it why numbers are missing (see `problems.checked`).
      threads: how many calls run at once.
      timeout: seconds a call may take once its pictures are on the host.
      on_failure: "error" stops with a UserError; "mask" marks the samples invalid,
        leaves NaN as their value and counts them in `failures`.

    Attributes:
      failures: name -> samples masked so far.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        threads: int = 2,
        timeout: float = 120.0,
        on_failure: str = "error",
    ):
        if on_failure not in ("error", "mask") or threads < 1 or timeout <= 0:
            raise UserError(
                "the reward pool can not be set up like this",
                got=f"threads={threads}, timeout={timeout}, on_failure={on_failure!r}",
                wanted="threads >= 1, timeout > 0, on_failure 'error' or 'mask'",
                way_out="change --config.rewards.threads, .timeout or .on_failure",
            )
        self.failures: Counter[str] = Counter()
        self.rewards, self._threads = dict(rewards), threads
        self._timeout, self._on_failure = timeout, on_failure
        self._queue: queue.Queue[_Call | None] = queue.Queue(QUEUE_PER_THREAD * threads)
        self._lock = threading.Lock()
        self._running: dict[_Call, threading.Thread] = {}
        self._workers: set[threading.Thread] = set()
        self._closed = False
        for _ in range(threads if self.rewards else 0):
            self._start_worker()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, images: Any, prompts: Sequence[str]) -> Handle:
        """Starts judging a batch and returns at once (or when the queue has room).

        Args:
          images: uint8 [b h w c], NumPy or a JAX array; a thread fetches the latter.
          prompts: their b prompts.
        """
        if self._closed:
            raise RuntimeError("the reward pool is closed")
        count = len(prompts)
        if images.shape[0] != count:
            raise ValueError(f"{images.shape[0]} pictures for {count} prompts")
        pictures, calls = _Pictures(images), []
        for name, reward in self.rewards.items():
            parts = self._threads if getattr(reward, "splittable", False) else 1
            for rows in _cut(count, parts):
                calls.append(_Call(name, reward, pictures, tuple(prompts), rows))
        for call in calls:
            self._put(call)
        return Handle(tuple(calls), count)

    def collect(
        self, handles: Sequence[Handle], numbers: np.ndarray | None = None
    ) -> Scores:
        """Waits for submissions and joins their scores in the order given.

        Args:
          handles: of the submissions.
          numbers: what an error calls their samples, where others are judged
            elsewhere; None: 0, 1, 2, ...

        Raises:
          UserError: with on_failure="error", a reward raised, ran out of time, or
            returned something else than one finite number a picture.
        """
        total = sum(handle.count for handle in handles)
        values = {n: np.full(total, np.nan, np.float32) for n in self.rewards}
        valid, offset = np.ones(total, bool), 0
        numbers = np.arange(total) if numbers is None else numbers
        for handle in handles:
            for call in handle.calls:
                self._wait(call)
                if call.lost is not None:
                    raise call.lost
                rows = slice(offset + call.rows.start, offset + call.rows.stop)
                if call.values is not None:
                    values[call.name][rows] = call.values
                if call.problem is not None:
                    valid[rows] &= ~call.problem.rows
            self._judge_failures(handle, numbers[offset:])
            offset += handle.count
        return Scores(values, valid)

    def close(self) -> None:
        """Ends the threads without waiting for queued calls or one that hangs."""
        self._closed = True
        while True:
            try:
                call = self._queue.get_nowait()
            except queue.Empty:
                break
            if call is not None:  # nobody will run it: say so to who collects it
                call.finish(lost=RuntimeError("the reward pool was closed"))
        with self._lock:
            workers = list(self._workers)
        for _ in workers[: self._queue.maxsize]:
            self._queue.put_nowait(None)
        deadline = time.monotonic() + JOIN
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))

    def _judge_failures(self, handle: Handle, numbers: np.ndarray) -> None:
        """Counts the failed samples of a submission, or raises for the first reward."""
        failed: dict[str, tuple[Problem, list[int]]] = {}
        for call in handle.calls:
            if call.problem is not None:
                _, samples = failed.setdefault(call.name, (call.problem, []))
                samples += numbers[call.rows][call.problem.rows].tolist()
        for name, (problem, samples) in failed.items():
            if self._on_failure == "mask":
                self.failures[name] += len(samples)
                _log_masked(name, problem, len(samples), handle.count)
                continue
            more = ", ..." if len(samples) > SHOWN else ""
            shown = ", ".join(map(str, samples[:SHOWN])) + more
            raise UserError(
                f"the reward {name!r} failed on samples [{shown}] ({len(samples)} in"
                f" all)",
                got=problem.got,
                wanted=problem.wanted,
                way_out=problem.way_out,
            ) from problem.cause

    def _put(self, call: _Call) -> None:
        while True:
            try:
                return self._queue.put(call, timeout=POLL)
            except queue.Full:
                self._give_up_overdue()

    def _wait(self, call: _Call) -> None:
        while not call.done.wait(POLL):
            self._give_up_overdue()

    def _give_up_overdue(self) -> None:
        """Ends calls past their time; a fresh thread takes the place of theirs.

        A thread can not be stopped from outside: it ends by itself when its reward
        comes back, and what it brings is dropped.
        """
        with self._lock:
            running = list(self._running)
        for call in running:
            late = call.begun is not None and (
                time.monotonic() - call.begun > self._timeout
            )
            if late and call.finish(problem=late_problem(self._timeout, call.count)):
                with self._lock:
                    self._workers.discard(self._running.pop(call, None))
                self._start_worker()

    def _start_worker(self) -> None:
        # daemon: a reward that never returns must not keep the program from exiting
        worker = threading.Thread(target=self._work, name="reward", daemon=True)
        with self._lock:
            self._workers.add(worker)
        worker.start()

    def _work(self) -> None:
        while not self._closed:
            call = self._queue.get()
            if call is None:
                return
            with self._lock:
                self._running[call] = threading.current_thread()
            kept = call.run()
            with self._lock:
                self._running.pop(call, None)
            if not kept:
                return


def _log_masked(name: str, problem: Problem, failed: int, count: int) -> None:
    """Says why samples are left out: their scores are missing, not their reason."""
    logging.getLogger(__name__).warning(
        "the reward %r has no score for %d of %d pictures: %s",
        *(name, failed, count, problem.got),
    )


def _cut(count: int, parts: int) -> list[slice]:
    """Cuts `count` rows into at most `parts` runs of nearly equal length."""
    parts = max(1, min(parts, count))
    ends = [count * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
