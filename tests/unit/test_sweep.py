"""Sweeps: what their cells are and where they write, which of them run again, how each ends, and what the table says of them."""

import csv
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tower.command import identity, load
from megatron_tower.config import REPOSITORY, InputError
from megatron_tower.runtime import cells, sweep
from megatron_tower.runtime.cells import DONE, FAILED, HERE, QUEUED, RUNNING, SLURM, Cell
from megatron_tower.runtime.job import EVALUATE, TRAIN
from tools.sweep import gather

SFT = ["phase=sft", "run_dir=runs/mine", "phase.global_batch_size=8", "phase.seq_length=64"]
ENDS = {
    "done": "import pathlib; pathlib.Path('result/finished.json').write_text('{}')",
    "crash": "print('starting'); [][1]",
    "bad input": "import sys; print('error: phase.file=x: not there', file=sys.stderr); sys.exit(2)",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "interrupted": "import os, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGINT)",
    "saved": "pass",
}


def plan(folder: Path, *swept: str, module: str = TRAIN, launcher: str = HERE, words: list[str] = SFT) -> list[tuple[Cell, object]]:
    return sweep.plan(folder, module, [[*words, *word.split()] for word in swept], launcher)


def rates(folder: Path, *values: str) -> list[tuple[Cell, object]]:
    return plan(folder, *(f"phase.optimizer.lr={value}" for value in values))


