"""What a run says about itself: metrics files, the progress bar, the stage timer.

Only process 0 writes; on the others every call is free and does nothing.
"""

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from ddrl_jax.board import Board
from ddrl_jax.errors import UserError
from ddrl_jax.wandb_run import start_wandb

STAGES: tuple[str, ...] = ("rollout", "reward", "update")
ONLY_AT_END = "only_at_end"  # key: names of values of a run that ends here
_RECENT = 10  # epochs whose median duration gives the time left


class Metrics:
    """The writers of one run: metrics.jsonl always, TensorBoard and wandb by config.

    Args:
      workdir: the folder of the run; wandb gets the config.json in it.
      config_log: the `log` part of the config (tensorboard, wandb).
      resume_step: the last step that a restart keeps; TensorBoard hides later ones.

    Raises:
      UserError: wandb is asked for and not installed, or TensorBoard's file could not
        be written (full disk).
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        config_log: Any,
        resume_step: int | None = None,
    ):
        self.root = Path(workdir)
        self._file = self._board = self._wandb = None
        if jax.process_index() != 0:
            return
        if config_log.wandb:
            self._wandb = start_wandb(self.root)
        if config_log.tensorboard:
            folder = self.root / "tensorboard"
            with _told(folder):
                self._board = Board(folder, resume_step)
        # Line buffered: a line is on its way to the disk when write() returns.
        self._file = (self.root / "metrics.jsonl").open("a", buffering=1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the metrics of one epoch.

        JSON has no NaN and no infinity: such a value becomes null and its key is
        listed under "nonfinite", so that it is neither lost nor made up.

        Args:
          step: epochs done.
          values: numbers, 0-d arrays or text; under ONLY_AT_END a tuple of keys.

        Raises:
          UserError: the line or its numbers could not be written (full disk).
        """
        if self._file is None:
            return
        line = as_line(step, values)
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            with suppress(OSError):  # closing tries to write the same line again
                self._file.close()
            raise _write_error(self.root / "metrics.jsonl", error) from error
        numbers = {k: v for k, v in line.items() if isinstance(v, int | float)}
        del numbers["step"]
        if self._board is not None:
            with _told(self._board.path):
                self._board.scalars(step, numbers)
                self._board.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def images(
        self, step: int, name: str, grid: UInt8[np.ndarray, "h w c"]
    ) -> Path | None:
        """Writes a picture to samples/NAME_STEP.png and to TensorBoard.

        Returns:
          The path of the file; None on other processes than 0.

        Raises:
          UserError: the file could not be written (full disk).
        """
        if self._file is None:
            return None
        safe = name.replace(os.sep, "_")
        path = self.root / "samples" / f"{safe}_{step:06d}.png"
        with _told(path):
            path.parent.mkdir(exist_ok=True)
            draft = path.with_name(f".{path.name}.tmp")
            Image.fromarray(np.asarray(grid)).save(draft, format="PNG")
            draft.replace(path)
        if self._board is not None:
            with _told(self._board.path):
                self._board.image(step, name, np.asarray(grid))
                self._board.flush()
        if self._wandb is not None:
            self._wandb.log({name: sys.modules["wandb"].Image(str(path))}, step=step)
        return path

    def close(self) -> None:
        """Closes the files; a file that has refused something is closed already.

        Raises:
          UserError: TensorBoard's file could not be written (full disk).
        """
        file, board, wandb = self._file, self._board, self._wandb
        self._file = self._board = self._wandb = None
        try:
            if file is not None:
                file.close()
            if board is not None:
                with _told(board.path):
                    board.close()
        finally:
            if wandb is not None:
                wandb.finish()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()


