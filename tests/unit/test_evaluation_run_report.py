"""The report of one run, from a made-up one: its sentences follow from the numbers, it fetches nothing, bad files are named."""

import html
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot as plt

from evaluation import figures, run_report
from evaluation.metrics.bootstrap import Estimate, Resampling
from evaluation.story import Stage, Story, read
from evaluation.tasks import TASKS
from megatron_tower.config import InputError

SETTINGS = {
    "name": "held_out",
    "text_per_locale": 0,
    "translations_per_locale": 60,
    "general": 200,
    "preference": 0,
    "verifiable": 0,
    "max_new_tokens": 48,
    "bootstrap_samples": 200,
    "confidence": 0.95,
    "seed": 1,
}
HOW = Resampling(200, 0.95, 1)
PAIRS = ("en->de_DE", "de_DE->en", "en->fr_FR", "fr_FR->en")
NGRAMS = {"unigram": {"de_DE": 4.0, "en": 3.6}, "trigram": {"de_DE": 2.6, "en": 2.2}}
WRONG = "<script>alert(1)</script> März | a very long answer without an end " * 3
ITEMS: dict[str, list[dict[str, Any]]] = {
    "text": [{"locale": locale, "text": "ten bytes."} for locale in ("de_DE", "en") for _ in range(20)],
    "translation": [
        {
            "kind": ("date", "catalogue")[i % 2],
            "source_locale": pair.split("->")[0],
            "target_locale": pair.split("->")[1],
            "source": f"March {i}",
            "reference": f"{i}. März 2024",
        }
        for pair in PAIRS
        for i in range(10)
    ],
    "general": [{"kind": ("sort", "count")[i % 2], "prompt": f"Sort {i}", "answer": f"{i}", "locale": "en"} for i in range(40)],
    "preference": [
        {"kind": ("damaged", "maths")[i % 2], "locale": "de_DE", "prompt": f"Q {i}", "chosen": "a", "rejected": "b"} for i in range(40)
    ],
    "verifiable": [
        {
            "prompt": f"V {i}",
            "reward": ("maths", "translation")[i % 2],
            "family": f"family_{i % 4}",
            "locale": "en",
            "answer": "x",
            "check": {},
        }
        for i in range(40)
    ],
}


@dataclass(frozen=True)
class Made:
    """A made-up stage: bits per byte, swaying by `sway` from text to text, and the share of each task's items that it gets right."""

    bits: float
    translation: float = 0.0
    general: float = 0.0
    preference: float = 0.5
    verifiable: float = 0.0
    sway: float = 0.1
    unjudged: int = 0

    def answers(self, task: str) -> list[dict[str, Any]]:
        rows = ITEMS[task]
        if task == "text":
            return [{"bits": 10 * (self.bits + self.sway * (-1) ** i), "tokens": 4} for i in range(len(rows))]
        right = [i * 7 % len(rows) < getattr(self, task) * len(rows) for i in range(len(rows))]  # more right: the same ones and others
        if task == "preference":
            return [{"chosen_logprob": -1.0, "rejected_logprob": -1.5 if ok else -0.8} for ok in right]
        if task == "verifiable":
            verdicts = [(float(ok), None) for ok in right]
            verdicts[: self.unjudged] = [(None, "error: it failed")] * self.unjudged
            return [{"output": "y", "score": score, "problem": problem} for score, problem in verdicts]
        return [
            {"output": row["reference" if task == "translation" else "answer"] if ok else WRONG}
            for row, ok in zip(rows, right, strict=True)
        ]


BASE = Made(8.1)
CPT = Made(2.2, translation=0.2, general=0.05)
SFT = Made(2.25, translation=0.6, general=0.6, preference=0.6, verifiable=0.3, sway=0.5)
WPO = Made(2.26, translation=0.6, general=0.6, preference=0.9, verifiable=0.3)
GRPO = Made(2.27, translation=0.3, general=0.6, preference=0.9, verifiable=0.65, sway=0.5)
PARTS = {"seconds_rollout": 3.0, "seconds_reward": 0.25, "seconds_logprobs": 0.75, "seconds_update": 1.0}


def curve(phase: str) -> list[dict[str, float]]:
    """What a phase logs; CPT as an earlier version did, without its tokens."""
    if phase == "grpo":
        rest = {"loss": 0.0, "kl": 0.01, "tokens_per_second": 500.0, "timeouts": 0.5, "dropped_groups": 2.0} | PARTS
        return [{"step": s, "reward": 0.2 * s, "tokens": 1000 * s} | rest for s in range(1, 5)]
    rows = [{"step": s, "loss": 7 / s**0.3, "lr": 1e-3, "gradient_norm": 1.0, "tokens_per_second": 2000.0} for s in range(1, 151)]
    if phase == "cpt":
        return rows
    return [row | {"tokens": 5000, "seconds_update": 2.5} | ({"margin": 0.1, "accuracy": 0.7} if phase == "wpo" else {}) for row in rows]


