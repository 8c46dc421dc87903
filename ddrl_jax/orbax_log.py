"""What Orbax and asyncio say beside the exception that reaches us, kept quiet.

A failed restore leaves other reads behind; when they end they report through three
channels (Orbax's log, sys.unraisablehook, asyncio's log) and would bury the one
message.
"""

import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ORBAX = f"{os.sep}orbax{os.sep}"  # in the path of its source files


def drop_own_log() -> None:
    """Drops Orbax's own log: what it reports reaches us as exceptions as well."""
    logging.getLogger("absl").addFilter(_not_from_orbax)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return _ORBAX not in record.pathname


def hook_without_late_reads() -> Callable[[Any], None]:
    """Returns a sys.unraisablehook that leaves out what late reads raise."""
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        frames = traceback.walk_tb(unraisable.exc_traceback)
        late = any(_ORBAX in frame.f_code.co_filename for frame, _ in frames)
        if not late and "Event loop is closed" not in str(unraisable.exc_value):
            previous(unraisable)

    return hook


def drop_late_reads(root: Path) -> None:
    """Drops asyncio's log of failed reads under this checkpoint root."""
    names = {str(root), str(root.resolve())}

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not any(name in text for name in names)

    logging.getLogger("asyncio").addFilter(keep)
