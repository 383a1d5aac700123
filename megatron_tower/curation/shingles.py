"""Runs of n words as 64-bit numbers: what duplicates and contamination are found by. 200 words a hundredth of a millisecond.

Words are those of data/split.py: punctuation, case and width don't count, each ideograph, kana and hangul syllable is one.
"""

import numpy as np
import xxhash

from megatron_tower.data.split import words

_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio


def word_hashes(text: str) -> np.ndarray:
    """[words] uint64"""
    return np.fromiter((xxhash.xxh3_64_intdigest(word.encode()) for word in words(text)), dtype=np.uint64)


def runs(hashes: np.ndarray, n: int) -> np.ndarray:
    """[words - n + 1] uint64, one number a run of n words; empty where there are fewer."""
    count = len(hashes) - n + 1
    if count < 1:
        return hashes[:0]
    mixed = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        mixed = (mixed ^ hashes[i : i + count]) * _ODD
        mixed ^= mixed >> np.uint64(29)
    return mixed
