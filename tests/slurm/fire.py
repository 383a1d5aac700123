"""Training under fire: whatever happens to a Slurm job, it ends with the losses and the weights of a run that nothing happened to.

    python -m tests.slurm.fire --runs 30            # needs a cluster: eval "$(python slurm/local_cluster.py env)"
    python -m tests.slurm.fire --faults "node down,preemption" --runs 4 --seed 7

Each run is hit once, at a random step, by a fault in turn; the table says what was hit when, how many starts it took, and whether the
losses of every step and the bytes of the last checkpoint are those of the undisturbed run. Exit code 1 if any run was lost, hung or
differs. The full disk needs root, to mount a small one.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from megatron_tower.config import REPOSITORY
from tests.distributed import room

PHASE = "cpt"
DEADLINE = 600  # seconds that a run may take
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class Victim:
    """A training job. `run_dir` holds its one phase."""

    job: str
    run_dir: Path
    steps: int

    def losses(self) -> list[tuple[int, float, float]]:
        """(step, loss, gradient norm) of each step that was logged."""
        file = self.run_dir / PHASE / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        told = (json.loads(line) for line in lines if line.endswith("}"))
        return [(one["step"], one["loss"], one["gradient_norm"]) for one in told]

    def step(self) -> int:
        return max((step for step, _, _ in self.losses()), default=0)

    def tensors(self) -> list[bytes]:
        return [path.read_bytes() for path in sorted((self.run_dir / PHASE / "checkpoints").glob(f"step_{self.steps:08d}/__*_0.distcp"))]

    def starts(self) -> int:
        file = self.run_dir / PHASE / "logs" / self.job / "starts.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def facts(self) -> dict[str, str]:
        """What scontrol says of the job."""
        return dict(word.split("=", 1) for word in slurm("scontrol", "show", "job", "--oneliner", self.job).split() if "=" in word)

    def has_ended(self) -> bool:
        """For good: on its way back to the queue a job shows for a moment how it ended."""
        if self.facts()["JobState"] not in ENDED:
            return False
        time.sleep(1)
        return self.facts()["JobState"] in ENDED

    def ranks(self) -> list[int]:
        """Process ids of the ranks."""
        return [process.pid for process in psutil.process_iter(["cmdline", "environ"]) if rank_of(process.info) == self.job]


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def rank_of(told: dict) -> str | None:
    """The job whose rank a process is; psutil tells None of one that has ended, or is another user's."""
    program, environment = Path(*(told["cmdline"] or [])[:1]).name, told["environ"] or {}
    is_rank = "python" in program and {"SLURM_STEP_ID", "MEGATRON_TOWER_JOB"} <= environment.keys()
    return environment.get("SLURM_JOB_ID") if is_rank else None


def submit(folder: Path, run_dir: Path, steps: int, *options: str) -> Victim:
    """Train the small room's model on two nodes, with seven checkpoints; `options` are sbatch's."""
    layout = ["parallel=dp2", "cluster=local_slurm", "cluster.ranks_per_node=1", "cluster.hang_seconds=30", f"run_dir={run_dir}"]
    words = room.words(folder, "gemma2", f"phase={PHASE}", f"phase.train_steps={steps}", f"phase.save_every={steps // 7}", *layout)
    common = ["--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={run_dir}.out"]
    return Victim(slurm("sbatch", *common, *options, "slurm/train.sbatch", *words), run_dir, steps)


# --- what happens to a job that has come to a random step -----------------------------------------------------------------------------


def time_limit(victim: Victim, chance: random.Random) -> None:
    """The job was submitted with too short a time, of which only its first start shall know."""
    wait(lambda: victim.starts() > 1 or victim.facts()["Restarts"] != "0" or victim.has_ended(), "the time limit")
    if not victim.has_ended():
        slurm("scontrol", "update", f"JobId={victim.job}", "TimeLimit=60")


