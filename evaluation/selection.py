"""The best of several answers to a prompt, by a reward model (rollout/scorers.py); each reward is kept as it comes.

An answer counts if it ended by itself and isn't empty; the same text is scored once, as its first model's. Of equals the first wins.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.generators import Chat
from evaluation.store import Record, Store, digest
from megatron_tower.config import PairsConfig
from megatron_tower.rollout import scorers

AT_ONCE = 1024  # answers scored between two writes


@dataclass(frozen=True)
class Best:
    """margin: its lead over the next answer; None where there is no other."""

    answer: str
    model: str
    reward: float | None
    margin: float | None


def candidates(replies: Sequence[Record], left_out: Counter) -> dict[str, str]:
    """answer -> model, in the order of the replies; adds to `left_out`, by model and reason, what can't be chosen."""
    found: dict[str, str] = {}
    for record in replies:
        text = record["text"].strip()
        if record["finish"] != "stop" or not text or text in found:
            left_out[record["model"], "cut at its length" if record["finish"] != "stop" else "repeated" if text else "empty"] += 1
        else:
            found[text] = record["model"]
    return found


@dataclass(frozen=True)
class Rewards:
    """A reward model's folder and what it has said; the weights are loaded only if something is new."""

    folder: str
    batch_size: int
    store: Store

    def of(self, asked: Sequence[tuple[Chat, str]]) -> list[float | None]:
        """In their order; None where the reward is no number."""
        weights = scorers.fingerprint(PairsConfig(scorer="reward_model", scorer_path=self.folder))
        keys = [digest(weights, chat, answer) for chat, answer in asked]
        missing = [i for i, key in enumerate(keys) if key not in self.store]
        if missing:
            from megatron_tower.runtime import cpu

            cpu.install()
            score = scorers.reward_model(Path(self.folder))
            for start in range(0, len(missing), AT_ONCE):
                part = missing[start : start + AT_ONCE]
                verdicts = score([({"prompt": asked[i][0]}, asked[i][1]) for i in part], self.batch_size)
                self.store.append({"key": keys[i], "reward": verdict.score} for i, verdict in zip(part, verdicts, strict=True))
        return [self.store[key]["reward"] for key in keys]


def best(found: dict[str, str], rewards: dict[str, float | None] | None, left_out: Counter) -> Best | None:
    """None where no answer is left. rewards: by answer; None: there is one answer at most."""
    if rewards is None:
        return next((Best(answer, model, None, None) for answer, model in found.items()), None)
    left_out.update((model, "without a reward") for answer, model in found.items() if rewards[answer] is None)
    ranked = sorted((answer for answer in found if rewards[answer] is not None), key=lambda answer: -rewards[answer])
    if not ranked:
        return None
    margin = rewards[ranked[0]] - rewards[ranked[1]] if len(ranked) > 1 else None
    return Best(ranked[0], found[ranked[0]], rewards[ranked[0]], margin)
