"""A run that is smaller or slower than it was asked to be does not begin."""

import os
import socket
import subprocess
import sys

import pytest
from launch_machine import CONFIG, ROOT

from ddrl_jax.errors import UserError
from ddrl_jax.main import run
from ddrl_jax.surroundings import Place, check_alone, check_one, check_platform


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("", "cpu"), ("cuda,cpu", "gpu"), ("rocm", "gpu"), ("tpu,cpu", "tpu")],
)
def test_the_platform_that_was_asked_for(wanted, found):
    check_platform(wanted, found)


@pytest.mark.parametrize("wanted", ["cuda,cpu", "tpu,cpu"])
def test_another_platform_is_refused(wanted):
    with pytest.raises(UserError, match="JAX has not started on"):
        check_platform(wanted, "cpu")


@pytest.mark.parametrize("platforms", ["cuda,cpu", "tpu,cpu"])
def test_a_machine_without_the_accelerator_is_one_message(platforms, tmp_path):
    """JAX takes "cuda,cpu" without a device for "cpu", and says nothing."""
    command = [sys.executable, "-m", "ddrl_jax.main", CONFIG, f"--workdir={tmp_path}/w"]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": platforms, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 2, result.stderr
    assert "ddrl_jax: error: JAX " in result.stderr and "way out:" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "w").exists()


JOIN = """
import sys
import numpy as np
from ddrl_jax.distributed import every, joined
from ddrl_jax.surroundings import Place
with joined(Place(sys.argv[1], 2, int(sys.argv[2]))):
    print("gathered", every(np.array([int(sys.argv[2])])).ravel())
"""


def test_a_web_proxy_is_not_asked_for_the_coordinator():
    """Nobody listens at the proxy: without care, the two would never meet.

    JAX does not warn of a variable that says nothing to gRPC any more."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    proxies = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN, coordinator, str(i)],
            cwd=ROOT,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", **proxies},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs, errors = zip(
            *(p.communicate(timeout=60) for p in processes), strict=True
        )
    finally:
        for process in processes:
            process.kill()
    assert [o.splitlines()[-1] for o in outputs] == ["gathered [0 1]"] * 2
    assert not any("proxy variable" in text for text in errors)


@pytest.mark.parametrize(
    "environment",
    [
        {"NNODES": "2", "NODE_RANK": "0"},
        {"SLURM_NTASKS": "8"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
        {"JOB_COMPLETION_INDEX": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_one_of_several_does_not_run_alone(environment):
    with pytest.raises(UserError) as found:
        check_alone(environment)
    name, value = next(iter(environment.items()))
    assert f"{name}={value}" in str(found.value.got)
    assert "--distributed.processes=1" in found.value.way_out


@pytest.mark.parametrize(
    "environment",
    [{}, {"NNODES": "1"}, {"SLURM_NTASKS": "1"}, {"TPU_WORKER_HOSTNAMES": "a"}]
    + [{"JOB_COMPLETION_INDEX": "0"}, {"NNODES": ""}],
)
def test_a_lone_process_runs(environment):
    check_alone(environment)


# ---- modes of one process

TWO = Place("a:1", 2, 0)


@pytest.mark.parametrize(
    ("where", "environment"),
    [
        (TWO, {}),
        (None, {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}),
        (None, {"OMPI_COMM_WORLD_RANK": "1"}),
        (None, {"TPU_WORKER_ID": "1"}),
    ],
)
def test_a_mode_of_one_process_does_not_start_several_times(where, environment):
    with pytest.raises(UserError, match="--mode=report is the work of one process"):
        check_one("report", where, environment)


@pytest.mark.parametrize(
    "environment", [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, {"PMI_RANK": ""}]
)
def test_a_mode_of_one_process_runs_in_a_batch_script(environment):
    check_one("report", None, environment)
    check_one("report", Place("", 1, 0), environment | {"SLURM_PROCID": "3"})


@pytest.mark.parametrize("mode", ["report", "compare", "plan"])
def test_the_command_line_refuses_it_before_it_looks_at_anything(
    mode, tmp_path, capsys
):
    flags = ["--distributed.coordinator=a:1", "--distributed.processes=2"]
    flags += ["--distributed.process=1", f"--workdir={tmp_path}/none"]
    flags += [f"--config={ROOT}/configs/quickstart.py:smoke"]
    assert run(["main", *flags, f"--mode={mode}"]) == 2
    assert "process 1 of 2" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
