"""Unigram and trigram models of the training tokens: the yardstick beside which a checkpoint's bits per byte stand.

Interpolated Kneser-Ney with one absolute discount an order, D = n1 / (n1 + 2 n2) (Chen & Goodman 1999), the lowest order
interpolated with the uniform distribution, so that every token of the vocabulary has a probability. The unigram is its own
model: discounted frequencies, not the trigram's continuation counts. Documents are BOS BOS w1 .. wn EOS; BOS is never predicted.
Leaves out: modified (three-discount) Kneser-Ney, pruning, files of its own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def _discount(counts: NDArray) -> float:
    """Absolute discount from the number of types seen once and twice; 0.5 where one of them is missing."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once and twice else 0.5


@dataclass(frozen=True)
class Lowest:
    """p(w) = (max(c(w) - D, 0) + D * types / vocabulary) / total, as a table [vocab_size]."""

    table: NDArray

    @staticmethod
    def of(counts: NDArray) -> "Lowest":
        """counts: [vocab_size]."""
        discount = _discount(counts)
        spread = discount * np.count_nonzero(counts) / len(counts)
        return Lowest((np.maximum(counts - discount, 0) + spread) / counts.sum())


@dataclass(frozen=True)
class Order:
    """One higher order: sorted n-gram keys with their discounted shares, sorted context keys with the share left to the order below."""

    grams: NDArray
    share: NDArray
    contexts: NDArray
    rest: NDArray

    @staticmethod
    def of(grams: NDArray, counts: NDArray, vocab_size: int) -> "Order":
        """grams: sorted distinct keys, `key // vocab_size` is the context's; counts: how often, or after how many words, each was seen."""
        discount = _discount(counts)
        contexts, start, types = np.unique(grams // vocab_size, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, start)
        return Order(grams, np.maximum(counts - discount, 0) / np.repeat(totals, types), contexts, discount * types / totals)

    def interpolate(self, grams: NDArray, contexts: NDArray, below: NDArray) -> NDArray:
        """p(w | context) for each asked n-gram; `below` where the context was never seen."""
        return _look_up(self.grams, self.share, grams, 0.0) + _look_up(self.contexts, self.rest, contexts, 1.0) * below


def _look_up(keys: NDArray, values: NDArray, asked: NDArray, missing: float) -> NDArray:
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[at] == asked, values[at], missing)


@dataclass(frozen=True)
class NgramModels:
    """Both models, fitted on the same documents."""

    bos: int
    eos: int
    unigram: Lowest
    continuation: Lowest
    bigram: Order
    trigram: Order

    @property
    def vocab_size(self) -> int:
        return len(self.unigram.table)

    @staticmethod
    def fit(documents: Iterable[Sequence[int]], vocab_size: int, bos: int, eos: int) -> "NgramModels":
        """documents: token ids; a BOS in front or an EOS at the end is kept from doubling. vocab_size**3 must fit 63 bits."""
        first, second, word = _windows(documents, bos, eos)
        trigrams, trigram_counts = np.unique((first * vocab_size + second) * vocab_size + word, return_counts=True)
        # Kneser-Ney: an order below counts the different words in front of an n-gram, not its occurrences
        bigrams, before = np.unique(trigrams % vocab_size**2, return_counts=True)
        return NgramModels(
            bos,
            eos,
            Lowest.of(np.bincount(word, minlength=vocab_size)),
            Lowest.of(np.bincount(bigrams % vocab_size, minlength=vocab_size)),
            Order.of(bigrams, before, vocab_size),
            Order.of(trigrams, trigram_counts, vocab_size),
        )

    def probabilities(self, document: Sequence[int]) -> tuple[NDArray, NDArray]:
        """(unigram, trigram) probability of each token of the document and of the EOS behind it."""
        first, second, word = _windows([document], self.bos, self.eos)
        contexts = first * self.vocab_size + second
        bigrams = second * self.vocab_size + word
        below = self.bigram.interpolate(bigrams, second, self.continuation.table[word])
        return self.unigram.table[word], self.trigram.interpolate(contexts * self.vocab_size + word, contexts, below)

    def bits(self, document: Sequence[int], given: int = 0) -> tuple[float, float]:
        """(unigram, trigram) negative log-likelihood of the document and its EOS, in bits, without its first `given` tokens."""
        unigram, trigram = self.probabilities(document)
        return float(-np.log2(unigram[given:]).sum()), float(-np.log2(trigram[given:]).sum())


def _windows(documents: Iterable[Sequence[int]], bos: int, eos: int) -> tuple[NDArray, NDArray, NDArray]:
    """(token two before, token before, token) at each predicted position of all documents, int64."""
    framed = []
    for document in documents:
        inner = np.asarray(document, dtype=np.int64)
        inner = inner[1:] if len(inner) and inner[0] == bos else inner
        inner = inner[:-1] if len(inner) and inner[-1] == eos else inner
        framed.append(np.concatenate([[bos, bos], inner, [eos]]))
    stream = np.concatenate(framed)
    predicted = np.ones(len(stream), dtype=bool)
    starts = np.cumsum([0] + [len(f) for f in framed[:-1]])
    predicted[starts] = predicted[starts + 1] = False
    at = np.flatnonzero(predicted)
    return stream[at - 2], stream[at - 1], stream[at]
