"""From a data config to a data folder: fetch, clean, split, tokenize, write; the same config gives the same bytes.

    gather -> clean -> split by source -> tokenizer -> CPT parts, SFT examples, held-out sets -> manifest -> rename

The folder appears complete or not at all. Leaves out: resuming half way (downloads are kept, the rest takes seconds).
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tower.config import Config, DataConfig, InputError
from megatron_tower.data import chat, cldr, cleaning, corpora, instructions, manifest, rl, sources, tasks, tokenizer, verifiable
from megatron_tower.data.examples import Example
from megatron_tower.data.locales import LOCALES, locale
from megatron_tower.data.pair import Pair
from megatron_tower.data.split import HeldOut, split
from megatron_tower.data.templates import PARALLEL
from megatron_tower.runtime.run_dir import check_writable, is_full

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 3  # of the folder; raised when what is written changes
PARTS = ("monolingual", "parallel", "instruction")
HOW = ("work", "workers", "part", "stages", "patience")  # of data.curation: they change no byte
HELD_OUT_GENERAL = 1000
HELD_OUT_VERIFIABLE = 600
HELD_OUT_PREFERENCE = 1000


def prepare(cfg: Config, fill: Callable[[Path, Config], dict] | None = None) -> Path:
    """Make `cfg.data.folder`, or find it finished. Returns it.

    fill: writes all files but the manifest, whose facts it returns; catalogues where none is given. Raises InputError for bad
    settings, a source that can't be had, or a folder made with other settings (nothing is touched).
    """
    folder = Path(cfg.data.folder)
    settings = _settings(cfg)
    if is_finished(cfg):
        return folder
    check(cfg.data)
    check_writable(folder.parent, f"data.folder={folder}")
    started = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        facts = (fill or _write)(partial, cfg)
        manifest.write(partial, {"settings": settings, **facts})
        partial.chmod(0o755)
        try:
            os.rename(partial, folder)
        except OSError:  # someone else finished it meanwhile
            if not is_finished(cfg):
                raise
    except Exception as error:
        if not is_full(error):
            raise
        raise InputError(f"the disk of {folder} is full: free space and run the same command again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _report(folder, facts, time.monotonic() - started)
    return folder


def _settings(cfg: Config) -> dict:
    """All that decides the bytes of the folder, by the name of its config key."""
    settings = {f"data.{name}": value for name, value in asdict(cfg.data).items() if name not in ("folder", "cache", "name")}
    if curation := settings["data.curation"]:
        settings["data.curation"] = {name: value for name, value in curation.items() if name not in HOW}
    own = None
    if cfg.model.hf_folder:
        path = Path(cfg.model.hf_folder) / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"model.hf_folder={cfg.model.hf_folder} holds no tokenizer.json: download the model's tokenizer files into it")
        own = sources.sha256(path)
    return {**settings, "model.family": cfg.model.family, "model.hf_folder": own, "format": FORMAT}


def is_finished(cfg: Config) -> bool:
    """Whether the folder is there, whole; raises InputError for one that was made with other settings, or is damaged."""
    folder, settings = Path(cfg.data.folder), _settings(cfg)
    if not folder.exists():
        return False
    if not (folder / manifest.NAME).is_file():
        raise InputError(f"{folder} exists but was not made by prepare_data: move it away, or give another data.folder")
    found = manifest.verify(folder).get("settings", {})
    if changed := [name for name, value in settings.items() if found.get(name) != value]:
        raise InputError(f"{folder} was prepared with other settings ({', '.join(changed)}): delete it, or give another data.folder")
    print(f"{folder} is ready (same settings, files verified)", flush=True)
    return True


def check(data: DataConfig) -> None:
    """Raise InputError for settings that no data can be made with."""
    for code in data.locales:
        if locale(code).code not in LOCALES:
            raise InputError(f"data.locales: {code} is known for evaluation only: use some of {', '.join(LOCALES)}")
    for problem, why in (
        (not data.locales or "en" in data.locales, f"data.locales={data.locales} must name one or more locales besides en"),
        (len(set(data.locales)) < len(data.locales), f"data.locales={data.locales} names one twice"),
        (not 0 < data.held_out < 1, f"data.held_out={data.held_out} must lie between 0 and 1"),
        (set(data.shares) != set(PARTS), f"data.shares={data.shares} must give a share to each of {', '.join(PARTS)}"),
        (
            any(s < 0 for s in data.shares.values()) or abs(sum(data.shares.values()) - 1) > 1e-6,
            f"data.shares={data.shares} must add up to 1",
        ),
        (data.sft_examples < 1, f"data.sft_examples={data.sft_examples} must be 1 or more"),
        (min(data.rl_prompts, data.preference_pairs) < 1, "data.rl_prompts and data.preference_pairs must be 1 or more"),
        (not 0 <= data.verifiable_share <= 1, f"data.verifiable_share={data.verifiable_share} must lie between 0 and 1"),
        (not data.instruction_kinds, f"data.instruction_kinds is empty: name some of {', '.join(instructions.KINDS)}"),
        (not 0 <= data.sft_translation_share <= 1, f"data.sft_translation_share={data.sft_translation_share} must lie between 0 and 1"),
    ):
        if problem:
            raise InputError(why)


def _write(folder: Path, cfg: Config) -> dict:
    """Everything but the manifest, whose facts it returns."""
    data = cfg.data
    wheels = [(name, str(number), sources.fetch(name, str(number), Path(data.cache))) for name, number in sorted(data.catalogues.items())]
    pairs, removed = cleaning.clean(pair for _, _, wheel in wheels for pair in sources.read(wheel, data.locales))
    for code in data.locales:
        pairs += cldr.generate(code, data.cldr_kinds, data.cldr_per_locale, data.seed)
    train, test, held, dropped = split(pairs, data.held_out)
    removed["repeats_held_out"] = Counter(pair.locale for pair in dropped)
    for side, members in (("training", train), ("held-out", test)):
        if missing := [code for code in data.locales if not any(pair.locale == code for pair in members)]:
            raise InputError(f"the {side} split has nothing in {missing[0]}: raise data.cldr_per_locale, or move data.held_out")

    general, sft = sft_examples(data, train, held)
    monolingual = corpora.monolingual(train, data.seed)
    words = make_tokenizer(cfg, [text for _, text in monolingual], sft, folder / "tokenizer")
    blended = _write_cpt(folder / "cpt", data, words, [text for _, text in monolingual], train, general)
    sets = write_sets(folder, data, words, train, test, held, sft, corpora.monolingual(test, data.seed))
    return {
        "sources": [asdict(sources.describe(*wheel)) for wheel in wheels] + [cldr_source()],
        "removed": {name: dict(sorted(counts.items())) for name, counts in removed.items()},
        **blended,
        **sets,
    }


def cldr_source() -> dict:
    return {"name": "Unicode CLDR through Babel", "version": version("babel"), "licence": "Unicode-3.0, BSD-3-Clause", "sha256": None}


def write_sets(
    folder: Path,
    data: DataConfig,
    words: "PreTrainedTokenizerFast",
    train: list[Pair],
    test: list[Pair],
    held: HeldOut,
    sft: list[Example],
    held_text: list[tuple[str, str]],
) -> dict:
    """SFT examples, prompts, preferences and all that is held out; returns their facts. held_text: (locale, document)."""
    _write_rows(folder / "sft" / "train.jsonl", (example.row() for example in sft))
    asked = [item for item in rl.prompts(data, train, data.rl_prompts, held_out=False) if not _leaks(item, held)]
    _write_rows(folder / "rl" / "train.jsonl", asked)
    preferred = [row for row in rl.preferences(data, train, data.preference_pairs, data.seed) if not _leaks_pair(row, held)]
    _write_rows(folder / "preferences" / "train.jsonl", preferred)
    held_texts, held_general = _write_held_out(folder / "held_out", data, test, held_text)
    return {
        "vocab_size": len(words),
        "pairs": {"train": _by_locale(data.locales, train), "held_out": _by_locale(data.locales, test)},
        "sft": {"examples": len(sft), "tasks": dict(Counter(e.task for e in sft)), "kinds": dict(Counter(e.kind for e in sft))},
        "sft_tokens": sum(len(ids) - 1 for ids, _ in chat.encode_all(words, [example.row()["messages"] for example in sft])),
        "rl": {"prompts": len(asked), "rewards": dict(Counter(item["reward"] for item in asked)), "preferences": len(preferred)},
        "held_out": {"text": held_texts, "translation": 2 * len(test), "general": held_general},
    }


def sft_examples(data: DataConfig, train: list[Pair], held: HeldOut) -> tuple[list[Example], list[Example]]:
    """General examples for CPT's instruction part, and the SFT mixture in random order."""
    wanted = round(data.sft_examples * data.sft_translation_share)
    instructed = rl.translation(data, train, round(wanted * data.verifiable_share), data.seed + 2)
    shown = [verifiable.example(item) for item in instructed if not _leaks(item, held)]
    translation = shown + tasks.generate(train, wanted - len(shown), data.seed, held)
    general = instructions.generate(data.instruction_kinds, data.sft_examples - wanted, data.seed, held_out=False, share=data.held_out)
    for found, asked, what in ((translation, wanted, "translation"), (general, data.sft_examples - wanted, "general")):
        if len(found) < asked:
            raise InputError(
                f"only {len(found)} {what} examples can be made, {asked} are asked for: lower data.sft_examples or add locales and kinds"
            )
    general = [example for example in general if not held.leaks(example.prompt) and not held.leaks(example.answer)]
    return general, sorted(translation + general, key=lambda example: hashlib.sha256(f"{data.seed}/{example.prompt}".encode()).digest())


