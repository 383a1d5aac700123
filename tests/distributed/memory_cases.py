# ruff: noqa: E402 (the bridge comes before megatron-core)
"""Curves and weights with and without the words that save memory or time, on four ranks. Run by test_memory_words.py.

python -m tests.distributed.memory_cases FOLDER
"""

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_tower.runtime import cpu

cpu.install()

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_tower.config import Config
from megatron_tower.runtime import distributed
from megatron_tower.train import build
from megatron_tower.training import checkpoint, saving, trainer
from megatron_tower.training.trainer import Trainer
from tests.distributed.curves import config

STEPS = 4
STEADY = "phase.optimizer.epsilon=1e-5"  # or a gradient that is zero but for rounding, as that of a key's bias, moves it by a whole step
SHARED = ["parallel.distributed_optimizer=true"]
LAYOUTS = {
    "dp4": ["parallel.data=4"],
    "tp2dp2": ["parallel=tp2_sp", "parallel.data=2", *SHARED],
    "pp2dp2": ["parallel=pp2", "parallel.data=2", *SHARED],
    "pp2dp2_virtual": ["parallel=pp2", "parallel.data=2", "parallel.virtual_pipeline=2", *SHARED],
}


def trained(cfg: Config, steps: int = STEPS, start: object = None) -> tuple[Trainer, list[float]]:
    """The trainer after `steps` updates, and their losses."""
    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    at = build(cfg, start or Path(cfg.phase.start_from))
    return at, [at.step()["loss"] for _ in range(steps)]


def weights(at: Trainer) -> list[Tensor]:
    at.state.gather()
    return [weight.detach().clone() for chunk in at.state.chunks for weight in chunk.parameters()]


@contextmanager
def all_gathered_before_the_loss() -> Iterator[None]:
    """The head's weight is read outside of its module, and nothing waits for it by itself."""
    loss = Trainer._loss

    def watched(self: Trainer, *args: object) -> tuple:
        last = self.state.chunks[-1]
        late = [group for group in last.bucket_groups if group.param_gather_handle is not None]
        assert not late, f"{len(late)} buckets of weights are still under way when the loss is computed"
        return loss(self, *args)

    Trainer._loss = watched
    yield
    Trainer._loss = loss


def near(found: list[float], expected: list[float]) -> bool:
    """But for the order of sums: buckets of other sizes are added up in another one. An update moves a weight by some 5e-3."""
    return all(abs(a - b) < 1e-5 for a, b in zip(found, expected, strict=True))


def same(found: Trainer, expected: Trainer, where: str) -> None:
    for one, other in zip(weights(found), weights(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5, msg=lambda text: f"{where}: {text}")


def overlap(folder: Path, family: str, layout: str) -> None:
    """Many small buckets, reduced and gathered beside the computation: the same losses and weights, on every rank."""
    words = [*LAYOUTS[layout], "phase.micro_batch_size=1", STEADY]
    plain, losses = trained(config(folder, family, "single", *words))
    with all_gathered_before_the_loss():
        beside, found = trained(config(folder, family, "single", *words, "parallel.overlap=true"))
    ranks = parallel_state.get_data_parallel_world_size()
    groups = [group for chunk in beside.state.chunks for group in chunk.bucket_groups]
    if layout != "pp2dp2_virtual" and parallel_state.is_pipeline_first_stage():  # the others have one bucket, as megatron-core wants it
        assert len(groups) > 5, f"{family} {layout}: {len(groups)} buckets"
    assert beside.state.chunks[0].ddp_config.overlap_grad_reduce and ranks > 1
    assert near(found, losses), f"{family} {layout}: {found} against {losses}"
    same(beside, plain, f"{family} {layout}")


def rollouts(folder: Path) -> None:
    """GRPO samples and scores with the weights of the last update, whole."""
    words = ["parallel.data=4", *SHARED, STEADY]
    plain, expected = trained(config(folder, "gemma2_grpo", "single", *words))
    beside, found = trained(config(folder, "gemma2_grpo", "single", *words, "parallel.overlap=true"))
    assert near(found, expected), f"rollouts: {found} against {expected}"
    same(beside, plain, "rollouts")


def saved(folder: Path) -> None:
    """A checkpoint written right after an update goes on, without the word and on another layout, as if nothing had been."""
    words = [f"run_dir={folder}/saved", "phase.micro_batch_size=1", STEADY]
    cfg = config(folder, "qwen2", "single", *words, *LAYOUTS["tp2dp2"], "parallel.overlap=true")
    before, _ = trained(cfg, STEPS // 2)
    saving.save(cfg, before.state)
    straight, losses = trained(config(folder, "qwen2", "single", *words, *LAYOUTS["tp2dp2"]))
    on = config(folder, "qwen2", "single", *words, *LAYOUTS["tp2dp2"])
    after, found = trained(on, STEPS // 2, checkpoint.latest(on.phase_dir))
    assert near(found, losses[STEPS // 2 :]), f"saved: {found} against {losses}"
    same(after, straight, "saved")


def gradients(folder: Path) -> None:
    """bf16 gradients are kept and reduced in bf16, and the course is near that of fp32 ones without being it."""
    words = ["precision=bf16", *LAYOUTS["tp2dp2"], "phase.micro_batch_size=1", STEADY]
    full, expected = trained(config(folder, "gemma2", "single", *words))
    half, found = trained(config(folder, "gemma2", "single", *words, "parallel.gradients=bfloat16"))
    kinds = [{buffer.grad_data.dtype for chunk in at.state.chunks for buffer in chunk.buffers} for at in (full, half)]
    assert kinds == [{torch.float32}, {torch.bfloat16}], kinds
    assert found != expected and all(abs(a - b) < 2e-2 for a, b in zip(found, expected, strict=True)), f"{found} against {expected}"


def main() -> None:
    folder = Path(sys.argv[1])
    trainer.DistributedDataParallelConfig = functools.partial(trainer.DistributedDataParallelConfig, bucket_size=5000)
    overlap(folder, "gemma2", "dp4")
    for layout in ("tp2dp2", "pp2dp2", "pp2dp2_virtual"):
        overlap(folder, "qwen2", layout)
    saved(folder)
    rollouts(folder)
    gradients(folder)
    dist.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    main()
