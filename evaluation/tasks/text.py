"""Bits per byte and perplexity of held-out text: how well the next token is predicted, before and after training.

Each document is BOS + text + EOS (a family without BOS has nothing to predict the first token from: it is not scored). The bits
of its tokens are divided by its UTF-8 bytes, so that models with different tokenizers compare; perplexity is per token and
compares only models of one tokenizer. The figure over all locales is the mean over locales.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evaluation.held_out import Row, choose
from evaluation.metrics.bootstrap import Resampling, estimate, ratio
from evaluation.tasks.task import Answer, Score, Task, grouped
from megatron_tower.config import EvalConfig


def chosen(rows: Sequence[Row], cfg: EvalConfig) -> list[Row]:
    return choose(rows, lambda row: row["locale"], cfg.text_per_locale)


def locale_sums(rows: Sequence[Row], answers: Sequence[Answer]) -> dict[str, NDArray]:
    """Locale -> [documents, 3] (bits, bytes, tokens)."""
    sums = np.array([[a["bits"], len(r["text"].encode()), a["tokens"]] for r, a in zip(rows, answers, strict=True)])
    return {locale: sums[of] for locale, of in grouped(rows, lambda row: row["locale"]).items()}


def score(rows: Sequence[Row], answers: Sequence[Answer], how: Resampling) -> list[Score]:
    locales = locale_sums(rows, answers)
    scores = [Score("text", "bits_per_byte", "all", "all", estimate(list(locales.values()), ratio, how))]
    for locale, sums in locales.items():
        scores.append(Score("text", "bits_per_byte", "locale", locale, estimate([sums], ratio, how)))
        scores.append(Score("text", "perplexity", "locale", locale, estimate([sums], perplexity, how)))
    return scores


def perplexity(sums: NDArray) -> NDArray:
    """[..., 3] (bits, bytes, tokens) -> 2 ** (bits a token)."""
    return 2 ** (sums[..., 0] / sums[..., 2])


TEXT = Task("text", ("locale", "text"), "text", chosen, score)
