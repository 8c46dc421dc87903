"""What the launchers hand to others: JobSet, SkyPilot task, images."""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from launch_machine import LAUNCH, OPTIONS, PROGRAM, ROOT, Machine, commands
from yaml_schema import violations

from ddrl_jax.errors import EXIT_AGAIN, EXIT_ERROR

GOOD = "--config.checkpoint.resume=last_good"
SCHEMAS = json.loads((ROOT / "tests" / "launch_schemas.json").read_text())


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def _jobset(machine: Machine, *more: str) -> dict:
    options = [*OPTIONS["gke_jobset"], *PROGRAM, *more, "--dry-run"]
    output = machine.run("gke_jobset.sh", *options).stdout
    return yaml.safe_load(output.split("<<'EOF'\n")[1].rpartition("\nEOF")[0])


def test_the_jobset_has_published_fields_only(machine):
    """The schema is the part of JobSet's custom resource definition that is used."""
    document = _jobset(machine, "--spot")
    assert list(violations(SCHEMAS["jobset"], document)) == []
    assert "@" not in json.dumps(document)
    document["spec"]["replicatedJobs"][0]["replica"] = 1
    document["spec"]["failurePolicy"]["maxRestarts"] = "50"
    found = list(violations(SCHEMAS["jobset"], document))
    assert len(found) == 2


def test_the_jobset_asks_for_all_chips_of_its_topology(machine):
    for topology, chips, hosts in (("4x4", "4", 4), ("2x2x4", "4", 4), ("2x4", "8", 1)):
        document = _jobset(machine, f"--topology={topology}", f"--chips={chips}")
        job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
        container = job["template"]["spec"]["containers"][0]
        assert job["parallelism"] == job["completions"] == hosts
        assert container["resources"]["limits"] == {"google.com/tpu": int(chips)}


WRONG = ("--chips=0", "--chips=abc", "--chips=04", "--chips=-4", "--chips=1e3")
WRONG += ("--slices=two", "--slices=0", "--restarts=-1", "--topology=08x8")
WRONG += ("--topology=0x8", "--topology=4", "--chips=99999999999999999999")


@pytest.mark.parametrize(
    ("name", "option"),
    [*(("gke_jobset", o) for o in WRONG), ("tpu_pod", "--attempts=abc")],
)
def test_a_number_that_is_none_is_one_message(name, option, machine):
    options = [*OPTIONS[name], *PROGRAM, option, "--dry-run"]
    result = machine.run(f"{name}.sh", *options)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"{name}.sh: error: {option} is not ")
    assert len(result.stderr.splitlines()) == 1


