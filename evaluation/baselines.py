"""Unigram and trigram bits per byte on the held-out text, from the CPT token stream, cached beside the report.

The stream is every document of `<data folder>/cpt/*.bin` once, not repeated by blend share. Takes seconds; a second call with the
same data and the same items reads the cache.
"""

import json
from pathlib import Path

import numpy as np

from evaluation.held_out import read
from evaluation.metrics.ngram import NgramModels
from evaluation.tasks.task import grouped
from evaluation.tasks.text import TEXT
from megatron_tower.config import EvalConfig, InputError
from megatron_tower.runtime.run_dir import write_text

ORDERS = ("unigram", "trigram")


def bits_per_byte(data_folder: Path, data_sha256: str, cfg: EvalConfig, cache: Path) -> dict[str, dict[str, float]]:
    """{"unigram" | "trigram": {locale: bits per byte}} on the items that the text task asks."""
    key = {"data": data_sha256, "text_per_locale": cfg.text_per_locale}
    if cache.is_file():
        kept = json.loads(cache.read_text())
        if kept["key"] == key:
            return kept["bits_per_byte"]
    found = _measure(data_folder, cfg)
    write_text(cache, json.dumps({"key": key, "bits_per_byte": found}, indent=1))
    return found


def _measure(data_folder: Path, cfg: EvalConfig) -> dict[str, dict[str, float]]:
    from megatron_tower.data.tokenizer import load
    from megatron_tower.runtime import cpu

    cpu.install()
    tokenizer = load(data_folder / "tokenizer")
    has_bos = tokenizer.bos_token_id is not None  # without one the first token is not scored (evaluation/generators/megatron.py)
    frame = tokenizer.bos_token_id if has_bos else tokenizer.eos_token_id
    models = NgramModels.fit(_documents(data_folder / "cpt"), len(tokenizer), frame, tokenizer.eos_token_id)
    rows = TEXT.choose(read(data_folder / "held_out" / "text.jsonl", TEXT.fields), cfg)
    encoded = tokenizer([row["text"] for row in rows], add_special_tokens=False)["input_ids"]
    bits = np.array([models.bits(ids, given=0 if has_bos else 1) for ids in encoded])
    sizes = np.array([len(row["text"].encode()) for row in rows])
    locales = grouped(rows, lambda row: row["locale"])
    return {
        name: {locale: float(bits[of, column].sum() / sizes[of].sum()) for locale, of in locales.items()}
        for column, name in enumerate(ORDERS)
    }


def _documents(folder: Path) -> list[np.ndarray]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefixes = sorted(path.with_suffix("") for path in folder.glob("*.idx"))
    if not prefixes:
        raise InputError(f"{folder} holds no .bin/.idx corpus for the n-gram models: run python -m tools.prepare_data")
    corpora = [IndexedDataset(str(prefix)) for prefix in prefixes]
    # copies: an IndexedDataset that goes out of scope unmaps the file under its arrays
    return [np.array(corpus[i], dtype=np.int64) for corpus in corpora for i in range(len(corpus))]
