"""Prompts by how hard they are for a checkpoint: which stay, what is counted, and that a killed run samples nothing twice."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import fmean

import pytest

from megatron_tower.command import load
from megatron_tower.config import Config, InputError
from megatron_tower.config_prompts import DifficultyConfig
from megatron_tower.data import prompts
from megatron_tower.rewards.pool import Verdict
from megatron_tower.rollout import answers
from tests.unit.hf_folders import answering
from tools import filter_prompts

PROMPTS, ANSWERS = 9, 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return answering(tmp_path_factory.mktemp("difficulty"))


@pytest.fixture
def words(checkpoint: Path, tmp_path: Path) -> list[str]:
    """A command line over prompts of two rewards, the last of them longer than the model's context."""
    asked = [f"What is {n} plus {n}?" for n in range(PROMPTS)] + ["What is " + "1 plus " * 100 + "1?"]
    rows = [item(prompt, "maths" if n % 2 else "preference") for n, prompt in enumerate(asked)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"items": tmp_path / "items.jsonl", "output": tmp_path / "kept.jsonl", "checkpoint": checkpoint, "batch_size": ANSWERS}
    settings |= {"rollouts_per_prompt": ANSWERS, "max_new_tokens": 24, "temperature": 1.5, "top_p": 1.0}
    return ["model=tiny_gemma2", *(f"prompts.difficulty.{name}={value}" for name, value in settings.items())]


def item(prompt: str, reward: str) -> dict:
    return {
        "prompt": prompt,
        "reward": reward,
        "family": "sum",
        "locale": "en",
        "answer": "2",
        "check": {"answer": "2"},
        "id": prompt,
    }


def rule(answer: str) -> Verdict:
    """A score by length alone; some answers have none."""
    kinds = {0: Verdict(None, "timeout"), 1: Verdict(None, "error: no")}
    return kinds.get(len(answer) % 7) or Verdict(len(answer) % 5 / 4)


class Pool:
    def __init__(self, processes: int, timeout: float) -> None: ...

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None: ...

    def score(self, asked: list[tuple[dict, str]]) -> list[Verdict]:
        return [rule(answer) for _, answer in asked]


@pytest.fixture
def ruled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filter_prompts, "VerifierPool", Pool)


def filtered(cfg: Config) -> list[dict]:
    """`python -m tools.filter_prompts` on one rank, without Hydra."""
    plan = filter_prompts.check(cfg)
    filter_prompts.run(cfg, plan)
    return prompts.read(plan.output)


def test_prompts_between_the_bounds_stay_with_their_mean_reward(words: list[str], tmp_path: Path, ruled: None, capsys):
    kept = filtered(load(words))
    cfg = load(words)
    plan = filter_prompts.check(cfg)
    told = {record["key"]: record["answers"] for record in map(json.loads, plan.answers.read_text().splitlines())}
    means, fates = {}, {"maths": Counter(), "preference": Counter()}
    for row, key in zip(plan.items, plan.keys, strict=True):
        if key not in told:
            continue
        assert len(told[key]) == ANSWERS
        verdicts = [rule(answer) for answer in told[key]]
        scores = [verdict.score for verdict in verdicts if verdict.score is not None]
        means[row["prompt"]] = fmean(scores) if scores else None
        fates[row["reward"]]["answers timed out"] += sum(verdict.problem == "timeout" for verdict in verdicts)
        fates[row["reward"]]["kept"] += bool(scores) and 0.3 <= fmean(scores) <= 0.95
    assert len(means) == PROMPTS
    assert {row["prompt"]: row["mean_reward"] for row in kept} == {p: m for p, m in means.items() if m is not None and 0.3 <= m <= 0.95}
    assert all(row["id"] == row["prompt"] for row in kept) and 0 < len(kept) < PROMPTS
    facts = json.loads((tmp_path / "kept.jsonl.manifest.json").read_text())
    for name, of in fates.items():
        assert {what: facts["rewards"][name].get(what, 0) for what in of} == of
    assert sum(of["longer than the context"] for of in facts["rewards"].values()) == 1 and facts["kept"] == len(kept)
    assert "maths: mean reward of 4 prompts" in capsys.readouterr().out


