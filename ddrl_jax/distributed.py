"""Several processes as one run: how they find each other and what they agree on.

A lone process is not joined to anything. The service of jax.distributed would end it
when its heartbeats come late, as after the sleep of a laptop, and gives it nothing:
its signals are handled by ddrl_jax.preemption, and Orbax needs no service for one.
"""

import hashlib
import itertools
import json
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ddrl_jax.errors import TryAgain, UserError
from ddrl_jax.interfaces import Scores
from ddrl_jax.surroundings import Place, check_alone, is_lone_task
from ddrl_jax.watch import FOREVER_MS, Rank, Watch

HEARTBEAT = 45  # seconds until JAX aborts the others of a process that stands still;
# Watch is sooner where it has ended or its machine is gone
ARRIVAL = 300  # seconds that the processes of a run may take to come together
TEXT_BYTES = 512  # of what a process tells the others
T = TypeVar("T")


@contextmanager
def joined(where: Place | None) -> Iterator[None]:
    """Joins this process to the others of its run, if it has any.

    To be entered before anything touches a device. When another process fails or is
    killed, this one ends too, with a message that names it.

    Args:
      where: of `surroundings.place`; None lets jax.distributed ask the cluster: Slurm,
        Open MPI, a TPU pod, GKE.

    Raises:
      TryAgain: the processes do not come together.
    """
    from jax._src.distributed import global_state  # Orbax and Flax read it too

    if not _initialize(where) or global_state.num_processes == 1:
        yield
        return
    try:
        # Asks no device: one that can not be started is told to the others as well.
        watch = Watch(
            global_state.client,
            str(global_state.coordinator_address),
            Rank(global_state.process_id, global_state.num_processes),
        )
    except (OSError, RuntimeError) as error:  # a socket's, or the service's
        raise _not_together(where, error) from error
    try:
        yield
    except BaseException as error:
        watch.fail(error)
        raise
    watch.finish()
    jax.distributed.shutdown()


def _initialize(where: Place | None) -> bool:
    """Starts jax.distributed; False for a process that is alone."""
    if where is not None and where.processes == 1:
        return False
    # Of a lone task a cluster would make one process a device, and hide the others.
    if where is None and is_lone_task(os.environ):
        return False
    # Through a web proxy gRPC would not reach the coordinator; empty means none, and
    # only to gRPC: downloads keep the proxy. JAX warns of every variable of that kind,
    # which is of use only where somebody else's says what gRPC does.
    ours = "grpc_proxy" not in os.environ
    os.environ.setdefault("grpc_proxy", "")
    if ours:
        jax.config.update("jax_check_proxy_envs", False)
    # SIGTERM is read by ddrl_jax.preemption.
    jax.config.update("jax_enable_preemption_service", False)
    options: dict[str, Any] = {
        "heartbeat_timeout_seconds": HEARTBEAT,
        "initialization_timeout": ARRIVAL,
    }
    try:
        if where is None:
            jax.distributed.initialize(**options)
        else:
            jax.distributed.initialize(
                *where, cluster_detection_method="deactivate", **options
            )
    except ValueError as error:
        if where is None and "coordinator_address should be" in str(error):
            check_alone(os.environ)
            return False  # no cluster of any kind
        raise _not_together(where, error) from error
    except RuntimeError as error:
        raise _not_together(where, error) from error
    return True


def _not_together(where: Place | None, error: Exception) -> TryAgain:
    given = "a cluster"
    if where is not None:
        given = f"{where.coordinator}, process {where.process} of {where.processes}"
    return TryAgain(
        "the processes of the run do not come together",
        got=f"{given}: {' '.join(str(error).split())[:500]}",
        wanted=f"all of them within {ARRIVAL} s, and process 0 at the coordinator's "
        "address",
        way_out="look at the messages of the others, and name a free port that all of "
        "them reach; --distributed.processes=1 runs this process alone",
    )


def is_main() -> bool:
    """Whether this process writes and prints for the run: process 0."""
    return jax.process_index() == 0


def every(values: np.ndarray) -> np.ndarray:
    """Gathers an array of the same shape and type from each process.

    Every process has to call it. Bits are kept, whatever the type.

    Args:
      values: [...], of this process.

    Returns:
      [processes ...].
    """
    values = np.ascontiguousarray(values)
    if jax.process_count() == 1:
        return values[None]
    raw = multihost_utils.process_allgather(values.reshape(-1).view(np.uint8))
    return np.asarray(raw).view(values.dtype).reshape(-1, *values.shape)


def every_text(text: str) -> list[str]:
    """Gathers a text from each process, cut to TEXT_BYTES; see `every`."""
    raw = text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES)
    rows = every(_bytes(raw))
    return [row.tobytes().decode(errors="ignore").strip() for row in rows]


def numbers_of_main(values: list[int]) -> list[int]:
    """Returns process 0's list, of any length. Every process has to call it."""
    count = int(every(np.array([len(values)]))[0, 0])
    if not count:
        return []
    own = np.zeros(count, np.int64)
    own[: len(values)] = values[:count]
    return every(own)[0].tolist()


