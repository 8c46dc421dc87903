import errno
import io
import math
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from ddrl_jax.board import Board
from ddrl_jax.errors import UserError
from ddrl_jax.metrics import Metrics

LOG = ConfigDict({"tensorboard": True, "wandb": False})
NUMBERS = {f"value/{i}": i / 4 for i in range(40)}
PICTURE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def crc32c(content: bytes) -> int:
    """Castagnoli's checksum bit by bit, from its polynomial."""
    rest = 0xFFFFFFFF
    for byte in content:
        rest ^= byte
        for _ in range(8):
            rest = rest >> 1 ^ (0x82F63B78 if rest & 1 else 0)
    return rest ^ 0xFFFFFFFF


def masked(content: bytes) -> bytes:
    """As TFRecord stores it: turned by 15 bits, and a constant added."""
    crc = crc32c(content)
    turned = (crc >> 15 | crc << 17) + 0xA282EAD8
    return (turned & 0xFFFFFFFF).to_bytes(4, "little")


def events(path) -> list:
    """TFRecord: length (8 bytes), its checksum (4), the record, its checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    content, found = path.read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        record, content = content[12 : 12 + length], content[8:]
        assert content[:4] == masked(length.to_bytes(8, "little"))
        assert content[4 + length : 8 + length] == masked(record)
        content = content[8 + length :]
        found.append(Event.FromString(record))
    return found


def files(root) -> list:
    """In the order in which TensorBoard reads them."""
    return sorted((root / "tensorboard").iterdir())


def starts(path) -> list[int]:
    kinds = [(event.step, event.session_log.status) for event in events(path)]
    return [step for step, status in kinds if status == 1]  # SessionLog.START


def test_the_checksum_is_the_published_one():
    assert crc32c(b"123456789") == 0xE3069283


def test_numbers_and_pictures_are_read_back_while_the_run_goes_on(tmp_path):
    values = {"reward/mean": 0.25, "data/loss": math.nan, "device": "cpu", "count": 3}
    with Metrics(tmp_path, LOG) as metrics:
        metrics.write(4, values)
        metrics.images(7, "evaluation", PICTURE)
        (file,) = files(tmp_path)
        first, *others = events(file)
    assert "tfevents" in file.name and first.file_version == "brain.Event:2"
    assert all(event.wall_time > 1.7e9 for event in (first, *others))
    found = {v.tag: (e.step, v) for e in others for v in e.summary.value}
    picture = found.pop("evaluation")
    numbers = {tag: (step, v.simple_value) for tag, (step, v) in found.items()}
    assert numbers == {"reward/mean": (4, 0.25), "count": (4, 3.0)}
    drawn = Image.open(io.BytesIO(picture[1].image.encoded_image_string))
    np.testing.assert_array_equal(np.asarray(drawn), PICTURE)
    assert picture[0] == 7 and len(events(file)) == 4  # close() added nothing


def test_a_restart_hides_what_came_after_the_step_it_goes_on_from(tmp_path):
    for resume_step in (None, 5):
        with Metrics(tmp_path, LOG, resume_step) as metrics:
            metrics.write(6, {"reward/mean": 0.5})
    first, second = files(tmp_path)
    assert starts(first) == [] and starts(second) == [6]
    version, start, number = events(second)  # what hides comes before what stays
    assert version.file_version and start.session_log.status and number.summary.value


def test_starts_within_a_second_have_files_of_their_own_in_order(tmp_path):
    written = []
    for step in range(4):
        board = Board(tmp_path / "tensorboard")
        board.scalars(step, {"a": 1.0})
        board.close()
        written.append(board.path)
    assert files(tmp_path) == written
    assert [events(path)[-1].step for path in written] == [0, 1, 2, 3]


@pytest.fixture
def disk(monkeypatch):
    """A disk below tensorboardX that can be full, and counts what it is asked."""
    state = SimpleNamespace(full=False, asked=0)

    class File(io.FileIO):
        def write(self, data):
            state.asked += 1
            if state.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def open_file(path):
        return io.BufferedWriter(File(path, "wb"))

    monkeypatch.setattr("tensorboardX.record_writer.open_file", open_file)
    return state


def outcome(call) -> BaseException | None:
    """What a call raises. One that hangs fails here, and does not hang the tests."""
    found = []

    def run():
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=300)
    assert found, "it hangs"
    return found[0]


WRITES = {
    "numbers": lambda metrics: metrics.write(2, NUMBERS),
    "a picture": lambda metrics: metrics.images(2, "evaluation", PICTURE),
}


@pytest.mark.parametrize("kind", WRITES)
def test_a_disk_that_fills_up_is_one_error_and_no_hang(tmp_path, disk, kind):
    metrics = Metrics(tmp_path, LOG)
    metrics.write(1, NUMBERS)
    (file,) = files(tmp_path)
    before = file.read_bytes()
    disk.full = True
    error = outcome(lambda: WRITES[kind](metrics))
    assert isinstance(error, UserError)
    assert f"{file} could not be written" in str(error)
    assert "No space left" in str(error)
    disk.full, asked = False, disk.asked  # room again, too late
    assert outcome(metrics.close) is None
    assert disk.asked == asked and file.read_bytes() == before


def test_a_disk_that_is_full_from_the_start_is_one_error(tmp_path, monkeypatch):
    def full(path):
        return open("/dev/full", "wb")

    monkeypatch.setattr("tensorboardX.record_writer.open_file", full)
    error = outcome(lambda: Metrics(tmp_path, LOG))
    assert isinstance(error, UserError)
    assert f"{tmp_path / 'tensorboard'} could not be written" in str(error)
    assert "No space left" in str(error)


def test_what_closing_could_not_write_is_one_error(tmp_path, disk):
    board = Board(tmp_path)
    board.scalars(1, {"a": 1.0})
    disk.full = True
    with pytest.raises(OSError, match="No space left"):
        board.close()
    asked = disk.asked
    board.close()
    assert disk.asked == asked


def test_no_thread_writes(tmp_path):
    before = set(threading.enumerate())
    with Metrics(tmp_path, LOG) as metrics:
        metrics.write(1, NUMBERS)
        metrics.images(1, "evaluation", PICTURE)
        assert set(threading.enumerate()) <= before
    assert set(threading.enumerate()) <= before


def test_importing_it_does_not_import_tensorboardx():
    code = "import sys, ddrl_jax.board; print('tensorboardX' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert result.stdout.strip() == "False"
