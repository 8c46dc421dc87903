"""launch/run.sh on a host: the environment it sets, and its exit status."""

import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
from launch_machine import CONFIG, LAUNCH, PROGRAM, WORKDIR, Machine

from ddrl_jax.surroundings import KEYS, Place, place

PYTHON = """
import signal, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
with open(note, "a") as file:
    file.write(json.dumps(dict(os.environ)) + "\\n")
until = time.time() + float(os.environ.get("SECONDS_TO_RUN", 0))
while time.time() < until and not stop:
    time.sleep(0.01)
time.sleep(0.1)  # saving
sys.exit(int(os.environ.get("STATUS", 0)))
"""


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def _python(machine: Machine) -> dict[str, str]:
    machine.add("program", PYTHON)
    return {"PYTHON": str(machine.tools / "program")}


@pytest.mark.parametrize("status", [0, 2, 7])
def test_the_exit_status_is_the_programs(status, machine):
    python = _python(machine)
    result = machine.run(
        "run.sh", "--platform=cpu", *PROGRAM, STATUS=str(status), **python
    )
    assert result.returncode == status, result.stderr
    program = ["program", "-m", "ddrl_jax.main", *PROGRAM]
    assert machine.calls[0] == [*program, "--config.data.cache=/mnt/shared/data_cache"]


@pytest.mark.parametrize("status, seen", [(0, 143), (7, 7)])
def test_a_notice_reaches_the_program_and_asks_for_a_restart(status, seen, machine):
    """143 only where the program itself ended well: an error stays an error."""
    more = _python(machine) | {"STATUS": str(status), "SECONDS_TO_RUN": "30"}
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "run.sh"), "--platform=cpu", *PROGRAM],
        env=machine.environment(**more),
    )
    until = time.time() + 20
    while len(machine.calls) < 2 and time.time() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == seen


def test_a_notice_before_the_program_has_started_is_handed_on(machine):
    """SIGTERM in the line before the one that starts the program."""
    more = _python(machine) | {"SECONDS_TO_RUN": "30"}
    machine.add("early", "import signal; os.kill(os.getppid(), signal.SIGTERM)")
    script = (LAUNCH / "run.sh").read_text()
    start = '"$python" -m ddrl_jax.main "${PROGRAM[@]}" &\nchild=$!'
    assert script.count(start) == 1
    where = f'. "{LAUNCH}/arguments.sh"'
    script = re.sub(r'^\. "\$\(dirname.*arguments\.sh"$', where, script, flags=re.M)
    copy = machine.folder / "run.sh"
    copy.write_text(script.replace(start, f"early\n{start}"))
    process = subprocess.run(
        ["bash", str(copy), "--platform=cpu", *PROGRAM],
        env=machine.environment(**more),
        timeout=20,
        check=False,
    )
    assert process.returncode == 143


def test_run_starts_the_real_program(machine):
    """Its own message for a mistake that only it knows."""
    arguments = ("--platform=cpu", CONFIG, WORKDIR, "--mode=nope")
    result = machine.run("run.sh", *arguments, PYTHON=sys.executable)
    assert result.returncode == 2
    assert "there is no such --mode" in result.stderr


def _environment(machine: Machine, platform: str, *arguments: str, **more: str) -> dict:
    python = _python(machine)
    machine.run("run.sh", f"--platform={platform}", *arguments, **more, **python)
    return next(dict(call) for call in machine.calls if isinstance(call, dict))


def test_caches_lie_beside_the_workdir_unless_they_are_set(machine):
    found = _environment(machine, "cpu", *PROGRAM)
    assert found["JAX_COMPILATION_CACHE_DIR"] == "/mnt/shared/compile_cache"
    assert found["HF_HUB_CACHE"] == "/mnt/shared/huggingface"
    assert machine.calls[0][-1] == "--config.data.cache=/mnt/shared/data_cache"
    machine.notes.unlink()
    own = {"JAX_COMPILATION_CACHE_DIR": "/c", "HF_HOME": "/h"}
    cached = "--config.data.cache=/d"
    found = _environment(machine, "cpu", *PROGRAM, cached, **own)
    assert found["JAX_COMPILATION_CACHE_DIR"] == "/c"
    assert "HF_HUB_CACHE" not in found
    assert [a for a in machine.calls[0] if "data.cache" in a] == [cached]


@pytest.mark.parametrize("workdir", ["~/runs/w", "~/w", "~root/runs/w", "~-/w"])
def test_caches_beside_a_workdir_in_a_home(workdir, machine):
    arguments = (CONFIG, f"--workdir={workdir}")
    found = _environment(machine, "cpu", *arguments, HOME="/home/my name")
    shared = os.path.dirname(workdir.replace("~root", os.path.expanduser("~root")))
    if not workdir.startswith("~-"):  # which the program refuses
        shared = shared.replace("~", "/home/my name")
    assert found["JAX_COMPILATION_CACHE_DIR"] == f"{shared}/compile_cache"
    assert found["HF_HUB_CACHE"] == f"{shared}/huggingface"
    assert machine.calls[0][-1] == f"--config.data.cache={shared}/data_cache"


