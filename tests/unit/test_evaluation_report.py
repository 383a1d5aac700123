"""The report from a made-up run: its sentences follow from the numbers, it fetches nothing, bad files are named."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation import report
from evaluation.metrics.bootstrap import Estimate
from evaluation.story import Stage, Story
from megatron_tower.config import InputError

SETTINGS = {
    "name": "held_out",
    "text_per_locale": 0,
    "translations_per_locale": 60,
    "general": 200,
    "batch_size": 64,
    "max_new_tokens": 48,
    "bootstrap_samples": 1000,
    "confidence": 0.95,
}
PAIRS = ("en->de_DE", "de_DE->en", "en->fr_FR", "fr_FR->en")
Figures = dict[str, tuple[float, float, float]]  # metric -> value, low, high
BASE: Figures = {"bits_per_byte": (8.1, 8.0, 8.2), "chrf": (3, 2, 4), "accuracy": (0, 0, 1.8)}
CPT: Figures = {"bits_per_byte": (2.2, 2.1, 2.3), "chrf": (30, 27, 33), "accuracy": (5, 2, 8)}
SFT: Figures = {"bits_per_byte": (2.25, 2.15, 2.35), "chrf": (45, 42, 48), "accuracy": (60, 54, 66)}
NGRAMS = {"unigram": {"de_DE": 4.0, "en": 3.6}, "trigram": {"de_DE": 2.6, "en": 2.2}}


def scores_of(figures: Figures) -> list[dict[str, Any]]:
    """A table as evaluation.run writes it, every group having the stage's figure."""
    bits, chrf, accuracy = figures["bits_per_byte"], figures["chrf"], figures["accuracy"]
    cells = [("text", "bits_per_byte", by, group, bits) for by, group in (("all", "all"), ("locale", "de_DE"), ("locale", "en"))]
    cells += [("text", "perplexity", "locale", locale, (2 ** bits[0],) * 3) for locale in ("de_DE", "en")]
    groups = [("all", "all"), ("direction", "en->xx"), ("direction", "xx->en"), *(("pair", pair) for pair in PAIRS)]
    for by, group in groups:
        cells += [("translation", metric, by, group, chrf) for metric in ("chrf", "bleu", "exact_match")]
        cells += [("translation", "copy_chrf", by, group, (20.0, 18.0, 22.0))]
        cells += [("translation", metric, by, group, (1.0, 0.0, 2.0)) for metric in ("empty", "copied")]
    for kind in ("date", "catalogue"):
        cells += [("translation", metric, "kind", kind, chrf) for metric in ("chrf", "exact_match")]
    cells += [("general", "accuracy", by, group, accuracy) for by, group in (("all", "all"), ("kind", "sort"), ("kind", "count"))]
    signed = {"chrf": "nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|version:2.6.0"}
    return [
        dict(zip(("task", "metric", "by", "group", "value", "low", "high"), (t, m, by, group, *figure), strict=True))
        | {"count": 60, "signature": signed.get(m, "")}
        for t, m, by, group, figure in cells
    ]


def write_stage(folder: Path, data: Path, figures: Figures, trained: bool) -> None:
    evaluation = folder / "evaluation"
    evaluation.mkdir(parents=True)
    record = {
        "settings": SETTINGS,
        "data": {"folder": str(data), "manifest_sha256": "ab" * 32},
        "decoding": {"method": "greedy", "max_new_tokens": 48, "prompts": "chat"},
        "prompts": {
            task: {"example": f"<start_of_turn>user {task}: {{source}}", "sha256": "0"} for task in ("text", "translation", "general")
        },
        "model": {"name": "tiny_gemma2", "family": "gemma2", "parameters": 2_345_678},
        "items": {"text": 300, "translation": 360, "general": 200},
        "seconds": {"open": 2.0, "text": 3.0, "translation": 10.0, "general": 4.0},
        "scores": scores_of(figures),
    }
    (evaluation / "scores.json").write_text(json.dumps(record))
    answers = []
    for number in range(3):
        for pair in PAIRS:
            source, target = pair.split("->")
            right = number == 0 and figures["chrf"][0] > 40
            output = f"{number}. März 2024" if right else "<script>alert(1)</script> März | a very long answer without an end " * 2
            answers.append(
                {
                    "task": "translation",
                    "kind": "date",
                    "source_locale": source,
                    "target_locale": target,
                    "source": f"March {number}, 2024",
                    "reference": f"{number}. März 2024",
                    "output": output,
                }
            )
    (evaluation / "generations.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    if trained:
        rows = [{"step": s, "loss": 7 / s**0.3, "lr": 1e-3, "gradient_norm": 1.0, "tokens_per_second": 2000.0} for s in range(1, 151)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "config.yaml").write_text("phase:\n  global_batch_size: 16\n  seq_length: 256\n")


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., Path]:
    """`run_of(base=BASE, sft=SFT)`: a run directory with those stages and a data folder beside it."""

    def make(**stages: Figures) -> Path:
        data, run = tmp_path / "data", tmp_path / "demo"
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
        for name, figures in stages.items():
            write_stage(run / name, data, figures, trained=name != "base")
        key = {"data": "ab" * 32, "text_per_locale": 0}
        (run / "ngrams.json").write_text(json.dumps({"key": key, "bits_per_byte": NGRAMS}))
        return run

    return make


