"""A TPU pod slice through everything that happens to one, with a stand-in for gcloud.

The stand-in keeps the state of a slice, and plays in turn what OUTCOMES says of each
time that the program is followed.
"""

import shutil
import subprocess

import pytest
from launch_machine import LAUNCH, OPTIONS, PROGRAM, ROOT, WORKDIR, Machine

CLOUD = """
import pathlib
state, ended = (pathlib.Path(note).with_name(n) for n in ("state", "ended"))
blind = pathlib.Path(note).with_name("blind")
def complain(text, code=1):
    print(text, file=sys.stderr)
    sys.exit(code)
if "create" in sys.argv:
    tries = sum("create" in json.loads(line) for line in open(note))
    outcome = (os.environ.get("GRANTS", "").split() + ["ACTIVE"] * tries)[tries - 1]
    if outcome == "refused":
        complain("ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUs' has been exceeded")
    state.write_text(outcome)
if "delete" in sys.argv:
    if os.environ.get("UNDELETABLE") and not ended.exists():
        ended.write_text("")
        complain("ERROR: FAILED_PRECONDITION")
    state.unlink()
if "describe" in sys.argv:
    seen = int(blind.read_text()) if blind.exists() else 0
    blind.write_text(str(seen + 1))
    if seen < int(os.environ.get("BLIND", 0)):
        complain("ERROR: Reauthentication failed. cannot prompt")
    if not state.exists():
        complain("ERROR: NOT_FOUND: Resource was not found")
    print({"ACTIVE": "READY"}.get(state.read_text(), "PREEMPTED")
          if "tpu-vm" in sys.argv else state.read_text())
command = next((a for a in sys.argv if a.startswith("--command=")), "")
if "detached.sh follow" in command:
    runs = [line for line in open(note) if "detached.sh follow" in line]
    outcome = os.environ.get("OUTCOMES", "0").split()[len(runs) - 1]
    ended.write_text("running" if outcome == "dropped" else "ended " + outcome)
    if outcome == "unreachable":
        ended.write_text("")
    if outcome == "preempted":
        state.write_text("SUSPENDED")
    if outcome != "0":
        sys.exit(255)
if "detached.sh status" in command and not ended.read_text():
    complain("ssh: connect to host 10.0.0.4 port 22: Connection timed out", 255)
if "detached.sh status" in command:
    other = 2 if ended.read_text() == "ended 2" else 75  # a mistake is all workers'
    print("Using ssh batch size of 2", f"ddrl_jax: ended {other}", sep="\\n")
    print("ddrl_jax: " + ended.read_text())
"""
ONCE = ["scp", "prepare", "start", "follow"]
SLICE = ["create", *ONCE]


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path)
    made.add("gcloud", CLOUD)
    return made


def _verbs(machine: Machine) -> list[str]:
    """What was done, without looking at states."""
    verbs = []
    for call in machine.calls:
        command = next((w for w in call if w.startswith("--command=")), "")
        inner = command.partition("detached.sh ")[2].partition(" ")[0]
        setup = "prepare" if "uv pip install" in command else inner
        verbs.append(setup or call[4])
    return [verb for verb in verbs if verb not in ("describe", "status")]


def _start(machine: Machine, outcomes: str, *arguments: str, **more: str):
    options = [*OPTIONS["tpu_pod"], *PROGRAM, *arguments]
    return machine.run("tpu_pod.sh", *options, OUTCOMES=outcomes, **more)


@pytest.mark.parametrize("lost", [0, 2])
def test_a_preempted_slice_is_requested_again(lost, machine):
    result = _start(machine, "preempted " * lost + "0")
    assert result.returncode == 0, result.stderr
    assert _verbs(machine) == [*SLICE, "delete"] * (lost + 1)


def test_a_dropped_connection_is_taken_up_again(machine):
    """The program goes on without it: nothing is started or stopped."""
    result = _start(machine, "dropped dropped 0")
    assert result.returncode == 0, result.stderr
    assert _verbs(machine) == [*SLICE, "follow", "follow", "delete"]
    assert result.stderr.count("attaching again") == 2


def test_workers_that_never_answer_are_given_up_and_left_as_they_are(machine):
    """Twice in turn is not too often here, and an answer begins a new count."""
    twice = "unreachable unreachable"
    result = _start(machine, f"{twice} dropped {twice} 0", SSH_TRIES="3")
    assert result.returncode == 0, result.stderr
    machine.notes.unlink()
    result = _start(machine, twice + " unreachable 0", SSH_TRIES="3")
    assert result.returncode == 1
    assert result.stderr.count("attaching again") == 2
    assert "the workers did not answer 3 times" in result.stderr
    assert _verbs(machine) == [*SLICE, "follow", "follow"]