def meet(mesh: Mesh) -> None:
    """Connects the devices of every group that the mesh can form, before any compiling.

    gloo waits 30 s for the other side when a group first talks, and compiling can set
    the processes further apart than that. NCCL and TPUs wait longer.
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    sizes = range(1, len(axes) + 1)
    for group in itertools.chain(*(itertools.combinations(axes, n) for n in sizes)):
        sharding = NamedSharding(mesh, P(group))
        ones = np.ones(math.prod(mesh.shape[axis] for axis in group), np.float32)
        x = jax.make_array_from_callback(ones.shape, sharding, ones.__getitem__)
        jax.block_until_ready(jax.jit(jnp.sum)(x))


def main_first(work: Callable[[], T]) -> T:
    """Runs work on process 0, then on the others, which find what it has written.

    Returns when all are done. However long it takes: an operation of devices would wait
    for its other side only as long as its library does.
    """
    if not is_main():
        _wait_for_all("main_first")
    found = work()
    if is_main():
        _wait_for_all("main_first")
    _wait_for_all("main_first_done")
    return found


def _wait_for_all(name: str) -> None:
    """Returns when all processes have called it; `Watch` sees those that have ended."""
    from jax._src.distributed import global_state

    if global_state.client is not None:
        global_state.client.wait_at_barrier(f"ddrl_jax/{name}", FOREVER_MS)


def check_shared(file: Path) -> None:
    """Stops the run where a process does not see the file that process 0 sees.

    Raises:
      UserError: names the processes.
    """
    seen = file.read_bytes() if file.exists() else b""
    digests = every(_bytes(hashlib.sha256(seen).digest()))
    apart = np.flatnonzero((digests != digests[0]).any(axis=1))
    if len(apart):
        raise UserError(
            f"{file.parent} is not the same folder in all processes",
            got=f"another one than process 0's in {', '.join(map(str, apart))}",
            wanted="one folder that every process of the run reaches by this path",
            way_out="name a folder on a shared file system with --workdir",
        )


def own_share(total: int) -> np.ndarray:
    """Rows [n] of `total` that this process works on, where every process has all."""
    return np.array_split(np.arange(total), jax.process_count())[jax.process_index()]


def whole_scores(scores: Scores, rows: np.ndarray, total: int) -> Scores:
    """Joins the scores of all processes in the order of the samples.

    Args:
      scores: of the rows that this process has judged.
      rows: [n] their positions; each position is one process's.
      total: how many samples there are.
    """
    if jax.process_count() == 1:
        return scores
    names = list(scores.values)
    table = np.zeros((len(names) + 2, total), np.float32)
    table[:, rows] = [*scores.values.values(), scores.valid, np.ones(len(rows))]
    tables = every(table)  # [processes names+2 total]
    owner = tables[:, -1].argmax(0)
    *values, valid, judged = tables[owner, :, np.arange(total)].T
    assert judged.all(), "a sample that no process holds"
    return Scores(dict(zip(names, values, strict=True)), valid.astype(bool))


def summed(counts: dict[str, float]) -> dict[str, float]:
    """Adds up what each process has counted, by name; a name it lacks is 0 there.

    Every process has to call it, or none because all count nothing.
    """
    if not counts or jax.process_count() == 1:
        return counts
    raw = json.dumps(counts).encode()
    longest = int(every(np.array([len(raw)])).max())
    rows = every(_bytes(raw.ljust(longest)))
    found = [json.loads(row.tobytes()) for row in rows]
    names = dict.fromkeys(name for each in found for name in each)
    return {name: sum(each.get(name, 0.0) for each in found) for name in names}


def check_agreement(values: Mapping[str, object]) -> None:
    """Stops the run where a process stands elsewhere than the others.

    Args:
      values: what has to be the same everywhere, each with a stable str().

    Raises:
      UserError: names the processes that differ, their hosts, and in what.
    """
    if jax.process_count() == 1:
        return
    names, texts = list(values), [str(value) for value in values.values()]
    hosts = every_text(socket.gethostname())
    _compare(hosts, ["the list of what is compared"], [str(names)])
    _compare(hosts, names, texts)


def _compare(hosts: list[str], names: list[str], texts: list[str]) -> None:
    digests = [hashlib.sha256(text.encode()).digest()[:8] for text in texts]
    rows = every(np.stack([_bytes(digest) for digest in digests]))
    whole = [row.tobytes() for row in rows]
    usual = max(whole, key=whole.count)  # the first of the most frequent ones
    others = [i for i, row in enumerate(whole) if row != usual]
    if not others:
        return
    differ = (rows != rows[whole.index(usual)]).any(axis=(0, 2))
    here = jax.process_index()
    raise UserError(
        "the processes do not agree on what they run",
        got="; ".join(f"process {i} on {hosts[i]} differs" for i in others)
        + " in "
        + ", ".join(np.array(names)[differ][:8]),
        wanted="the same program, configuration and prompts in every process; process "
        f"{here} has "
        + ", ".join(
            f"{n} = {t[:60]}" for n, t, d in zip(names, texts, differ, strict=True) if d
        )[:400],
        way_out="start all processes with the same command on the same code and data",
    )


def _bytes(raw: bytes) -> np.ndarray:
    return np.frombuffer(raw, np.uint8)


def leave(status: int) -> None:
    """Ends a process that is joined to others at once, and any other one not at all.

    The farewell of jax.distributed would wait for processes that do not come to it.
    """
    from jax._src.distributed import global_state

    if global_state.client is None and global_state.service is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
