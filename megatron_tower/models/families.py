"""The model families, by the name that `model.family` gives. To add one: a file like gemma2.py, a line here, a parity test."""

from megatron_tower.config import InputError
from megatron_tower.models.gemma2 import GEMMA2
from megatron_tower.models.llama import LLAMA
from megatron_tower.models.mapping import Family
from megatron_tower.models.qwen2 import QWEN2

FAMILIES: dict[str, Family] = {"gemma2": GEMMA2, "qwen2": QWEN2, "llama": LLAMA}


def family_of(name: str) -> Family:
    """The family called `name` in our config or in an HF config's `model_type`."""
    if name not in FAMILIES:
        raise InputError(f"model family {name} is unknown: use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
