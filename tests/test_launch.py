"""The launchers: their syntax, their mistakes, and what they would run and do run."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from launch_machine import (
    CONFIG,
    LAUNCH,
    OPTIONS,
    PROGRAM,
    ROOT,
    TOOL_OF,
    TOOLS,
    WORKDIR,
    Machine,
    commands,
)

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    where = [str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join(where))
    assert shellcheck, "the extra `test` brings shellcheck"
    command = [shellcheck, "-x", "-P", str(ROOT), str(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_is_started_can_be_started(script):
    sourced = script.name in ("arguments.sh", "xla_flags.sh", "slurm.sbatch")
    assert sourced or os.access(script, os.X_OK)


def test_every_launcher_is_tried_here_and_in_the_readme():
    own = {s.stem for s in LAUNCH.glob("*.sh")}
    own -= {"arguments", "xla_flags", "local_processes", "detached"}
    assert own == set(OPTIONS)
    readme = (LAUNCH / "README.md").read_text()
    assert [name for name in own if f"launch/{name}.sh" not in readme] == []


@pytest.mark.parametrize("name", OPTIONS)
def test_a_dry_run_needs_no_tool_and_calls_none(name, machine):
    without = machine.run(f"{name}.sh", *OPTIONS[name], *PROGRAM, "--dry-run")
    assert without.returncode == 0, without.stderr
    for tool in TOOLS:
        machine.add(tool)
    result = machine.run(f"{name}.sh", *OPTIONS[name], *PROGRAM, "--dry-run")
    assert result.stdout == without.stdout
    assert machine.calls == []


def _started(name: str, output: str) -> list[str]:
    """The arguments that reach `python -m ddrl_jax.main`, through every quoting."""
    if name == "gke_jobset":
        document = yaml.safe_load(output.split("<<'EOF'\n")[1].rpartition("\nEOF")[0])
        job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
        return job["template"]["spec"]["containers"][0]["args"]
    last = [words for words in commands(output) if any(CONFIG in w for w in words)][-1]
    if name in ("tpu_pod", "gke_xpk"):
        inner = next(word for word in last if word.startswith("--command="))
        last = shlex.split(inner)
    if name == "skypilot":
        inner = next(word for word in last if word.startswith("--env=ARGUMENTS="))
        last = shlex.split(inner.removeprefix("--env=ARGUMENTS="))
    first = last.index(CONFIG)
    return last[first : first + len(PROGRAM)]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_program_gets_the_arguments_as_they_were(name, machine):
    result = machine.run(f"{name}.sh", *OPTIONS[name], *PROGRAM, "--dry-run")
    assert _started(name, result.stdout) == PROGRAM


@pytest.mark.parametrize("name", TOOL_OF)
def test_it_runs_what_the_dry_run_shows(name, machine):
    tool = TOOL_OF[name]
    shown = machine.run(f"{name}.sh", *OPTIONS[name], *PROGRAM, "--dry-run")
    body = "if 'describe' in sys.argv: print('ACTIVE')"
    if name == "gke_jobset":
        body = "sys.stdout.write(sys.stdin.read())"
    machine.add(tool, body)
    result = machine.run(f"{name}.sh", *OPTIONS[name], *PROGRAM)
    assert result.returncode == 0, result.stderr
    if name == "gke_jobset":
        assert machine.calls == [["kubectl", "apply", "-f", "-"]]
        assert shown.stdout == f"kubectl apply -f - <<'EOF'\n{result.stdout}EOF\n"
        return
    wanted = [words for words in commands(shown.stdout) if words[0] == tool]
    if name == "tpu_pod":  # here the slice is there already, and is looked at more
        machine_calls = [c for c in machine.calls if "describe" not in c]
        skipped = ("create", "describe")
        assert machine_calls == [w for w in wanted if not {*skipped} & {*w}]
        return
    assert machine.calls == wanted


BAD = {
    "no config": ([WORKDIR], "--config=FILE is missing"),
    "no such config": (["--config=configs/nope.py", WORKDIR], "there is no configs/n"),
    "no workdir": ([CONFIG], "--workdir=DIR is missing"),
    "bucket": ([CONFIG, "--workdir=gs://b/run"], "is no path"),
    "unknown option": ([*PROGRAM, "--sport"], "there is no option --sport"),
    "unknown value": ([*PROGRAM, "--nods=2"], "there is no option --nods"),
    "no option": ([*PROGRAM, "dry-run"], "dry-run is no option"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_mistake_is_one_message_and_exit_status_2(name, case, machine):
    for tool in TOOLS:
        machine.add(tool)
    arguments, message = BAD[case]
    result = machine.run(f"{name}.sh", *OPTIONS[name], *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert machine.calls == []


@pytest.mark.parametrize("name", TOOL_OF)
def test_a_missing_tool_is_one_message(name, machine):
    result = machine.run(f"{name}.sh", *OPTIONS[name], *PROGRAM)
    assert result.returncode == 2
    assert result.stderr.startswith(f"{name}.sh: error: {TOOL_OF[name]} is not")


@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "slurm"])
def test_a_missing_option_is_named(name, machine):
    result = machine.run(f"{name}.sh", *OPTIONS[name][1:], *PROGRAM, "--dry-run")
    first = OPTIONS[name][0].partition("=")[0]
    assert result.returncode == 2
    assert f"{first}=... is missing" in result.stderr


@pytest.mark.parametrize("name", OPTIONS)
def test_help_shows_every_option(name, machine):
    result = machine.run(f"{name}.sh", "--help")
    text = (LAUNCH / f"{name}.sh").read_text()
    (known,) = re.findall(r'^parse "(.*?)"', text, re.M)
    options = re.findall(r"[\w-]+", known)
    assert result.returncode == 0
    assert [o for o in options if f"--{o}" not in result.stdout] == []
    assert "--dry-run" in result.stdout
