"""The command line: `python -m ddrl_jax.main --config=FILE[:variant] --workdir=DIR`.

Nothing slow is imported before the command line has been understood. A problem that the
user can fix ends in one message on stderr and exit status 2, without a traceback; 75 is
the status where another process of the run is gone, and nothing has to be fixed.
"""

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from ml_collections import ConfigDict

from ddrl_jax import __version__
from ddrl_jax.command_line import Command, help_text, parse
from ddrl_jax.errors import UserError
from ddrl_jax.file_tree import with_home

EXIT_CRASH = 1
EXIT_INTERRUPTED = 130  # what a shell reports of a program ended by Ctrl-C


def run(argv: Sequence[str], *, join: bool = False) -> int:
    """Runs one command and returns its exit status.

    Args:
      argv: as sys.argv, the program first.
      join: join the other processes of the run, if there are any. Only where nothing
        of this process has touched a device yet.
    """
    try:
        if {"--help", "-h", "-help"} & set(argv[1:]):
            print(help_text())
            return 0
        with _disk_explained():
            _dispatch(parse(argv), join)
        return 0
    except UserError as error:
        print(f"ddrl_jax: error: {error}", file=sys.stderr, flush=True)
        return error.status
    except KeyboardInterrupt:
        print("\nddrl_jax: interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED


def main() -> None:
    """Runs the command of this process and leaves with its exit status."""
    try:
        status = run(sys.argv, join=True)
    except Exception:
        traceback.print_exc()
        status = EXIT_CRASH
    if status and "ddrl_jax.distributed" in sys.modules:
        from ddrl_jax.distributed import leave

        leave(status)
    sys.exit(status)


def _dispatch(command: Command, join: bool) -> None:
    """Checks what can be checked without computing, and calls the mode."""
    from ddrl_jax.surroundings import check_one, place

    mode, config, workdir = command.mode, command.config, command.workdir
    where = place(command.place, os.environ)
    if mode not in _MODE_CALLS:
        check_one(mode, where, os.environ)
    if mode == "compare":
        from ddrl_jax.compare import compare_mode

        compare_mode(config, workdir)
        return
    if mode == "report" or config is None:
        _report(workdir)
        return
    if mode == "plan":
        from ddrl_jax.plan import plan_mode

        _enable_compilation_cache()
        plan_mode(config, command.plan or {})
        return
    from ddrl_jax.check_config import check_config
    from ddrl_jax.config_rules import shared_settings
    from ddrl_jax.distributed import check_agreement, joined
    from ddrl_jax.sources import without_data

    more = (command.profile,) if command.profile else ()  # only of mode train
    # The other processes are told of a full disk as of any other mistake.
    with joined(where) if join else nullcontext(), _disk_explained():
        trains = mode not in DATALESS
        used = config if trains else without_data(config, mode)
        check_config(used, _device_count(), trains)
        check_agreement(
            {"--mode": mode, "ddrl_jax": __version__} | shared_settings(config)
        )
        _enable_compilation_cache()
        _MODE_CALLS[mode](config, workdir, *more)


def _device_count() -> int:
    import jax

    from ddrl_jax.surroundings import check_platform

    wanted = os.environ.get("JAX_PLATFORMS", "")
    try:
        count = jax.device_count()
    except (RuntimeError, AssertionError) as e:  # no word where "cuda" sees no device
        raise UserError(
            "JAX can not start on this machine",
            got=" ".join(str(e).split()) or f"no device, where JAX_PLATFORMS={wanted}",
            wanted="a platform that is here, or JAX_PLATFORMS unset",
            way_out="JAX_PLATFORMS=cpu runs without an accelerator",
        ) from e
    check_platform(wanted, jax.default_backend())
    return count


def _enable_compilation_cache() -> None:
    """Keeps compiled programs between runs; goes without where it can not write."""
    import jax

    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    default = os.path.join(cache, "ddrl_jax", "jax")
    own = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folder = with_home(own or default)
    try:
        if folder.startswith("~"):  # nor is a folder of that odd name made
            raise FileNotFoundError(f"{folder} is in a home that is not known here")
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        print(f"ddrl_jax: compiled programs are not kept: {e}", file=sys.stderr)
        folder = None
    jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Start-up is many small programs, so they are worth keeping as well.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@contextmanager
def _disk_explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = _disk_problem(error)
        if problem is None:
            raise
        raise problem from error


def _disk_problem(error: OSError) -> UserError | None:
    """A disk or a path that refuses as a message; None for any other failure."""
    room = "a disk with room and permission to write"
    start, folder = "start again: the run goes on", "--workdir, or in the key of a path"
    rows = {
        errno.ENOSPC: (room, f"free some space and {start}"),
        errno.EDQUOT: (room, f"free some of your quota and {start}"),
        errno.EROFS: (room, f"name a place that can be written in {folder}"),
        # Not only of the workdir: a data set of somebody else, for instance.
        errno.EACCES: (
            "permission to read it, or to write there",
            "have it permitted by its owner, whom ls -ld shows (it may be that of a "
            f"folder above), or name another place in {folder}",
        ),
    }
    moved = f"move away what lies there, or name another place in {folder}"
    shorter = f"a shorter name in --config, {folder}"
    named = {  # of a path; without one, it is no mistake of the user
        errno.EEXIST: ("nothing in the place of a new file or folder", moved),
        errno.ENOTDIR: ("a folder there, where there is a file", moved),
        errno.EISDIR: ("a file there, where there is a folder", moved),
        errno.ENAMETOOLONG: ("a name that the disk can hold", shorter),
    }
    rows |= named if error.filename else {}
    if error.errno not in rows:
        return None
    wanted, way_out = rows[error.errno]
    return UserError(
        f"{error.filename or 'a file'} can not be read or written",
        got=os.strerror(error.errno),
        wanted=wanted,
        way_out=way_out,
    )


def _train(config: ConfigDict, workdir: str, *profile: tuple[int, int]) -> None:
    from ddrl_jax.config_notes import notes
    from ddrl_jax.distributed import is_main
    from ddrl_jax.train import train

    for note in notes(config) if is_main() else ():
        print(f"note: {note}", file=sys.stderr, flush=True)
    train(config, workdir, *profile)


def _evaluate(config: ConfigDict, workdir: str) -> None:
    from ddrl_jax.evaluate import evaluate_mode

    evaluate_mode(config, workdir)


def _sample(config: ConfigDict, workdir: str) -> None:
    from ddrl_jax.sample import sample_mode

    sample_mode(config, workdir)


def _export(config: ConfigDict, workdir: str) -> None:
    from ddrl_jax.export import export_mode

    export_mode(config, workdir)


def _report(workdir: str) -> None:
    from ddrl_jax.report import write_report

    print(write_report(workdir))


DATALESS = ("sample", "export")  # modes that need no data set
_MODE_CALLS = {
    "train": _train,
    "evaluate": _evaluate,
    "sample": _sample,
    "export": _export,
}


if __name__ == "__main__":
    main()
