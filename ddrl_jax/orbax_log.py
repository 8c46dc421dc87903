"""What Orbax says: its exceptions in one line, and all beside them kept quiet.

A failed restore leaves other reads behind; when they end they report through three
channels (Orbax's log, sys.unraisablehook, asyncio's log) and would bury the one
message.
"""

import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WRITE_FAULTS = re.compile(
    r"No space left|RESOURCE_EXHAUSTED|PERMISSION_DENIED|Read-only|os_error_code|"
    r"OS error|Input/output error|quota",
    re.IGNORECASE,
)
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


def is_write_fault(error: BaseException | None) -> bool:
    """Whether a failed save comes from the disk, as far as its causes tell."""
    while error is not None:
        if isinstance(error, OSError) and error.errno != errno.EEXIST:
            return True
        if _WRITE_FAULTS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: object) -> str:
    """Returns what an exception says, without TensorStore's specification."""
    text = str(error).strip() or type(error).__name__
    return re.split(r" \[tensorstore_spec| See full TensorStore", text.splitlines()[0])[
        0
    ]
