"""Rewards: pure functions `score(item, answer)` in [0, 1], one module each, imported when first asked for.

A worker that only checks maths never imports lm-eval. A module's `warm_up()`, where it has one, does what would
otherwise be paid by the first answer. Leaves out: processes and time-outs (`pool.py`).
"""

from collections.abc import Callable
from importlib import import_module

from megatron_tower.config import InputError
from megatron_tower.data.prompts import REWARDS

Reward = Callable[[dict, str], float]  # (item, answer) -> score; raises InputError for a malformed item


def reward(name: str) -> Reward:
    """The reward that an item names in `item["reward"]`, ready to score; raises InputError for one that does not exist."""
    if name not in REWARDS:
        raise InputError(f"reward {name!r} is unknown: use one of {', '.join(REWARDS)}")
    module = import_module(f"{__name__}.{name}")
    if hasattr(module, "warm_up"):
        module.warm_up()
    return module.score
