"""A profiler trace of a range of epochs, for `--profile=FIRST:LAST`.

    pip install xprof && xprof --logdir=WORKDIR/profile

shows it; every epoch is one step in it. Process 0 of several traces its own devices.
"""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import jax

Epochs = tuple[int, int]  # first and last, as metrics.jsonl numbers them


class Profile:
    """Traces the epochs of a range; a context manager, so that no trace stays open.

    What an epoch includes ends where the next one begins: its evaluation and its
    checkpoint too. A run that is resumed within the range traces what is left of it.

    Args:
      folder: where traces are written, each start of the program its own.
      epochs: first and last epoch, or None for no trace.
    """

    def __init__(self, folder: Path, epochs: Epochs | None):
        # Of several processes on one machine each would write over the other's file.
        self.folder = folder
        self._epochs = epochs if jax.process_index() == 0 else None
        self._step = ExitStack()
        self._tracing = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def begin(self, epoch: int) -> None:
        """Says that an epoch begins, and so that the one before has ended.

        Args:
          epoch: its number, from 1.
        """
        if self._epochs is None:
            return
        first, last = self._epochs
        self._step.close()
        if self._tracing and epoch > last:
            self._stop()
        if not first <= epoch <= last:
            return
        if not self._tracing:
            jax.profiler.start_trace(str(self.folder))
            self._tracing = True
        name = jax.profiler.StepTraceAnnotation("epoch", step_num=epoch)
        self._step.enter_context(name)

    def _stop(self) -> None:
        self._step.close()
        if not self._tracing:
            return
        self._tracing = False
        jax.profiler.stop_trace()
        how = f"pip install xprof && xprof --logdir={self.folder}"
        print(f"profile: {self.folder} ({how})", flush=True)
