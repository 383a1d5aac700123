"""The order in which things are dealt out: shuffled epoch after epoch, a function of the seed and the position alone.

A run that goes on, or changes its data-parallel size, is dealt what it would have been. Imports no torch.
"""

import random
from functools import lru_cache


def dealt(index: int, number: int, seed: int) -> int:
    """Which of `number` things comes at position `index` of an endless run of shuffled epochs: a function of (seed, index) alone."""
    epoch, position = divmod(index, number)
    return _order(number, seed, epoch)[position]


@lru_cache(maxsize=2)
def _order(number: int, seed: int, epoch: int) -> list[int]:
    order = list(range(number))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