def test_a_config_that_names_its_own_cache_keeps_it(machine):
    _environment(machine, "cpu", "--config=configs/latent_emoji.py", WORKDIR)
    assert [a for a in machine.calls[0] if "data.cache" in a] == []


@pytest.mark.parametrize(
    "platform, wanted", [("gpu", "cuda,cpu"), ("tpu", "tpu,cpu"), ("cpu", "cpu")]
)
def test_the_platform_is_told_to_jax(platform, wanted, machine):
    found = _environment(machine, platform, *PROGRAM)
    assert found["JAX_PLATFORMS"] == wanted
    machine.notes.unlink()
    found = _environment(machine, platform, *PROGRAM, JAX_PLATFORMS="cpu")
    assert found["JAX_PLATFORMS"] == "cpu"


XPK = {
    "NNODES": "2",
    "NODE_RANK": "1",
    "JAX_COORDINATOR_ADDRESS": "n-slice-job-0-0.n",
    "JAX_COORDINATOR_PORT": "6002",
}


def test_the_gpu_nodes_of_xpk_find_each_other(machine):
    """The names are those that xpk's docker_resources.get_gpu_env gives the pods."""
    found = _environment(machine, "gpu", *PROGRAM, **XPK)
    names = {f"DDRL_{key.upper()}": found[f"DDRL_{key.upper()}"] for key in KEYS}
    assert place({}, names) == Place("n-slice-job-0-0.n:6002", 2, 1)
    machine.notes.unlink()
    found = _environment(machine, "gpu", *PROGRAM, NNODES="2")
    assert not [name for name in found if name.startswith("DDRL_")]


GPUS = {
    "9.0, NVIDIA H100 80GB HBM3": ("1", "1"),
    "9.0, NVIDIA H100 PCIe": ("1", ""),
    "10.0, NVIDIA B200": ("", ""),
    "8.0, NVIDIA A100-SXM4-80GB": ("", ""),
}


@pytest.mark.parametrize("gpu", GPUS)
def test_hopper_gets_one_queue_and_with_switches_nvls(gpu, machine):
    machine.add("nvidia-smi", f"print({gpu!r}); print('9.0, NVIDIA H200')")
    found = _environment(machine, "gpu", *PROGRAM)
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_NVLS_ENABLE")
    assert tuple(found.get(name, "") for name in names) == GPUS[gpu]


@pytest.mark.parametrize(
    "platform, name", [("gpu", "XLA_FLAGS"), ("tpu", "LIBTPU_INIT_ARGS")]
)
def test_flags_follow_the_platform_and_the_users_own_come_last(platform, name, machine):
    other = {"XLA_FLAGS", "LIBTPU_INIT_ARGS"} - {name}
    found = _environment(machine, platform, *PROGRAM, **{name: "--mine=1"})
    assert re.fullmatch(r"(--xla_\w+=(true|\d+) )+--mine=1", found[name])
    assert other.pop() not in found
    machine.notes.unlink()
    found = _environment(machine, platform, *PROGRAM, "--no-flags")
    assert name not in found


def test_an_unknown_platform_is_an_error(machine):
    result = machine.run("run.sh", "--platform=npu", *PROGRAM, "--dry-run")
    assert result.returncode == 2
    assert "npu is not gpu, tpu or cpu" in result.stderr


START = "import jax; jax.numpy.zeros(1).block_until_ready()"
# Reads the flags as on a TPU, and needs none: it only asks for the shape of a slice.
START_TPU = """
from ddrl_jax.chips import CHIPS
from ddrl_jax.plan.target import Target
Target("tpu", CHIPS["v5e"]).devices({"data": 4, "fsdp": 1, "tensor": 1, "context": 1})
"""


def _jax_accepts(code: str = START, **environment: str) -> bool:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        check=False,
        timeout=120,
    )
    return result.returncode == 0


def test_the_installed_jaxlib_knows_the_gpu_flags(machine):
    """An unknown flag in XLA_FLAGS ends the process, on whatever platform."""
    found = _environment(machine, "gpu", *PROGRAM)
    names = ("XLA_FLAGS", "JAX_OPTIMIZATION_LEVEL", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    assert _jax_accepts(**{name: found[name] for name in names})
    assert not _jax_accepts(XLA_FLAGS=found["XLA_FLAGS"] + " --xla_gpu_no_such=true")
    assert not _jax_accepts(JAX_OPTIMIZATION_LEVEL="O9")


@pytest.mark.skipif(not find_spec("libtpu"), reason="needs libtpu: the extra `tpu`")
def test_the_installed_libtpu_knows_the_tpu_flags(machine):
    flags = _environment(machine, "tpu", *PROGRAM)["LIBTPU_INIT_ARGS"]
    assert _jax_accepts(START_TPU, LIBTPU_INIT_ARGS=flags)
    unknown = flags + " --xla_tpu_no_such_flag=true"
    assert not _jax_accepts(START_TPU, LIBTPU_INIT_ARGS=unknown)