def _leaks(item: dict, held: HeldOut) -> bool:
    return held.leaks(item["prompt"]) or held.leaks(item["answer"] or "")


def _leaks_pair(row: dict, held: HeldOut) -> bool:
    return any(held.leaks(row[side]) for side in ("prompt", "chosen", "rejected"))


def make_tokenizer(cfg: Config, texts: list[str], sft: list[Example], folder: Path) -> "PreTrainedTokenizerFast":
    """The model's own, or one trained on the training strings, the instructions and the names of the turns."""
    if cfg.model.hf_folder:
        return tokenizer.copy(Path(cfg.model.hf_folder), cfg.model.family, folder)
    lines = [line for text in texts for line in text.split("\n")]
    lines += [line for example in sft for text in (example.prompt, example.answer) for line in text.split("\n")]
    lines += ["user", "model", "assistant"] * len(sft)
    return tokenizer.train(lines, cfg.model.family, cfg.data.vocab_size, folder)


def _write_cpt(
    folder: Path, data: DataConfig, words: "PreTrainedTokenizerFast", monolingual: list[str], train: list[Pair], general: list[Example]
) -> dict:
    """The three indexed corpora and `blend.json`; returns tokens by part, and parallel texts by template and the locale of its words."""
    folder.mkdir()
    parallel = list(corpora.parallel(train, data.seed))
    documents = {
        "monolingual": monolingual,
        "parallel": [text for text, _ in parallel],
        "instruction": list(corpora.instruction(general, data.seed)),
    }
    blend = []
    for name in PARTS:
        blend.append({"prefix": name, "share": data.shares[name], "tokens": corpora.write(folder / name, documents[name], words)})
    (folder / "blend.json").write_text(json.dumps(blend, indent=1) + "\n")
    return {
        "cpt_tokens": {part["prefix"]: part["tokens"] for part in blend},
        "templates": {name: dict(Counter(spoken for _, (template, spoken) in parallel if template == name)) for name in PARALLEL},
    }


