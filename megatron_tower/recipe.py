"""All of a recipe on this machine: data, base model, each phase and its evaluation, an export, the report.

Preference pairs are sampled from the stage before the phase that learns from them.

    python -m megatron_tower.recipe recipe=demo
    python -m megatron_tower.recipe recipe=demo model=tiny_qwen2 parallel=tp2

Each step is a command that can be typed by hand; it is printed before it runs, and does nothing where its work is done
already, so a second run goes on where the first one stopped. Leaves out: the same steps as jobs (`megatron_tower.launch`).
"""

import multiprocessing
import os
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from megatron_tower.command import INTERRUPTED, entry_point, load, own_words
from megatron_tower.config import Config, InputError, check_phase
from megatron_tower.runtime import processes, run_dir
from megatron_tower.runtime.job import EVALUATE, TRAIN


@dataclass(frozen=True)
class Step:
    """`python -m <module> <words>`, done when it exits with 0 and has left what it is to leave; `cfg` is what it runs with.

    after: titles of the steps whose work it needs.
    """

    title: str
    module: str
    words: list[str]
    cfg: Config
    after: list[str]
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


def train(cfg: Config, words: list[str], after: list[str]) -> Step:
    """The training of `cfg.phase`."""
    return Step(f"train {cfg.phase.name}", TRAIN, words, cfg, after, cfg.phase_dir / "finished.json")


def evaluation(cfg: Config, words: list[str], subject: str, after: list[str]) -> list[Step]:
    """The evaluation of `cfg.eval.checkpoint`: on Slurm, neural metrics are a job of their own: no generating GPU waits for them."""
    title, leaves = f"evaluate {subject}", cfg.evaluation_dir / "scores.json"
    if not cfg.eval.metrics or cfg.cluster.launcher == "local" or cfg.eval.stage != "all":
        return [Step(title, EVALUATE, words, cfg, after, leaves)]
    first, then = (replace(cfg, eval=replace(cfg.eval, stage=stage)) for stage in ("generate", "score"))
    generate = Step(title, EVALUATE, [*words, "eval.stage=generate"], first, after, leaves)
    return [generate, Step(f"score {subject}", EVALUATE, [*words, "eval.stage=score"], then, [title], leaves)]


def checked(words: list[str]) -> Config:
    """The configuration of one phase; raises InputError when it can't run, or its directory was made with another one."""
    cfg = load(words)
    check_phase(cfg)
    run_dir.check(cfg)
    return cfg


def steps(cfg: Config, words: list[str]) -> list[Step]:
    """Every step in an order that can be run. `words` are the user's; raises InputError for a phase that can't run as configured."""
    if not cfg.recipe.phases:
        raise InputError(f"recipe={cfg.recipe.name} names no phases: list them under recipe.phases")
    if cfg.eval.output:
        raise InputError(f"eval.output={cfg.eval.output} would take the scores of every phase: leave it out of a recipe")
    run = Path(cfg.run_dir)

    def evaluate(stage: str, after: str) -> list[Step]:
        subject = str(run / stage)
        on_it = replace(cfg, eval=replace(cfg.eval, checkpoint=subject))
        return evaluation(on_it, [*words, f"eval.checkpoint={subject}"], stage, [after])

    plan = [
        Step("data", "tools.prepare_data", words, cfg, [], Path(cfg.data.folder) / "manifest.json"),
        Step("base model", "tools.init_model", words, cfg, ["data"], run / "base" / "config.json"),
        *evaluate("base", "base model"),
    ]
    before = "base model"
    for in_phase, phase in _phases(cfg, words):
        if phase.phase.dataset == "preferences":
            plan.append(Step("preference pairs", "tools.build_pairs", in_phase, phase, [before], Path(phase.phase.file)))
            before = "preference pairs"
        plan.append(train(phase, in_phase, [before]))
        before = plan[-1].title
        plan += evaluate(phase.phase.name, before)
    exported = ["--checkpoint", str(run / cfg.recipe.phases[-1]), "--output", str(run / "hf")]
    plan.append(Step("export", "tools.convert_megatron_to_hf", exported, cfg, [before], run / "hf" / "config.json"))
    evaluations = [step.title for step in plan if step.module == EVALUATE]
    plan.append(Step("report", "evaluation.run_report", words, cfg, evaluations, run / "report.html"))
    if cfg.recipe.sentence:
        sentence = ["--checkpoint", str(run / "hf"), "--to", cfg.recipe.sentence_locale, cfg.recipe.sentence]
        plan.append(Step("translate", "megatron_tower.translate", sentence, cfg, ["export"]))
    return plan


def _phases(cfg: Config, words: list[str]) -> list[tuple[list[str], Config]]:
    """Words and configuration of each phase; each is composed in a process of its own, for it takes a third of a second."""
    of_phases = [phase_words(cfg, phase, words) for phase in cfg.recipe.phases]
    # Not multiprocessing.Pool: it ends its workers by SIGTERM, which one forked from a process that catches it survives.
    with ProcessPoolExecutor(min(len(of_phases), os.cpu_count() or 1), multiprocessing.get_context("fork")) as pool:
        return list(zip(of_phases, pool.map(checked, of_phases), strict=True))


@entry_point
def main(cfg: Config) -> None:
    if cfg.cluster.launcher != "local":
        raise InputError(f"cluster={cfg.cluster.name} runs in jobs: python -m megatron_tower.launch submits them; cluster=local runs here")
    console = Console(highlight=False)
    plan = steps(cfg, own_words())
    start = time.monotonic()
    for number, step in enumerate(plan, 1):
        console.rule(f"[bold]{number}/{len(plan)} {step.title}[/]", align="left")
        console.print(f"$ python {shlex.join(step.command[1:])}", style="dim", soft_wrap=True, markup=False)
        began = time.monotonic()
        code = processes.exit_code(step.run())
        if code == INTERRUPTED or (not code and step.leaves and not step.leaves.exists()):
            console.print(f"{step.title} was interrupted; the same command goes on from there", soft_wrap=True)
            sys.exit(code or 1)
        if code:
            told = f"{step.title} ended with exit code {code}; mend it and run the same command again: finished steps are kept"
            console.print(told, soft_wrap=True)
            sys.exit(code)
        console.print(f"{step.title}: {time.monotonic() - began:.0f} s", style="dim")
    console.rule(f"[bold]done in {(time.monotonic() - start) / 60:.1f} min[/]", align="left")
    console.print(f"report: {Path(cfg.run_dir).resolve() / 'report.html'}", soft_wrap=True)


if __name__ == "__main__":
    main()