def write_stage(folder: Path, data: Path, made: Made) -> None:
    evaluation = folder / "evaluation"
    evaluation.mkdir(parents=True)
    answers = {task.name: made.answers(task.name) for task in TASKS.values() if task.name in ITEMS}
    scores = [score for task in TASKS.values() if task.name in ITEMS for score in task.score(ITEMS[task.name], answers[task.name], HOW)]
    record = {
        "settings": SETTINGS,
        "data": {"folder": str(data), "manifest_sha256": "ab" * 32},
        "decoding": {"method": "greedy", "max_new_tokens": 48, "prompts": "chat"},
        "prompts": {task: {"example": f"<start_of_turn>user {task}: {{source}}", "sha256": "0"} for task in ITEMS if task != "text"},
        "model": {"name": "tiny_gemma2", "family": "gemma2", "parameters": 2_345_678},
        "items": {task: len(rows) for task, rows in ITEMS.items()},
        "seconds": {"open": 2.0, "text": 3.0, "translation": 10.0, "general": 4.0, "preference": 1.0, "verifiable": 2.0},
        "scores": [asdict(score) | asdict(score.estimate) for score in scores],
    }
    (evaluation / "scores.json").write_text(json.dumps(record))
    lines = [{"task": name, **row, **a} for name, rows in ITEMS.items() for row, a in zip(rows, answers[name], strict=True)]
    (evaluation / "generations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if folder.name != "base":
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve(folder.name)))
        (folder / "config.yaml").write_text("phase:\n  global_batch_size: 16\n  seq_length: 256\n")


def made_run(folder: Path, **stages: Made) -> Path:
    """A run directory with those stages and a data folder beside it."""
    data, run = folder / "data", folder / "demo"
    data.mkdir()
    facts = {
        "sources": [
            {"name": "kolibri", "version": "0.19.5", "licence": "MIT", "sha256": "c0ffee" * 10},
            {"name": "CLDR", "version": "48", "licence": "Unicode-3.0", "sha256": None},
        ],
        "pairs": {"train": {"de_DE": {"date": 900, "catalogue": 2000}}, "held_out": {"de_DE": {"date": 90, "catalogue": 200}}},
        "cpt_tokens": {"monolingual": 300000, "parallel": 900000},
        "sft": {"examples": 12000},
    }
    (data / "manifest.json").write_text(json.dumps(facts))
    for name, made in stages.items():
        write_stage(run / name, data, made)
    key = {"data": "ab" * 32, "text_per_locale": 0}
    (run / "ngrams.json").write_text(json.dumps({"key": key, "bits_per_byte": NGRAMS}))
    return run


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., Path]:
    """`run_of(base=BASE, sft=SFT)`: a run directory with those stages."""
    return partial(made_run, tmp_path)


def text_of(page: str) -> str:
    """What a reader sees, white space evened out."""
    body = re.sub(r"</?(b|span)\b[^>]*>", "", page.split("</style>")[1])
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def test_report_has_everything_and_fetches_nothing(run_of: Callable[..., Path]) -> None:
    run = run_of(base=BASE, cpt=CPT, sft=SFT)
    assert run_report.write(run, ["base", "cpt", "sft"]) == run / "report.html"
    page, markdown = (run / "report.html").read_text(encoding="utf-8"), (run / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert len(links) == 3 and all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert "@import" not in page and "url(" not in page and "<script" not in page and "http" not in page
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert page.count("<table>") == page.count('<div class="scroll"><table>') >= 8
    assert sorted(path.name for path in (run / "figures").iterdir()) == ["bits.png", "pareto.png", "training.png"]
    for figure in ("bits", "pareto", "training"):
        assert f"(figures/{figure}.png)" in markdown
    tables = [table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)]
    assert len(tables) >= 8 and all(re.fullmatch(r"\|(---\|)+", table[1]) and len(table) > 2 for table in tables)
    for shown in (text_of(page), markdown):
        assert "kolibri" in shown and "MIT" in shown and "c0ffeec0ffeec0ff" in shown
        assert "Base needs 8.10 bits per byte: 113 % more than the unigram model's 3.80" in shown
        assert "CPT needs 2.20 bits per byte: 42 % fewer than the unigram model's 3.80, 8 % fewer than the trigram model's 2.40" in shown
        assert "614,400" in shown and "2,000" in shown  # tokens trained on, tokens a second
        assert "nw:2" in shown and "every pair is translated better than by copying" in shown.lower()
    assert "&lt;script&gt;alert(1)" in page  # what a model says is text, not markup


