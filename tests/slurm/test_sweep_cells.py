"""Sweeps over real jobs: cells of two sizes of which some fail, one cell again by itself, and a cell that goes back into the queue."""

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tests.distributed import room


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "megatron_tower.train", "-m", *words, "hydra/launcher=submitit_slurm"]


def starts(phase_dir: str | Path) -> list[dict]:
    """Of the one job that a cell had."""
    return [json.loads(line) for path in Path(phase_dir).glob("logs/*/starts.jsonl") for line in path.read_text().splitlines()]


def test_cells_of_two_sizes_some_of_which_fail(cluster, tmp_path: Path) -> None:
    """Four ranks on two nodes or two on one, from weights that are there or not; then the missing ones appear."""
    room.prepare(tmp_path, "gemma2")
    base, missing = tmp_path / "gemma2_base", tmp_path / "not_there"
    words = room.words(tmp_path, "gemma2", "phase=cpt", "phase.train_steps=3", "cluster=local_slurm", f"hydra.sweep.dir={tmp_path}/sweep")
    done = cluster.run(*command(*words, f"phase.start_from={base},{missing}", "parallel=tp2pp2,dp2"), timeout=400)
    assert done.returncode == 1 and "2 of 4 cells done" in done.stdout, done.stdout + done.stderr
    rows = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").open()))
    found = {(Path(row["start_from"]), row["parallel"]): row for row in rows}
    assert {key: row["State"] for key, row in found.items()} == {
        (base, "tp2pp2"): "done",
        (base, "dp2"): "done",
        (missing, "tp2pp2"): "failed",
        (missing, "dp2"): "failed",
    }
    losses = [float(found[base, layout]["Last loss"]) for layout in ("tp2pp2", "dp2")]
    assert abs(losses[0] - losses[1]) < 1e-3
    nodes = [[start["nodes"].count(",") + 1 for start in starts(found[base, layout]["Outputs"])] for layout in ("tp2pp2", "dp2")]
    assert nodes == [[2], [1]]

    number = found[missing, "dp2"]["Cell"]
    reason, again = re.search(rf"cell {number}: (.*)\n +again: (.*)", done.stdout).groups()
    assert str(missing) in reason and reason.endswith("(exit code 2)")
    shutil.copytree(base, missing)
    once_more = cluster.run(sys.executable, *shlex.split(again)[1:], timeout=300)
    assert once_more.returncode == 0 and "1 cells, 1 to run" in once_more.stdout, once_more.stdout + once_more.stderr
    assert "3 of 4 cells done" in once_more.stdout
    whole = json.loads((tmp_path / "sweep" / number / "cell.json").read_text())
    assert whole["state"] == "done" and abs(whole["numbers"]["last loss"] - losses[1]) < 1e-3


def test_a_cell_that_is_requeued_is_waited_for_and_disturbs_no_other(cluster, tmp_path: Path) -> None:
    """The last task of an array has the array's own job id, by which Slurm would requeue all of them."""
    room.prepare(tmp_path, "gemma2")
    words = room.words(tmp_path, "gemma2", "phase=cpt", "phase.train_steps=200", "cluster=local_slurm", f"hydra.sweep.dir={tmp_path}/sweep")
    launched = [*command(*words, "seed=1,2"), "cluster.signal_seconds=30"]
    with subprocess.Popen(launched, env=cluster.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as sweep:
        try:
            metrics = [tmp_path / "sweep" / number / "run/cpt/metrics.jsonl" for number in "01"]
            cluster.until(
                lambda: sweep.poll() is not None or all(path.exists() and path.read_text() for path in metrics), "both cells train"
            )
            cluster.ask("scancel", "--signal=USR2", (tmp_path / "sweep" / "1" / "job").read_text())
            said, _ = sweep.communicate(timeout=300)
        finally:
            sweep.kill()
    assert sweep.returncode == 0 and "2 of 2 cells done" in said, said
    assert [len(starts(path.parent)) for path in metrics] == [1, 2], said
    for path in metrics:
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, 201))
