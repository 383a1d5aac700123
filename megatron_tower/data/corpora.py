"""The three parts of the CPT mixture as documents, and documents as Megatron IndexedDatasets.

    monolingual   strings of one locale that follow one another in a catalogue, or CLDR renderings of one kind
    parallel      pairs in the templates' words, both ways; one pair, or several as one text
    instruction   general instructions with their answers as plain text

A document is [BOS if the family has one] text EOS. Shares are the blend's business: a part that is too small is repeated.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tower.data.examples import Example
from megatron_tower.data.pair import Pair, key
from megatron_tower.data.templates import INSTRUCTION, PARALLEL, document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STRINGS = (4, 12)  # of a monolingual document
SENTENCES = (2, 4)  # of a document translated as one text; a third of the parallel documents are such


def monolingual(pairs: Sequence[Pair], seed: int) -> list[tuple[str, str]]:
    """(locale, document) of every string on either side, each once a locale; the order of documents is the catalogues'."""
    rng = random.Random(f"{seed}/monolingual")
    sides: dict[str, dict[str, tuple[str, str]]] = {}  # locale -> key -> (origin, string), in order
    for pair in pairs:
        for code, text in (("en", pair.source), (pair.locale, pair.target)):
            sides.setdefault(code, {}).setdefault(key(text), (pair.origin, text))
    documents = []
    for code, strings in sides.items():
        for _, group in groupby(strings.values(), key=lambda item: item[0]):
            texts = [text for _, text in group]
            documents += [(code, "\n".join(chunk)) for chunk in _chunks(texts, STRINGS, rng)]
    return documents


def parallel(pairs: Sequence[Pair], seed: int) -> Iterator[tuple[str, tuple[str, str]]]:
    """Each pair once into English and once out of it, each time in a template drawn for it, which is told with the locale of its words."""
    rng = random.Random(f"{seed}/parallel")
    for _, group in groupby(pairs, key=lambda pair: (pair.locale, pair.origin)):
        members = list(group)
        for outward in (True, False):
            rest = members
            while rest:
                size = rng.randint(*SENTENCES) if rng.random() < 0.33 else 1
                chunk, rest = rest[:size], rest[size:]
                english, other = [p.source for p in chunk], [p.target for p in chunk]
                sides = ("en", chunk[0].locale, english, other) if outward else (chunk[0].locale, "en", other, english)
                yield document(rng.choice(list(PARALLEL)), *sides)


def instruction(examples: Iterable[Example], seed: int) -> Iterator[str]:
    rng = random.Random(f"{seed}/instruction")
    for example in examples:
        yield INSTRUCTION[rng.choice(list(INSTRUCTION))](example.prompt, example.answer)


def write(prefix: Path, documents: Sequence[str], tokenizer: "PreTrainedTokenizerFast") -> int:
    """Write `prefix`.bin and .idx; returns the number of tokens."""
    import numpy
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(len(tokenizer)))
    for ids in tokenizer(list(documents), add_special_tokens=False)["input_ids"]:
        tokens = numpy.array([*before, *ids, tokenizer.eos_token_id])
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return int(sum(builder.sequence_lengths))


def _chunks(texts: list[str], sizes: tuple[int, int], rng: random.Random) -> Iterator[list[str]]:
    while texts:
        size = rng.randint(*sizes)
        yield texts[:size]
        texts = texts[size:]
