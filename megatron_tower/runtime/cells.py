"""One cell of a sweep: a command line, and the small file that tells what became of it. Imports no torch.

    {"module": "megatron_tower.train", "words": ["phase=sft", "phase.optimizer.lr=1e-6"], "own": ["run_dir=runs/lr/0/run", ...],
     "state": "failed", "reason": "phase.start_from=...: not there", "outputs": "runs/lr/0/run/sft", "numbers": {}, ...}

Leaves out: running cells (`runtime/sweep.py`), what a table shows of them (`tools/sweep.py`).
"""

import fcntl
import getpass
import json
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_tower.config import Config, InputError, digest
from megatron_tower.runtime import slurm
from megatron_tower.runtime.job import TRAIN
from megatron_tower.runtime.run_dir import write_text

HERE, SLURM = "basic", "submitit_slurm"  # hydra/launcher
QUEUED, RUNNING, DONE, FAILED = "queued", "running", "done", "failed"
WHERE = ("cluster", "run_dir")  # what a cell's results don't depend on
KEPT = ("loss", "reward", "accuracy", "margin", "kl", "tokens_per_second")  # of metrics.jsonl
LAST = 0.1  # share of the logged steps whose mean is the figure of a training
ERROR = re.compile(r"(?:error: |[\w.]*(?:Error|Exception|Interrupt)\b:? ?)")  # how the line begins that says why a command ended
ECHO = re.compile(r"closed by peer|reset by peer|Broken pipe", re.IGNORECASE)  # what ranks say when another one has failed


@dataclass
class Cell:
    """folder: <sweep>/<number>; words: as swept; own: what the sweep adds; launcher: Hydra's word; config: digest of what they mean;
    job: in Slurm, as squeue names it."""

    folder: Path
    module: str
    words: list[str]
    launcher: str
    own: list[str] = field(default_factory=list)
    outputs: str = ""
    config: str = ""
    state: str = QUEUED
    reason: str | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    job: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "Cell":
        path, job = folder / "cell.json", folder / "job"
        try:
            return cls(folder, **json.loads(path.read_text(encoding="utf-8")), job=job.read_text() if job.exists() else None)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: not the file of a sweep's cell ({error}): remove {folder}") from error

    def note(self, state: str, reason: str | None = None, numbers: dict[str, float] | None = None) -> None:
        self.state, self.reason, self.numbers = state, reason, numbers or {}
        told = {name: value for name, value in asdict(self).items() if name not in ("folder", "job")}
        write_text(self.folder / "cell.json", json.dumps(told, indent=1, ensure_ascii=False) + "\n")

    def note_job(self, job: str | None) -> None:
        """In a file of its own, since cell.json is the job's to write from now on."""
        self.job = job
        (self.folder / "job").write_text(job) if job else (self.folder / "job").unlink(missing_ok=True)

    @property
    def log(self) -> Path:
        """What the cell said when it ran here; locked as long as one of its processes lives."""
        return self.folder / "log.txt"

    @property
    def values(self) -> dict[str, str]:
        """Key -> value of the words."""
        return dict(word.lstrip("+").partition("=")[::2] for word in self.words)

    def label(self, keys: Sequence[str]) -> str:
        return " ".join(f"{short(key, keys)}={self.values[key]}" for key in keys if key in self.values)

    @property
    def argv(self) -> list[str]:
        return [sys.executable, "-m", self.module, *self.words, *self.own]

    @property
    def again(self) -> str:
        """The command that runs this cell alone, into the same sweep."""
        launcher = [] if self.launcher == HERE else [f"hydra/launcher={self.launcher}"]
        sweep = word("hydra.sweep.dir", str(self.folder.parent))
        return shlex.join(["python", "-m", self.module, "-m", *self.words, sweep, *launcher])

    @property
    def result(self) -> Path:
        """Is there once the cell's work is done."""
        return Path(self.outputs) / ("finished.json" if self.module == TRAIN else "scores.json")

    def holds(self, cfg: Config) -> bool:
        """Whether it is done: with this configuration, and on the checkpoint as it is now."""
        if self.state != DONE or self.config != digest(cfg, WHERE) or not self.result.exists():
            return False
        return self.module == TRAIN or _changed(Path(cfg.eval.checkpoint)) <= self.result.stat().st_mtime

    def end(self, code: int, logs: list[Path]) -> None:
        """Note how it ended; `logs` may hold the reason, the likeliest first."""
        if code or not self.result.exists():
            self.note(FAILED, _reason(code, logs))
        else:
            self.note(DONE, numbers=_trained(Path(self.outputs)) if self.module == TRAIN else _scored(self.result))


