"""How training tells of itself, from rank 0: metrics.jsonl always, a bar in a terminal or plain lines, TensorBoard and W&B on request.

with Progress(cfg, steps=300, done=0) as progress:
    progress.log(step, {"loss": 2.1, "tokens_per_second": 2400.0})
"""

import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from megatron_tower.config import Config, InputError
from megatron_tower.runtime.distributed import is_rank_zero

LINE_EVERY = 10.0  # seconds between plain lines


def check(cfg: Config) -> None:
    """Raise InputError when a writer that the config asks for is not installed."""
    for wanted, package in ((cfg.phase.tensorboard, "tensorboard"), (cfg.phase.wandb_project, "wandb")):
        if wanted and not find_spec(package):
            raise InputError(f"phase={cfg.phase.name} asks for {package}, which is not installed: pip install {package}")


class Progress:
    """Steps are counted from 1; `done` of them were made before (a resume). On ranks other than 0 nothing happens."""

    def __init__(self, cfg: Config, steps: int, done: int) -> None:
        self.cfg, self.steps, self.done = cfg, steps, done
        self.writers: list[Callable[[int, dict[str, float]], object]] = []
        self.closers: list[Callable[[], None]] = []

    def __enter__(self) -> "Progress":
        if not is_rank_zero():
            return self
        metrics = (self.cfg.phase_dir / "metrics.jsonl").open("a", buffering=1)  # a line is on its way to disk when it is whole
        self.writers.append(lambda step, values: metrics.write(json.dumps({"step": step, **values}) + "\n"))
        self.closers.append(metrics.close)
        self._terminal() if Console().is_terminal else self._lines()
        if self.cfg.phase.tensorboard:
            self._tensorboard()
        if self.cfg.phase.wandb_project:
            self._wandb()
        return self

    def log(self, step: int, values: dict[str, float]) -> None:
        """Tell of `step`; a step that is no multiple of `phase.log_every`, and not the last, is passed over."""
        if step % self.cfg.phase.log_every == 0 or step == self.steps:
            for write in self.writers:
                write(step, values)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for close in reversed(self.closers):
            close()

    def _terminal(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
        )
        bar = Bar(*columns)
        task = bar.add_task(self.cfg.phase.name, total=self.steps, completed=self.done, told="")
        bar.start()
        self.writers.append(lambda step, values: bar.update(task, completed=step, told=_told(values)))
        self.closers.append(bar.stop)

    def _lines(self) -> None:
        started, last = time.monotonic(), -LINE_EVERY

        def line(step: int, values: dict[str, float]) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= LINE_EVERY or step == self.steps:
                last = now
                left = (now - started) / (step - self.done) * (self.steps - step)
                print(f"{self.cfg.phase.name} step {step}/{self.steps}  {_told(values)}  {left / 60:.1f} min left", flush=True)

        self.writers.append(line)

    def _tensorboard(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(self.cfg.phase_dir / "tensorboard", purge_step=self.done + 1)
        self.writers.append(lambda step, values: [board.add_scalar(k, v, step) for k, v in values.items()])
        self.closers.append(board.close)

    def _wandb(self) -> None:
        import wandb

        run = wandb.init(project=self.cfg.phase.wandb_project, name=str(self.cfg.phase_dir), dir=self.cfg.phase_dir)
        self.writers.append(lambda step, values: run.log(values, step=step))
        self.closers.append(run.finish)


def _told(values: dict[str, float]) -> str:
    return f"loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tokens/s"
