"""What a checkpoint costs training on this machine, saved by the training itself or beside it: the table of `python -m tools.bench save`.

Training stands still for the whole of a plain save (fp32 weights and moments to the disk, hashed); for one beside it, while memory is
snapshot. Then both go on at once, on the same cores: steps are slower until the checkpoint is published.
Measure with GOMP_SPINCOUNT=20000, as ranks are started (`runtime/processes.py`): threads that wait by spinning starve the writer.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tower.config import Config

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from megatron_tower.models.build import Decoder

HEAD = (
    "| model | checkpoint, MB | step, ms | stands still: plain, ms | beside, ms | step beside, ms | published after, ms |\n"
    "|---|---:|---:|---:|---:|---:|---:|"
)


@dataclass(frozen=True)
class Result:
    """Milliseconds, medians over the turns; `published`: from the beginning of a save beside the training to its end."""

    megabytes: float
    step: float
    plain: float
    beside: float
    step_beside: float
    published: float


def measure(cfg: Config, make: "Callable[[], list[Decoder]]", rows: "Dataset", turns: int) -> Result:
    """Some steps, a plain save, a save beside further steps; so often."""
    from megatron_tower.data import manifest
    from megatron_tower.training.rounds import RowSource
    from megatron_tower.training.saving import Saver
    from megatron_tower.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        manifest.write(data, {})
        cfg = replace(cfg, run_dir=folder, data=replace(cfg.data, folder=str(data)), phase=replace(cfg.phase, keep_last=1))
        beside = replace(cfg, phase=replace(cfg.phase, async_save=True))
        trainer = Trainer(cfg, make(), RowSource(cfg, rows), cfg.phase.train_steps)
        step, plain, still, slow, published = [], [], [], [], []
        trainer.step()
        for _ in range(turns):
            step.append(_seconds(trainer.step))
            with Saver(cfg) as saver:
                trainer.step()  # a step number of its own: it is another checkpoint
                plain.append(_seconds(lambda saver=saver: saver.save(trainer.state)))
            trainer.step()
            began = time.perf_counter()
            with Saver(beside) as saver:
                still.append(_seconds(lambda saver=saver: saver.save(trainer.state)))
                slow.append(_seconds(trainer.step))
            published.append(time.perf_counter() - began)
        size = sum(file.stat().st_size for file in cfg.phase_dir.rglob("*.distcp")) / 1e6
    return Result(size, *(1000 * statistics.median(seconds) for seconds in (step, plain, still, slow, published)))


def line(name: str, r: Result) -> str:
    """A row of the markdown table that begins with HEAD."""
    numbers = (r.megabytes, r.step, r.plain, r.beside, r.step_beside, r.published)
    return f"| {name} | " + " | ".join(f"{number:,.0f}" for number in numbers) + " |"


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
