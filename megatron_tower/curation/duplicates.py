"""Rows that repeat earlier ones: exactly, on one side of a pair, or nearly (MinHash, as FineWeb has it: arXiv 2406.17557, section 3.4).

Each row has a column of 64-bit numbers; equal numbers in one column make two rows alike. Columns are asked in order, each among
the rows that those before it left, and of alike rows the first stays. Near duplicates are the connected components of rows that
agree in all 8 minima of one of 14 bands over runs of 5 words: texts of similarity 0.8 are found 92 times in 100, of 0.6 21 times.
Leaves out: looking at the texts again before one goes. Memory: about 24 bytes a row, whatever the texts' length.
"""

from collections.abc import Sequence

import numpy as np
import xxhash
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from megatron_tower.curation.shards import Row
from megatron_tower.curation.shingles import runs, word_hashes
from megatron_tower.data.pair import key

RUN, BANDS, ROWS = 5, 14, 8
AT_ONCE = 4096  # runs whose permutations are held
_MULTIPLY, _ADD = np.random.Generator(np.random.PCG64(20240625)).integers(0, 2**64, (2, BANDS * ROWS), dtype=np.uint64)
_MULTIPLY |= np.uint64(1)


def document_columns(near: bool) -> list[str]:
    return ["repeated"] + [f"near_{band}" for band in range(BANDS)] * near


def pair_columns(sides: Sequence[str]) -> list[str]:
    return ["repeated", *(f"repeated_{side}" for side in sides)]


def of_document(row: Row, near: bool) -> list[int]:
    """A number for each of `document_columns`."""
    return [_number(key(row["text"])), *(_bands(row["text"]) if near else ())]


def of_pair(row: Row, sides: Sequence[str]) -> list[int]:
    """A number for each of `pair_columns`. One side repeats another only in the same pair of languages."""
    languages = f"{row['source_locale']} {row['target_locale']}"
    texts = {side: key(row[side]) for side in ("source", "target")}
    return [_number(languages, *texts.values()), *(_number(languages, texts[side]) for side in sides)]


def _number(*texts: str) -> int:
    return xxhash.xxh3_64_intdigest("\0".join(texts).encode())


def _bands(text: str) -> list[int]:
    """A number a band, from the least of each of its permutations of the text's runs."""
    hashes = word_hashes(text)
    found = np.unique(runs(hashes, min(RUN, max(1, len(hashes)))))
    if not len(found):
        return [_number(text, str(band)) for band in range(BANDS)]  # no words: like itself alone
    least = np.full(BANDS * ROWS, 2**32 - 1, dtype=np.uint32)
    for i in range(0, len(found), AT_ONCE):
        permuted = (found[i : i + AT_ONCE, None] * _MULTIPLY + _ADD) >> np.uint64(32)
        least = np.minimum(least, permuted.min(axis=0).astype(np.uint32))
    return [xxhash.xxh3_64_intdigest(band.tobytes(), seed=i) for i, band in enumerate(least.reshape(BANDS, ROWS))]


def alike(columns: Sequence[np.ndarray], names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """columns: [rows] uint64 each. Returns (why, reasons): why[row] = 0 for a row that stays, else 1 + the index of its reason."""
    exact = [i for i, name in enumerate(names) if not name.startswith("near_")]
    reasons = [names[i] for i in exact] + ["near_duplicate"]
    why = np.zeros(len(columns[0]) if len(columns) else 0, dtype=np.uint8)
    for code, i in enumerate(exact, 1):
        left = np.flatnonzero(why == 0)
        _, first = np.unique(columns[i][left], return_index=True)
        again = np.ones(len(left), dtype=bool)
        again[first] = False
        why[left[again]] = code
    if len(exact) < len(names):
        left = np.flatnonzero(why == 0)
        why[left[_not_first([columns[i][left] for i in range(len(names)) if i not in exact])]] = len(reasons)
    return why, reasons


def _not_first(bands: Sequence[np.ndarray]) -> np.ndarray:
    """Which rows are not the first of their component."""
    rows = len(bands[0])
    one, other = [], []
    for band in bands:
        order = np.argsort(band, kind="stable")
        same = band[order[1:]] == band[order[:-1]]
        one.append(order[:-1][same])
        other.append(order[1:][same])
    left, right = np.concatenate(one), np.concatenate(other)
    _, component = connected_components(coo_array((np.ones(len(left), dtype=bool), (left, right)), shape=(rows, rows)), directed=False)
    again = np.ones(rows, dtype=bool)
    again[np.unique(component, return_index=True)[1]] = False
    return again
