"""The report of a run: report.html (one self-contained page, phones included), report.md and figures/*.png, from files alone.

Reads <run_dir>/<stage>/evaluation, <run_dir>/<stage>/metrics.jsonl and the data manifest; stages are `base` and the recipe's
phases, those that were evaluated. Computes nothing but the stages' differences, item by item, and the n-gram yardsticks.

    python -m evaluation.run_report run_dir=runs/demo-tiny_gemma2-single
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from evaluation import figures
from evaluation.baselines import bits_per_byte
from evaluation.findings import HEADLINES, aims, beside_ngrams, changes, not_learnt, trade, unjudged
from evaluation.metrics.bootstrap import Estimate
from evaluation.metrics.translation import plain
from evaluation.story import Stage, Story, read
from megatron_tower.command import entry_point
from megatron_tower.config import Config, EvalConfig
from megatron_tower.runtime.run_dir import write_text

MAX_SAMPLES = 6  # of each, right and wrong
SECONDS = "seconds_"  # what metrics.jsonl's keys begin with that say where a step's time went
ITEMS = {
    "text": "texts",
    "translation": "translations",
    "general": "instructions",
    "preference": "preference pairs",
    "verifiable": "verifiable instructions",
}


@entry_point
def main(cfg: Config) -> None:
    print(f"report: {write(Path(cfg.run_dir), ['base', *cfg.recipe.phases])}")


def write(run_dir: Path, stages: list[str]) -> Path:
    """Write report.html, report.md and figures/ into run_dir; returns the page's path. Raises InputError before writing anything."""
    story = read(run_dir, stages)
    first = story.stages[0].scores
    asked = EvalConfig(name=first["settings"]["name"], text_per_locale=first["settings"]["text_per_locale"])
    ngrams = bits_per_byte(story.data_folder, first["data"]["manifest_sha256"], asked, run_dir / "ngrams.json")
    facts = _facts(story, ngrams)
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=lambda name: name == "run_report.html.j2",
    )
    templates.filters["arrow"] = lambda pair: pair.replace("->", " → ")
    templates.filters["line"] = lambda text: " ".join(text.split())
    for name in ("report.md", "report.html"):
        write_text(run_dir / name, templates.get_template(f"run_{name}.j2").render(facts))
    return run_dir / "report.html"


