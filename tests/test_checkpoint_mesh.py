"""A checkpoint of one mesh comes back on any other, to the bit."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from process_runs import ROOT, WITHOUT_GLOO, free_port
from saved_states import bits
from tiny_runs import perturbed_state, tiny_program

from ddrl_jax.checkpoint import Checkpoints, abstract
from ddrl_jax.objectives.advantages import PerPromptTracker
from ddrl_jax.program import Program
from ddrl_jax.sharding import AXES, place_batch, put, replicated, to_host

SAVED_ON = (4, 2, 1, 1)
EPOCH = 7


def program_on(sizes: tuple[int, ...]) -> Program:
    mesh = {f"mesh.{axis}": n for axis, n in zip(AXES, sizes, strict=True)}
    edits = {"train.microbatch": 1, "train.minibatches": 1, "optimizer.ema_decay": 0.9}
    return tiny_program(mesh | edits)


def whole_state(program: Program) -> dict:
    """Every leaf with numbers of its own, the optimizer's included, and PRNG keys."""
    state, random = perturbed_state(program), np.random.default_rng(5)

    def drawn(a):
        if jnp.issubdtype(a.dtype, jnp.integer):
            return put(np.asarray(random.integers(9, 99), a.dtype), a.sharding)
        return put(random.normal(size=a.shape).astype(a.dtype), a.sharding)

    tracker = PerPromptTracker.init(4, 3)
    keys = jax.random.split(jax.random.key(3), 8)
    return {
        "train": jax.tree.map(drawn, state),
        "tracker": jax.tree.map(drawn, put(tracker, replicated(program.mesh))),
        "keys": place_batch(program.mesh, keys),
    }


def restored(program: Program, root: Path) -> dict:
    like = abstract(whole_state(program)) | {"train": program.abstract_state()}
    checkpoints = Checkpoints(root, 1, 9)
    found = checkpoints.restore(like)
    checkpoints.close()
    assert found is not None and (found.epoch, found.cursor) == (
        EPOCH,
        {"epoch": EPOCH},
    )
    for leaf, wanted in zip(
        jax.tree.leaves(found.state), jax.tree.leaves(like), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    return found.state


def save(root: Path, state: dict) -> None:
    checkpoints = Checkpoints(root, 1, 9)
    checkpoints.save(EPOCH, state, {"epoch": EPOCH})
    checkpoints.close()


def saved_bits(state: dict) -> list[tuple[str, str, bytes]]:
    state = state | {"keys": jax.random.key_data(state["keys"])}
    return bits(to_host(state))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(root, bits) of a checkpoint of the mesh SAVED_ON."""
    root = tmp_path_factory.mktemp("saved") / "checkpoints"
    state = whole_state(program_on(SAVED_ON))
    shards = {leaf.sharding.spec for leaf in jax.tree.leaves(state["train"].params)}
    assert any("fsdp" in spec for spec in shards)
    save(root, state)
    return root, saved_bits(state)


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 1, 1, 1), (1, 2, 2, 1)])
def test_on_another_mesh(sizes, saved):
    root, wanted = saved
    assert saved_bits(restored(program_on(sizes), root)) == wanted
    assert len(wanted) > 50 and len({part[2] for part in wanted}) > len(wanted) // 2


BESIDE = """
import pickle, sys
from pathlib import Path
import jax
rank, port, root, new = int(sys.argv[1]), *sys.argv[2:]
jax.config.update("jax_enable_preemption_service", False)
jax.distributed.initialize("127.0.0.1:" + port, 2, rank)
import test_checkpoint_mesh as test
program = test.program_on((2, 2, 2, 1))
state = test.restored(program, Path(root))
found = test.saved_bits(state)
spread = [a for a in jax.tree.leaves(state) if not a.is_fully_replicated]
assert spread and not any(a.is_fully_addressable for a in spread)
test.save(Path(new), state)
Path(f"{new}.{rank}").write_bytes(pickle.dumps(found))
"""


def ends(code: str, *arguments: object) -> list[str]:
    """Two processes of four devices run this to the end; what each has written."""
    port = str(free_port())
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    program = [sys.executable, "-c", WITHOUT_GLOO + code]
    children = [
        subprocess.Popen(
            [*program, str(rank), port, *map(str, arguments)],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = [child.communicate(timeout=300) for child in children]
    for child, (_, errors) in zip(children, found, strict=True):
        assert child.returncode == 0, errors
    return ["\n".join(output.splitlines()) for output, _ in found]


@pytest.mark.slow
def test_on_two_processes_and_back(saved, tmp_path):
    root, wanted = saved
    new = tmp_path / "of_two"
    ends(BESIDE, root, new)
    for rank in range(2):
        assert pickle.loads(Path(f"{new}.{rank}").read_bytes()) == wanted
    assert saved_bits(restored(program_on((1, 1, 1, 1)), new)) == wanted


# Of three checkpoints the second has one other value, in a leaf that is cut over both
# processes, and of the third what the second process has written is torn.
DAMAGED = """
import shutil, sys
from pathlib import Path
import jax, numpy as np
rank, port, root = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_enable_preemption_service", False)
jax.distributed.initialize("127.0.0.1:" + port, 2, rank)
from jax.sharding import NamedSharding, PartitionSpec as P
from ddrl_jax.checkpoint import Checkpoints, abstract
from ddrl_jax.distributed import main_first
from ddrl_jax.errors import UserError
from ddrl_jax.sharding import make_mesh, put
mesh = make_mesh({"data": 1, "fsdp": 8, "tensor": 1, "context": 1})
cut, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())

