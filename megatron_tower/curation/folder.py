"""The training folder of a pipeline whose stages are done: the same files that data/prepare.py makes of catalogues.

CPT parts are the tokenized ones of all tasks, joined; SFT, WPO and GRPO sets are made from a sample of the clean pairs with English and
from CLDR; held-out rows that training text repeats are left out and counted. Leaves out: answers of models (tools/build_sft.py).
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from megatron_tower.config import Config, InputError
from megatron_tower.config_data import CurationConfig, SourceConfig
from megatron_tower.curation import tokens
from megatron_tower.curation.engine import Stage, share, total
from megatron_tower.curation.pipeline import Pipeline
from megatron_tower.curation.shards import Row
from megatron_tower.data import cldr, corpora, instructions
from megatron_tower.data import prepare as catalogues
from megatron_tower.data.pair import Pair, key
from megatron_tower.data.split import HeldOut, split
from megatron_tower.runtime.run_dir import check_writable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")
FETCH = "fetch"  # named alone: what sources name is downloaded, which every run begins with
SENTENCE = 300  # characters of either side of a pair that an instruction is made of
HELD_PAIRS = 1000  # of a locale
HELD_TEXTS = 200
TOKENIZER_BYTES = 20_000_000  # of all locales, that a tokenizer is trained on
INSTRUCTIONS = 2000  # that it is trained on besides


def prepare(cfg: Config) -> Path | None:
    """Run the stages, or this array task's part of them; the first worker also makes the data folder, and returns it. Raises InputError."""
    index, count = _part(cfg.data.curation)
    asked = cfg.data.curation.stages
    if not (asked or index) and catalogues.is_finished(cfg):
        return Path(cfg.data.folder)
    catalogues.check(cfg.data)
    known = stage_names(cfg.data.curation)
    if unknown := sorted(set(asked) - set(known)):
        raise InputError(f"data.curation.stages: {unknown[0]} is unknown: use some of {', '.join(known)}")
    check_writable(Path(cfg.data.curation.work), f"data.curation.work={cfg.data.curation.work}")
    pipeline = Pipeline(cfg)
    for stage in pipeline.stages:
        if not asked or stage.name in asked:
            share(stage, 1 if stage.gpus else cfg.data.curation.workers, index, count, cfg.data.curation.patience)
            _tell(stage)
    if asked or index:
        return None
    return catalogues.prepare(cfg, lambda folder, _: assemble(folder, pipeline))


def stage_names(curation: CurationConfig) -> list[str]:
    """What data.curation.stages may name, known before anything is fetched."""
    scored = [f"score_{name}" for name in (*curation.document_scores, *curation.pair_scores)]
    return [FETCH, "filter", "duplicates", *scored, "select", "plan", "tokenize"]


def _part(curation: CurationConfig) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", curation.part)
    if not found or int(found[1]) >= int(found[2]):
        raise InputError(f"data.curation.part={curation.part} must be like 0/4: the first of four workers")
    return int(found[1]), int(found[2])


def _tell(stage: Stage) -> None:
    """What a stage has seen, and what it removed, on one line each."""
    facts = total(stage.facts())
    if "removed" not in facts:
        print(f"{stage.name}: {len(stage.tasks)} tasks done", flush=True)
        return
    rows = sum(facts["rows"].values())
    gone = {reason: sum(counts.values()) for reason, counts in facts["removed"].items()}
    print(f"{stage.name}: {rows:,} rows, {sum(facts['bytes'].values()) / 1e6:,.1f} MB; {rows - sum(gone.values()):,} rows left", flush=True)
    for reason, count in sorted(gone.items(), key=lambda one: -one[1]):
        print(f"    {reason:24} {count:>12,}  {100 * count / rows:5.2f} %", flush=True)
    for path, count in sorted(facts.get("leaks", {}).items()):
        print(f"    of {path:21} {count:>12,}", flush=True)
    for name, count in sorted(facts.get("anomalies", {}).items()):
        print(f"    anomaly {name:16} {count:>12,}", flush=True)


def assemble(folder: Path, pipeline: Pipeline) -> dict:
    data = pipeline.data
    shutil.copytree(pipeline.plan.folder(0) / "tokenizer", folder / "tokenizer")
    words = pipeline.tokenizer()
    held_pairs, held_text, repeated = _held_out(pipeline)
    made = [pair for code in data.locales for pair in cldr.generate(code, data.cldr_kinds, data.cldr_per_locale, data.seed)]
    train, test, _, _ = split(made, data.held_out)
    test += held_pairs
    held = HeldOut(text for pair in test for text in (pair.source, pair.target))
    train = [pair for pair in (*_sample(pipeline), *train) if not held.leaks(pair.source) and not held.leaks(pair.target)]
    for side, members in (("training", train), ("held-out", test)):
        if missing := [code for code in data.locales if not any(pair.locale == code for pair in members)]:
            raise InputError(
                f"the {side} pairs have nothing in {missing[0]}: add sources, raise data.cldr_per_locale, or move data.held_out"
            )
    general, sft = catalogues.sft_examples(data, train, held)
    blended = _cpt(folder / "cpt", pipeline, words, general)
    counts = {stage.name: total(stage.facts()) for stage in (pipeline.filter, pipeline.select)}
    return {
        "sources": [_source(name, source) for name, source in pipeline.curation.sources.items()] + [catalogues.cldr_source()],
        "stages": {stage.name: stage.root.name for stage in pipeline.stages},
        "yields": counts,
        "removed": total([counts["filter"], counts["select"]])["removed"],
        "held_out_repeated": repeated,
        "planned": pipeline.plan.facts()[0]["planned"],
        **blended,
        **catalogues.write_sets(folder, data, words, train, test, held, sft, held_text),
    }


