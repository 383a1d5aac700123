"""Loss curves of two families on several layouts of ranks, and of runs that change the layout half-way. Run by test_layouts.py.

    python -m tests.distributed.curves FOLDER gemma2:tp2 qwen2:tp2-pp2 gemma2:dp2-dp2:bf16 ...

Cases are family:layout (20 steps straight) or family:layout-layout (saved after 10 steps in the first, 10 more in the second). Gemma 2
learns documents, Qwen 2.5 chats, whose rows differ in how many tokens count. Writes FOLDER/curves/CASE.json.
"""

import json
import sys
from pathlib import Path

from megatron_tower.config import Config, load
from megatron_tower.runtime import cpu, distributed
from tests.distributed.room import words

STEPS, HALF = 20, 10
LAYOUTS = {
    "single": [],
    "accumulated": ["phase.micro_batch_size=8"],
    "recomputed": ["phase.recompute=full"],
    "recomputed_selectively": ["phase.recompute=selective"],
    "tp2": ["parallel=tp2"],
    "tp2_sp": ["parallel=tp2_sp"],
    "pp2": ["parallel=pp2"],
    "dp2": ["parallel=dp2"],
    "dp2_distributed": ["parallel=dp2", "parallel.distributed_optimizer=true"],
    "pp2_virtual": ["parallel=pp2", "parallel.virtual_pipeline=2"],
    "tp2pp2": ["parallel=tp2pp2"],
    "tp2dp2_distributed": ["parallel=tp2", "parallel.data=2", "parallel.distributed_optimizer=true"],
}
PHASE = {"gemma2": ["phase=cpt"], "qwen2": ["phase=sft", "phase.epochs=null"]}


def config(folder: Path, family: str, layout: str, *more: str) -> Config:
    return load(words(folder, family, *PHASE[family], f"phase.train_steps={STEPS}", *LAYOUTS[layout], *more))


def curve(folder: Path, case: str) -> list[float]:
    """Losses of a case; of the second half only where it has one."""
    family, layouts, *precision = case.split(":")
    before, _, after = layouts.partition("-")
    more = [f"run_dir={folder}/run_{family}_{before}_{''.join(precision)}", *(f"precision={p}" for p in precision)]
    if not after:
        return straight(config(folder, family, before, *more))
    cfg = config(folder, family, before, *more)
    if not cfg.phase_dir.exists():
        saved(cfg)
    return resumed(config(folder, family, after, *more))


def straight(cfg: Config, steps: int = STEPS) -> list[float]:
    """Losses of the first `steps` updates from the base weights."""
    from megatron_tower.train import build

    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    trainer = build(cfg, Path(cfg.phase.start_from))
    return [trainer.step()["loss"] for _ in range(steps)]


def saved(cfg: Config, steps: int = HALF) -> None:
    """Make `steps` updates and save."""
    from megatron_tower.train import build
    from megatron_tower.training import checkpoint

    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    trainer = build(cfg, Path(cfg.phase.start_from))
    for _ in range(steps):
        trainer.step()
    checkpoint.save(cfg.phase_dir, trainer.state, cfg.model, keep_last=1)


def resumed(cfg: Config) -> list[float]:
    """Losses of the updates after the newest checkpoint."""
    from megatron_tower.train import build
    from megatron_tower.training import checkpoint

    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    trainer = build(cfg, checkpoint.latest(cfg.phase_dir))
    return [trainer.step()["loss"] for _ in range(trainer.steps - trainer.state.step)]


def main() -> None:
    folder, *cases = Path(sys.argv[1]), *sys.argv[2:]
    cpu.install()
    (folder / "curves").mkdir(exist_ok=True)
    for case in cases:
        losses = curve(folder, case)
        if distributed.is_rank_zero():
            (folder / "curves" / f"{case}.json").write_text(json.dumps(losses))
    distributed.shutdown()


if __name__ == "__main__":
    main()
