"""What the surroundings of a process promise, held against what it has found.

A run that is smaller or slower than it was asked to be looks like one that works.
"""

from collections.abc import Mapping

from ddrl_jax.errors import UserError

# How those who start processes say how many there are.
COUNTS = {
    "NNODES": "xpk, torchrun",
    "SLURM_NTASKS": "Slurm",
    "OMPI_COMM_WORLD_SIZE": "Open MPI",
    "PMI_SIZE": "MPICH",
    "JAX_PROCESS_COUNT": "xpk",
}
BACKENDS = {"cuda": "gpu", "rocm": "gpu"}  # what JAX calls the backend of a platform


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
