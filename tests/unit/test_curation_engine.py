"""Stages over shards: whatever ends a worker, a rerun completes, and nothing is doubled, lost or half written."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_tower.config import InputError
from megatron_tower.curation import engine, shards
from megatron_tower.curation.engine import Stage, part, run, total

TASKS = 12


def stage(root: Path, before=lambda task: None, after: tuple[Stage, ...] = ()) -> Stage:
    """Task i writes i rows; `before` runs when half of them are written."""

    def work(task: int, folder: Path) -> dict:
        with shards.Writer(folder / "rows.jsonl.zst") as out:
            for row in range(task):
                if row == task // 2:
                    before(task)
                out.write({"task": task, "row": row})
        return {"rows": task, "by": {str(task % 2): task}}

    return Stage("count", root, [f"file {i}" for i in range(TASKS)], work, after=after)


def content(found: Stage) -> dict[str, bytes]:
    return {str(path.relative_to(found.root)): path.read_bytes() for path in sorted(found.root.rglob("*")) if path.is_file()}


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, bytes]:
    whole = stage(tmp_path / "undisturbed")
    run(whole, workers=2)
    return content(whole)


def test_facts_add_up(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    whole = stage(tmp_path / "undisturbed")
    assert total(whole.facts()) == {"rows": 66, "by": {"0": 30, "1": 36}} and not whole.missing()
    assert [row["task"] for row in shards.read(whole.folder(3) / "rows.jsonl.zst")] == [3, 3, 3]


def test_a_killed_worker_takes_its_task_alone(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    hurt = stage(tmp_path / "hurt", lambda task: os.kill(os.getpid(), signal.SIGKILL) if task in (3, 8) else None)
    with pytest.raises(InputError, match=r"count: 2 of 12 tasks failed, the first is file 3: .*signal 9"):
        run(hurt, workers=2)
    assert hurt.missing() == [3, 8]
    healed = stage(tmp_path / "hurt")
    run(healed, workers=2)
    assert content(healed) == undisturbed  # what killed workers left is gone, too


def test_a_worker_has_not_failed_where_another_was_first(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """As two of an array are at a task when both have waited long enough; the first clears away what the other has begun."""
    root = tmp_path / "both"
    slow = stage(root, lambda task: run(stage(root), 1, [task]) if task == 5 else None)
    run(slow, workers=2)
    assert content(slow) == undisturbed


def _indexed(folder: Path, data: bytes) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "rows.bin"), dtype=np.uint8)
    for at in range(0, len(data), 100):
        builder.add_document(np.frombuffer(data[at : at + 100], np.uint8), [100])
    builder.finalize(str(folder / "rows.idx"))


WAYS = {  # in which stages write
    "rows": lambda folder, data: shards.write(folder / "rows", ({"text": data[at : at + 100].hex()} for at in range(0, len(data), 100))),
    "npy": lambda folder, data: np.save(folder / "rows.npy", np.frombuffer(data, np.uint8)),
    "npz": lambda folder, data: np.savez(folder / "rows.npz", rows=np.frombuffer(data, np.uint8)),
    "bytes": lambda folder, data: (folder / "rows").write_bytes(data),
    "indexed": _indexed,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, disk: Callable[[int], Path], way: str) -> None:
    """A real one, with room for five or six tasks of twelve."""

    def fills(root: Path) -> Stage:
        def work(task: int, folder: Path) -> dict:
            WAYS[way](folder, random.Random(task).randbytes(50_000))
            return {"rows": 500}

        return Stage("fills", root, [f"file {i}" for i in range(TASKS)], work)

    run(fills(tmp_path / "undisturbed"), workers=2)
    hurt = fills(disk(380_000) / "hurt")
    with pytest.raises(InputError, match=r"^fills: \d of 12 .*, the first is file \d+: the disk of .*hurt is full: free space and run "):
        run(hurt, workers=2)
    assert 0 < len(hurt.missing()) < TASKS
    assert {path.name for path in hurt.root.iterdir()} == {f"{task:05d}" for task in range(TASKS) if task not in hurt.missing()}
    disk(2_000_000)
    run(hurt, workers=2)
    assert content(hurt) == content(fills(tmp_path / "undisturbed"))


def test_a_programming_error_leaves_its_traceback(tmp_path: Path) -> None:
    hurt = stage(tmp_path / "hurt", lambda task: 1 // 0)
    with pytest.raises(InputError, match=r"division or modulo.*00001\.traceback"):
        run(hurt, workers=2)
    assert "1 // 0" in (hurt.root / "00001.traceback").read_text()
    run(stage(tmp_path / "hurt"), workers=2)
    assert not list(hurt.root.glob("*.traceback"))


def test_a_second_run_does_nothing(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    run(stage(tmp_path / "undisturbed", lambda task: 1 // 0), workers=2)


def test_parts_of_an_array_make_the_same_folder(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    parts = stage(tmp_path / "parts")
    for index in (2, 0, 1):
        run(parts, 1, part(parts, index, 3))
        assert not part(parts, index, 3)
    assert content(parts) == undisturbed


def test_two_workers_at_one_task(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """A requeued job may do a task that its first life still does: one of them publishes."""
    twice = stage(tmp_path / "twice")
    run(twice, 2, [*range(TASKS), *range(TASKS)])
    assert content(twice) == undisturbed


def test_a_stage_waits_for_the_one_before(tmp_path: Path) -> None:
    first = stage(tmp_path / "first")
    second = stage(tmp_path / "second", after=(first,))
    with pytest.raises(InputError, match=r"first lacks 12 of 12 tasks .file 0.: run count again"):
        run(second, 1)
    assert not second.root.exists()


def test_what_does_not_add_up(tmp_path: Path) -> None:
    assert total([{"a": 1, "b": {"x": [1]}}, {"a": 2, "b": {"x": [2], "y": [3]}}]) == {"a": 3, "b": {"x": [1, 2], "y": [3]}}
    with pytest.raises(ValueError, match=r"do not add up"):
        total([{"a": "x"}, {"a": "y"}])


def test_progress_is_told_where_no_terminal_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(engine, "EVERY", -1)
    run(stage(tmp_path / "told"), 2)
    assert "count: 12 of 12 tasks" in capfd.readouterr().out