def _facts(story: Story, ngrams: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Everything that the two templates show."""
    means = {name: sum(values.values()) / len(values) for name, values in ngrams.items()}
    between = [found for found in changes(story) if found]
    drawn = {
        "pareto": ("Translation against general ability", figures.pareto(story)),
        "bits": ("Bits per byte by locale", figures.bits(story, ngrams)),
        "training": ("Training", figures.training(story)),
    }
    return {
        "story": story,
        "stages": story.stages,
        "headlines": [headline for headline in HEADLINES if any(headline.of(stage) for stage in story.stages)],
        "aims": aims(between),
        "between": between,
        "trade": trade,
        "unjudged": unjudged(story),
        "beside": beside_ngrams(story, means),
        "unlearnt": not_learnt(story, ngrams),
        "ngrams": ngrams,
        "ngram_means": means,
        "figures": [
            (name, title, figures.save(figure, story.run_dir / "figures" / f"{name}.png"))
            for name, (title, figure) in drawn.items()
            if figure
        ],
        "right": list(_samples(story, right=True)),
        "wrong": list(_samples(story, right=False)),
        "title": f"Report of {story.run_dir.resolve().name}",
        "subtitle": _subtitle(story),
        "confidence": f"{100 * story.stages[0].scores['settings']['confidence']:g}",
        "by_group": (
            ("Preference accuracy, %", "preference", "accuracy", "kind", 1),
            ("Preference accuracy, %", "preference", "accuracy", "locale", 1),
            ("Preference margin, nats a token", "preference", "margin", "kind", 3),
            ("Mean verifiable reward, %", "verifiable", "reward", "reward", 1),
            ("Mean verifiable reward, %", "verifiable", "reward", "family", 1),
            ("Mean verifiable reward, %", "verifiable", "reward", "locale", 1),
        ),
        "translation_metrics": (("chrf", "chrF++", 1), ("bleu", "BLEU", 1), ("exact_match", "exact match, %", 1)),
        "translation_rows": [(by, group) for by in ("pair", "direction", "all") for group in story.groups("translation", "chrf", by)],
        "faults": (("empty", "empty"), ("copied", "source copied"), ("wrong_language", "wrong language")),
        "sources": story.manifest["sources"],
        "method": _method(story),
        "times": [_time(stage) for stage in story.stages],
        "rollouts": [f"{stage.title}: {', '.join(said)}." for stage in story.stages if (said := _rollouts(stage))],
        "spent": [(stage.title, spent) for stage in story.stages if (spent := _spent(stage))],
        "show": _show,
    }


def _method(story: Story) -> list[str]:
    """How the figures came about, from what scores.json recorded."""
    first = story.stages[0].scores
    asked = first["settings"]
    prompts = ", ".join(f"{s.title}: {s.scores['decoding']['prompts']}" for s in story.stages)
    signatures = sorted({s["signature"] for s in first["scores"] if s["signature"] and s["by"] == "pair"})
    return [
        f"Greedy decoding, at most {asked['max_new_tokens']} new tokens. Prompts ({prompts}) stand in each stage's scores.json.",
        "chrF++ and BLEU over several pairs are the mean over pairs; by kind they are pooled over segments. "
        "“Source copied” beside chrF++ is what the untranslated source would score.",
        "Exact match and accuracy compare after Unicode composition, any white space counting as one space.",
        "Wrong language is judged by lid.176 where the answer has 20 characters or more and the detector recognises the reference.",
        "Preference accuracy: share of held-out pairs whose chosen answer has the higher mean log-probability a token (its end of turn "
        "included), a tie counting half. Verifiable reward: mean of the rewards that GRPO trains on, from 0 to 100 %, over held-out items.",
        "The translation reward contains chrF to the reference, on translations under an instruction; preference pairs and plain "
        "translations are not rewarded. chrF++ is therefore no independent judge of GRPO: read it with exact match, which is in no reward.",
        "From stage to stage: paired bootstrap of the difference on the same items, without those that have no verdict at either stage; "
        "it is called one where its interval leaves out 0.",
        f"Intervals: {100 * asked['confidence']:g} % percentile bootstrap over segments, {asked['bootstrap_samples']} resamples within "
        "each pair or locale; shares of exactly 0 or 100 % have the exact binomial bound.",
        "Bits per byte: bits of each document and its end, given its beginning, over its UTF-8 bytes. The n-gram models have the same "
        "tokenizer and the CPT corpus, every document once (interpolated Kneser-Ney, one discount an order).",
        f"sacrebleu: {'; '.join(signatures)}.",
    ]


def _time(stage: Stage) -> dict[str, str]:
    """One row of the table of run times. Training: the logged steps' mean seconds, times the steps; start and saving not counted."""
    evaluation = f"{sum(stage.scores['seconds'].values()):.0f}"
    if not stage.curve:
        return {"stage": stage.title, "steps": "–", "tokens": "–", "rate": "–", "training": "–", "evaluation": evaluation}
    steps = int(stage.curve[-1]["step"])
    tokens = sum(stage.tokens) / len(stage.curve)
    a_step = sum(n / row["tokens_per_second"] for n, row in zip(stage.tokens, stage.curve, strict=True)) / len(stage.curve)
    return {
        "stage": stage.title,
        "steps": f"{steps:,}",
        "tokens": f"{steps * tokens:,.0f}",
        "rate": f"{tokens / a_step:,.0f}",
        "training": f"{steps * a_step:.0f}",
        "evaluation": evaluation,
    }


def _spent(stage: Stage) -> list[tuple[str, str, str]]:
    """(part, mean seconds a step, % of the parts' sum) of a phase whose steps have more parts than the update; else nothing."""
    parts = sorted({key for row in stage.curve for key in row if key.startswith(SECONDS)})
    means = {key.removeprefix(SECONDS).replace("_", " "): stage.curve_mean(key) for key in parts}
    if len(means) < 2:
        return []
    total = sum(means.values())
    return [(part, f"{spent:.2f}", f"{100 * spent / total:.0f}") for part, spent in sorted(means.items(), key=lambda item: -item[1])]


def _rollouts(stage: Stage) -> list[str]:
    """What of the sampled answers taught nothing, of a phase that records it."""
    counts = (("timeouts", "answers a step timed out"), ("dropped_groups", "groups a step dropped, their answers all having one reward"))
    return [f"{mean:.2f} {words}" for key, words in counts if (mean := stage.curve_mean(key)) is not None]


def _subtitle(story: Story) -> str:
    model, items = story.stages[-1].scores["model"], story.stages[0].scores["items"]
    held_out = [f"{count:,} {ITEMS[task]}" for task, count in items.items()]
    return (
        f"{' → '.join(s.title for s in story.stages)} of {model['name']} ({model['parameters'] / 1e6:,.1f}M parameters), "
        f"on {', '.join(held_out[:-1])} and {held_out[-1]} held out from training."
    )


def _show(estimate: Estimate | None, digits: int) -> tuple[str, str]:
    """Value and interval as text; dashes where a stage has no such score."""
    if estimate is None:
        return "–", ""
    return f"{estimate.value:.{digits}f}", f"{estimate.low:.{digits}f} – {estimate.high:.{digits}f}"


def _samples(story: Story, right: bool) -> Iterator[dict[str, Any]]:
    """Translations that the last stage got right (or wrong), every stage's side by side: the first of each pair, kinds in turn."""
    answers = [stage.lines("translation") for stage in story.stages]
    kinds: Counter[str] = Counter()
    pairs: set[str] = set()
    for _ in range(MAX_SAMPLES):
        fits = [
            rows
            for rows in zip(*answers, strict=True)
            if (plain(rows[-1]["output"]) == plain(rows[-1]["reference"])) == right and _pair(rows[-1]) not in pairs
        ]
        if not fits:
            return
        rows = min(fits, key=lambda rows: kinds[rows[-1]["kind"]])  # the first among equals, in the file's order
        kinds[rows[-1]["kind"]] += 1
        pairs.add(_pair(rows[-1]))
        outputs = [
            (s.title, row["output"], plain(row["output"]) == plain(row["reference"])) for s, row in zip(story.stages, rows, strict=True)
        ]
        yield {
            "pair": _pair(rows[-1]),
            "kind": rows[-1]["kind"],
            "source": rows[-1]["source"],
            "reference": rows[-1]["reference"],
            "outputs": outputs,
        }


def _pair(row: dict[str, Any]) -> str:
    return f"{row['source_locale']}->{row['target_locale']}"


if __name__ == "__main__":
    main()
