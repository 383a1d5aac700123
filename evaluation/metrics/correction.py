"""Grammatical error correction: GLEU (Napoles et al. 2015, as revised in 2016) and the F0.5 of token edits.

GLEU is BLEU whose matches lose the n-grams that were kept from the source though the reference has them not. Of several references one is
drawn for each sentence, 500 times with the seeds of the authors' script, and the corpus scores are averaged.

Edits are what a minimal alignment of tokens (nltk's) changes, adjoining ones joined, the same way for the correction and for each
reference; of several references, each sentence has the one that its F0.5 is best with, and where nothing was proposed precision is 100,
as in ERRANT. These edits are neither ERRANT's, which parses the sentence to align and to split them, nor MaxMatch's, which searches those
nearest to the reference's own: figures compare with each other, not with published F0.5.
"""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

ORDER, DRAWS = 4, 500
Edit = tuple[int, int, tuple[str, ...]]  # source tokens [start, end) become these


def tokens(text: str, spaced: bool) -> list[str]:
    """The Penn Treebank's (which divide English contractions), quotation marks as they were; characters where no spaces divide words."""
    from nltk.tokenize import TreebankWordTokenizer  # here, since NLTK takes seconds

    if not spaced:
        return [character for character in text if not character.isspace()]
    return ['"' if token in ("``", "''") else token for token in TreebankWordTokenizer().tokenize(text)]


def gleu_statistics(
    sources: Sequence[Sequence[str]], hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> NDArray:
    """Counts a sentence [sentences, draws x (2 + 4 + 4)] (lengths of hypothesis and reference, matches, totals); all of tokens."""
    each = [
        np.array([_gleu_counts(source, hypothesis, reference) for reference in of])
        for source, hypothesis, of in zip(sources, hypotheses, references, strict=True)
    ]
    drawn = []
    for seed in range(DRAWS if max(map(len, each)) > 1 else 1):
        rng = random.Random(101 * seed)
        drawn.append(np.stack([of[rng.randint(0, len(of) - 1)] for of in each]))
    return np.concatenate(drawn, axis=1)


def _gleu_counts(source: Sequence[str], hypothesis: Sequence[str], reference: Sequence[str]) -> list[int]:
    matches = []
    for order in range(1, ORDER + 1):
        ours, theirs, before = (_ngrams(of, order) for of in (hypothesis, reference, source))
        kept = Counter({ngram: count for ngram, count in before.items() if ngram not in theirs})
        matches.append(max((ours & theirs).total() - (ours & kept).total(), 0))
    return [len(hypothesis), len(reference), *matches, *(max(len(hypothesis) + 1 - order, 0) for order in range(1, ORDER + 1))]


def _ngrams(words: Sequence[str], order: int) -> Counter:
    return Counter(tuple(words[i : i + order]) for i in range(len(words) + 1 - order))


def gleu(sums: NDArray) -> NDArray:
    """[..., draws x 10] -> mean over draws, in 0-100; 0 where an order has no match."""
    sums = sums.reshape(*sums.shape[:-1], -1, 2 + 2 * ORDER).astype(np.float64)
    hypothesis, reference, match, total = sums[..., 0], sums[..., 1], sums[..., 2 : 2 + ORDER], sums[..., 2 + ORDER :]
    geometric = np.exp(np.log(np.maximum(match, 1) / np.maximum(total, 1)).mean(axis=-1))
    brevity = np.exp(np.minimum(0, 1 - reference / np.maximum(hypothesis, 1)))
    return 100 * np.where((match > 0).all(axis=-1), brevity * geometric, 0.0).mean(axis=-1)


def edits(before: Sequence[str], after: Sequence[str]) -> set[Edit]:
    from nltk.metrics.distance import edit_distance_align

    found, path = [], edit_distance_align(before, after)
    for (i, j), (i_next, j_next) in pairwise(path):
        if i_next > i and j_next > j and before[i] == after[j]:
            continue
        if found and found[-1][1] == i and found[-1][3] == j:
            found[-1] = (found[-1][0], i_next, found[-1][2], j_next)
        else:
            found.append((i, i_next, j, j_next))
    return {(start, end, tuple(after[first:last])) for start, end, first, last in found}


def edit_statistics(
    sources: Sequence[Sequence[str]], hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> NDArray:
    """Counts a sentence [sentences, 3]: edits that a reference has too, other edits, edits that are missing."""
    table = []
    for source, hypothesis, of in zip(sources, hypotheses, references, strict=True):
        ours, counts = edits(source, hypothesis), []
        for reference in of:
            theirs = edits(source, reference)
            counts.append((len(ours & theirs), len(ours - theirs), len(theirs - ours)))
        table.append(max(counts, key=lambda one: (float(f_half(np.array(one))), one[0], -one[1], -one[2])))
    return np.array(table)


def precision(sums: NDArray) -> NDArray:
    """[..., 3] -> percent of the proposed edits that are right."""
    return _share(sums[..., 0], sums[..., 1])


def recall(sums: NDArray) -> NDArray:
    return _share(sums[..., 0], sums[..., 2])


def f_half(sums: NDArray) -> NDArray:
    p, r = precision(sums), recall(sums)
    return 1.25 * p * r / np.maximum(0.25 * p + r, 1e-16)


def _share(right: NDArray, wrong: NDArray) -> NDArray:
    return np.where(wrong > 0, 100 * right / np.maximum(right + wrong, 1), 100.0)