def finish(cell: Cell, losses: tuple[float, ...] = (3.0, 2.0)) -> None:
    """Leave what a training leaves."""
    outputs = Path(cell.outputs)
    outputs.mkdir(parents=True)
    rows = ({"step": i, "loss": loss, "tokens_per_second": 10.0} for i, loss in enumerate(losses, 1))
    (outputs / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (outputs / "finished.json").write_text("{}")
    cell.end(0, [])


def score(cell: Cell, chrf: float) -> None:
    Path(cell.outputs).mkdir(parents=True)
    rows = [{"task": "translation", "metric": "chrf", "by": by, "value": chrf} for by in ("all", "locale")]
    cell.result.write_text(json.dumps({"scores": rows}))
    cell.end(0, [])


def test_cells_of_a_training_write_apart_and_read_what_the_run_has(tmp_path: Path) -> None:
    work = rates(tmp_path, "1e-6", "3e-6")
    assert [cell.folder.name for cell, _ in work] == ["0", "1"]
    for cell, cfg in work:
        again = load([*cell.words, *cell.own])
        assert again.run_dir == cfg.run_dir == str(cell.folder / "run") and cell.outputs == f"{cell.folder}/run/sft"
        assert again.phase.start_from == cfg.phase.start_from == "runs/mine/cpt"
        assert again.data.folder == load(SFT).data.folder
    assert [cfg.phase.optimizer.lr for _, cfg in work] == [1e-6, 3e-6]


def test_only_what_is_missing_runs_again(tmp_path: Path) -> None:
    (first, _), (second, _) = rates(tmp_path, "1e-6", "3e-6")
    finish(first)
    second.end(1, [])
    again = rates(tmp_path, "1e-6", "2e-6", "3e-6")
    assert [(cell.folder.name, cfg is None) for cell, cfg in again] == [("0", True), ("2", False), ("1", False)]
    slower = plan(tmp_path, "phase.optimizer.lr=1e-6", words=["cluster.time=48:00:00", *SFT])
    assert [(cell.folder.name, cfg) for cell, cfg in slower] == [("0", None)], "where a cell runs makes it no other cell"
    first.result.unlink()
    assert rates(tmp_path, "1e-6")[0][1], "its result is gone"


def test_a_cell_of_another_meaning_is_not_done(tmp_path: Path) -> None:
    """The same words may mean something else once a file of conf/ was changed."""
    cell = rates(tmp_path, "1e-6")[0][0]
    finish(cell)
    cell.config = "of other files in conf/"
    cell.note(DONE)
    assert rates(tmp_path, "1e-6")[0][1]


def test_evaluations_write_apart_only_where_they_would_meet(tmp_path: Path) -> None:
    apart = plan(tmp_path / "a", "eval.checkpoint=x/sft", "eval.checkpoint=x/wpo", module=EVALUATE, words=[])
    assert [(cell.outputs, cell.own) for cell, _ in apart] == [("x/sft/evaluation", []), ("x/wpo/evaluation", [])]
    tokens = ("eval.checkpoint=x eval.max_new_tokens=64", "eval.checkpoint=x eval.max_new_tokens=128")
    for cell, cfg in plan(tmp_path / "b", *tokens, module=EVALUATE, words=[]):
        assert cell.outputs == cfg.eval.output == load([*cell.words, *cell.own]).eval.output == f"{cell.folder}/evaluation"


def test_an_evaluation_is_done_until_its_checkpoint_changes(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "sft"
    (checkpoint / "checkpoints").mkdir(parents=True)
    (checkpoint / "checkpoints" / "latest").write_text("step_1")
    word = f"eval.checkpoint={checkpoint}"
    cell = plan(tmp_path / "s", word, module=EVALUATE, words=[])[0][0]
    score(cell, 30.0)
    assert plan(tmp_path / "s", word, module=EVALUATE, words=[])[0][1] is None
    later = cell.result.stat().st_mtime + 10
    os.utime(checkpoint / "checkpoints" / "latest", (later, later))
    assert plan(tmp_path / "s", word, module=EVALUATE, words=[])[0][1]


def test_a_refused_cell_leaves_the_others_to_run(tmp_path: Path) -> None:
    (bad, nothing), (_, cfg) = plan(tmp_path, "parallel.tensor=3", "parallel.tensor=1")
    assert nothing is None and cfg
    assert bad.state == FAILED and "parallel.tensor=3 does not divide them" in Cell.read(bad.folder).reason


@pytest.mark.parametrize(
    ("swept", "options", "said"),
    [
        (["parallel.tensor=3", "parallel.tensor=5"], {}, "parallel.tensor=3 does not divide them"),
        (["cluster.threads_per_rank=1", "cluster.threads_per_rank=2"], {}, "differ in nothing but cluster words"),
        (["seed=1", "seed=2"], {"module": "megatron_tower.recipe"}, "megatron_tower.recipe takes no -m"),
        (["seed=1"], {"launcher": SLURM}, "cluster=local has launcher=local: leave hydra/launcher out"),
        (["seed=1"], {"words": [*SFT, "cluster=local_slurm"]}, "cluster=local_slurm has launcher=slurm: add hydra/launcher=submitit_slurm"),
    ],
)
def test_what_is_no_sweep_is_refused_before_anything_is_written(tmp_path: Path, swept, options, said) -> None:
    with pytest.raises(InputError, match=said):
        plan(tmp_path / "s", *swept, **options)
    assert not (tmp_path / "s").exists()


def test_a_folder_holds_one_sweep(tmp_path: Path) -> None:
    rates(tmp_path, "1e-6")
    with pytest.raises(InputError, match=r"holds a sweep of megatron_tower\.train"):
        plan(tmp_path, "eval.checkpoint=x", module=EVALUATE, words=[])


def test_each_end_is_told_and_leaves_the_next_cells_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until one is interrupted, which is meant for all of them."""
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Cell, "argv", property(lambda cell: [sys.executable, "-c", ENDS[cell.words[0]]]))
    work = []
    for number, end in enumerate(("crash", "bad input", "killed", "done", "interrupted", "saved")):
        (tmp_path / str(number)).mkdir()
        outputs = "result" if end == "done" else "nowhere"
        work.append(Cell(tmp_path / str(number), TRAIN, [end], HERE, outputs=outputs))
        work[-1].note(QUEUED)
    sweep.run_here(work, [])
    ended = [(cell.state, cell.reason) for cell in cells.read(tmp_path)]
    assert ended == [
        (FAILED, "IndexError: list index out of range (exit code 1)"),
        (FAILED, "phase.file=x: not there (exit code 2)"),
        (FAILED, "ended with exit code -9"),
        (DONE, None),
        (FAILED, "ended with exit code -2"),
        (QUEUED, None),
    ]
    assert cells.read(tmp_path)[3].numbers == {"loss": 2.0, "last loss": 2.0}
    sweep.run_here([work[5]], [])
    assert "the same command goes on from there" in Cell.read(work[5].folder).reason, "asked to stop, it saved and ended with code 0"


def test_the_reason_is_that_of_the_rank_which_failed(tmp_path: Path) -> None:
    """Not of those that lost it; the log written to last is named last."""
    lost, failed = tmp_path / "lost", tmp_path / "failed"
    lost.write_text("[rank1]: RuntimeError: Connection closed by peer [127.0.0.1]:1\n")
    failed.write_text("loss 3\n[rank0]: Traceback\n[rank0]:   x\n[rank0]: FloatingPointError: step 3 is not finite\nsrun: error: n1\n")
    cell = Cell(tmp_path, TRAIN, [], HERE)
    cell.end(1, [lost, failed])
    assert cell.reason == "FloatingPointError: step 3 is not finite (exit code 1)"


def test_the_dead_are_told_from_the_living(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "in_queue", lambda: {"7_1", "7_2"})
    monkeypatch.setattr(cells.slurm, "ask", lambda *_: "JobId=7 JobState=OUT_OF_MEMORY Reason=x")
    for number, (state, job) in enumerate(
        [(RUNNING, "7_0"), (RUNNING, "7_1"), (FAILED, "7_2"), (QUEUED, None), (RUNNING, None), (RUNNING, None)]
    ):
        (tmp_path / str(number)).mkdir()
        cell = Cell(tmp_path / str(number), TRAIN, [f"seed={number}"], SLURM)
        cell.note(state)
        cell.note_job(job)
    with (tmp_path / "5" / "log.txt").open("w") as log:  # as of a cell that runs on this machine
        fcntl.flock(log, fcntl.LOCK_EX)
        found = cells.read(tmp_path)
    assert [cell.state for cell in found] == [FAILED, RUNNING, QUEUED, QUEUED, FAILED, RUNNING]
    assert found[0].reason == "its Slurm job 7_0 ended as OUT_OF_MEMORY and left no word"


def test_cells_in_the_queue_are_waited_for_and_not_submitted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is requeued is away for a while; slurmctld too."""
    cell = rates(tmp_path, "1e-6")[0][0]
    cell.note_job("9")
    monkeypatch.setattr(cells, "in_queue", lambda: {"9"})
    assert rates(tmp_path, "1e-6")[0][1] is None
    looks = iter([{"9", "1"}, RuntimeError("slurmctld is away"), {"9"}, {"1"}])

    def in_queue() -> set[str]:
        look = next(looks)
        if isinstance(look, RuntimeError):
            raise look
        return look

    monkeypatch.setattr(cells, "in_queue", in_queue)
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: None)
    sweep.wait([cell])
    assert next(looks, None) is None


def test_the_table_shows_what_differs_and_how_to_run_a_failed_cell_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    work = plan(
        tmp_path / "s",
        "phase.optimizer.lr=1e-6 parallel=single",
        "phase.optimizer.lr=3e-6 parallel=single",
        "phase.optimizer.lr=3e-6 parallel=dp2",
        words=[*SFT, "phase.start_from='a b,c'"],
    )
    assert load([*work[0][0].words, *work[0][0].own]).phase.start_from == "a b,c"
    finish(work[0][0], (4.0, 2.0))
    finish(work[1][0], (4.0, 1.5))
    work[2][0].note(FAILED, "phase.file=x: not there")
    gather(tmp_path / "s")
    said = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "s" / "sweep.csv").open()))
    assert [(row["lr"], row["parallel"], row["State"], row["Last loss"]) for row in rows] == [
        ("1e-6", "single", "done", "2.0000"),
        ("3e-6", "single", "done", "1.5000"),
        ("3e-6", "dp2", "failed", ""),
    ]
    assert "run_dir" not in rows[0] and "cell 2: phase.file=x: not there" in said and "2 of 3 cells done" in said
    words = shlex.split(said.split("again: ")[1].splitlines()[0])
    assert words[:4] == ["python", "-m", TRAIN, "-m"] and words[-1] == f"hydra.sweep.dir={tmp_path}/s"
    assert identity(words[4:-1]) == identity(work[2][0].words) and load(words[4:-1]).phase.start_from == "a b,c"
    text = (tmp_path / "s" / "sweep.md").read_text()
    assert "| 1 | 3e-6 | single | done |" in text and words[-1] in text
    assert (tmp_path / "s" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_evaluations_are_shown_by_their_headlines(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for (cell, _), chrf in zip(
        plan(tmp_path, f"eval.checkpoint={tmp_path}/a", f"eval.checkpoint={tmp_path}/b", module=EVALUATE, words=[]), (20, 30), strict=True
    ):
        score(cell, chrf)
    gather(tmp_path)
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [(row["checkpoint"][-1], row["Translation chrF++"]) for row in rows] == [("a", "20.0"), ("b", "30.0")]


def test_benchmarks_and_neural_metrics_are_in_the_table_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [f"eval.checkpoint={tmp_path}/{name}" for name in "ab"]
    for cell, _ in plan(tmp_path, *words, module=EVALUATE, words=[]):
        Path(cell.outputs).mkdir(parents=True)
        found = {("wmt24pp", "xcomet_xxl"): 83.456, ("wmt24pp", "empty"): 1.0, ("wmt24pp", "metricx"): 3.2, ("gsm8k", "accuracy"): 70.0}
        rows = [{"task": task, "metric": metric, "by": "all", "value": value} for (task, metric), value in found.items()]
        cell.result.write_text(json.dumps({"scores": rows}))
        cell.end(0, [])
    gather(tmp_path)
    row = next(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert list(row)[3:-1] == ["wmt24pp xcomet_xxl", "wmt24pp metricx", "gsm8k accuracy"] and row["wmt24pp xcomet_xxl"] == "83.46"


def test_a_folder_without_cells_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no cells"):
        gather(tmp_path)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "cell.json").write_text("{}")
    with pytest.raises(InputError, match=r"0/cell\.json: not the file of a sweep's cell"):
        gather(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["megatron_tower.train", "parallel.tensor=3,5"], "parallel.tensor=3 does not divide them"),
        (["megatron_tower.train", "model=tiny_gemma2,no_such_model"], "no_such_model"),
        (["megatron_tower.recipe", "seed=1,2"], "megatron_tower.recipe takes no -m"),
        (["megatron_tower.train", "seed=1,2", "hydra/launcher=submitit_local"], "hydra/launcher=submitit_local runs no sweep here"),
    ],
)
def test_a_bad_command_is_one_sentence_and_exit_code_2(tmp_path: Path, words: list[str], said: str) -> None:
    module, *swept = words
    command = [sys.executable, "-m", module, "-m", *swept, f"hydra.sweep.dir={tmp_path}/s"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and said in done.stderr and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_a_command_has_a_folder_of_its_own() -> None:
    """The same whatever cluster words it has, and another for other words."""
    from omegaconf import ListConfig

    from megatron_tower.command import _digest

    assert _digest(ListConfig(["seed=1,2", "cluster=a"])) == _digest(ListConfig(["cluster=b", "cluster.time=1:00", "seed=1,2"]))
    assert _digest(ListConfig(["seed=1,2"])) != _digest(ListConfig(["seed=1,3"]))


def test_a_signal_reaches_the_running_cell_and_ends_the_sweep(tmp_path: Path) -> None:
    """The command line as a whole, with a cell that waits for it; ranks answer a signal by themselves (test_stopping)."""
    code = (
        "import sys, pathlib; from megatron_tower.runtime import sweep; from megatron_tower.runtime.cells import Cell\n"
        "wait = 'import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print(1, flush=True); time.sleep(60)'\n"
        "Cell.argv = property(lambda cell: [sys.executable, '-c', wait])\n"
        f"folders = [pathlib.Path('{tmp_path}') / n for n in '01']; [f.mkdir() for f in folders]\n"
        "sweep.run_here([Cell(f, 'megatron_tower.train', [], 'basic', outputs='nowhere') for f in folders], [])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    try:
        log = tmp_path / "0" / "log.txt"
        while process.poll() is None and not (log.exists() and log.read_text()):
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
    assert "the same command goes on from there" in Cell.read(tmp_path / "0").reason and not (tmp_path / "1" / "log.txt").exists()