FIGURE = r"\d+\.\d \[\d+\.\d, \d+\.\d\]"


def test_differences_are_claimed_only_where_the_interval_leaves_out_zero(run_of: Callable[..., Path]) -> None:
    run = run_of(base=BASE, cpt=CPT, sft=SFT)
    shown = text_of(run_report.write(run, ["base", "cpt", "sft"]).read_text(encoding="utf-8"))
    assert re.search(rf"Translation chrF\+\+: {FIGURE} → {FIGURE}; difference \+\d+\.\d \[\+\d+\.\d, \+\d+\.\d\], better\.", shown)
    assert re.search(
        r"General accuracy: 5\.0 % \[.*?\] → 60\.0 % \[.*?\]; difference \+55\.0 \[\+[34]\d\.\d, \+[67]\d\.\d\], better\.", shown
    )
    same = r"2\.20 \[.*?\] → 2\.25 \[.*?\]; difference \+0\.05 \[−0\.\d\d, \+0\.\d\d\], no difference is claimed\."
    assert re.search(f"Held-out bits per byte: {same}", shown)
    assert "SFT gains in translation chrF++" in shown and "A trade" not in shown


def test_each_phase_is_held_to_what_it_is_for(run_of: Callable[..., Path]) -> None:
    stages = {"base": BASE, "cpt": CPT, "sft": SFT, "wpo": WPO, "grpo": GRPO}
    run = run_of(**stages)
    run_report.write(run, list(stages))
    page, markdown = text_of((run / "report.html").read_text(encoding="utf-8")), (run / "report.md").read_text(encoding="utf-8")
    for shown in (page, markdown):
        interval = r"95 % interval \[\+\d+\.\d, \+\d+\.\d\]"
        assert re.search(rf"WPO raised preference accuracy: from 60\.0 % to 90\.0 % \(difference \+30\.0, {interval}\)\.", shown)
        assert re.search(rf"GRPO raised mean verifiable reward: from 30\.0 % to 65\.0 % \(difference \+35\.0, {interval}\)\.", shown)
        assert "WPO gains in preference accuracy; no loss is measured." in shown
        assert "A trade: GRPO gains in mean verifiable reward and loses in translation chrF++ and translation exact match." in shown
        assert "family_3" in shown and "Mean verifiable reward, %, by family" in shown and "Preference accuracy, %, by locale" in shown
        assert "GRPO: 0.50 answers a step timed out, 2.00 groups a step dropped" in shown
        assert "they are left out of its mean reward" not in shown
    assert "| rollout | 3.00 | 60 |" in markdown and "| logprobs | 0.75 | 15 |" in markdown
    assert "| GRPO | 4 | 10,000 | 500 | 20 | 22 |" in markdown and "| SFT | 150 | 750,000 | 2,000 | 375 | 22 |" in markdown
    assert "step of WPO spends" not in markdown  # all of it is the update
    assert markdown.index("| rollout |") < markdown.index("| update |")  # the largest part first


def test_figures_show_every_stage_and_what_each_phase_trains_for(run_of: Callable[..., Path]) -> None:
    stages = {"base": BASE, "cpt": CPT, "sft": SFT, "wpo": WPO, "grpo": GRPO}
    story = read(run_of(**stages), list(stages))
    training, pareto = figures.training(story), figures.pareto(story)
    assert [axes.get_title(loc="left") for axes in training.axes] == [
        "CPT: loss, nats a token",
        "SFT: loss, nats a token",
        "WPO: margin",
        "WPO: pairs in order, share",
        "GRPO: mean reward",
        "GRPO: KL to its start, nats",
    ]
    assert list(training.axes[4].lines[0].get_ydata()) == [0.2 * s for s in range(1, 5)]
    everything, close = ([drawn.get_label() for drawn in axes.containers] for axes in pareto.axes)
    assert everything == ["Base", "CPT", "SFT", "WPO", "GRPO"] and close == everything[2:]
    plt.close("all")


