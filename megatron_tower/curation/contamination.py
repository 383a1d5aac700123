"""Which texts repeat an evaluation set: a run of 13 words of it, all of a shorter text of it, or a short one as a line of their own.

Texts written without spaces count each character, so twice as many are asked for. The index holds a 64-bit number a run.
Leaves out: paraphrases and translations of an evaluation set.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_tower.curation.shingles import runs, word_hashes
from megatron_tower.data import jsonl
from megatron_tower.data.pair import key
from megatron_tower.data.split import words

VERSION = 2  # of which texts are looked for, and how
SHORTEST = 5  # words; shorter texts ("Save the page") are part of ordinary language


class Contamination:
    """texts[i] is told by its index i. `among(*texts)`: which of them these repeat."""

    def __init__(self, texts: Sequence[str], n: int) -> None:
        long: dict[int, list[tuple[np.ndarray, int]]] = {}
        short: dict[int, list[tuple[int, int, int]]] = {}
        self.lines: dict[int, int] = {}  # of texts that are too short for runs
        for index, text in enumerate(texts):
            hashes = word_hashes(text)
            length = 2 * n if _unspaced(text) else n
            if len(hashes) >= length:
                long.setdefault(length, []).append((runs(hashes, length), index))
            elif len(hashes) >= SHORTEST:
                whole = int(runs(hashes, len(hashes))[0])
                short.setdefault(int(runs(hashes, SHORTEST)[0]), []).append((len(hashes), whole, index))
            else:
                self.lines.setdefault(_line(text), index)
        self.long = {length: _sorted(of) for length, of in long.items()}
        self.short, self.begins = short, np.array(sorted(short), dtype=np.uint64)  # by their first words: most texts hold none of these

    def among(self, *texts: str) -> set[int]:
        """Of several evaluation texts that share a run, the first."""
        told: set[int] = set()
        for text in texts:
            if self.lines:
                told.update(self.lines[line] for line in map(_line, text.split("\n")) if line in self.lines)
            hashes = word_hashes(text) if self.long or self.short else ()
            for length, (known, of) in self.long.items():
                told.update(of[_found(runs(hashes, length), known)[1]].tolist())
            if self.short:
                here = runs(hashes, SHORTEST)
                for at in _found(here, self.begins)[0].tolist():
                    rest = hashes[at:]
                    told.update(
                        index
                        for length, whole, index in self.short[int(here[at])]
                        if len(rest) >= length and int(runs(rest[:length], length)[0]) == whole
                    )
        return told


def _found(here: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of `here` are known, and where in `known`, which is sorted."""
    at = np.searchsorted(known, here)
    at[at == len(known)] = 0
    hit = np.flatnonzero(known[at] == here)
    return hit, at[hit]


def _sorted(of: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Each run once, in order, and the index of the first text that has it."""
    every = np.concatenate([hashes for hashes, _ in of])
    known, first = np.unique(every, return_index=True)
    return known, np.repeat([index for _, index in of], [len(hashes) for hashes, _ in of])[first]


def _line(text: str) -> int:
    return xxhash.xxh3_64_intdigest(key(text).encode())


def _unspaced(text: str) -> bool:
    found = words(text)
    return sum(len(word) == 1 and word > "\u3000" for word in found) > len(found) / 2


def texts_of(path: Path, setting: str) -> list[str]:
    """The texts in the rows of an evaluation set, whatever its fields are called; `setting` names it.

    Left out, as lines of their own that other text has, too: short texts of a field that says each of them ten times over ("news"), and
    what has no letters ("42"). Raises InputError for what is no JSON Lines.
    """
    rows = jsonl.read(path, f"name evaluation sets in {setting}", f'{{"source": "..."}}, with any fields ({setting})')
    found = [one for _, row in rows for one in _strings(row)]
    times, distinct = Counter(name for name, _ in found), Counter(name for name, _ in set(found))
    labels = {name for name in times if times[name] >= 10 * distinct[name]}
    return [text for name, text in found if any(map(str.isalpha, text)) and not (name in labels and len(words(text)) < SHORTEST)]


def _strings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(field, text); the texts of a list are of one field."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for field, inner in value.items():
            yield from _strings(inner, f"{name}.{field}")
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, name)
