"""Filtering and tokenization, megabytes of text a second on one core, beside datatrove and Megatron-LM's way to preprocess.

    python -m tools.bench_data --documents english.jsonl --datatrove OTHER_VENV/bin/python --markdown data.md

datatrove (`pip install datatrove[processing,io] spacy`) needs newer numpy and huggingface-hub than COMET allows, so it has an
environment of its own. Sides take turns, each in one process that has imported what it needs; ratios are medians of turns. English text,
for which datatrove has its fastest word tokenizer. Leaves out: language identification, whose model datatrove downloads; files read.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

Turn = Callable[[], float]  # seconds
FILTERS = ("length", "boilerplate", "markup", "quality", "repetition")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, required=True, help='JSONL of {"text": ...}')
    parser.add_argument("--datatrove", type=Path, help="a Python that has datatrove; its rows are left out if not given")
    parser.add_argument("--megabytes", type=float, default=2.0)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)  # we are the other Python: a tokenizer's folder
    asked = parser.parse_args()
    texts = _texts(asked.documents, asked.megabytes)
    if asked.peer:
        _serve(_datatrove(texts, asked.peer))
        return
    with tempfile.TemporaryDirectory() as scratch:
        table = _table(asked, texts, Path(scratch))
    print(table)
    if asked.markdown:
        asked.markdown.write_text(table + "\n")


def _table(asked: argparse.Namespace, texts: list[str], scratch: Path) -> str:
    ours = _ours(texts, scratch)
    for turn in ours.values():
        turn()  # the first is not counted, on either side
    megatron = _megatron(texts, scratch)
    megatron()
    peers = {"tokenize": [("Megatron-LM's way", megatron)]}
    if asked.datatrove:
        command = [str(asked.datatrove), __file__, "--documents", str(asked.documents), "--megabytes", str(asked.megabytes)]
        other = subprocess.Popen([*command, "--peer", str(scratch / "tokenizer")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for work in ours:
            peers.setdefault(work, []).append(("datatrove", lambda work=work: _ask(other, work)))
    size = sum(len(text.encode()) for text in texts) / 1e6
    lines = [f"{size:.1f} MB of English in {len(texts)} documents", "", "| work | ours, MB/s | beside | MB/s | ratio | lowest - highest |"]
    lines.append("|---|---:|---|---:|---:|---:|")
    for work, mine in ours.items():
        for name, theirs in peers.get(work, []):
            pairs = [(mine(), theirs()) for _ in range(asked.turns)]
            ratios = sorted(other / own for own, other in pairs)
            rates = [size / median(side) for side in zip(*pairs, strict=True)]
            lines.append(
                f"| {work} | {rates[0]:.2f} | {name} | {rates[1]:.2f} | {median(ratios):.2f} | {ratios[0]:.2f} - {ratios[-1]:.2f} |"
            )
    return "\n".join(lines)


def _texts(path: Path, megabytes: float) -> list[str]:
    texts, left = [], megabytes * 1e6
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            if len(text) > 500:
                texts.append(text)
                left -= len(text)
            if left < 0:
                break
    return texts


def _ours(texts: list[str], scratch: Path) -> dict[str, Turn]:
    import yaml

    from megatron_tower.config import CONF
    from megatron_tower.curation import duplicates, tokens
    from megatron_tower.curation.filters import filters
    from megatron_tower.data import tokenizer

    plan = yaml.safe_load((CONF / "data/curation/filters.yaml").read_text())["documents"]
    drops = list(filters("documents", {name: plan[name] for name in FILTERS}).values())
    lines = [line for text in texts for line in text.split("\n")]
    words = tokenizer.train(lines, "gemma2", 4096, scratch / "tokenizer")

    def filtering() -> None:
        for text in texts:
            any(drop({"text": text, "locale": "en"}) for drop in drops)

    return {
        "filter": _timed(filtering),
        "near-duplicate signatures": _timed(lambda: [duplicates.of_document({"text": text}, True) for text in texts]),
        "tokenize": _timed(lambda: tokens.write(scratch, ((("x", "en"), text, ()) for text in texts), words)),
    }


def _megatron(texts: list[str], scratch: Path) -> Turn:
    """What Megatron-LM's tools/preprocess_data.py does in a worker: a document at a time through the Hugging Face tokenizer's call."""
    import numpy
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from megatron_tower.data import tokenizer

    words = tokenizer.load(scratch / "tokenizer")

    def preprocess() -> None:
        builder = IndexedDatasetBuilder(str(scratch / "megatron.bin"), dtype=DType.optimal_dtype(len(words)))
        for text in texts:
            ids = [*words(text, add_special_tokens=False)["input_ids"], words.eos_token_id]
            builder.add_document(numpy.array(ids), [len(ids)])
        builder.finalize(str(scratch / "megatron.idx"))

    return _timed(preprocess)


def _datatrove(texts: list[str], folder: Path) -> dict[str, Turn]:
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
    from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

    scratch = str(folder.parent)
    filters = [GopherQualityFilter(), GopherRepetitionFilter(), C4QualityFilter(filter_no_terminal_punct=False)]
    signatures = MinhashDedupSignature(f"{scratch}/signatures")
    write = MegatronDocumentTokenizer(scratch, "datatrove", str(folder / "tokenizer.json"), eos_token=None)

    def filtering() -> None:
        for text in texts:
            document = Document(text=text, id="")
            all(one.filter(document) is True for one in filters)

    def signing() -> None:
        for text in texts:
            signatures.get_signature(signatures.get_shingles(text))

    return {
        "filter": _timed(filtering),
        "near-duplicate signatures": _timed(signing),
        "tokenize": _timed(lambda: write.write_tokens((Document(text=text, id="") for text in texts), "datatrove")),
    }


def _timed(work: Callable[[], object]) -> Turn:
    def turn() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return turn


def _serve(turns: dict[str, Turn]) -> None:
    """Seconds for each word on stdin, the first time of each not counted."""
    for turn in turns.values():
        turn()
    for line in sys.stdin:
        print(turns[line.strip()](), flush=True)


def _ask(other: subprocess.Popen, work: str) -> float:
    print(work, file=other.stdin, flush=True)
    return float(other.stdout.readline())


if __name__ == "__main__":
    main()