def preemption(victim: Victim, chance: random.Random) -> None:
    every = slurm("sinfo", "--noheader", "--partition=high", "--format=%D")
    slurm("sbatch", "--partition=high", f"--nodes={every}", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")


def requeue(victim: Victim, chance: random.Random) -> None:
    slurm("scontrol", "requeue", victim.job)


def node_down(victim: Victim, chance: random.Random) -> None:
    node = chance.choice(slurm("scontrol", "show", "hostnames", victim.facts()["NodeList"]).split())
    slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=fire")
    wait(lambda: victim.facts()["JobState"] != "RUNNING", "the job to lose its node")
    if "down" in slurm("sinfo", "--noheader", f"--nodes={node}", "--format=%T"):  # it may have come back by itself
        slurm("scontrol", "update", f"NodeName={node}", "State=RESUME")


def kill_one_rank(victim: Victim, chance: random.Random) -> None:
    os.kill(chance.choice(victim.ranks()), signal.SIGKILL)


def terminate_all_ranks(victim: Victim, chance: random.Random) -> None:
    for pid in victim.ranks():
        os.kill(pid, signal.SIGTERM)


def hang(victim: Victim, chance: random.Random) -> None:
    """The others wait for it; after `cluster.hang_seconds` they say where, and die."""
    os.kill(chance.choice(victim.ranks()), signal.SIGSTOP)


def full_disk(victim: Victim, chance: random.Random) -> None:
    """Leave no room for the next checkpoint, and make some when that has ended the ranks."""
    filler, starts = victim.run_dir / "filler", victim.starts()
    free = shutil.disk_usage(victim.run_dir).free
    filler.write_bytes(b"\0" * max(0, free - 300_000))
    wait(lambda: victim.facts()["JobState"] != "RUNNING" or victim.starts() > starts, "the full disk to end the ranks")
    filler.unlink()


FAULTS: dict[str, Callable[[Victim, random.Random], None]] = {
    "time limit": time_limit,
    "preemption": preemption,
    "scontrol requeue": requeue,
    "node down": node_down,
    "SIGKILL of one rank": kill_one_rank,
    "SIGTERM of all ranks": terminate_all_ranks,
    "SIGSTOP of one rank": hang,
    "full disk": full_disk,
}


# --- one run --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    fault: str
    step: int  # at which it was hit
    starts: int
    seconds: float
    verdict: str


def under_fire(fault: str, folder: Path, run_dir: Path, straight: Victim, chance: random.Random) -> Outcome:
    began, options = time.monotonic(), []
    if fault == "time limit":
        options = ["--time=1", f"--signal=USR2@{chance.randrange(45, 59)}"]  # Slurm looks every 30 s
    run_dir.mkdir(parents=True)
    if fault == "full disk":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", run_dir], check=True)
    victim = submit(folder, run_dir, straight.steps, *options)
    hit = 0
    try:
        if fault != "time limit":
            due = chance.randrange(1, straight.steps * 4 // 5)
            wait(lambda: victim.step() >= due and victim.ranks(), f"step {due}")
            hit = victim.step()
        FAULTS[fault](victim, chance)
        wait(victim.has_ended, "the job to end")
        verdict = judge(victim, straight)
    except TimeoutError as error:
        verdict = f"HUNG: {error}"
        subprocess.run(["scancel", victim.job], timeout=60)
    outcome = Outcome(fault, hit or went_on_from(victim), victim.starts(), time.monotonic() - began, verdict)
    if fault == "full disk":
        subprocess.run(["umount", "--lazy", run_dir], check=True)
    return outcome


def undisturbed(folder: Path, steps: int) -> Victim:
    """The run that the others are compared with, and the room that they train in."""
    room.prepare(folder, "gemma2")
    straight = submit(folder, folder / "straight", steps)
    wait(straight.has_ended, "the undisturbed run to end")
    if len(straight.losses()) != steps:
        raise RuntimeError(f"the undisturbed run failed: see {straight.run_dir}.out")
    return straight


def judge(victim: Victim, straight: Victim) -> str:
    state = victim.facts()["JobState"]
    if state != "COMPLETED":
        return f"LOST: {state}"
    if victim.losses() != straight.losses():
        return "losses DIFFER"
    return "bit-equal" if victim.tensors() == straight.tensors() != [] else "weights DIFFER"


def went_on_from(victim: Victim) -> int:
    """The step from which the second start went on."""
    starts = (victim.run_dir / PHASE / "logs" / victim.job / "starts.jsonl").read_text().splitlines()
    went_on = json.loads(starts[1])["from"] if len(starts) > 1 else None
    return int(went_on.removeprefix("step_")) if went_on else 0


def wait(reached: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{DEADLINE} s passed before {what}")
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=len(FAULTS))
    parser.add_argument("--faults", default=",".join(FAULTS), help="names from the table, with commas")
    parser.add_argument("--steps", type=int, default=280)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/fire"), help="is emptied")
    arguments = parser.parse_args()
    os.chdir(REPOSITORY)
    folder, faults, chance = arguments.folder.absolute(), arguments.faults.split(","), random.Random(arguments.seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    straight = undisturbed(folder, arguments.steps)
    table = Table("run", "fault", "hit at step", "starts", "seconds", "losses and weights")
    outcomes = []
    for number in range(1, arguments.runs + 1):
        outcome = under_fire(faults[(number - 1) % len(faults)], folder, folder / f"run_{number:02d}", straight, chance)
        outcomes.append(outcome)
        row = [str(number), outcome.fault, str(outcome.step), str(outcome.starts), f"{outcome.seconds:.0f}", outcome.verdict]
        print("  ".join(row), flush=True)
        table.add_row(*row)
    Console(width=120).print(table)
    equal = sum(outcome.verdict == "bit-equal" for outcome in outcomes)
    print(f"{equal} of {len(outcomes)} runs bit-equal to the undisturbed one")
    sys.exit(equal != len(outcomes))


if __name__ == "__main__":
    main()