def test_a_worker_that_crashed_is_started_again_with_all_others(machine):
    result = _start(machine, "139 1 0")
    assert result.returncode == 0, result.stderr
    assert _verbs(machine) == [*SLICE, *ONCE, *ONCE, "delete"]


def test_restarts_on_a_healthy_slice_have_an_end(machine):
    result = _start(machine, "1 1 1 1", "--restarts=1")
    assert result.returncode == 1
    assert "the slice is left as it is" in result.stderr
    assert _verbs(machine) == [*SLICE, *ONCE]


def test_a_mistake_is_not_tried_again(machine):
    """The slice is left as it is, for a look at the logs."""
    result = _start(machine, "2 0")
    assert result.returncode == 1
    assert "failed on a healthy slice, which is left as it is" in result.stderr
    assert _verbs(machine) == SLICE


def test_it_gives_up_after_the_attempts(machine):
    result = _start(machine, "preempted " * 9, "--attempts=2")
    assert result.returncode == 2
    assert "2 slices were lost" in result.stderr
    assert _verbs(machine).count("start") == 2


@pytest.mark.parametrize("grants", ["refused refused refused", "FAILED FAILED"])
def test_what_was_not_granted_uses_up_no_slice(grants, machine):
    result = _start(machine, "preempted 0", "--attempts=2", GRANTS=grants)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("was not granted") == len(grants.split())
    assert _verbs(machine).count("start") == 2


def test_requests_that_are_never_granted_have_an_end(machine):
    result = _start(machine, "0", GRANTS="refused " * 9, REQUEST_TRIES="3")
    assert result.returncode == 2
    assert "3 requests in turn were not granted" in result.stderr
    assert _verbs(machine) == ["create"] * 3


def test_an_answer_that_does_not_come_is_waited_for(machine):
    (machine.folder / "state").write_text("ACTIVE")  # a slice that is there
    result = _start(machine, "0", "--keep", BLIND="3")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("gcloud does not answer") == 3
    assert _verbs(machine) == ONCE


def test_without_an_answer_nothing_is_requested_or_deleted(machine):
    (machine.folder / "state").write_text("ACTIVE")
    result = _start(machine, "0", BLIND="99")
    assert result.returncode == 2
    assert "gcloud did not answer" in result.stderr
    assert "Reauthentication failed" in result.stderr
    assert _verbs(machine) == []


def test_a_slice_that_can_not_be_deleted_yet_is_tried_again(machine):
    (machine.folder / "state").write_text("SUSPENDED")
    result = _start(machine, "0", UNDELETABLE="1")
    assert result.returncode == 0, result.stderr
    assert _verbs(machine) == ["delete", "delete", *SLICE, "delete"]


def test_a_share_is_made_writable_and_apt_waits_for_its_lock(machine):
    shown = _start(machine, "0", "--nfs=10.0.0.2:/share", "--dry-run").stdout
    assert "sudo chmod 1777 /mnt/shared" in shown
    mount = shown.partition("mountpoint")[2]
    assert mount.index("update") < mount.index("install nfs-common")
    assert "DPkg::Lock::Timeout=300" in mount


# ---- what is shipped


def _copy(machine: Machine) -> str:
    copy = machine.folder / "copy"
    shutil.copytree(LAUNCH, copy / "launch")
    (copy / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "quickstart.py", copy / "configs")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=copy, check=True)
    return str(copy / "launch" / "tpu_pod.sh")


def test_what_is_not_committed_is_told(machine):
    script = _copy(machine)
    options = [*OPTIONS["tpu_pod"], *PROGRAM, "--dry-run"]
    assert machine.run(script, *options).stderr == ""
    new = machine.folder / "copy" / "configs" / "new.py"
    new.write_text("")
    result = machine.run(script, *options)
    assert result.returncode == 0 and "warning: the commit HEAD" in result.stderr
    own = [*OPTIONS["tpu_pod"], "--config=configs/new.py", WORKDIR, "--dry-run"]
    result = machine.run(script, *own)
    assert result.returncode == 2
    assert "configs/new.py is not in the commit HEAD" in result.stderr
