"""What the surroundings of a process say of it, held against what it has found.

A run that is smaller or slower than it was asked to be looks like one that works.
"""

from collections.abc import Mapping
from typing import NamedTuple

from ddrl_jax.errors import UserError

KEYS = ("coordinator", "processes", "process")  # --distributed.KEY, DDRL_KEY
# How those who start processes say how many there are.
COUNTS = {
    "NNODES": "xpk, torchrun",
    "SLURM_NTASKS": "Slurm",
    "OMPI_COMM_WORLD_SIZE": "Open MPI",
    "PMI_SIZE": "MPICH",
    "JAX_PROCESS_COUNT": "xpk",
}
# Those of them that JAX reads, in its order: one may have started the other.
CLUSTERS = ("OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")
# And how they say which one this is.
RANKS = (
    "NODE_RANK",
    "SLURM_PROCID",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "TPU_WORKER_ID",
    "JOB_COMPLETION_INDEX",
)
BACKENDS = {"cuda": "gpu", "rocm": "gpu"}  # what JAX calls the backend of a platform


class Place(NamedTuple):
    """Where a process stands in a run that was started by hand.

    Attributes:
      coordinator: HOST:PORT of process 0, free there and within reach of all.
      processes: how many there are.
      process: which one this is, from 0.
    """

    coordinator: str
    processes: int
    process: int


def place(
    flags: Mapping[str, str | None], environment: Mapping[str, str]
) -> Place | None:
    """Reads where this process stands from flags, or else from the environment.

    Args:
      flags: coordinator, processes and process as the command line gives them.
      environment: DDRL_COORDINATOR, DDRL_PROCESSES, DDRL_PROCESS.

    Returns:
      None where nothing is given: then the cluster, if there is one, says.

    Raises:
      UserError: only a part is given, or a value that can not be.
    """
    found = {
        key: flags.get(key) or environment.get(f"DDRL_{key.upper()}") for key in KEYS
    }
    if not any(found.values()):
        return None
    if found["processes"] == "1":
        return Place(found["coordinator"] or "", 1, 0)
    shown = ", ".join(f"{key} {value or 'missing'}" for key, value in found.items())
    try:
        coordinator, port = str(found["coordinator"]).rsplit(":", 1)
        count, index = int(found["processes"] or ""), int(found["process"] or "")
        good = bool(coordinator) and 0 < int(port) < 65536 and 0 <= index < count
    except ValueError:
        good, count, index = False, 0, 0
    if good:
        return Place(str(found["coordinator"]), count, index)
    raise UserError(
        "it is not clear which process of the run this is",
        got=shown,
        wanted="--distributed.coordinator=HOST:PORT, --distributed.processes=N and "
        "--distributed.process=0..N-1, or DDRL_COORDINATOR, DDRL_PROCESSES and "
        "DDRL_PROCESS",
        way_out="give all three to every process, or none of them where Slurm, Open "
        "MPI, a TPU pod or GKE starts the processes",
    )


def check_one(mode: str, where: Place | None, environment: Mapping[str, str]) -> None:
    """Stops a mode that is the work of one process where there are several.

    A batch script, which has the variables of process 0, may run one.

    Args:
      mode: its name.
      where: of `place`.
      environment: os.environ.

    Raises:
      UserError: several processes are named by hand, or this is not the first one that
        a cluster has started.
    """
    told = [f"{name}={environment[name]}" for name in RANKS if name in environment]
    told = [text for text in told if text.partition("=")[2] not in ("", "0")]
    if where is not None:
        here = f"process {where.process} of {where.processes}"
        told = [here] if where.processes > 1 else []
    if not told:
        return
    raise UserError(
        f"--mode={mode} is the work of one process",
        got=", ".join(told),
        wanted="one process, which needs no other",
        way_out=f"start --mode={mode} once; --distributed.processes=1 says that this "
        "process is the only one",
    )


def check_platform(wanted: str, found: str) -> None:
    """Stops a run that fell back to another platform than the first of a list.

    JAX passes over "cuda" in silence where no NVIDIA device is visible, as in a
    container that was not given any.

    Args:
      wanted: JAX_PLATFORMS, such as "cuda,cpu"; empty where JAX may choose.
      found: jax.default_backend().

    Raises:
      UserError: they differ.
    """
    first = wanted.split(",")[0].strip()
    if not first or found in (first, BACKENDS.get(first)):
        return
    raise UserError(
        f"JAX has not started on {first}",
        got=f"{found}, where JAX_PLATFORMS={wanted}",
        wanted=f"a {first} device that this process sees, and JAX's wheels for it",
        way_out="look at nvidia-smi here, and give the container its devices "
        '(docker run --gpus=all); pip install -e ".[gpu]" or ".[gpu-cuda12]" by the '
        f"driver; JAX_PLATFORMS={found} runs on {found}",
    )


def is_lone_task(environment: Mapping[str, str]) -> bool:
    """Whether the innermost of the clusters that JAX knows has started this one only.

    Args:
      environment: os.environ. mpirun within one task of Slurm leaves both counts there,
        and its own is the one that holds.
    """
    counts = [environment[name] for name in CLUSTERS if name in environment]
    return counts[:1] == ["1"]


def check_alone(environment: Mapping[str, str]) -> None:
    """Stops a process that found no others where there are to be several.

    Args:
      environment: os.environ.

    Raises:
      UserError: a variable of COUNTS is above 1, several hosts form the TPU slice, or
        this is not the first pod of an indexed Kubernetes job.
    """
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    told = [
        f"{name}={environment[name]} ({who})"
        for name, who in COUNTS.items()
        if environment.get(name, "").isdigit() and int(environment[name]) > 1
    ]
    if "," in hosts:
        told.append(f"TPU_WORKER_HOSTNAMES={hosts}")
    if environment.get("JOB_COMPLETION_INDEX", "0") != "0":
        index = environment["JOB_COMPLETION_INDEX"]
        told.append(f"JOB_COMPLETION_INDEX={index} (Kubernetes)")
    if not told:
        return
    raise UserError(
        "this process would run alone, and it is to be one of several",
        got="no cluster that jax.distributed knows, and " + ", ".join(told),
        wanted="every process started by the cluster (srun, mpirun, a TPU pod, a "
        "JobSet), or told its place",
        way_out="start it with launch/, or give each process "
        "--distributed.coordinator=HOST:PORT, --distributed.processes=N and "
        '--distributed.process=I; on Kubernetes pip install "jax[k8s]" and let its '
        "service account read pods and jobs; --distributed.processes=1 runs it alone",
    )
