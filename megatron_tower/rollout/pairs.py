"""Preference pairs: the best and the worst of a prompt's scored answers, and a translation with its post-edit.

Of several best answers the shortest is chosen, of several worst the one closest to it in length is rejected: the rule of WPO's authors
(model card of Llama3-Instruct-8B-WPO-HB-v2). Lengths are in characters, so that answers of any origin compare.
Leaves out: making answers (`generate.py`) and scoring them (`scorers.py`).  Run:  python -m tools.build_pairs
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tower.config import InputError
from megatron_tower.data import chat, jsonl, preferences, prompts
from megatron_tower.data.preferences import Preference
from megatron_tower.data.prompts import Item
from megatron_tower.data.templates import translation_prompt

POST_EDIT = ("source", "mt", "post_edit", "source_locale", "target_locale")
FORM = '{"source": "...", "mt": "...", "post_edit": "...", "source_locale": "en", "target_locale": "de_DE"}'
MISSING = "name a JSONL file"
MISSING_ITEMS = "run python -m tools.prepare_data, or name a JSONL file of prompts with their rewards, or of chats"


@dataclass(frozen=True)
class Candidate:
    """An answer that may become a side of a pair. sampled: by the checkpoint itself; score: higher is better, on any scale."""

    answer: str
    sampled: bool
    score: float


def best_and_worst(prompt: str, candidates: Sequence[Candidate], minimum_gap: float) -> Preference | None:
    """The pair of one prompt; None where best and worst are no more than `minimum_gap` apart. What is left of ties: the first."""
    if not candidates:
        return None
    highest, lowest = (best(c.score for c in candidates) for best in (max, min))
    if highest - lowest <= minimum_gap:
        return None
    chosen = min((c for c in candidates if c.score == highest), key=lambda c: len(c.answer))
    rejected = min((c for c in candidates if c.score == lowest), key=lambda c: abs(len(c.answer) - len(chosen.answer)))
    origin = "on_policy" if chosen.sampled and rejected.sampled else "off_policy"
    return Preference(prompt, chosen.answer, rejected.answer, highest, lowest, origin)


def read_items(path: Path) -> tuple[list[Item], int]:
    """(items, chats of several turns, which are left out) of a file of prompts with their rewards, or of SFT's chats, as its first line is.

    The item of a chat has its answer as another candidate, and no reward: a model scores its answers.
    """
    if not any("messages" in row for _, row in [next(jsonl.read(path, MISSING_ITEMS), ("", {}))]):
        return prompts.read(path), 0
    chats = [(place, chat.conversation(row, place)) for place, row in jsonl.read(path, MISSING_ITEMS)]
    single = [turns for _, turns in chats if [turn["role"] for turn in turns] == ["user", "assistant"]]
    if not single:
        raise InputError(f"{path}: none of its {len(chats)} chats is a user turn and its answer: name another file")
    return [{"prompt": asked["content"], "answer": said["content"], "check": {}} for asked, said in single], len(chats) - len(single)


def read_answers(path: Path) -> dict[str, list[str]]:
    """Answers made elsewhere, by prompt; lines {"prompt": "...", "answers": ["...", ...]}. InputError names file and line."""
    answers: dict[str, list[str]] = {}
    for place, row in jsonl.read(path, MISSING):
        jsonl.require_texts(row, ["prompt"], place)
        if not isinstance(row.get("answers"), list) or not all(jsonl.is_text(answer) for answer in row["answers"]):
            raise InputError(f'{place}: "answers" must be a list of texts that are not empty')
        answers.setdefault(row["prompt"], []).extend(row["answers"])
    return answers


def read_given(path: Path) -> tuple[list[Preference], int]:
    """(pairs, post-edits that changed nothing) of a file of ready pairs, or of post-edits, as its first line is.

    A post-edit {source, mt, post_edit, source_locale, target_locale} is chosen over the machine translation it mends.
    """
    rows = jsonl.read(path, MISSING)
    if not any("post_edit" in row for _, row in [next(rows, ("", {}))]):
        return preferences.read(path), 0
    edits = [_post_edit(row, place) for place, row in jsonl.read(path, MISSING)]
    changed = [pair for pair in edits if pair.chosen != pair.rejected]
    return changed, len(edits) - len(changed)


def _post_edit(row: jsonl.Row, place: str) -> Preference:
    jsonl.require_texts(row, POST_EDIT, place, FORM)
    try:
        prompt = translation_prompt(row["source_locale"], row["target_locale"], row["source"])
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    return Preference(prompt, row["post_edit"].strip(), row["mt"].strip(), origin="post_edit")
