"""Curves of two families and four phases on several layouts of ranks, and of runs that change the layout half-way. Run by test_layouts.py.

    python -m tests.distributed.curves FOLDER gemma2:tp2 qwen2:tp2-pp2 gemma2:dp2-dp2:bf16 gemma2_wpo:pp2 ...

Cases are course:layout (all steps straight) or course:layout-layout (half of them in the first, saved, the rest in the second). Gemma 2
learns documents, Qwen 2.5 chats, whose rows differ in how many tokens count; gemma2_wpo learns pairs, the courses with grpo from their
own answers. Writes FOLDER/curves/CASE.json: what TOLD names of each step.
"""

import json
import sys
from pathlib import Path

from megatron_tower.command import load
from megatron_tower.config import Config
from megatron_tower.runtime import cpu, distributed
from tests.distributed.room import grpo_words, words, wpo_words

STEPS, HALF = 8, 4
RL_STEPS = 8
TOLD = {"cpt": ["loss"], "sft": ["loss"], "wpo": ["loss", "margin", "weight_mean"], "grpo": ["loss", "kl", "entropy", "reward"]}
LAYOUTS = {
    "single": [],
    "accumulated": ["phase.micro_batch_size=8"],
    "recomputed": ["parallel.recompute=full"],
    "recomputed_selectively": ["parallel.recompute=selective"],
    "tp2": ["parallel=tp2"],
    "tp2_sp": ["parallel=tp2_sp"],
    "tp2_sp_beside": ["parallel=tp2_sp", "parallel.tensor_overlap=true"],  # on GPUs
    "pp2": ["parallel=pp2"],
    "dp2": ["parallel=dp2"],
    "dp2_distributed": ["parallel=dp2", "parallel.distributed_optimizer=true"],
    "pp2_virtual": ["parallel=pp2", "parallel.virtual_pipeline=2"],
    "tp2pp2": ["parallel=tp2pp2"],
    "tp2dp2_distributed": ["parallel=tp2", "parallel.data=2", "parallel.distributed_optimizer=true"],
}
PHASE = {"gemma2": ["phase=cpt"], "qwen2": ["phase=sft", "phase.epochs=null"]}
# Of GRPO all that a rollout can do: weights for the mismatch, two updates a round, further prompts where groups are dropped.
OPTIONS = {
    "gemma2_wpo": ["phase.objective.sft_coefficient=0.1"],
    "gemma2_grpo": ["phase.objective.importance_cap=2.0", "phase.micro_batch_size=2"],
    "qwen2_grpo": ["phase.objective.aggregation=dapo", "phase.rollout.updates=2", "phase.rollout.refills=1", "phase.micro_batch_size=2"],
}


def config(folder: Path, course: str, layout: str, *more: str) -> Config:
    """A course is a family, on its phase of PHASE, or family_phase."""
    family, _, phase = course.partition("_")
    if not phase:
        return load(words(folder, family, *PHASE[family], f"phase.train_steps={STEPS}", *LAYOUTS[layout], *more))
    steps = f"phase.train_steps={RL_STEPS if phase == 'grpo' else STEPS}"
    own = {"wpo": wpo_words, "grpo": grpo_words}[phase]
    return load(own(folder, family, *OPTIONS[course], steps, *LAYOUTS[layout], *more))


def curve(folder: Path, case: str, *words: str) -> list[float]:
    """What TOLD names of each step; of the second half only where a case has one. `words`: further ones."""
    course, layouts, *precision = case.split(":")
    before, _, after = layouts.partition("-")
    more = [f"run_dir={folder}/run_{course}_{before}_{''.join(precision)}", *(f"precision={p}" for p in precision), *words]
    cfg = config(folder, course, before, *more)
    if not after:
        return straight(cfg, cfg.phase.train_steps)
    if not (cfg.phase_dir / "checkpoints").exists():
        saved(cfg, cfg.phase.train_steps // 2)
    return resumed(config(folder, course, after, *more))


def straight(cfg: Config, steps: int = STEPS) -> list[float]:
    """The first `steps` updates from the base weights."""
    from megatron_tower.train import build

    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    trainer = build(cfg, Path(cfg.phase.start_from))
    return told(trainer, steps)


def saved(cfg: Config, steps: int = HALF) -> object:
    """Make `steps` updates and save; the trainer, which could go on."""
    from megatron_tower.train import build
    from megatron_tower.training import saving

    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    trainer = build(cfg, Path(cfg.phase.start_from))
    told(trainer, steps)
    saving.save(cfg, trainer.state)
    return trainer


def resumed(cfg: Config) -> list[float]:
    """The updates after the newest checkpoint."""
    from megatron_tower.train import build
    from megatron_tower.training import checkpoint

    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    trainer = build(cfg, checkpoint.latest(cfg.phase_dir))
    return told(trainer, trainer.steps - trainer.state.step)


def told(trainer: object, steps: int) -> list[float]:
    """What TOLD names of the next `steps` updates."""
    names = TOLD[trainer.cfg.phase.name]
    return [values.get(name, 0.0) for values in (trainer.step() for _ in range(steps)) for name in names]


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
