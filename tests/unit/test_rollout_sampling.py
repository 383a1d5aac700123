"""Choosing the next token: distribution, nucleus, ties, independence of the batch."""

import numpy as np
import pytest
import torch

from megatron_tower.rollout import sampling
from megatron_tower.rollout.sampling import next_tokens

DRAWS = 20_000


class OneRank:
    """A tensor-parallel group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def sample(logits: torch.Tensor, temperature: float, top_p: float) -> np.ndarray:
    """DRAWS tokens from one row of logits [vocab]."""
    numbers = torch.from_numpy(np.random.default_rng(0).random(DRAWS))
    return next_tokens(logits.expand(DRAWS, -1), numbers, temperature, top_p, OneRank()).numpy()


def nucleus(logits: torch.Tensor, temperature: float, top_p: float) -> np.ndarray:
    """The wanted distribution, token by token: most probable first until their mass reaches top_p."""
    probabilities = torch.softmax(logits.double() / temperature, 0).numpy()
    kept, mass = np.zeros_like(probabilities), 0.0
    for token in np.argsort(-probabilities):
        if mass >= top_p:
            break
        kept[token], mass = probabilities[token], mass + probabilities[token]
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.8), (0.7, 0.5), (1.0, 1e-6)])
def test_samples_follow_the_tempered_nucleus(temperature, top_p):
    logits = torch.tensor([1.3, -0.4, 2.1, 0.2, 0.7, -3.0, 1.9, 0.0])
    wanted = nucleus(logits, temperature, top_p)
    counts = np.bincount(sample(logits, temperature, top_p), minlength=len(logits))
    assert not counts[wanted == 0].any()
    expected = DRAWS * wanted[wanted > 0]
    chi_square = ((counts[wanted > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 25  # 99.9 % point of chi-square with 7 degrees of freedom: 24.3


def test_a_row_is_sampled_alike_alone_and_in_a_batch():
    rng = np.random.default_rng(1)
    logits, numbers = torch.from_numpy(rng.normal(size=(32, 500))).float(), torch.from_numpy(rng.random(32))
    together = next_tokens(logits, numbers, 0.8, 0.95, OneRank())
    alone = [next_tokens(logits[i : i + 1], numbers[i : i + 1], 0.8, 0.95, OneRank()).item() for i in range(32)]
    assert together.tolist() == alone


def test_rounding_of_near_ties_does_not_change_a_sample():
    """A flat distribution has thousands of near-ties, which two layouts order differently: ids, not ranks, lay out the draw."""
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(rng.normal(scale=1e-2, size=(256, 4096)))
    noise = torch.from_numpy(rng.normal(scale=1e-6, size=logits.shape))
    numbers = torch.from_numpy(rng.random(256))
    same = next_tokens(logits, numbers, 1.0, 0.95, OneRank()) == next_tokens(logits + noise, numbers, 1.0, 0.95, OneRank())
    assert same.float().mean() > 0.98  # laid out by rank it is 0.88


def test_greedy_breaks_ties_by_the_lowest_id():
    logits = torch.zeros(3, 1000)
    logits[0, [7, 400, 999]] = 1.0
    logits[1, [999, 998]] = 1.0
    assert next_tokens(logits, torch.zeros(3), 0.0, 1.0, OneRank()).tolist() == [7, 998, 0]


def test_the_nucleus_of_flat_and_of_peaked_rows_is_the_sorted_one(monkeypatch: pytest.MonkeyPatch):
    """Whether it fits into what is sorted first or not, in a batch of both."""
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.normal(size=(8, 400)) * np.array([0.1, 6.0] * 4)[:, None])
    probabilities = logits.softmax(-1)
    for size in (400, 20):
        monkeypatch.setattr(sampling, "SORTED", size)
        for rows in (probabilities, probabilities[1::2]):  # the peaked ones alone need no whole sort
            wanted = [nucleus(row.log(), 1.0, 0.9) for row in rows]
            least = sampling._least(rows, 0.9)
            assert all(((row >= least).numpy() == (kept > 0)).all() for row, least, kept in zip(rows, least, wanted, strict=True))
