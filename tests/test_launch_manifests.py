"""What the launchers hand to others: JobSet, SkyPilot task, images."""

import json
import re
import shutil
import subprocess

import pytest
import yaml
from launch_machine import LAUNCH, OPTIONS, PROGRAM, ROOT, Machine, commands
from yaml_schema import violations

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


def test_only_spot_nodes_are_asked_for_as_spot(machine):
    def selector(*more: str) -> dict:
        job = _jobset(machine, *more)["spec"]["replicatedJobs"][0]
        return job["template"]["spec"]["template"]["spec"]["nodeSelector"]

    assert "cloud.google.com/gke-spot" not in selector()
    assert selector("--spot")["cloud.google.com/gke-spot"] == "true"


def test_the_skypilot_task_has_published_fields_only():
    document = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert list(violations(SCHEMAS["skypilot"], document)) == []
    assert document["resources"]["use_spot"] is True
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
    assert machine.calls == [["bash", "launch/run.sh", "--platform=gpu", *PROGRAM]]


DOCKERFILES = sorted(LAUNCH.glob("Dockerfile.*"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_is_pinned_and_copies_what_exists(path):
    lines = [x for x in path.read_text().splitlines() if x and not x.startswith("#")]
    steps = [line.partition(" ")[::2] for line in lines]
    known = {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "ENTRYPOINT"}
    assert {name for name, _ in steps} <= known
    assert steps[0][0] == "FROM"
    assert re.fullmatch(r"python:3\.12\.\d+-slim-\w+", steps[0][1])
    copies = [rest.split() for name, rest in steps if name == "COPY"]
    assert [source for *sources, _ in copies for source in sources] != []
    missing = [s for *sources, _ in copies for s in sources if not (ROOT / s).exists()]
    assert missing == []
    extra = re.search(r'pip install -e "\.\[(\w+)\]"', path.read_text())
    assert extra and f'"{extra[1]}": [' in (ROOT / "setup.py").read_text()
    entry = json.loads(next(rest for name, rest in steps if name == "ENTRYPOINT"))
    platform = path.suffix.removeprefix(".")
    assert entry == ["bash", "launch/run.sh", f"--platform={platform}"]