def values(epoch):
    a = np.random.default_rng(0).normal(size=8000).astype(np.float32)
    a[-1] = epoch
    return a

def state(epoch):
    a = values(epoch)
    return {"a": put(a, cut), "b": put(a[:3], whole), "c": put(a[:8], cut)}

def save(*epochs):
    checkpoints = Checkpoints(root, 1, 9)
    for epoch in epochs:
        checkpoints.save(epoch, state(epoch), {"epoch": epoch})
    checkpoints.close()

def exchange():
    shutil.rmtree(root / "2" / "state")
    shutil.copytree(root / "1" / "state", root / "2" / "state")

def tear():
    files = [*(root / "3" / "state" / "ocdbt.process_1" / "d").iterdir()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

def refused():
    try:
        Checkpoints(root, 1, 9).restore(abstract(state(0)))
    except UserError as error:
        print(error, "END", sep="\\n", flush=True)

save(1, 2)
main_first(lambda: rank or exchange())
refused()
save(3)
main_first(lambda: rank or tear())
refused()
found = Checkpoints(root, 1, 9).restore(abstract(state(0)), "last_good")
parts = [np.asarray(s.data) for s in found.state["a"].addressable_shards]
half = values(found.epoch)[4000 * rank :][:4000]
print(found.epoch, np.array_equal(np.concatenate(parts), half))
"""


@pytest.mark.slow
def test_damage_is_found_by_all_processes_and_they_go_on_from_the_same_epoch(tmp_path):
    first, second = (said.split("\nEND\n") for said in ends(DAMAGED, tmp_path))
    assert first == second
    wrong, torn, then = first
    assert then == "1 True"
    assert f"the checkpoint {tmp_path / '2'} is damaged" in wrong
    assert "the bytes of a are not those that were saved" in wrong
    assert f"the checkpoint {tmp_path / '3'} is damaged" in torn
    assert "process 1: " in torn and "bound method" not in torn
    assert sorted(p.name for p in (tmp_path / "damaged").iterdir()) == ["2", "3"]
    like = {"a": jnp.zeros(8000), "b": jnp.zeros(3), "c": jnp.zeros(8)}
    found = Checkpoints(tmp_path, 1, 9).restore(abstract(like))
    assert found is not None and found.epoch == 1  # read by one process as well