def make_tokenizer(pipeline: Pipeline, folder: Path) -> "PreTrainedTokenizerFast":
    """The model's own, or one trained on as much text of each language as of any other, and on the words of instructions."""
    data = pipeline.data
    if pipeline.cfg.model.hf_folder:
        return catalogues.make_tokenizer(pipeline.cfg, [], [], folder)
    general = instructions.generate(data.instruction_kinds, INSTRUCTIONS, data.seed, held_out=False, share=data.held_out)
    groups = Counter()
    texts = []
    for task in range(len(pipeline.names)):
        for group, text, _ in tokens.texts(pipeline.selected(task), 4000):
            if groups[group] < TOKENIZER_BYTES / (2 * (len(data.locales) + 1)):
                groups[group] += len(text.encode())
                texts.append(text)
    return catalogues.make_tokenizer(pipeline.cfg, texts, general, folder)


def _cpt(folder: Path, pipeline: Pipeline, words: "PreTrainedTokenizerFast", general: list) -> dict:
    """The parts of the mixture and blend.json; returns their tokens, also by language."""
    from megatron.core.datasets.indexed_dataset import DType

    folder.mkdir()
    parts = {"instruction": corpora.write(folder / "instruction", list(corpora.instruction(general, pipeline.data.seed)), words)}
    for part in ("monolingual", "parallel"):
        written = [
            at / part for task in range(len(pipeline.names)) if (at := pipeline.tokenize.folder(task)) and (at / f"{part}.idx").is_file()
        ]
        if written:
            parts[part] = tokens.join(folder / part, written, DType.optimal_dtype(len(words)))
    shares = {part: share for part, share in pipeline.data.shares.items() if share > 0}
    if missing := sorted(set(shares) - set(parts)):
        raise InputError(f"no text is left for {missing[0]}, which data.shares gives {shares[missing[0]]:g}: add sources, or set it to 0")
    blend = [{"prefix": part, "share": share, "tokens": parts[part]} for part, share in shares.items()]
    (folder / "blend.json").write_text(json.dumps(blend, indent=1) + "\n")
    facts = total(pipeline.tokenize.facts())
    return {"cpt_tokens": parts, "cpt_tokens_by_language": facts["tokens"], "templates": facts["templates"]}


def _sample(pipeline: Pipeline) -> list[Pair]:
    """Clean pairs with English, short enough for an instruction: of each locale those whose ids have the least hashes."""
    found: dict[str, list[tuple[float, str, Pair]]] = {}
    for task in range(len(pipeline.names)):
        for row in pipeline.selected(task):
            if pair := _pair(row):
                found.setdefault(pair.locale, []).append((tokens.uniform(row["id"]), row["id"], pair))
    wanted = pipeline.curation.sft_pairs
    return [pair for code in pipeline.data.locales for _, _, pair in sorted(found.get(code, []), key=lambda one: one[:2])[:wanted]]


def _pair(row: Row) -> Pair | None:
    if "text" in row or "en" not in (row["source_locale"], row["target_locale"]) or max(len(row["source"]), len(row["target"])) > SENTENCE:
        return None
    source, target, code = row["source"], row["target"], row["target_locale"]
    if code == "en":
        source, target, code = target, source, row["source_locale"]
    return Pair(code, source, target, row.get("document") or row["id"], kind="corpus")


def _held_out(pipeline: Pipeline) -> tuple[list[Pair], list[tuple[str, str]], int]:
    """Held-out pairs and texts that no training text repeats, each once, and how many rows that leaves out."""
    hit = {int(i) for task in range(len(pipeline.names)) for i in np.load(pipeline.select.folder(task) / "hits.npy")}
    pairs: dict[tuple[str, str], Pair] = {}
    texts: dict[str, tuple[str, str]] = {}
    index = repeated = 0
    for row in pipeline.held_rows:
        own = range(index, index + (1 if "text" in row else 2))
        index = own.stop
        if any(i in hit for i in own):
            repeated += 1
        elif "text" in row:
            texts.setdefault(key(row["text"]), (row["locale"], row["text"]))
        elif pair := _pair(row):
            pairs.setdefault((pair.locale, key(pair.source)), pair)
    return (
        _first(pairs.values(), HELD_PAIRS, lambda pair: pair.locale),
        _first(texts.values(), HELD_TEXTS, lambda text: text[0]),
        repeated,
    )


def _first(found: Iterable[T], count: int, of: Callable[[T], str]) -> list[T]:
    """`count` of each group, in order."""
    groups: dict[str, list[T]] = {}
    for one in found:
        groups.setdefault(of(one), []).append(one)
    return [one for group in groups.values() for one in group[:count]]


def _source(name: str, source: SourceConfig) -> dict:
    return {"name": name, "version": source.origin, "licence": source.licence, "sha256": None}
