"""Train or held out, decided by the source string alone, so that a test sentence is unseen in every language.

A source is held out when its hash says so: the same sentence falls on the same side in every locale, package and run.
That alone leaks: two sources may share a translation, and a long date contains a short one. So whatever of the training
side repeats a held-out string, in whole or as a run of words, is dropped and counted. Leaves out: near duplicates.
"""

import hashlib
import re
from collections.abc import Iterable

from megatron_tower.data.pair import Pair, key

_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
SHORTEST_RUN = 3  # shorter held-out strings ("Save page") are looked for as whole strings only: they are part of ordinary language


def is_held_out(source: str, share: float) -> bool:
    """Whether this source belongs to the held-out side, on which about `share` of all sources fall."""
    return int.from_bytes(hashlib.sha256(key(source).encode()).digest()[:8], "big") < share * 2**64


def words(text: str) -> tuple[str, ...]:
    """Words, numbers, and each ideograph, kana or hangul syllable alone; punctuation, case and spacing don't count."""
    return tuple(_WORDS.findall(key(text)))


class HeldOut:
    """The strings that must not be trained on, and `leaks(text)`: does a line of this text, label (`German: ...`) or not, repeat one?"""

    def __init__(self, texts: Iterable[str]) -> None:
        self.whole = set()
        self.runs: dict[int, set[tuple[str, ...]]] = {}
        for text in texts:
            self.whole.add(key(text))
            if len(run := words(text)) >= SHORTEST_RUN:
                self.runs.setdefault(len(run), set()).add(run)

    def leaks(self, text: str) -> bool:
        return any(self._line_leaks(line) for line in text.splitlines())

    def _line_leaks(self, line: str) -> bool:
        if key(line) in self.whole or key(line.partition(": ")[2]) in self.whole:
            return True
        run = words(line)
        return any(run[i : i + n] in known for n, known in self.runs.items() if n <= len(run) for i in range(len(run) - n + 1))


def split(pairs: Iterable[Pair], share: float) -> tuple[list[Pair], list[Pair], HeldOut, list[Pair]]:
    """Training pairs, held-out pairs, the guard over the latter's strings on both sides, and the training pairs it dropped."""
    train, test = [], []
    for pair in pairs:
        (test if is_held_out(pair.source, share) else train).append(pair)
    held = HeldOut(text for pair in test for text in (pair.source, pair.target))
    dropped = [pair for pair in train if held.leaks(pair.source) or held.leaks(pair.target)]
    gone = set(dropped)
    return [pair for pair in train if pair not in gone], test, held, dropped
