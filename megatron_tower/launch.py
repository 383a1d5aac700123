"""Submit one phase or a whole recipe as jobs, through submitit: to Slurm, or to the background of this machine.

    python -m megatron_tower.launch recipe=tower_plus model=gemma2_9b parallel=... cluster=my_cluster   # CPT to report, by dependencies
    python -m megatron_tower.launch phase=sft model=gemma2_9b cluster=my_cluster run_dir=runs/mine
    python -m megatron_tower.launch eval.checkpoint=runs/mine/sft cluster=my_cluster   # jobs.json in its folder
    python -m megatron_tower.launch --dry-run recipe=demo cluster=my_cluster             # scripts, judged by sbatch --test-only
    python -m megatron_tower.launch status|logs|cancel recipe=demo cluster=my_cluster    # or just run_dir=...

On Slurm each step of the recipe is a job (`runtime/job.py`): the next phase waits for the one before it, not for its evaluation. With
cluster=local one process goes through the steps. Jobs are noted in <run_dir>/jobs.json; the same words again submit what is left.
Leaves out: a copy of the code (a job runs what the working tree holds when it begins), Hydra's sweeps (`-m` of each command).
"""

import argparse
import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_tower import recipe
from megatron_tower.command import load, refuse
from megatron_tower.config import Config, InputError, digest
from megatron_tower.recipe import Step
from megatron_tower.runtime import queue
from megatron_tower.runtime.job import TRAIN, Job
from megatron_tower.runtime.processes import tail
from megatron_tower.runtime.queue import Submitted
from megatron_tower.runtime.run_dir import check_writable, write_text

ACTIONS = ("submit", "status", "logs", "cancel")
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PLACE += ("MEGATRON_TOWER_JOB", "MEGATRON_TOWER_NODES", "MEGATRON_TOWER_END_TIME")
NAME = "jobs.json"  # in run_dir
WIDTH = 160  # of tables that no terminal shows


@dataclass(frozen=True)
class Record:
    """A step that was submitted, as jobs.json keeps it. settings: tells its configuration; phases: that it trains."""

    title: str
    settings: str
    phases: list[str]
    after: list[str]
    job: Submitted


def main() -> None:
    parser = argparse.ArgumentParser("launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, let sbatch judge it, write nothing")
    parser.add_argument("words", nargs="+", metavar="word", help=f"{', '.join(ACTIONS)} (the first if none is named), then Hydra words")
    asked = parser.parse_intermixed_args()
    action = asked.words.pop(0) if asked.words[0] in ACTIONS else "submit"
    for name in [name for name in os.environ if (name.startswith("SLURM_") and name != "SLURM_CONF") or name in PLACE]:
        del os.environ[name]  # of a job that this was typed in: its place is not that of the jobs to come
    try:
        if "=" not in (asked.words or ["="])[0]:
            raise InputError(f"{asked.words[0]} is neither an action nor key=value: use one of {', '.join(ACTIONS)}, then Hydra words")
        if action == "submit":
            submit(asked.words, asked.dry_run)
        else:
            {"status": status, "logs": logs, "cancel": cancel}[action](Path(load(asked.words).run_dir))
    except InputError as error:
        refuse(error)


def submit(words: list[str], dry_run: bool) -> None:
    """Queue every step that is left, or none at all. Raises InputError."""
    cfg, steps = plan(words)
    run, place = Path(cfg.run_dir), queue.of(cfg.cluster)
    jobs = {step.title: _job(step) for step in steps}
    place.check(list(jobs.values()))
    _refuse_closed(run)
    records = read(run)
    left = unfinished(steps, records)
    if dry_run:
        for step in left:
            before = [f"<{title}>" for title in step.after]  # whose ids are not known yet
            print(f"# {step.title}", place.text(f"{run.name}/{step.title}", jobs[step.title], before), sep="\n")
        return
    _refuse_busy(run, records)
    new: dict[str, Record] = {}
    try:
        for step in left:
            before = [new[title].job.id for title in step.after if title in new]
            job = place.submit(f"{run.name}/{step.title}", jobs[step.title], before)
            new[step.title] = Record(step.title, _settings(step), _trains(step), before, job)
            _write(run, [*records, *new.values()])
    except BaseException as error:  # Ctrl-C too: half a chain is worth nothing
        if new:
            queue.cancel([record.job for record in new.values()])
            _write(run, records)
        if isinstance(error, OSError):
            raise InputError(f"run_dir={run} can't be written ({error}): choose another") from error
        raise
    _tell_submitted(run, steps, new, {title: place.asks(job) for title, job in jobs.items()})


def plan(words: list[str]) -> tuple[Config, list[Step]]:
    """The steps that the words name: one phase, one evaluation, or a recipe, which on this machine is one step. Raises InputError."""
    named = {word.split("=")[0] for word in words}
    if "eval.checkpoint" in named:
        cfg = load(words)
        run_dir = str(cfg.evaluation_dir)
        subject = Path(cfg.eval.checkpoint).name
        found = recipe.evaluation(cfg, words, subject, [])
        return replace(cfg, run_dir=run_dir), [replace(step, cfg=replace(step.cfg, run_dir=run_dir)) for step in found]
    if {"phase", "recipe"} <= named:
        raise InputError("recipe=... submits all its phases and phase=... one: leave out one of them")
    if "phase" in named:
        cfg = recipe.checked(words)
        return cfg, [recipe.train(cfg, words, [])]
    if "recipe" not in named:
        raise InputError("nothing to submit is named: recipe=demo stands for its phases, phase=sft for one, eval.checkpoint=... scores it")
    cfg = load(words)
    steps = recipe.steps(cfg, words)
    if cfg.cluster.launcher == "local":
        return cfg, [Step("recipe", "megatron_tower.recipe", words, cfg, [])]
    return cfg, steps


