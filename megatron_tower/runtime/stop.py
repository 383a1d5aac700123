"""Asked to stop, or to save: what any rank has caught and what rank 0 sees becomes one answer that all ranks read between two steps.

    SIGTERM, SIGUSR2, Ctrl-C       on any rank: save and end. A second Ctrl-C has its usual effect
    <run_dir>/triggers/stop        save and end; a phase does not begin while the file is there
    <run_dir>/triggers/save        save once more and go on; the file is removed
    MEGATRON_TOWER_END_TIME        when Slurm ends the job, in Unix seconds: save and end while there is time for it

Leaves out: what to do about it (`training/trainer.py` saves and ends), who starts the ranks again (`runtime/job.py`).
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tower.runtime.distributed import device, is_rank_zero

STOPPING = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
NOTHING, SAVE, STOP_FILE, JOB_END = range(4)  # what ranks can say; a signal says JOB_END + its number. The highest is heard
ENDING = 10.0  # seconds that ranks take to leave once they have saved


@dataclass(frozen=True)
class Asked:
    """`end`: why training shall save and end, if it shall; `save`: whether it shall save and go on."""

    end: str | None = None
    save: bool = False


class StopSignal:
    """Catches the signals in STOPPING from its making on; `triggers` is the folder of the files."""

    def __init__(self, triggers: Path):
        self._triggers = triggers
        self._number = 0
        end = os.environ.get("MEGATRON_TOWER_END_TIME")
        self._end_time = float(end) if end else None
        for number in STOPPING:
            signal.signal(number, self._catch)

    def _catch(self, number: int, frame: object) -> None:
        self._number = number
        if number == signal.SIGINT:  # Slurm sends the others again, before SIGKILL: then this process is at its last save
            signal.signal(number, signal.SIG_DFL)

    def agreed(self, seconds: float = 0.0) -> Asked:
        """What is asked for, the same answer on every rank; every rank must call it at the same step.

        `seconds`: the time that rank 0 needs, if training goes on, until the next save would be over.
        """
        code = torch.tensor(self._code(seconds), device=device())
        dist.all_reduce(code, dist.ReduceOp.MAX)
        reasons = {
            NOTHING: Asked(),
            SAVE: Asked(save=True),
            STOP_FILE: Asked(end=f"{self._triggers / 'stop'} is there (remove it to go on)"),
            JOB_END: Asked(end="the job's time is nearly over"),
        }
        return reasons.get(int(code)) or Asked(end=signal.Signals(int(code) - JOB_END).name)

    def _code(self, seconds: float) -> int:
        if self._number:
            return JOB_END + self._number
        if not is_rank_zero():
            return NOTHING
        if self._end_time and time.time() + seconds + ENDING > self._end_time:
            return JOB_END
        if (self._triggers / "stop").exists():
            return STOP_FILE
        save = self._triggers / "save"
        if save.exists():
            save.unlink(missing_ok=True)
            return SAVE
        return NOTHING