def text_of(page: str) -> str:
    """What a reader sees, white space evened out."""
    body = re.sub(r"</?(b|span)\b[^>]*>", "", page.split("</style>")[1])
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def test_report_has_everything_and_fetches_nothing(run_of: Callable[..., Path]) -> None:
    run = run_of(base=BASE, cpt=CPT, sft=SFT)
    assert report.write(run, ["base", "cpt", "sft"]) == run / "report.html"
    page, markdown = (run / "report.html").read_text(encoding="utf-8"), (run / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert len(links) == 3 and all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert "@import" not in page and "url(" not in page and "<script" not in page and "http" not in page
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert page.count("<table>") == page.count('<div class="scroll"><table>') >= 8
    assert sorted(path.name for path in (run / "figures").iterdir()) == ["bits.png", "losses.png", "pareto.png"]
    for figure in ("bits", "losses", "pareto"):
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


def test_differences_are_claimed_only_where_intervals_are_apart(run_of: Callable[..., Path]) -> None:
    run = run_of(base=BASE, cpt=CPT, sft=SFT)
    shown = text_of(report.write(run, ["base", "cpt", "sft"]).read_text(encoding="utf-8"))
    assert "Translation chrF++: 30.0 [27.0, 33.0] → 45.0 [42.0, 48.0]; better, and the intervals do not overlap." in shown
    assert "Held-out bits per byte: 2.20 [2.10, 2.30] → 2.25 [2.15, 2.35]; the intervals overlap, so no difference is claimed." in shown
    assert "A trade" not in shown


def test_a_trade_and_an_unlearnt_locale_are_said_in_words(run_of: Callable[..., Path]) -> None:
    worse: Figures = {"bits_per_byte": (4.1, 3.9, 4.2), "chrf": (19, 15, 22), "accuracy": (60, 54, 66)}
    run = run_of(cpt=CPT, sft=worse)
    report.write(run, ["base", "cpt", "sft"])
    shown = (run / "report.md").read_text(encoding="utf-8")
    assert (
        "A trade: SFT gains in general accuracy and loses in held-out bits per byte, translation chrF++ and translation exact match."
        in shown
    )
    assert "source: de_DE → en (19.0 [15.0, 22.0] beside 20.0), en → de_DE" in shown and "Translation not learnt" in shown
    assert "Text not learnt, bits per byte after SFT not below the unigram model's: de_DE (4.10 [3.90, 4.20] beside 4.00), en" in shown


def test_one_stage_alone_is_a_report(run_of: Callable[..., Path]) -> None:
    run = run_of(base=BASE)
    shown = text_of(report.write(run, ["base", "cpt", "sft"]).read_text(encoding="utf-8"))
    assert "Base of tiny_gemma2 (2.3M parameters), on 300 texts" in shown and not (run / "figures" / "losses.png").exists()


def test_bad_input_is_named_and_nothing_is_written(run_of: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no <stage>/evaluation/scores.json"):
        report.write(tmp_path / "nowhere", ["base"])
    run = run_of(base=BASE, cpt=CPT)
    scores = run / "cpt" / "evaluation" / "scores.json"
    record = json.loads(scores.read_text())
    scores.write_text(json.dumps(record | {"settings": SETTINGS | {"general": 7}}))
    with pytest.raises(InputError, match="base and cpt were evaluated with different settings"):
        report.write(run, ["base", "cpt"])
    scores.write_text("{}")
    with pytest.raises(InputError, match=r"scores\.json lacks data, decoding"):
        report.write(run, ["base", "cpt"])
    scores.write_text("{broken")
    with pytest.raises(InputError, match=r"scores\.json: not JSON"):
        report.write(run, ["base", "cpt"])
    scores.write_text(json.dumps(record))
    generations = run / "base" / "evaluation" / "generations.jsonl"
    generations.write_text(generations.read_text() + "{broken\n")
    with pytest.raises(InputError, match=r"generations\.jsonl:13: not JSON"):
        report.write(run, ["base", "cpt"])
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