def as_line(step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON object of one epoch; see `Metrics.write`."""
    line: dict[str, Any] = {"step": int(step)}
    nonfinite = []
    for key, value in values.items():
        value = value if isinstance(value, str | tuple) else np.asarray(value).item()
        if isinstance(value, float) and not math.isfinite(value):
            nonfinite.append(key)
            value = None
        line[key] = value
    return line | ({"nonfinite": nonfinite} if nonfinite else {})


class ProgressBar:
    """One line of progress: epoch, reward, data loss, samples a second, time left.

    A bar where stderr is a terminal, else a plain line an epoch.

    Args:
      total: epochs of the whole run.
      enabled: False shows nothing (log.progress).
      initial: epochs done before this start.
    """

    def __init__(self, total: int, enabled: bool, initial: int = 0):
        self._total, self._done = total, initial
        self._shown = enabled and jax.process_index() == 0
        self._seconds: list[float] = []
        self._last = time.monotonic()
        self._bar: tqdm | None = None
        if self._shown and sys.stderr.isatty():
            layout = "{desc} {n_fmt}/{total_fmt} |{bar}| {postfix}"
            self._bar = tqdm(
                total=total, initial=initial, bar_format=layout, dynamic_ncols=True
            )

    def stage(self, name: str) -> None:
        """Says what the epoch is doing now ("rollout", "update"); terminals only."""
        if self._bar is not None:
            self._bar.set_description_str(f"{name:<8}")

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows the end of an epoch.

        Args:
          step: epochs done.
          values: its metrics; shown are reward/mean, data/loss, samples_per_second.
        """
        now = time.monotonic()
        self._seconds.append((now - self._last) / max(step - self._done, 1))
        self._last, self._done = now, step
        if not self._shown:
            return
        text = "  ".join(_shown_parts(values))
        left = f"{_clock(self.seconds_left())} left"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{text}  {left}", refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            line = f"epoch {step}/{self._total}  {text}  {left}"
            print(line, file=sys.stderr, flush=True)

    def seconds_left(self) -> float:
        """Returns the epochs left times the median of the recent durations.

        A median, because the first epoch compiles and some epochs evaluate.
        """
        if not self._seconds:
            return math.nan
        usual = statistics.median(self._seconds[-_RECENT:])
        return usual * max(self._total - self._done, 0)

    def close(self) -> None:
        """Leaves the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()


class Timer:
    """Seconds an epoch spends in its stages, each second counted once.

    `with timer("rollout"): ...` adds to time/rollout; inside another stage the outer
    one stands still. For one thread: work that overlaps counts where the loop waits.
    """

    def __init__(self) -> None:
        self._spent = dict.fromkeys(STAGES, 0.0)
        self._open: list[str] = []
        self._start = self._mark = time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Times a block as `stage`."""
        self._settle()
        self._open.append(stage)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def epoch(self) -> dict[str, float]:
        """Returns time/STAGE in seconds and starts again from zero.

        time/rest is what lies in no stage; time/epoch is the sum of all. What is done
        with the result, as writing it, belongs to the rest of the next epoch.
        """
        self._settle()
        now = self._mark
        times = {f"time/{stage}": spent for stage, spent in self._spent.items()}
        total = now - self._start
        times["time/rest"] = max(total - sum(times.values()), 0.0)
        times["time/epoch"] = total
        self._spent, self._start = dict.fromkeys(STAGES, 0.0), now
        return times

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leaves a block out of the epoch: evaluation, saving."""
        self._settle()
        begun = self._mark
        try:
            yield
        finally:
            self._mark = time.perf_counter()
            self._start += self._mark - begun

    def _settle(self) -> None:
        """Books the time since the last mark on the innermost open stage."""
        now = time.perf_counter()
        if self._open:
            stage = self._open[-1]
            self._spent[stage] = self._spent.get(stage, 0.0) + now - self._mark
        self._mark = now


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _write_error(path, error) from error


def _write_error(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} could not be written",
        got=error,
        wanted="a disk with room, and permission to write",
        way_out="make room and run the same command again: it goes on from the last "
        "checkpoint",
    )


def _shown_parts(values: Mapping[str, Any]) -> Iterator[str]:
    names = {"reward/mean": "reward", "data/loss": "data loss"}
    for key, name in names.items():
        if values.get(key) is not None:
            yield f"{name} {float(values[key]):.4g}"
    if values.get("samples_per_second") is not None:
        yield f"{float(values['samples_per_second']):.1f} samples/s"


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
