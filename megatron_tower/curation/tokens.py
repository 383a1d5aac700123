"""Rows as Megatron's indexed datasets, one a part of the mixture and task; the templates of data/templates.py put pairs into words.

A document is [BOS if the family has one] text EOS. Pairs of one document that follow one another become texts of up to
`document_tokens`; each pair is written once in each direction. Which template a text takes is drawn by its id.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tower.curation.engine import Facts
from megatron_tower.curation.mixture import Group
from megatron_tower.curation.shards import Row
from megatron_tower.data.templates import PARALLEL, document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

AT_ONCE = 1000  # texts
Text = tuple[Group, str, tuple[str, ...]]  # the last: of a pair, its template and the locale of the template's words
TEMPLATES = list(PARALLEL)


def draw(name: str, fraction: float) -> bool:
    """Whether what is called `name` is among this fraction, the same in every run."""
    return uniform(f"draw/{name}") < fraction


def group(row: Row) -> Group:
    if "text" in row:
        return "monolingual", row["locale"]
    return "parallel", row["source_locale"] if row["target_locale"] == "en" else row["target_locale"]


def texts(rows: Iterable[Row], document_bytes: int) -> Iterator[Text]:
    """What is trained on: documents as they are; pairs in the words of a template, both ways, those of one document together."""
    for (which, _), run in groupby(rows, key=lambda row: (group(row), row.get("document"))):
        if which[0] == "monolingual":
            yield from ((which, row["text"], ()) for row in run)
            continue
        for chunk in _chunks(run, document_bytes):
            yield from ((which, text, said) for text, said in rendered(chunk))


def rendered(pairs: Sequence[Row]) -> Iterator[tuple[str, tuple[str, ...]]]:
    first = pairs[0]
    there, back = first["source_locale"], first["target_locale"]
    sources, targets = [pair["source"] for pair in pairs], [pair["target"] for pair in pairs]
    for direction in ((there, back, sources, targets), (back, there, targets, sources)):
        template = TEMPLATES[int(uniform(f"template/{direction[0]}/{first['id']}") * len(TEMPLATES))]
        yield document(template, *direction)


def write(folder: Path, found: Iterable[Text], tokenizer: "PreTrainedTokenizerFast") -> Facts:
    """Write folder/<part>.bin and .idx for each part there is; returns tokens by part and language, texts by template and its locale."""
    import numpy
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    builders: dict[str, IndexedDatasetBuilder] = {}
    tokens: dict[str, dict[str, int]] = {}
    templates: dict[str, dict[str, int]] = {}
    for batch in _batches(found):
        encoded = tokenizer.backend_tokenizer.encode_batch_fast([text for _, text, _ in batch], add_special_tokens=False)
        for ((part, language), _, said), ids in zip(batch, encoded, strict=True):
            if part not in builders:
                builders[part] = IndexedDatasetBuilder(str(folder / f"{part}.bin"), dtype=DType.optimal_dtype(len(tokenizer)))
            row = numpy.array([*before, *ids.ids, tokenizer.eos_token_id])
            builders[part].add_document(row, [len(row)])
            _count(tokens, part, language, len(row))
            if said:
                _count(templates, *said, 1)
    for part, builder in builders.items():
        builder.finalize(str(folder / f"{part}.idx"))
    return {"tokens": tokens, "templates": templates}


def _count(counts: dict[str, dict[str, int]], first: str, second: str, more: int) -> None:
    of = counts.setdefault(first, {})
    of[second] = of.get(second, 0) + more


def join(prefix: Path, parts: Sequence[Path], dtype: type) -> int:
    """One dataset of several, in order; returns its tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for part in parts:
        builder.add_index(str(part))
    builder.finalize(f"{prefix}.idx")
    return int(sum(builder.sequence_lengths))


def _chunks(pairs: Iterable[Row], limit: int) -> Iterator[list[Row]]:
    """Pairs of one document that follow one another, up to `limit` bytes of both sides; alone where they belong to none."""
    chunk: list[Row] = []
    size = 0
    for pair in pairs:
        own = len(pair["source"].encode()) + len(pair["target"].encode())
        if chunk and (size + own > limit or not pair.get("document")):
            yield chunk
            chunk, size = [], 0
        chunk.append(pair)
        size += own
    if chunk:
        yield chunk


def _batches(found: Iterable[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    for one in found:
        batch.append(one)
        if len(batch) == AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def uniform(text: str) -> float:
    """0 to 1, by the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
