"""SIGTERM and Ctrl-C become a flag that the training loop reads between steps."""

import os
import signal
import threading
from types import FrameType, TracebackType

import numpy as np

from ddrl_jax.distributed import every

_NOTICE = b"\n%s: finishing the step, then saving\n"


class Preemption:
    """Asks the run to stop at the next safe point.

    While it is entered, SIGTERM and the first SIGINT only set `requested`, so that a
    save in progress completes; later SIGTERMs change nothing, a second SIGINT raises
    KeyboardInterrupt. The old handlers return on exit. Python runs handlers in the main
    thread only, so elsewhere this installs none and `requested` stays False.

    Attributes:
      requested: whether a signal has asked for the end.
      signal_name: which one, "SIGTERM" or "SIGINT"; None before.
      agreed: whether all processes of the run have agreed to stop.
    """

    def __init__(self) -> None:
        self.requested = self.agreed = self._interrupted = False
        self.signal_name: str | None = None
        self._old: dict[int, object] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._old.items():
            # None: the handler was installed outside Python and can not be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # pyright: ignore[reportArgumentType]
        self._old.clear()

    def agree(self) -> bool:
        """Whether to stop: a signal has reached this process or any other.

        Every process has to call it at the same point of its work, so that all of them
        stop there.
        """
        if not self.agreed:
            self.agreed = bool(every(np.array(self.requested)).any())
        return self.agreed

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        if self.requested:
            return
        self.requested = True
        self.signal_name = signal.Signals(number).name
        # os.write: print is not safe inside a handler that interrupts a print.
        os.write(2, _NOTICE % self.signal_name.encode())
