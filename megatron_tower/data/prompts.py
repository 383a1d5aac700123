"""Prompts whose answers can be verified: items, each with the name of a reward and what that reward needs to know.

    {"prompt": "...", "reward": "maths", "family": "addition", "locale": "en", "answer": "42", "check": {"answer": "42"}}

`answer` is a reference that scores 1, or null; `family` is for tables. Leaves out: the rewards (`rewards/`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tower.config import InputError
from megatron_tower.data import chat, jsonl
from megatron_tower.data.order import dealt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORM = '{"prompt": "...", "reward": "maths", "family": "...", "locale": "en", "answer": "...", "check": {...}}'
REWARDS = ("maths", "instructions", "translation", "preference")

Item = dict[str, object]


def read(path: Path) -> list[Item]:
    """The items of a JSONL file; raises InputError with file and line for the first that is malformed, and for an empty file."""
    missing = "run python -m tools.prepare_data, or name a JSONL file of prompts with their rewards"
    items = [_checked(item, place) for place, item in jsonl.read(path, missing, FORM)]
    if not items:
        raise InputError(f"{path} is empty: there is no prompt to answer")
    return items


def _checked(item: Item, place: str) -> Item:
    jsonl.require_texts(item, ("prompt", "reward", "family", "locale"), place, FORM)
    if item["reward"] not in REWARDS:
        raise InputError(f'{place}: "reward" is {item["reward"]}: use one of {", ".join(REWARDS)}')
    if not isinstance(item.get("check"), dict):
        raise InputError(f'{place}: "check" must be an object with what the reward needs; each line must be one object like {FORM}')
    return item


def family(item: Item) -> str:
    """The family that a table shows: of a composed one (`date+json`) how many there are together, for each composition is rare."""
    together = item["family"].count("+") + 1
    return item["family"] if together == 1 else f"{together} together"


class Prompts:
    """`dataset[i]`: (item, prompt ids) number i of an endless run of shuffled epochs, a function of (seed, i) alone. dropped: too long."""

    def __init__(self, items: Sequence[Item], encoded: Sequence[list[int]], longest: int, seed: int) -> None:
        self.kept = [(item, ids) for item, ids in zip(items, encoded, strict=True) if len(ids) <= longest]
        self.dropped, self.seed = len(items) - len(self.kept), seed

    @property
    def rows_per_epoch(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> tuple[Item, list[int]]:
        return self.kept[dealt(index, len(self.kept), self.seed)]


def prompts(path: Path, tokenizer: "PreTrainedTokenizerBase", longest: int, seed: int) -> Prompts:
    """The items of a file, prompts of more than `longest` tokens left out: they are counted and told."""
    items = read(path)
    data = Prompts(items, [chat.prompt_ids(tokenizer, item["prompt"]) for item in items], longest, seed)
    if not data.kept:
        raise InputError(f"{path}: none of its {len(items)} prompts leaves room for an answer in {longest} tokens; raise phase.seq_length")
    if data.dropped:
        print(f"{path}: {data.dropped} of {len(items)} prompts have more than {longest} tokens and are left out", flush=True)
    return data