def test_no_restarts_are_a_number_of_them(machine):
    spec = _jobset(machine, "--restarts=0")["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 0


def _pod(machine: Machine, *more: str) -> dict:
    job = _jobset(machine, *more)["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job["template"]["spec"]


def test_only_spot_nodes_are_asked_for_as_spot(machine):
    pod, key = _pod(machine), "cloud.google.com/gke-spot"
    assert key not in pod["nodeSelector"] and "tolerations" not in pod
    pod = _pod(machine, "--spot")
    assert pod["nodeSelector"][key] == "true"
    assert [t["key"] for t in pod["tolerations"]] == [key]


def test_preemptions_do_not_use_up_the_restarts(machine):
    spec = _jobset(machine)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    disrupted, noticed, mistaken = job["podFailurePolicy"]["rules"]
    assert disrupted["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert noticed["onExitCodes"]["values"] == [143]
    container = job["template"]["spec"]["containers"][0]
    assert noticed["onExitCodes"]["containerName"] == container["name"]
    assert mistaken["onExitCodes"]["values"] == [EXIT_ERROR]
    assert mistaken["onExitCodes"]["containerName"] == container["name"]
    actions = {rule["action"] for rule in (disrupted, noticed, mistaken)}
    assert actions == {"FailJob"}


# What Kubernetes says of a Job that a rule of its podFailurePolicy ended (KEP-3329),
# and of one that a failure without a rule ended.
EXITED = "Container ddrl-jax for pod default/n-0 failed with exit code {} matching "
RULE = "FailJob rule at index 1"
DISRUPTED = "Pod default/n-0 has condition DisruptionTarget matching " + RULE
BACKOFF = ("BackoffLimitExceeded", "Job has reached the specified backoff limit")


@pytest.mark.parametrize(
    ("reason", "message", "action"),
    [
        ("PodFailurePolicy", DISRUPTED, "RestartJobSetAndIgnoreMaxRestarts"),
        (
            "PodFailurePolicy",
            EXITED.format(143) + RULE,
            "RestartJobSetAndIgnoreMaxRestarts",
        ),
        ("PodFailurePolicy", EXITED.format(EXIT_ERROR) + RULE, "FailJobSet"),
        (*BACKOFF, "RestartJobSet"),
    ],
)
def test_what_jobset_does_with_an_end(reason, message, action, machine):
    """The first rule that applies; without one it restarts, and counts."""
    rules = _jobset(machine)["spec"]["failurePolicy"]["rules"]
    found = [
        rule["action"]
        for rule in rules
        if reason in rule["onJobFailureReasons"]
        and any(
            re.search(p, message) for p in rule.get("onJobFailureMessagePatterns", [""])
        )
    ]
    assert (found or ["RestartJobSet"])[0] == action


def test_xpk_starts_again_what_lost_a_process_and_no_mistake(machine):
    options = [*OPTIONS["gke_xpk"], *PROGRAM, "--dry-run"]
    (words,) = commands(machine.run("gke_xpk.sh", *options).stdout)
    assert f"--restart-on-exit-codes={EXIT_AGAIN}" in words
    assert EXIT_AGAIN != EXIT_ERROR


def test_the_skypilot_task_has_published_fields_only():
    document = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert list(violations(SCHEMAS["skypilot"], document)) == []
    assert document["resources"]["use_spot"] is True
    assert document["resources"]["job_recovery"]["recover_on_exit_codes"] == [143]
    document["resources"]["spot_recovery"] = "FAILOVER"  # a field of older releases
    assert len(list(violations(SCHEMAS["skypilot"], document))) == 1


def test_the_skypilot_task_hands_its_arguments_on(machine):
    """`run` of the YAML, executed, with run.sh replaced by something that prints."""
    document = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    shown = machine.run("skypilot.sh", *OPTIONS["skypilot"], *PROGRAM, "--dry-run")
    words = commands(shown.stdout)[0]
    arguments = next(w for w in words if w.startswith("--env=ARGUMENTS="))
    (machine.tools / "bash").unlink()
    machine.add("bash")
    subprocess.run(
        [str(shutil.which("bash")), "-c", document["run"]],
        env=machine.environment(ARGUMENTS=arguments.removeprefix("--env=ARGUMENTS=")),
        check=True,
    )
    start = ["bash", "launch/run.sh", "--platform=gpu"]
    assert machine.calls == [[*start, *PROGRAM, GOOD]]


def test_skypilot_passes_over_a_checkpoint_that_is_not_whole(machine):
    own = "--config.checkpoint.resume=latest"
    for more, wanted in (((), [GOOD]), ((own,), [own])):
        options = [*OPTIONS["skypilot"], *PROGRAM, *more, "--dry-run"]
        words = shlex.split(machine.run("skypilot.sh", *options).stdout)
        arguments = next(w for w in words if w.startswith("--env=ARGUMENTS="))
        assert [a for a in shlex.split(arguments) if "resume" in a] == wanted


def test_skypilot_chooses_the_wheels_of_a_cuda(machine):
    for cuda, extra in ((), "gpu"), (("--cuda=12",), "gpu-cuda12"):
        options = [*OPTIONS["skypilot"], *PROGRAM, *cuda, "--dry-run"]
        assert f"--env=EXTRA={extra} " in machine.run("skypilot.sh", *options).stdout
        assert f'"{extra}": [' in (ROOT / "setup.py").read_text()
    refused = machine.run("skypilot.sh", *OPTIONS["skypilot"], *PROGRAM, "--cuda=11")
    assert refused.returncode == 2


DOCKERFILES = sorted(LAUNCH.glob("Dockerfile.*"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_is_pinned_and_copies_what_exists(path):
    lines = [x for x in path.read_text().splitlines() if x and not x.startswith("#")]
    steps = [line.partition(" ")[::2] for line in lines]
    known = {"FROM", "ENV", "WORKDIR", "ARG", "COPY", "RUN", "ENTRYPOINT"}
    assert {name for name, _ in steps} <= known
    assert steps[0][0] == "FROM"
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", steps[0][1])
    copies = [rest.split() for name, rest in steps if name == "COPY"]
    assert [source for *sources, _ in copies for source in sources] != []
    missing = [s for *sources, _ in copies for s in sources if not (ROOT / s).exists()]
    assert missing == []
    (extra,) = re.findall(r'constraints.txt -e "\.\[(\$?\w+)\]"', path.read_text())
    if extra == "$EXTRA":
        extra = dict(rest.split("=") for name, rest in steps if name == "ARG")["EXTRA"]
    assert f'"{extra}": [' in (ROOT / "setup.py").read_text()
    entry = json.loads(next(rest for name, rest in steps if name == "ENTRYPOINT"))
    platform = path.suffix.removeprefix(".")
    assert entry == ["bash", "launch/run.sh", f"--platform={platform}"]


def _constraints() -> dict[str, str]:
    lines = (LAUNCH / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.mark.skipif(
    "launch/constraints.txt" not in os.environ.get("PIP_CONSTRAINT", ""),
    reason="only .ci/run installs them; elsewhere there may be newer releases",
)
def test_the_constraints_are_what_these_tests_run_with():
    found = {name: importlib.metadata.version(name) for name in _constraints()}
    assert found == _constraints()


def test_every_requirement_is_constrained():
    text = (ROOT / "setup.py").read_text()
    required = re.findall(r'^    "([\w-]+)>=', text[: text.index("EXTRAS = ")], re.M)
    assert {"jax", "orbax-checkpoint"} < set(required)
    assert set(required) - set(_constraints()) == set()


@pytest.mark.parametrize("name", ["Dockerfile.gpu", "skypilot.yaml", "tpu_pod.sh"])
def test_what_installs_reads_the_constraints(name):
    text = (LAUNCH / name).read_text()
    assert "-c launch/constraints.txt" in text
    assert re.search(r"python[: ]3\.11\b", text)
