"""The verifier pool: what each kind of misbehaviour becomes, that the others' scores stand, and that no process is left."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_tower.rewards.pool import Verdict, VerifierPool

CASES = "tests.unit.reward_cases:reward"


def item(reward: str, check: object = None) -> dict:
    return {"prompt": "", "reward": reward, "check": check}


def descendants() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def pool() -> Iterator[VerifierPool]:
    before = {child.pid for child in descendants()}
    with VerifierPool(processes=2, timeout=2.0, rewards=CASES) as pool:
        yield pool
    assert {child.pid for child in descendants()} <= before


def test_a_reward_that_never_returns_is_killed_and_the_others_are_scored(pool: VerifierPool) -> None:
    jobs = [(item("length"), "x" * (i % 10)) for i in range(40)]
    child = f"86399.{time.time_ns()}"  # seconds that the hanging reward's own child sleeps
    jobs[3] = jobs[20] = (item("hang", child), "")
    verdicts = pool.score(jobs)
    assert [i for i, v in enumerate(verdicts) if v == Verdict(None, "timeout")] == [3, 20]
    assert all(v == Verdict((i % 10) / 10) for i, v in enumerate(verdicts) if i not in (3, 20))
    started = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", child]]
    assert not psutil.wait_procs(started, timeout=10)[1]  # what it had started was killed, too
    assert pool.score([(item("length"), "four")]) == [Verdict(0.4)]  # by a replacement


def test_what_each_failure_is_called(pool: VerifierPool) -> None:
    names = ["broken", "nan", "infinite", "two", "none", "exit", "abort", "missing", "length"]
    verdicts = pool.score([(item(name), "five!") for name in names])
    assert verdicts.pop() == Verdict(0.5)
    assert all(v.score is None for v in verdicts)
    problems = [v.problem for v in verdicts]
    assert problems[:4] == ["error: ValueError: no digit in 'five!'", "nan", "nan", "error: the reward two gave 2.0, outside [0, 1]"]
    assert problems[4].startswith("error: TypeError: ")
    assert problems[5] == "error: the worker ended with exit code 3"
    assert problems[6] == f"error: the worker ended with signal {signal.SIGABRT:d}"
    assert problems[7] == "error: KeyError: 'missing'"


def test_what_a_reward_prints_does_not_reach_the_pool(pool: VerifierPool) -> None:
    assert pool.score([(item("rubbish"), ""), (item("length"), "ab"), (item("rubbish"), "")]) == [Verdict(1.0), Verdict(0.2), Verdict(1.0)]


def test_importing_a_reward_is_not_on_the_clock_and_a_slow_answer_is(pool: VerifierPool) -> None:
    verdicts = pool.score([(item("slow_import"), "abc"), (item("sleep", 0.5), ""), (item("sleep", 30), "")])
    assert verdicts == [Verdict(0.3), Verdict(1.0), Verdict(None, "timeout")]


def test_all_processes_work_at_once_are_kept_and_started_only_when_needed(tmp_path: Path) -> None:
    before = len(descendants())
    with VerifierPool(processes=2, timeout=30.0, rewards=CASES) as pool:
        assert pool.score([]) == []
        assert len(descendants()) == before
        runs = []
        for name in ("first", "again"):
            (tmp_path / name).mkdir()
            runs.append({verdict.score for verdict in pool.score([(item("meet", str(tmp_path / name)), "")] * 2)})
        assert len(runs[0]) == 2 and runs[0] == runs[1]
        assert len(descendants()) == before + 2


def test_answers_of_any_text_and_length_arrive_whole(pool: VerifierPool) -> None:
    odd = ["\n\r\u2028\x00", "\ud800", "𝕏" * 3]
    assert pool.score([(item("length"), text) for text in odd]) == [Verdict(0.4), Verdict(0.1), Verdict(0.3)]
    assert pool.score([(item("length"), "x" * 2_000_000)])[0].problem.endswith("outside [0, 1]")


def test_the_real_rewards_run_in_workers_and_an_answer_too_large_to_compute_is_a_time_out() -> None:
    maths = {"prompt": "", "reward": "maths", "check": {"answer": "42"}}
    preference = {"prompt": "", "reward": "preference", "check": {"best": "B", "labels": ["A", "B"]}}
    jobs = [(maths, "6 * 7 = 42"), (maths, r"\boxed{9^{9^{9^{9}}}}"), (preference, "B"), (maths, r"\boxed{41}"), (item("poetry"), "")]
    with VerifierPool(processes=2, timeout=2.0) as pool:
        first, large, *others = pool.score(jobs)
    assert first == Verdict(1.0)
    assert large == Verdict(None, "timeout")
    assert others[:2] == [Verdict(1.0), Verdict(0.0)]
    assert others[2].problem.startswith("error: InputError: reward 'poetry' is unknown")


def test_a_reward_that_takes_all_memory_is_an_error(pool: VerifierPool) -> None:
    assert pool.score([(item("memory"), ""), (item("length"), "a")]) == [Verdict(None, "error: MemoryError: "), Verdict(0.1)]


def test_an_idle_worker_that_was_killed_is_replaced(pool: VerifierPool) -> None:
    known = {child.pid for child in descendants()}
    assert pool.score([(item("length"), "a")]) == [Verdict(0.1)]
    worker = next(child for child in descendants() if child.pid not in known)
    worker.kill()
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert pool.score([(item("length"), "ab")]) == [Verdict(0.2)]


def test_workers_that_cannot_start_are_an_error_and_not_a_score() -> None:
    with (
        VerifierPool(1, 1.0, rewards="tests.unit.no_such_module:reward") as pool,
        pytest.raises(RuntimeError, match="exit code 1 before it was ready"),
    ):
        pool.score([(item("length"), "")])


def test_workers_die_with_a_parent_that_is_killed() -> None:
    program = f"""
        import os, threading
        from megatron_tower.rewards.pool import VerifierPool
        pool = VerifierPool(1, 60.0, rewards="{CASES}")
        def tell():
            while not pool._workers or pool._workers[0].state.value != "running": pass
            print(pool._workers[0].process.pid, flush=True)
        threading.Thread(target=tell, daemon=True).start()
        pool.score([({{"reward": "sleep", "check": 60}}, "")])
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs([worker], timeout=5)
    assert not alive