def test_a_killed_run_goes_on_and_samples_nothing_twice(words: list[str], tmp_path: Path, ruled: None, monkeypatch):
    plan = filter_prompts.check(load(words))
    killed = subprocess.Popen([sys.executable, "-m", "tools.filter_prompts", *words], stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while not (plan.answers.is_file() and plan.answers.read_bytes().count(b"\n")) and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    first = plan.answers.read_bytes().splitlines(keepends=True)[0]
    plan.answers.write_bytes(first + b'{"key": "cut off')
    plan.output.unlink(missing_ok=True)
    asked, sample = [], answers.answers

    def counted(model, found, **how):
        asked.extend(found)
        return sample(model, found, **how)

    monkeypatch.setattr(answers, "answers", counted)
    kept = filtered(load(words))
    assert len(asked) == PROMPTS - 1 == len(set(asked)) and filter_prompts._number(json.loads(first)["key"]) not in asked
    assert kept == filtered(load([*words, f"prompts.difficulty.output={tmp_path}/fresh.jsonl", "prompts.difficulty.batch_size=64"]))
    assert filter_prompts.is_made(plan.output, plan.settings, "prompts.difficulty.output")
    for change in ("prompts.difficulty.maximum=0.9", "prompts.difficulty.temperature=1", "seed=1"):
        with pytest.raises(InputError, match=f"made with another {change.split('=')[0]}"):
            filter_prompts.is_made(plan.output, filter_prompts.check(load([*words, change])).settings, "prompts.difficulty.output")


def test_none_between_the_bounds_is_one_sentence_and_keeps_the_answers(words: list[str], tmp_path: Path, monkeypatch):
    monkeypatch.setattr(filter_prompts, "VerifierPool", Pool)
    monkeypatch.setattr(Pool, "score", lambda self, asked: [Verdict(float(item["reward"] == "maths")) for item, _ in asked])
    with pytest.raises(InputError, match=r"no prompt lies between 0\.3 and 0\.95 .*too hard.*maths: .*too easy"):
        filtered(load(words))
    assert [path.name for path in sorted(tmp_path.glob("*kept*"))] == ["kept.jsonl.answers.jsonl"]


def test_the_bounds_are_inside_and_no_score_is_no_zero():
    cfg = DifficultyConfig()
    fates = [filter_prompts._fate(cfg, mean) for mean in (0.0, 0.29, 0.3, 0.95, 0.96, None)]
    assert fates == ["too hard", "too hard", "kept", "kept", "too easy", "no score"]
    counts = Counter()
    assert filter_prompts._mean([Verdict(None, "timeout"), Verdict(1.0), Verdict(None, "error: x"), Verdict(0.5)], counts) == 0.75
    assert counts == {"answers timed out": 1, "answers without a score": 1}


def test_a_histogram_has_every_mean_once():
    lines = list(filter_prompts.histogram("maths", [0.0, 0.05, 0.1, 1.0]))
    assert lines[0] == "maths: mean reward of 4 prompts" and len(lines) == 11
    assert [int(line.split()[1]) for line in lines[1:]] == [2, 1, 0, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("minimum=0.96", "must lie in this order"),
        ("maximum=1.5", "must lie in this order"),
        ("checkpoint=null", "checkpoint is not set"),
        ("checkpoint=nowhere", "checkpoint=nowhere is neither"),
        ("items=nowhere.jsonl", r"nowhere\.jsonl is missing"),
    ],
)
def test_bad_input_is_refused(words: list[str], change: str, told: str):
    with pytest.raises(InputError, match=told):
        filter_prompts.check(load([*words, f"prompts.difficulty.{change}"]))