def test_a_phase_that_failed_at_its_aim_is_said_to_have(run_of: Callable[..., Path]) -> None:
    run = run_of(sft=SFT, wpo=replace(WPO, preference=0.62, general=0.1), grpo=replace(GRPO, translation=0.6, general=0.1, verifiable=0.0))
    run_report.write(run, ["sft", "wpo", "grpo"])
    shown = (run / "report.md").read_text(encoding="utf-8")
    assert re.search(r"WPO did not change preference accuracy measurably: from 60\.0 % to 62\.5 % \(difference \+2\.5, .*\[\+0\.0, ", shown)
    assert "WPO loses in general accuracy; no gain is measured." in shown
    assert re.search(
        r"GRPO lowered mean verifiable reward: from 30\.0 % to 0\.0 % \(difference −30\.0, 95 % interval \[−\d\d\.\d, −", shown
    )


def test_answers_without_a_verdict_are_told_and_left_out_on_both_sides(run_of: Callable[..., Path]) -> None:
    run = run_of(wpo=WPO, grpo=replace(WPO, unjudged=20))
    run_report.write(run, ["wpo", "grpo"])
    shown = (run / "report.md").read_text(encoding="utf-8")
    assert "20 of 40 verifiable answers of GRPO have no verdict (error 20): they are left out of its mean reward." in shown
    assert "verifiable answers of WPO have" not in shown
    assert "(difference +0.0, 95 % interval [+0.0, +0.0])" in shown  # on the 20 items that both have: not a fall


def test_a_trade_and_an_unlearnt_locale_are_said_in_words(run_of: Callable[..., Path]) -> None:
    run = run_of(cpt=replace(CPT, translation=1.0), sft=Made(4.1, translation=0.0, general=0.6, sway=0.3))
    run_report.write(run, ["base", "cpt", "sft"])
    shown = (run / "report.md").read_text(encoding="utf-8")
    assert (
        "A trade: SFT gains in general accuracy and loses in held-out bits per byte, translation chrF++ and translation exact match."
        in shown
    )
    assert re.search(r"Translation not learnt, .*: de_DE → en \(\d+\.\d \[.*?\] beside \d+\.\d\), en → de_DE", shown)
    assert re.search(
        r"Text not learnt, bits per byte after SFT not below the unigram model's: de_DE \(4\.10 \[.*?\] beside 4\.00\), en", shown
    )


def test_one_stage_alone_is_a_report(run_of: Callable[..., Path]) -> None:
    run = run_of(base=BASE)
    shown = text_of(run_report.write(run, ["base", "cpt", "sft"]).read_text(encoding="utf-8"))
    assert (
        "Base of tiny_gemma2 (2.3M parameters), on 40 texts" in shown
        and "preference pairs and 40 verifiable instructions held out" in shown
        and not (run / "figures" / "training.png").exists()
    )


def test_bad_input_is_named_and_nothing_is_written(run_of: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no <stage>/evaluation/scores.json"):
        run_report.write(tmp_path / "nowhere", ["base"])
    run = run_of(base=BASE, cpt=CPT)
    scores = run / "cpt" / "evaluation" / "scores.json"
    record = json.loads(scores.read_text())
    scores.write_text(json.dumps(record | {"settings": SETTINGS | {"general": 7}}))
    with pytest.raises(InputError, match="base and cpt were evaluated with different settings"):
        run_report.write(run, ["base", "cpt"])
    scores.write_text("{}")
    with pytest.raises(InputError, match=r"scores\.json lacks data, decoding"):
        run_report.write(run, ["base", "cpt"])
    scores.write_text("{broken")
    with pytest.raises(InputError, match=r"scores\.json: not JSON"):
        run_report.write(run, ["base", "cpt"])
    scores.write_text(json.dumps(record))
    generations = run / "base" / "evaluation" / "generations.jsonl"
    generations.write_text(generations.read_text() + "{broken\n")
    with pytest.raises(InputError, match=r"generations\.jsonl:201: not JSON"):
        run_report.write(run, ["base", "cpt"])
    generations.write_text("".join(generations.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(InputError, match=r"'verifiable': 38} answers and scores.json speaks of .*'verifiable': 40}"):
        run_report.write(run, ["base", "cpt"])
    assert not (run / "report.html").exists() and not (run / "figures").exists()


def test_groups_are_those_of_any_stage() -> None:
    cell = {"task": "general", "metric": "accuracy", "by": "kind", "value": 1, "low": 0, "high": 2, "count": 3}
    stages = [Stage(name, {"scores": [cell | {"group": name}]}, [], [], "") for name in ("b", "a")]
    story = Story(Path(), stages, Path(), {})
    assert story.groups("general", "accuracy", "kind") == ["a", "b"]
    assert (
        stages[0].get("general", "accuracy", "kind", "b") == Estimate(1, 0, 2, 3)
        and stages[0].get("general", "accuracy", "kind", "a") is None
    )
