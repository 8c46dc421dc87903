"""TensorBoard's file of one start of a run, written by the thread that calls.

tensorboardX's SummaryWriter hands its events to a thread. A full disk ends that thread
without a word, and then the next number waits for it for ever. So only the records and
the summaries are tensorboardX's here.
"""

import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8


class Board:
    """A new file of events, `path`, in a folder that TensorBoard watches.

    An OSError closes it: readers could not tell what follows a record cut short.

    Args:
      folder: made if it is not there.
      resume_step: the last step that a restart keeps; TensorBoard hides what earlier
        files say of later ones. None hides nothing.

    Raises:
      OSError: the file could not be opened or written (full disk).
    """

    def __init__(self, folder: Path, resume_step: int | None = None):
        from tensorboardX.proto import event_pb2  # slow to import, and optional
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / _new_name()
        self._records = RecordWriter(str(self.path))
        self._append(file_version="brain.Event:2")
        if resume_step is not None:
            log = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]
            start = log(status=log.START)
            self._append(step=resume_step + 1, session_log=start)
        self.flush()  # a folder that takes nothing is told before the first epoch

    def scalars(self, step: int, numbers: Mapping[str, int | float]) -> None:
        """Appends numbers, each as a curve of its own.

        Args:
          step: epochs done.
          numbers: the value of each curve.

        Raises:
          OSError: they could not be written (full disk).
        """
        from tensorboardX.summary import scalar

        for name, number in numbers.items():
            self._append(step=step, summary=scalar(name, number))

    def image(self, step: int, name: str, grid: UInt8[np.ndarray, "h w c"]) -> None:
        """Appends a picture.

        Args:
          step: epochs done.
          name: of the row of pictures over the steps.
          grid: the picture.

        Raises:
          OSError: it could not be written (full disk).
        """
        from tensorboardX.summary import image

        self._append(step=step, summary=image(name, grid, dataformats="HWC"))

    def flush(self) -> None:
        """Puts on the disk what was appended.

        Raises:
          OSError: it could not be written (full disk).
        """
        with self._closed_by_refusal():
            self._records.flush()

    def close(self) -> None:
        """Writes what is left and closes the file; again, or after an error, nothing.

        Raises:
          OSError: what was left could not be written (full disk).
        """
        self._records.close()

    def _append(self, **fields: Any) -> None:
        from tensorboardX.proto import event_pb2

        # protobuf makes its names at run time
        kind = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
        event = kind(wall_time=time.time(), **fields)
        with self._closed_by_refusal():
            self._records.write(event.SerializeToString())

    @contextmanager
    def _closed_by_refusal(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            with suppress(OSError):  # closing tries to write the same bytes again
                self._records.close()
            raise


def _new_name() -> str:
    """A name that no other start has; TensorBoard goes by "tfevents" and by order.

    SummaryWriter's ends at the host: two starts in one second write into one file.
    """
    seconds, rest = divmod(time.time_ns(), 10**9)
    return f"events.out.tfevents.{seconds:010d}.{socket.gethostname()}.{rest:09d}"
