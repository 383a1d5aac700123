"""A real Slurm for the tests of this folder (`slurm/local_cluster.py`): three nodes; they are skipped where it is not installed.

def test_it(cluster):
    job = cluster.submit("--nodes=2", "--wrap=srun hostname")
    cluster.wait(job)
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from slurm import local_cluster

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "slurm" / "local_cluster.py"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
UP = {"idle", "mixed", "allocated"}  # and not "idle*": no answer
HOPELESS = {"DependencyNeverSatisfied", "JobHeldAdmin", "launch_failed_requeued_held"}


@dataclass(frozen=True)
class Cluster:
    """A running cluster, and what tests do with it."""

    tool: local_cluster.Cluster
    env: dict[str, str]

    def run(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Any command, in the repository; its exit code is the caller's business."""
        return subprocess.run(words, cwd=REPOSITORY, env=self.env, capture_output=True, text=True, timeout=timeout)

    def ask(self, *words: str) -> str:
        """Output of a command that must succeed."""
        done = self.run(*words)
        assert done.returncode == 0, f"{shlex.join(words)} ended with {done.returncode}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: str) -> str:
        """The id of the job that `sbatch words` queues."""
        return self.ask("sbatch", "--parsable", *words)

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says (Restarts, NodeList, StdOut, ...), as far as values have no blanks."""
        return dict(word.split("=", 1) for word in self.ask("scontrol", "show", "job", "--oneliner", job).split() if "=" in word)

    def state(self, job: str) -> str:
        return self.facts(job)["JobState"]

    def wait(self, job: str, states: set[str] | frozenset[str] = frozenset({"COMPLETED"}), seconds: float = 300) -> str:
        """Wait until the job is in one of `states`, which is returned; fails with its logs once it can't get there any more."""
        deadline, ended = time.monotonic() + seconds, False
        while True:
            facts = self.facts(job)
            state = facts["JobState"]
            if state in states:
                return state
            over = state in ENDED or facts.get("Reason") in HOPELESS
            if over and ended:  # seen twice: on its way back to the queue a job shows how it ended, too
                pytest.fail(f"job {job} is {state} ({facts.get('Reason')}), not {' or '.join(states)}\n{self.story(job)}")
            if time.monotonic() > deadline:
                pytest.fail(f"job {job} is still {state} ({facts.get('Reason')}) after {seconds:.0f} s\n{self.story(job)}")
            ended = over
            time.sleep(0.5)

    def until(self, true: Callable[[], object], what: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
            time.sleep(0.2)

    def story(self, job: str) -> str:
        """The end of the job's output, and what slurmctld wrote about it."""
        facts = self.facts(job)
        told = []
        for path in dict.fromkeys((facts["StdOut"], facts["StdErr"])):
            with contextlib.suppress(OSError):
                told += [f"--- {path}", *Path(path).read_text(errors="replace").splitlines()[-60:]]
        lines = (self.tool.folder / "log" / "slurmctld.log").read_text(errors="replace").splitlines()
        return "\n".join([*told, "--- slurmctld", *(line for line in lines if re.search(rf"JobId={job}\b", line))])

    def processes(self, job: str) -> list[int]:
        """Process ids of everything a job has started, on any node."""
        return [process.pid for process in self.tool.processes() if process.job == job]

    def kill_node(self, node: str) -> None:
        """As by a power cut: slurmd and all jobs' processes there are gone at once, and slurmctld finds out."""
        while there := [process.pid for process in self.tool.processes() if process.node == node]:  # also what was forked meanwhile
            for pid in there:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=killed")

    def start_node(self, node: str) -> None:
        """Bring back a node that was killed; what was sent to it while it was dead may take it down once more, late."""
        self.tool.start_node(node)
        deadline = time.monotonic() + 240
        while not (state := self.ask("sinfo", "--noheader", f"--nodes={node}", "--format=%T").split()) or not set(state) <= UP:
            assert time.monotonic() < deadline, f"{node} is not back\n{self.ask('scontrol', 'show', 'node', node)}\n{self.ask('squeue')}"
            if any(word.startswith("down") for word in state):
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
            time.sleep(1)


@contextlib.contextmanager
def running(nodes: int, gpus: int = 4, cpus: int = 16, accounting: bool = False) -> Iterator[Cluster]:
    """A cluster of its own, ended also when this process is killed: the stopper waits for the end of its input."""
    if lacking := local_cluster.missing():
        pytest.skip(f"Slurm is not installed ({', '.join(lacking)} not found): python slurm/local_cluster.py install")
    folder = Path(tempfile.mkdtemp(prefix="slurm_")).resolve()
    stop = shlex.join([sys.executable, str(TOOL), "stop", "--folder", str(folder)])
    stopper = subprocess.Popen(
        ["sh", "-c", f"cat; {stop} && rm -rf {folder}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        tool = local_cluster.Cluster(folder)
        tool.start(nodes, gpus, cpus, accounting)
        inherited = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        yield Cluster(tool, {name: value for name, value in tool.environment().items() if name not in inherited})
    finally:
        _, complaint = stopper.communicate(timeout=180)
    assert stopper.returncode == 0, complaint


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with running(nodes=3) as shared:
        yield shared


@pytest.fixture
def another_cluster() -> Callable[..., AbstractContextManager[Cluster]]:
    """`with another_cluster(nodes=1) as it`: one that the test may break."""
    return running
