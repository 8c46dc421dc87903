"""Who is who in a run that a cluster has started: without a flag, as clusters tell it.

JAX reads it; what is held here is that our start reaches JAX's reading, and what comes
of the variables that Open MPI, GKE, TPU VMs and Kubernetes set. No metadata server and
no Kubernetes is asked: stand-ins answer in their place.
"""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from jax._src import distributed as of_jax
from jax._src.clusters import cloud_tpu_cluster, cluster
from process_runs import ROOT, WITHOUT_GLOO, free_port

from ddrl_jax import distributed
from ddrl_jax.errors import EXIT_ERROR, TryAgain

# ---- two real processes on this machine

JOIN = """
import jax
import numpy as np
from ddrl_jax.distributed import every, joined
with joined(None):
    print("gathered", every(np.array([jax.process_index()])).ravel(), flush=True)
"""


def joined(shared: dict[str, str], own: list[dict[str, str]]) -> list[str]:
    """The last line of each process that starts with these variables."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WITHOUT_GLOO + JOIN],
            cwd=ROOT,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | shared | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for more in own
    ]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(own), said
    return [out.splitlines()[-1] for out, _ in said]


def test_open_mpi_needs_no_flags():
    """As mpirun 4 sets them; without a port JAX makes one of the job's id."""
    shared = {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1,10.148.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    own = [
        {"OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i)}
        for i in range(2)
    ]
    assert joined(shared, own) == ["gathered [0 1]"] * 2


def test_the_pods_of_a_tpu_slice_on_gke_need_no_flags():
    """As JAX sees a TPU VM, with the CPU as the platform."""
    shared = {
        "JAX_FORCE_TPU_INIT": "1",
        "JAX_PLATFORMS": "cpu",
        "TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.1",
        "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1:8080",
        "MEGASCALE_NUM_SLICES": "1",
        "MEGASCALE_SLICE_ID": "0",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    own = [{"TPU_WORKER_ID": str(i)} for i in range(2)]
    assert joined(shared, own) == ["gathered [0 1]"] * 2


# ---- what is made of the variables, up to the connection

CLUSTERS = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JOB_", "KUBERNETES_", "JAX_COORD")


@pytest.fixture
def place_of(monkeypatch):
    """place_of(variables) -> (coordinator, processes, process) that JAX would join."""
    state = of_jax.State()

    def refused(*_, **__):
        raise RuntimeError("this far")

    service = SimpleNamespace(
        get_distributed_runtime_service=lambda *_, **__: object(),
        get_distributed_runtime_client=refused,
    )
    monkeypatch.setattr(of_jax, "global_state", state)
    monkeypatch.setattr(of_jax, "_jax", service)
    monkeypatch.setattr(of_jax.xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "10.0.0.7")
    monkeypatch.setenv("grpc_proxy", "")
    for name in os.environ:
        if name.startswith(CLUSTERS):
            monkeypatch.delenv(name)

    def found(variables: dict[str, str]) -> tuple[str | None, int, int]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(TryAgain, match="this far"):
            distributed._initialize(None)
        return state.coordinator_address, state.num_processes, state.process_id

    keep = jax.config.jax_enable_preemption_service
    yield found
    jax.config.update("jax_enable_preemption_service", keep)


@pytest.fixture
def metadata(monkeypatch):
    """On a TPU VM, whose metadata server knows this and is asked for nothing else."""
    known: dict[str, str] = {}

    def answer(key: str) -> tuple[str, int]:
        return (known[key], 200) if key in known else ("not found", 404)

    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", answer)
    for module in (cluster, cloud_tpu_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    return known


SLICES = {
    "MEGASCALE_COORDINATOR_ADDRESS": "n-slice-0-0.n:8080",
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "1",
}
JOBSET = {"JOB_COMPLETION_INDEX": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({}, ("n-0.n:8482", 2, 1)),
        ({"TPU_PROCESS_ADDRESSES": "m-0:8471,m-1:8471"}, ("m-0:8482", 2, 1)),
        (SLICES, ("n-slice-0-0.n:8482", 6, 3)),  # the second of the second slice
        ({"JAX_COORDINATOR_PORT": "99"}, ("n-0.n:99", 2, 1)),
    ],
)
def test_a_jobset_of_tpu_slices(more, wanted, place_of, metadata):
    """What GKE's webhook sets in the pods of launch/jobset.yaml."""
    pod = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "n-0.n,n-1.n"}
    assert place_of(JOBSET | pod | more) == wanted


ENDPOINTS = "a:1:10.0.0.4,b:2:10.0.0.5,c:3:10.0.0.6,d:4:10.0.0.7"
TWO = """ACCELERATOR_TYPE: 'v5p-64'
MEGASCALE_COORDINATOR_ADDRESS: '10.0.9.9:8080'
MEGASCALE_NUM_SLICES: '2'
MEGASCALE_SLICE_ID: '1'
"""


@pytest.mark.parametrize(
    ("endpoints", "more", "wanted"),
    [
        (ENDPOINTS, {}, ("10.0.0.4:8482", 4, 2)),
        ("w-0,w-1,w-2", {}, ("w-0:8482", 3, 2)),  # as newer images have them
        (ENDPOINTS, {"tpu-env": TWO}, ("10.0.9.9:8482", 8, 6)),
    ],
)
def test_a_tpu_pod_slice(endpoints, more, wanted, place_of, metadata):
    """What the metadata server says on the VMs of launch/tpu_pod.sh."""
    metadata |= {"agent-worker-number": "2", "worker-network-endpoints": endpoints}
    metadata |= more
    assert place_of({}) == wanted


def test_open_mpi_and_slurm_come_before_the_machine(place_of, metadata):
    metadata |= {"agent-worker-number": "0", "worker-network-endpoints": "w-0"}
    orte = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
    ranks = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    port = 65535 - 4096 + 1 + 1531576320 // 4096 % 4096
    found = place_of(orte | ranks | {"OMPI_COMM_WORLD_SIZE": "8"})
    assert found == (f"10.96.0.1:{port}", 8, 5)


class Kubernetes(SimpleNamespace):
    """Its API, with one pod of an indexed job of a JobSet."""

    def list_namespaced_pod(self, namespace: str, field_selector: str):
        assert (namespace, field_selector) == ("mine", "status.podIP=10.0.0.7")
        owner = SimpleNamespace(controller=True, kind="Job")
        meta = {"labels": {"job-name": "n-gpu-0"}, "owner_references": [owner]}
        return SimpleNamespace(
            items=[SimpleNamespace(metadata=SimpleNamespace(**meta))]
        )

    def read_namespaced_job(self, name: str, namespace: str):
        assert (name, namespace) == ("n-gpu-0", "mine")
        labels = {"jobset.sigs.k8s.io/jobset-name": "n"}
        return SimpleNamespace(
            metadata=SimpleNamespace(name=name, labels=labels),
            spec=SimpleNamespace(parallelism=4),
        )


def test_a_jobset_of_gpu_pods_is_asked_of_kubernetes(place_of, monkeypatch):
    """With the extra k8s, and a service account that may read pods and jobs."""
    from jax._src.clusters import K8sCluster

    client = SimpleNamespace(
        CoreV1Api=Kubernetes,
        BatchV1Api=Kubernetes,
        exceptions=SimpleNamespace(ApiException=ConnectionError),
    )
    config = SimpleNamespace(load_incluster_config=lambda: None)
    module = SimpleNamespace(client=client, config=config)
    monkeypatch.setitem(sys.modules, "kubernetes", module)
    monkeypatch.setattr(K8sCluster, "_namespace", lambda: "mine")
    monkeypatch.setenv("HOSTNAME", "n-gpu-0-1")
    assert place_of(JOBSET) == ("n-gpu-0-0.n:55527", 4, 1)


def test_open_mpi_5_which_jax_does_not_know_is_no_run_of_one():
    """It no longer says where its launcher is: each would be process 0 of its own."""
    ranks = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    code = "import sys; from ddrl_jax.main import main; main()"
    workdir = "--workdir=/nonexistent/ddrl_jax"
    config = f"--config={ROOT}/configs/quickstart.py:smoke"
    found = subprocess.run(
        [sys.executable, "-c", code, config, workdir],
        cwd=ROOT,
        env=os.environ | ranks,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == EXIT_ERROR
    assert "OMPI_COMM_WORLD_SIZE=2 (Open MPI)" in found.stderr
    assert "--distributed.coordinator=HOST:PORT" in found.stderr
