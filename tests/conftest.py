"""What every test may rely on: the CPU, eight devices, no network, no trace in HOME.

Nothing of ddrl_jax is imported here: pytest has not yet installed the hook that checks
the shapes in its signatures.
"""

import os
import pathlib
import socket

CACHE = pathlib.Path(__file__).resolve().parents[1] / ".jax_cache"
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # Compiled programs are kept between runs and shared with the programs tests start.
    "JAX_COMPILATION_CACHE_DIR": str(CACHE / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    # The workers of pytest-xdist are the parallelism.
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "MPLBACKEND": "Agg",
    "MPLCONFIGDIR": str(CACHE / "matplotlib"),
    "XDG_CACHE_HOME": str(CACHE / "xdg"),
    "TFDS_DATA_DIR": str(CACHE / "tfds"),
    "HF_HOME": str(CACHE / "hub"),
    "HF_HUB_OFFLINE": "1",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import jax  # noqa: E402
import pytest  # noqa: E402

# A setting of this process and not a flag in the environment: a program that a test
# starts is to see one device, as on a laptop.
jax.config.update("jax_num_cpu_devices", 8)
jax.devices()  # at once: --mode=plan gives a process without devices those of its mesh

STRICT = {"diffusion", "objectives"}  # folders of tests/ held to exact ranks and types
_connect = socket.socket.connect


def _connect_within_this_machine(self: socket.socket, address) -> None:
    inet = self.family in (socket.AF_INET, socket.AF_INET6)
    if inet and address[0] not in ("localhost", "127.0.0.1", "::1"):
        raise AssertionError(f"a test tried to reach {address}: nothing is downloaded")
    return _connect(self, address)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that at the end no worker waits for one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `optimised` have XLA's optimisations, the others LLVM's least.

    Before the fixtures of the test, so that they compile as it does, and in the
    environment for the programs that it starts.
    """
    least = item.get_closest_marker("optimised") is None
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(least))
    if least != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", least)
        jax.clear_caches()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", _connect_within_this_machine)


@pytest.fixture(autouse=True)
def exact_ranks_and_types(request):
    """Formulas may not lean on broadcasting or promotion that nobody wrote down."""
    if not STRICT & set(request.path.parts):
        yield
        return
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Where DDRL_NO_SKIPS is set, a test that lacks its package fails: .ci/run sets it.

    Otherwise all tests of parity would go with an import that broke.
    """
    report = yield
    why = str(report.longrepr)
    if "DDRL_NO_SKIPS" in os.environ and report.skipped and "could not import" in why:
        report.outcome, report.longrepr = "failed", why
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """The same of a whole file."""
    report = yield
    why = str(report.longrepr)
    if "DDRL_NO_SKIPS" in os.environ and report.skipped and "could not import" in why:
        report.outcome, report.longrepr = "failed", why
    return report
