"""What a plan compiles for: TPUs that are not here, or placeholder CPU devices.

libtpu holds the compiler of TPUs and needs no TPU for it, only the shape of a slice
(https://docs.jax.dev/en/latest/aot.html, "AOT for other devices"). What it says of
memory and collectives is what the chip runs with the same flags: libtpu reads those in
LIBTPU_INIT_ARGS, where launch/run.sh puts some for a run and a plan puts none
(`. launch/xla_flags.sh tpu` before a plan takes them along). GPUs have no such
compiler: for them the plan is the CPU compiler's.
"""

import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from ddrl_jax.chips import Chip
from ddrl_jax.errors import UserError
from ddrl_jax.plan.links import lay

COMPILERS = ("tpu", "cpu")
# Without these libtpu asks a cloud's metadata server which machine this is, refuses a
# second process, and warns of all that it did not find.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of a machine that is not asked for
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
_HOST = (2, 2, 1)  # chips of a host along the torus; small slices have fewer


class Target(NamedTuple):
    """Whose compiler a plan asks, and for which devices.

    Attributes:
      compiler: a name of COMPILERS.
      chip: the TPU; None with "cpu".
      slices: of TPUs; 0: as few as the chip allows.
    """

    compiler: str
    chip: Chip | None = None
    slices: int = 0

    @property
    def name(self) -> str:
        """As the sheet calls the compiler."""
        return "CPU" if self.chip is None else f"TPU {self.chip.name}"

    def devices(self, mesh: Mapping[str, int]) -> list:
        """Devices for a mesh; nothing can run on those of a TPU.

        Raises:
          UserError: no slices of this chip have so many.
        """
        if self.chip is None:
            return jax.devices()[: math.prod(mesh.values())]
        links = lay(self.chip, mesh, self.slices)
        torus = links.torus()
        if not torus:
            raise UserError(
                "the plan knows the shapes of slices of 2^k TPUs only",
                got=f"{math.prod(mesh.values())} x {self.chip.name} in {links.count} "
                "slices",
                wanted="a power of 2 in each slice",
                way_out="--plan.compiler=cpu asks the compiler of this machine",
            )
        return _topology(self.chip.name, torus, links.count)


HERE = Target("cpu")


@contextlib.contextmanager
def unsaved() -> Iterator[None]:
    """Within it no program goes to the persistent cache.

    Without a TPU none for a TPU can be read from there, and each try is a warning.
    """
    key = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, key)
    jax.config.update(key, math.inf)
    try:
        yield
    finally:
        jax.config.update(key, before)


def choose(wanted: str | None, chip: Chip, slices: int) -> Target:
    """The target of --plan.compiler; unset, the chip's own compiler where it is.

    Args:
      wanted: a name of COMPILERS, or None.
      chip: of --plan.chip.
      slices: of --plan.slices.

    Raises:
      UserError: an unknown name, a chip without a compiler, or none installed.
    """
    is_tpu = any(kind.startswith("TPU") for kind in chip.kinds)
    installed = importlib.util.find_spec("libtpu") is not None
    if wanted is None:
        wanted = "tpu" if is_tpu and installed else "cpu"
    if wanted not in COMPILERS:
        raise _refused(repr(wanted), " or ".join(COMPILERS))
    if wanted == "cpu":
        return HERE
    if not is_tpu:
        raise _refused(f"tpu, with --plan.chip={chip.name}", "cpu for this chip")
    if not installed:
        raise _refused(
            "tpu, without the package libtpu",
            "libtpu, which holds that compiler",
            'pip install "ddrl_jax[tpu]", on a machine without TPUs too, or leave the '
            "flag away",
        )
    return Target("tpu", chip, slices)


def _refused(got: str, wanted: str, way_out: str = "") -> UserError:
    return UserError(
        "--plan.compiler has a value that can not be used",
        got=got,
        wanted=wanted,
        way_out=way_out or "correct --plan.compiler, or leave it away",
    )


def _topology(chip: str, torus: tuple[int, ...], slices: int) -> list[Any]:
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    shape = "x".join(map(str, torus))
    host = [min(size, most) for size, most in zip((*torus, 1), _HOST, strict=False)]
    options: dict[str, Any] = {"chips_per_host_bounds": tuple(host)}
    options |= {"num_slices": slices} if slices > 1 else {}
    found = topologies.get_topology_desc(f"{chip}:{shape}", "tpu", **options)
    return list(found.devices)
