"""Asked to stop: SIGTERM, SIGUSR2 or Ctrl-C become a flag that all ranks read together between two steps.

A second signal of the same kind has its usual effect. Leaves out: what to do about it (`training/trainer.py` saves and ends).
"""

import signal

import torch
import torch.distributed as dist

from megatron_tower.runtime.distributed import device

STOPPING = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopSignal:
    """Catches the signals in STOPPING from its making on."""

    def __init__(self) -> None:
        self._number = 0
        for number in STOPPING:
            signal.signal(number, self._catch)

    def _catch(self, number: int, frame: object) -> None:
        self._number = number
        signal.signal(number, signal.SIG_DFL)

    def agreed(self) -> str | None:
        """Name of a signal that any rank has caught, the same answer on every rank; every rank must call it at the same step."""
        number = torch.tensor(self._number, device=device())
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return signal.Signals(int(number)).name if number else None