def unfinished(steps: list[Step], records: list[Record]) -> list[Step]:
    """Steps whose work is not there, or was not done by these jobs in this configuration, or rests on a step that is left itself.

    A phase's directory keeps to one configuration, so what has finished there is done whoever did it.
    """
    newest = {record.title: record for record in records}
    left: dict[str, Step] = {}
    for step in steps:
        done = step.leaves is None or step.leaves.exists()
        if step.module != TRAIN:
            record = newest.get(step.title)
            done = done and record is not None and record.settings == _settings(step) and record.job.succeeded
            done = done and not any(title in left for title in step.after)
        if not done:
            left[step.title] = step
    return list(left.values())


def status(run: Path) -> None:
    """Print a table of the run's jobs."""
    records = _newest(run)
    found = queue.states([record.job for record in records])
    table = Table("step", "job", "state", "restarts", "reached", "waits for")
    for record in records:
        state = found[record.job]
        waits = ", ".join(record.after) if state.reason == "Dependency" else state.reason if state.word == "PENDING" else ""
        table.add_row(record.title, record.job.id, state.word, str(state.restarts or ""), _reached(run, record), waits)
    _console().print(table)


def logs(run: Path) -> None:
    """Print where each job's logs are, and the end of the newest one of a running step, else of a failed one."""
    records = _newest(run)
    found = queue.states([record.job for record in records])
    console = _console()
    for record in records:
        console.print(f"{record.title}: {record.job.output}", soft_wrap=True)

    def rank(record: Record) -> int:
        word = found[record.job].word
        return 2 if word == "RUNNING" else 1 if found[record.job].is_over and word != "COMPLETED" else 0

    written = [(rank(record), path.stat().st_mtime_ns, record, path) for record in records for path in _logs(record.job)]
    if written:
        *_, record, path = max(written, key=lambda log: log[:2])
        print(f"\n{record.title}, {found[record.job].word}: the end of {path}", *tail(path), sep="\n")


def cancel(run: Path) -> None:
    """End the run's jobs that are queued or running."""
    records = _newest(run)
    busy = _busy(records)
    queue.cancel([record.job for record in busy])
    print("cancelled: " + ", ".join(f"{record.job.id} ({record.title})" for record in busy) if busy else "no job is queued or running")


def read(run: Path) -> list[Record]:
    """What was submitted for a run, oldest first; raises InputError when the file is damaged."""
    path = run / NAME
    if not path.exists():
        return []
    try:
        return [Record(**{**entry, "job": Submitted(**entry["job"])}) for entry in json.loads(path.read_text())]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it once none of the run's jobs is queued any more") from error


def _write(run: Path, records: list[Record]) -> None:
    write_text(run / NAME, json.dumps([asdict(record) for record in records], indent=1) + "\n")


def _newest(run: Path) -> list[Record]:
    """The last submission of each step; raises InputError when there is none."""
    if not (newest := {record.title: record for record in read(run)}):
        raise InputError(f"no jobs were submitted for run_dir={run}: give the words that they were submitted with")
    return list(newest.values())


def _busy(records: list[Record]) -> list[Record]:
    found = queue.states([record.job for record in records])
    return [record for record in records if not found[record.job].is_over]


def _refuse_busy(run: Path, records: list[Record]) -> None:
    if busy := _busy(records):
        raise InputError(
            f"run_dir={run} has jobs that are queued or running ({len(busy)}, the first is {busy[0].job.id}, {busy[0].title}): "
            f"wait for them, or python -m megatron_tower.launch cancel {shlex.quote(f'run_dir={run}')}"
        )


def _refuse_closed(run: Path) -> None:
    """Raise InputError when nothing can be written in `run`, or it asks its jobs to stop."""
    check_writable(run, f"run_dir={run}")
    if (stop := run / "triggers" / "stop").exists():
        raise InputError(f"{stop} is there, at which jobs stop: remove it to go on")


def _job(step: Step) -> Job:
    """A phase has its logs beside it; the folders of other steps are theirs to make."""
    job = Job.of(step.cfg, step.module, step.words)
    return job if step.module == TRAIN else replace(job, folder=Path(step.cfg.run_dir, "logs").absolute())


def _settings(step: Step) -> str:
    """What a step's result may depend on."""
    return digest(step.cfg, ignore=("cluster", "parallel"))


def _trains(step: Step) -> list[str]:
    """The phases that a step trains."""
    if step.module == TRAIN:
        return [step.cfg.phase.name]
    return step.cfg.recipe.phases if step.module == "megatron_tower.recipe" else []


def _reached(run: Path, record: Record) -> str:
    """The last step in the metrics of the phase that was trained last."""
    paths = [path for phase in record.phases if (path := run / phase / "metrics.jsonl").exists()]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)[-1:]:
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return f"{path.parent.name} step {json.loads(whole[-1])['step']}" if whole else ""
    return ""


def _logs(job: Submitted) -> list[Path]:
    """What a job's processes have written: its first one, and its ranks."""
    return [path for path in (job.output, *sorted((Path(job.folder) / job.id).glob("rank_*.log"))) if path.exists()]


def _tell_submitted(run: Path, steps: list[Step], new: dict[str, Record], asked: dict[str, str]) -> None:
    table = Table("step", "job", "waits for", "asks for")
    for step in steps:
        if record := new.get(step.title):
            table.add_row(step.title, record.job.id, ", ".join(record.after), asked[step.title])
        else:
            table.add_row(step.title, "done", style="dim")
    console = _console()
    console.print(table)
    console.print(f"python -m megatron_tower.launch status|logs|cancel {shlex.quote(f'run_dir={run}')}", soft_wrap=True)


def _console() -> Console:
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH)


if __name__ == "__main__":
    main()
