"""A machine whose cloud tools are stand-ins, for the tests of launch/.

Nothing is rented: a stand-in notes how it was called, and does what its test wants.
"""

import json
import pathlib
import shlex
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
TOOLS = ("gcloud", "kubectl", "xpk", "sbatch", "sky", "srun", "squeue", "scontrol")
CONFIG = "--config=configs/quickstart.py:smoke"
WORKDIR = "--workdir=/mnt/shared/my run"  # a space, to see what is quoted
PROGRAM = [CONFIG, WORKDIR, '--config.prompts.list=("it\'s",)', "--profile=1:2"]
OPTIONS = {
    "run": ["--platform=gpu"],
    "tpu_pod": ["--name=n", "--project=p", "--zone=z", "--type=v5p-64", "--spot"],
    "gke_jobset": [
        *("--name=n", "--image=i", "--tpu=tpu-v6e-slice"),
        *("--topology=4x4", "--claim=c"),
    ],
    "gke_xpk": [
        *("--name=n", "--cluster=c", "--project=p", "--zone=z"),
        *("--tpu=v6e-16", "--image=i", "--storage=s"),
    ],
    "slurm": ["--nodes=2"],
    "skypilot": ["--name=n", "--bucket=b"],
}
TOOL_OF = {
    "tpu_pod": "gcloud",
    "gke_jobset": "kubectl",
    "gke_xpk": "xpk",
    "slurm": "sbatch",
    "skypilot": "sky",
}
STAND_IN = """#!{python} -SE
import json, os, sys
note = os.environ["STAND_IN_NOTES"]
name = os.path.basename(sys.argv[0])
with open(note, "a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
{body}
"""


class Machine:
    """A PATH with stand-ins for the tools, and what they were called with."""

    def __init__(self, folder: pathlib.Path):
        self.tools, self.notes = folder / "tools", folder / "notes.jsonl"
        self.folder = folder
        self.tools.mkdir()
        for name in ("bash", "env", "git", "sleep", "date", "cat", "dirname"):
            self.link(name)
        for name in ("grep", "sed", "basename"):
            self.link(name)

    def link(self, name: str) -> None:
        (self.tools / name).symlink_to(str(shutil.which(name)))

    def add(self, name: str, body: str = "") -> None:
        path = self.tools / name
        path.write_text(STAND_IN.format(python=sys.executable, body=body))
        path.chmod(0o755)

    def run(self, script: str, *arguments: str, **more: str):
        return subprocess.run(
            ["bash", str(LAUNCH / script), *arguments],
            env=self.environment(**more),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def environment(self, **more: str) -> dict[str, str]:
        own = {"PATH": str(self.tools), "STAND_IN_NOTES": str(self.notes)}
        return own | {"HOME": str(self.folder), "POLL_SECONDS": "0"} | more

    @property
    def calls(self) -> list[list[str]]:
        if not self.notes.exists():
            return []
        return [json.loads(line) for line in self.notes.read_text().splitlines()]


def commands(output: str) -> list[list[str]]:
    """The lines of a dry run as argument lists."""
    lines = [line for line in output.splitlines() if not line.startswith("#")]
    return [shlex.split(line) for line in lines]
