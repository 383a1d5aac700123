"""All of a recipe on this machine: data, base model, each phase and its evaluation, an export, the report.

Preference pairs are sampled from the stage before the phase that learns from them.

    python -m megatron_tower.recipe recipe=demo
    python -m megatron_tower.recipe recipe=demo model=tiny_qwen2 parallel=tp2

Each step is a command that can be typed by hand; it is printed before it runs, and does nothing where its work is done
already, so a second run goes on where the first one stopped. Leaves out: Slurm (a chain of the same steps as jobs).
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from rich.console import Console

from megatron_tower.config import Config, InputError, check_phase, entry_point, load
from megatron_tower.runtime import processes


@dataclass(frozen=True)
class Step:
    """`python -m <module> <words>`, done when it exits with 0 and has left what it is to leave."""

    title: str
    module: str
    words: list[str]
    leaves: Path | None = None

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", self.module, *self.words]

    def run(self) -> int:
        """Wait for it and return its exit code; a Ctrl-C is the step's to answer, which may save before it ends."""
        process = processes.start(self.command)
        with processes.forwarding([process]):
            return process.wait()


def phase_words(cfg: Config, phase: str, words: list[str]) -> list[str]:
    """The Hydra words of one phase: what the recipe sets for it, then the user's own, which win."""
    return [f"recipe={cfg.recipe.name}", f"phase={phase}", *cfg.recipe.overrides.get(phase, []), *words]


def steps(cfg: Config, words: list[str]) -> list[Step]:
    """Every step in order. `words` are the user's; raises InputError for a phase that can't run as configured."""
    run = Path(cfg.run_dir)
    plan = [
        Step("data", "tools.prepare_data", words),
        Step("base model", "tools.init_model", words),
        Step("evaluate base", "evaluation.run", [*words, f"eval.checkpoint={run / 'base'}"]),
    ]
    for phase in cfg.recipe.phases:
        in_phase = phase_words(cfg, phase, words)
        checked = load(in_phase)
        check_phase(checked)
        if checked.phase.dataset == "preferences":
            plan.append(Step("preference pairs", "tools.build_pairs", in_phase, Path(checked.phase.file)))
        plan.append(Step(f"train {phase}", "megatron_tower.train", in_phase, run / phase / "finished.json"))
        plan.append(Step(f"evaluate {phase}", "evaluation.run", [*words, f"eval.checkpoint={run / phase}"]))
    last = run / cfg.recipe.phases[-1]
    plan.append(Step("export", "tools.convert_megatron_to_hf", ["--checkpoint", str(last), "--output", str(run / "hf")]))
    plan.append(Step("report", "evaluation.report", words))
    if cfg.recipe.sentence:
        to = ["--to", cfg.recipe.sentence_locale, cfg.recipe.sentence]
        plan.append(Step("translate", "megatron_tower.translate", ["--checkpoint", str(run / "hf"), *to]))
    return plan


@entry_point
def main(cfg: Config) -> None:
    if not cfg.recipe.phases:
        raise InputError(f"recipe={cfg.recipe.name} names no phases: list them under recipe.phases")
    console = Console(highlight=False)
    plan = steps(cfg, list(HydraConfig.get().overrides.task))
    start = time.monotonic()
    for number, step in enumerate(plan, 1):
        console.rule(f"[bold]{number}/{len(plan)} {step.title}[/]", align="left")
        console.print("$ python " + " ".join(step.command[1:]), style="dim", soft_wrap=True)
        began = time.monotonic()
        code = step.run()
        if code:
            console.print(f"{step.title} ended with exit code {code}; mend it and run the same command again: finished steps are kept")
            sys.exit(code)
        if step.leaves and not step.leaves.exists():
            console.print(f"{step.title} was interrupted; the same command goes on from there")
            sys.exit(1)
        console.print(f"{step.title}: {time.monotonic() - began:.0f} s", style="dim")
    console.rule(f"[bold]done in {(time.monotonic() - start) / 60:.1f} min[/]", align="left")
    console.print(f"report: {Path(cfg.run_dir).resolve() / 'report.html'}", soft_wrap=True)


if __name__ == "__main__":
    main()
