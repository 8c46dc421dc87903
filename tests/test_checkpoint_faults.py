import errno
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from saved_states import bits, make_state, restore, save_epochs

from ddrl_jax.checkpoint import Checkpoints, abstract
from ddrl_jax.errors import UserError


@pytest.fixture
def root(tmp_path) -> Path:
    """A run that has saved epochs 1, 2 and 3."""
    save_epochs(tmp_path / "checkpoints", (1, 2, 3))
    return tmp_path / "checkpoints"


# --- Full disk


def no_space(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_in_the_background_is_one_error(root, monkeypatch, capfd):
    checkpoints = Checkpoints(root, 1, 9)
    checkpoints.restore(abstract(make_state(0)))
    handler = ocp.JsonCheckpointHandler
    monkeypatch.setattr(handler, "_save_fn", no_space_async)
    assert checkpoints.save(4, make_state(4), {})  # fails after it has returned
    with pytest.raises(UserError, match="epoch 4 could not be written") as error:
        checkpoints.save(5, make_state(5), {})
    checkpoints.close()
    assert "No space left" in error.value.got
    assert "epoch 3" in error.value.way_out
    assert capfd.readouterr().err == ""  # the message is all that the user sees
    assert restore(root).epoch == 3


async def no_space_async(*_args, **_kwargs):
    no_space()


def test_the_last_save_fails_at_close_and_not_silently(root, monkeypatch):
    checkpoints = Checkpoints(root, 1, 9)
    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", no_space_async)
    checkpoints.save(4, make_state(4), {})
    with pytest.raises(UserError, match="No space left"):
        checkpoints.close()


def test_a_bug_is_not_reported_as_a_full_disk(root, monkeypatch):
    async def broken(*_args, **_kwargs):
        raise RuntimeError("a bug")

    checkpoints = Checkpoints(root, 1, 9)
    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", broken)
    checkpoints.save(4, make_state(4), {})
    with pytest.raises(RuntimeError, match="a bug"):
        checkpoints.close()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount).returncode != 0:
        pytest.skip("no permission to mount a small disk; the patched tests stand in")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk, capfd):
    def noise(epoch: int):
        values = np.random.default_rng(epoch).normal(size=150_000)
        return {"w": jnp.asarray(values, jnp.float32)}

    root, done = small_disk / "checkpoints", 0
    checkpoints = Checkpoints(root, 1, 9)
    with pytest.raises(UserError, match="could not be written") as error:
        for epoch in range(1, 9):
            checkpoints.save(epoch, noise(epoch), {})
            checkpoints.wait()
            done = epoch
    checkpoints.close()
    assert done >= 1 and f"goes on from epoch {done}" in error.value.way_out
    assert capfd.readouterr().err == ""
    again = Checkpoints(root, 1, 9)
    found = again.restore(abstract(noise(0)))
    again.close()
    assert found.epoch == done and bits(found.state) == bits(noise(done))


# --- kill -9

CHILD = """
import sys
import jax, numpy as np
from ddrl_jax.checkpoint import Checkpoints, abstract

def state(epoch):
    rng = np.random.default_rng(epoch)
    return {str(i): jax.numpy.asarray(rng.normal(size=60_000)) for i in range(4)}

checkpoints = Checkpoints(sys.argv[1], 1, 2)
found = checkpoints.restore(abstract(state(0)))
epoch = found.epoch if found else 0
if found:
    same = [(found.state[k] == v).all() for k, v in state(epoch).items()]
    assert all(same) and found.cursor == {"epoch": epoch}, "restored another state"
print("from", epoch, flush=True)
while True:
    checkpoints.wait()
    print("done", epoch, flush=True)
    epoch += 1
    checkpoints.save(epoch, state(epoch), {"epoch": epoch})
"""


def test_kill_9_at_random_moments_loses_no_committed_checkpoint(tmp_path):
    script, root = tmp_path / "child.py", tmp_path / "checkpoints"
    script.write_text(textwrap.dedent(CHILD))
    moments = random.Random(0)
    done = 0
    for _ in range(5):
        saves, seconds = moments.randint(1, 4), 0.15 * moments.random()
        started, last = run_and_kill(script, root, saves, seconds)
        # One more may have been committed after the last line was printed.
        assert done <= started <= done + 1
        done = last
    found = restore_noise(root)
    assert done <= found <= done + 1 and done >= 5


def run_and_kill(script: Path, root: Path, saves: int, seconds: float):
    """Kills a child some time after some saves.

    Returns the epochs that it started from and last called done.
    """
    repository = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, script, root],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(repository)},
    ) as child:
        lines = [child.stdout.readline() for _ in range(saves + 2)]
        time.sleep(seconds)
        child.kill()
        lines += child.stdout.read().splitlines(keepends=True)
        assert lines[0].startswith("from"), child.stderr.read()
    # The kill may have cut the last line short.
    epochs = [int(line.split()[1]) for line in lines if line.endswith("\n")]
    return epochs[0], epochs[-1]


def restore_noise(root: Path) -> int:
    like = {str(i): jnp.zeros(60_000) for i in range(4)}
    checkpoints = Checkpoints(root, 1, 2)
    found = checkpoints.restore(abstract(like))
    checkpoints.close()
    return found.epoch
