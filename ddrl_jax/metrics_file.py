"""metrics.jsonl when a run goes on: what it says of the epochs to come moves away.

Then k epochs, a stop and k epochs leave the lines of 2k epochs at a stretch.
"""

import json
import os
from typing import Any

from ddrl_jax.metrics import ONLY_AT_END
from ddrl_jax.text import parse_json
from ddrl_jax.workdir import Workdir, replace_file


def written_steps(home: Workdir) -> list[int]:
    """Returns the epochs of which metrics.jsonl has a whole line.

    Args:
      home: the folder of the run.
    """
    if not home.metrics.exists():
        return []
    steps = map(_step_of, home.metrics.read_bytes().splitlines(keepends=True))
    return [int(step) for step in steps if step != float("inf")]


def continue_from(home: Workdir, step: int) -> int:
    """Moves the metrics after a restored epoch out of metrics.jsonl.

    They are appended to metrics.discarded.jsonl, with any line that a kill has cut
    short, so that nothing is lost and metrics.jsonl has one line an epoch. So do the
    values that the line of the restored epoch holds only because the run ended there.

    Args:
      home: the folder of the run.
      step: the last `step` that stays; -1 moves every line.

    Returns:
      The number of lines that were appended.
    """
    if not home.metrics.exists():
        return 0
    lines = home.metrics.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    moved = [line for line in lines if _step_of(line) > step]
    if kept:
        kept[-1], *more = _without_the_end(kept[-1])
        moved = more + moved
    if moved:
        # First the copy, then the cut: a kill between them leaves both.
        with home.discarded.open("ab") as file:
            file.writelines(line.rstrip(b"\n") + b"\n" for line in moved)
            file.flush()
            os.fsync(file.fileno())
        replace_file(home.metrics, b"".join(kept))
    return len(moved)


def _without_the_end(text: bytes) -> list[bytes]:
    """The line of an epoch that is not the last any more, and what it has lost."""
    line = parse_json(text)
    ended = line.pop(ONLY_AT_END, [])
    if not ended:
        return [text]
    lost = {key: line.pop(key) for key in ended}
    bad = [key for key in line.pop("nonfinite", []) if key not in ended]
    line |= {"nonfinite": bad} if bad else {}
    return [_text(line), _text({"step": line["step"]} | lost)]


def _text(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _step_of(line: bytes) -> int | float:
    """The step of a line of metrics.jsonl; infinity where the line is cut short."""
    try:
        return parse_json(line)["step"] if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
