"""Preference pairs: a prompt, the answer that was chosen and the one that was rejected.

    {"prompt": "...", "chosen": "...", "rejected": "...", "chosen_score": 0.9, "rejected_score": 0.2, "origin": "on_policy"}

Scores and origin may be null or absent; they are for people and tables. As UltraFeedback is published, `chosen` and `rejected` may also be
chats of one user turn and the answer, or of the answer where `prompt` is a chat; scores are then called score_chosen and score_rejected.
Leaves out: conversations of several turns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tower.config import InputError
from megatron_tower.data import chat, jsonl
from megatron_tower.data.order import dealt
from megatron_tower.data.sequences import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORM = '{"prompt": "...", "chosen": "...", "rejected": "...", "chosen_score": 0.9, "rejected_score": 0.2, "origin": "on_policy"}'


@dataclass(frozen=True)
class Preference:
    """Scores are the reward's, higher is better; origin says where the answers came from (on_policy, off_policy, post_edit, ...)."""

    prompt: str
    chosen: str
    rejected: str
    chosen_score: float | None = None
    rejected_score: float | None = None
    origin: str | None = None


def read(path: Path) -> list[Preference]:
    """The pairs of a JSONL file; raises InputError with file and line for the first that is malformed, and for an empty file."""
    missing = "build pairs with python -m tools.build_pairs, or set phase.file to a JSONL file of pairs"
    pairs = [_pair(row, place) for place, row in jsonl.read(path, missing, FORM)]
    if not pairs:
        raise InputError(f"{path} is empty: there is no pair to learn from")
    return pairs


def _pair(row: jsonl.Row, place: str) -> Preference:
    if isinstance(row.get("chosen"), list) or isinstance(row.get("rejected"), list):
        row = _of_chats(row, place)
    jsonl.require_texts(row, ("prompt", "chosen", "rejected"), place, FORM)
    if row["chosen"] == row["rejected"]:
        raise InputError(f'{place}: "rejected" equals "chosen": drop the line, it says nothing')
    for name in ("chosen_score", "rejected_score"):
        score = row.get(name)
        if score is not None and (not isinstance(score, int | float) or not math.isfinite(score)):
            raise InputError(f'{place}: "{name}" is {score}: it must be a finite number, or null')
    return Preference(*(row.get(name) for name in Preference.__dataclass_fields__))


def _of_chats(row: jsonl.Row, place: str) -> jsonl.Row:
    """The same as texts. A text as prompt is repeated by both chats; a chat as prompt opens both."""
    opening = row.get("prompt") if isinstance(row.get("prompt"), list) else []
    found = {}
    for side in ("chosen", "rejected"):
        rest = row.get(side)
        turns = chat.conversation({"messages": opening + rest if isinstance(rest, list) else rest}, f'{place}: "{side}"')
        if [turn["role"] for turn in turns] != ["user", "assistant"]:
            raise InputError(f'{place}: "{side}" has several turns, or a system turn: drop the line')
        found[side] = turns
    asked = found["chosen"][0]["content"]
    if any(text != asked for text in (found["rejected"][0]["content"], asked if opening else row.get("prompt", asked))):
        raise InputError(f'{place}: "prompt", "chosen" and "rejected" don\'t begin with the same prompt: drop the line')
    sides = {side: turns[1]["content"] for side, turns in found.items()}
    scores = {f"{side}_score": row.get(f"{side}_score", row.get(f"score_{side}")) for side in found}
    return {"origin": "off_policy", **row, "prompt": asked, **sides, **scores}


class Preferences:
    """`dataset[i]`: pair i of an endless run of shuffled epochs as (chosen, rejected), a function of (seed, i) alone. dropped: too long."""

    def __init__(self, pairs: Sequence[tuple[Encoded, Encoded]], seq_length: int, pad_id: int, seed: int) -> None:
        self.pairs = [pair for pair in pairs if max(len(ids) for ids, _ in pair) - 1 <= seq_length]
        self.dropped, self.pad_id, self.seed = len(pairs) - len(self.pairs), pad_id, seed

    @property
    def rows_per_epoch(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Encoded, Encoded]:
        return self.pairs[dealt(index, len(self.pairs), self.seed)]


def preferences(path: Path, tokenizer: "PreTrainedTokenizerBase", seq_length: int, seed: int) -> Preferences:
    """The pairs of a file in the tokenizer's chat template, without those that are too long, which are counted and told."""
    pairs = read(path)
    turns = [
        [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": answer}]
        for pair in pairs
        for answer in (pair.chosen, pair.rejected)
    ]
    encoded = chat.encode_all(tokenizer, turns)
    data = Preferences(list(zip(encoded[0::2], encoded[1::2], strict=True)), seq_length, chat.pad_id(tokenizer), seed)
    if not data.pairs:
        raise InputError(f"{path}: in none of its {len(pairs)} pairs do both answers fit phase.seq_length={seq_length}; raise it")
    if data.dropped:
        print(f"{path}: {data.dropped} of {len(pairs)} pairs are longer than phase.seq_length={seq_length} and are left out", flush=True)
    return data