def _write_held_out(folder: Path, data: DataConfig, test: list[Pair], text: list[tuple[str, str]]) -> tuple[dict[str, int], int]:
    """Held-out text as documents like those of training, translations both ways, general instructions."""
    general = instructions.generate(data.instruction_kinds, HELD_OUT_GENERAL, data.seed, held_out=True, share=data.held_out)
    _write_rows(folder / "text.jsonl", _shuffled({"locale": code, "text": document} for code, document in text))
    ways = [
        row
        for pair in test
        for row in (_way(pair, "en", pair.locale, pair.source, pair.target), _way(pair, pair.locale, "en", pair.target, pair.source))
    ]
    _write_rows(folder / "translation.jsonl", _shuffled(ways))
    _write_rows(folder / "general.jsonl", ({"kind": e.kind, "prompt": e.prompt, "answer": e.answer, "locale": e.locale} for e in general))
    _write_rows(folder / "verifiable.jsonl", rl.prompts(data, test, HELD_OUT_VERIFIABLE, held_out=True))
    _write_rows(folder / "preference.jsonl", rl.preferences(data, test, HELD_OUT_PREFERENCE, data.seed + 1))
    return dict(Counter(code for code, _ in text)), len(general)


def _way(pair: Pair, source_locale: str, target_locale: str, source: str, reference: str) -> dict:
    return {"kind": pair.kind, "source_locale": source_locale, "target_locale": target_locale, "source": source, "reference": reference}


def _shuffled(rows: Iterable[dict]) -> list[dict]:
    """In the order of their hashes, so that the first few are a fair sample."""
    return sorted(rows, key=lambda row: hashlib.sha256(json.dumps(row).encode()).digest())


def _write_rows(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _by_locale(codes: list[str], pairs: list[Pair]) -> dict[str, dict[str, int]]:
    """{locale: {kind: pairs}}"""
    return {code: dict(Counter(pair.kind for pair in pairs if pair.locale == code)) for code in codes}


def _report(folder: Path, facts: dict, seconds: float) -> None:
    """A short table: pairs a locale, what the filters removed, tokens."""
    from rich.console import Console
    from rich.table import Table

    table = Table("locale", "pairs to train on", "of them CLDR", "held out", title=f"{folder} ({seconds:.0f} s)")
    for code, kinds in facts["pairs"]["train"].items():
        total, human = sum(kinds.values()), kinds.get("catalogue", 0) + kinds.get("corpus", 0)
        table.add_row(code, f"{total:,}", f"{total - human:,}", f"{sum(facts['pairs']['held_out'][code].values()):,}")
    console = Console(width=max(Console().width, 100), highlight=False)
    console.print(table)
    removed = {name: sum(counts.values()) for name, counts in facts["removed"].items()}
    console.print("removed: " + ", ".join(f"{name} {count:,}" for name, count in removed.items() if count))
    console.print("CPT tokens: " + ", ".join(f"{name} {count:,}" for name, count in facts["cpt_tokens"].items()))
    console.print(f"SFT: {facts['sft']['examples']:,} examples, {facts['sft_tokens']:,} tokens; vocabulary {facts['vocab_size']:,}")
