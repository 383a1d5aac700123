"""Verifiable translation: "translate while obeying a checkable instruction", generator and checker of each family together.

A family proposes (a changed source and reference, and parameters), checks an answer, and knows variants that break it.
Leaves out: whether the translation is good; that is `rewards/translation.py`.
"""

from megatron_tower.data.verifiable.checking import case_of, damaged, kept
from megatron_tower.data.verifiable.families import FAMILIES
from megatron_tower.data.verifiable.generate import example, generate

__all__ = ["FAMILIES", "case_of", "damaged", "example", "generate", "kept"]
