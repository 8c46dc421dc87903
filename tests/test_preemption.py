import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ddrl_jax.preemption import Preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_only_sets_the_flag(number, capfd):
    with Preemption() as stop:
        assert not stop.requested and stop.signal_name is None
        os.kill(os.getpid(), number)
        assert stop.requested and stop.signal_name == number.name
    assert number.name in capfd.readouterr().err


def test_more_sigterms_change_nothing(capfd):
    with Preemption() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert capfd.readouterr().err.count("SIGTERM") == 1


def test_the_first_ctrl_c_after_a_sigterm_does_not_end_it():
    with Preemption() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and stop.signal_name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_twice_ends_at_once():
    with Preemption() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_old_handlers_come_back_even_after_an_error():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(RuntimeError), Preemption():
        changed = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
        assert all(a != b for a, b in zip(before, changed, strict=True))
        raise RuntimeError
    assert before == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]


def test_in_another_thread_it_installs_nothing():
    before, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with Preemption() as stop:
            found.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, before)]


CHILD = """
import sys, time
import jax.numpy as jnp
from ddrl_jax.checkpoint import Checkpoints
from ddrl_jax.preemption import Preemption

checkpoints = Checkpoints(sys.argv[1], 0, 2)
with Preemption() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    state = {str(i): jnp.full(500_000, i, jnp.float32) for i in range(4)}
    checkpoints.save(7, state, {"epoch": 7}, force=True)
    print("saving", flush=True)
    time.sleep(0.1)
    checkpoints.close()
print("saved after", stop.signal_name, flush=True)
"""


def test_sigterm_during_the_save_that_sigterm_asked_for_does_not_break_it(tmp_path):
    script, root = tmp_path / "child.py", tmp_path / "checkpoints"
    script.write_text(CHILD)
    repository = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, script, root],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(repository)},
    ) as child:
        assert child.stdout.readline() == "ready\n"
        child.terminate()
        assert child.stdout.readline() == "saving\n"
        child.terminate()
        assert child.stdout.readline() == "saved after SIGTERM\n"
        assert child.wait(timeout=60) == 0
    assert [path.name for path in root.iterdir()] == ["7"]
    assert (root / "7" / "commit_success.txt").exists()