def word(key: str, value: str | None) -> str:
    """`key=value` for Hydra, quoted where its grammar needs that."""
    if value is None or re.fullmatch(r"[\w./+-]+", value):
        return f"{key}={'null' if value is None else value}"
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


def read(folder: Path) -> list[Cell]:
    """The cells of a sweep in order; those that died without a word are noted as failed."""
    paths = (path.parent for path in folder.glob("*/cell.json") if path.parent.name.isdigit())
    found = [Cell.read(path) for path in sorted(paths, key=lambda path: int(path.name))]
    queue = alive_jobs(found)
    return [_settled(cell, queue) for cell in found]


def alive_jobs(found: Sequence[Cell]) -> set[str]:
    """Slurm jobs of cells that have not ended for good; all of them where Slurm can't be asked."""
    jobs = {cell.job for cell in found if cell.job and cell.state != DONE}
    try:
        return jobs & in_queue() if jobs else set()
    except (RuntimeError, OSError) as error:
        print(f"can't ask Slurm what has become of {len(jobs)} jobs: {error}")
        return jobs


def _settled(cell: Cell, queue: set[str]) -> Cell:
    if is_alive(cell, queue):
        if cell.state == FAILED:  # Slurm ended it and will start it again
            cell.state = QUEUED
        return cell
    if cell.state != RUNNING and not (cell.state == QUEUED and cell.job):
        return cell
    now = Cell.read(cell.folder)  # it may have come to its end since it was read
    if now.state == cell.state:
        now.note(FAILED, _obituary(now))
    return now


def swept(found: Sequence[Cell]) -> list[str]:
    """The keys whose value is not the same in every cell, in the order of the words; a cell alone shows none."""
    every = dict.fromkeys(key for cell in found for key in cell.values if not key.startswith("cluster"))
    return [key for key in every if len({cell.values.get(key) for cell in found}) > 1]


def short(key: str, keys: Sequence[str]) -> str:
    """The last part of a key, where no other of `keys` ends the same way."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def in_queue() -> set[str]:
    """This user's Slurm jobs that have not ended for good, those of arrays as 12_3."""
    return set(slurm.ask("squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i").split())


def is_alive(cell: Cell, queue: set[str]) -> bool:
    """Whether a cell that was begun is still at work, or waits in the queue."""
    if cell.job:
        return cell.job in queue
    if not cell.log.exists():
        return False
    with cell.log.open() as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _obituary(cell: Cell) -> str:
    """Why a cell that left no word has died, as far as can be told."""
    if not cell.job:
        return "was killed, or the machine went down" if cell.state == RUNNING else "was not begun"
    try:
        facts = slurm.ask("scontrol", "show", "job", "--oneliner", cell.job)
    except RuntimeError:  # Slurm forgets ended jobs after some minutes
        return f"its Slurm job {cell.job} is gone and left no word"
    state = re.search(r"JobState=(\S+)", facts)
    return f"its Slurm job {cell.job} ended as {state[1] if state else 'unknown'} and left no word"


def _reason(code: int, logs: list[Path]) -> str:
    """One sentence from the logs, else the exit code."""
    if code == 0:
        return "ended before it was done; the same command goes on from there"
    if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return "was ended by SIGTERM, which scancel and Slurm's limits send; the same command goes on from there"
    for log in logs:
        lines = [re.sub(r"^\s*(\[rank\d+\]: )?", "", line).rstrip() for line in log.read_text(errors="replace").splitlines()]
        said = [line for line in lines if ERROR.match(line) and not ECHO.search(line)]
        if said:
            return f"{said[-1].removeprefix('error: ')} (exit code {code})"
    return f"ended with exit code {code}"


def _changed(checkpoint: Path) -> float:
    """When a run directory's phase, a checkpoint or a Hugging Face folder last got new weights."""
    files = [checkpoint / "checkpoints" / "latest", *checkpoint.glob("*.safetensors"), *checkpoint.glob("*.json")]
    return max((path.stat().st_mtime for path in files if path.exists()), default=float("inf"))


def _trained(outputs: Path) -> dict[str, float]:
    """Figures of a training: means over the last of its steps, and the last loss."""
    rows = [json.loads(line) for line in (outputs / "metrics.jsonl").read_text().splitlines()]
    last = rows[-max(1, round(LAST * len(rows))) :]
    means = {key: sum(row[key] for row in last) / len(last) for key in KEPT if all(row.get(key) is not None for row in last)}
    return means | {"last loss": rows[-1]["loss"]}


def _scored(scores: Path) -> dict[str, float]:
    """Figures of an evaluation: those over all items of a task, as `task metric`."""
    rows = json.loads(scores.read_text(encoding="utf-8"))["scores"]
    return {f"{row['task']} {row['metric']}": row["value"] for row in rows if row["by"] == "all"}
