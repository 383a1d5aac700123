"""What stages ask of a row, and the account of those that go: by reason and locale, with a few to look at."""

import hashlib
import unicodedata
from collections import Counter
from heapq import heappush, heappushpop
from pathlib import Path

from megatron_tower.curation import shards
from megatron_tower.curation.engine import Facts
from megatron_tower.curation.shards import Row
from megatron_tower.data.pair import INVISIBLE, plain
from megatron_tower.data.split import is_held_out

EXAMPLES = 5  # removed rows that a task keeps of each reason and locale
REMOVED = "removed.jsonl.zst"


def normalise(row: Row) -> None:
    """NFC, nothing invisible; each side of a pair on one line."""
    if "text" in row:
        row["text"] = unicodedata.normalize("NFC", row["text"]).translate(INVISIBLE).strip()
    else:
        row["source"], row["target"] = plain(row["source"]), plain(row["target"])


def sides(row: Row) -> tuple[str, ...]:
    return (row["text"],) if "text" in row else (row["source"], row["target"])


def locale_of(row: Row) -> str:
    """`de_DE`, or `en-de_DE`"""
    return row["locale"] if "text" in row else f"{row['source_locale']}-{row['target_locale']}"


def size(row: Row) -> int:
    """bytes"""
    return sum(len(text.encode()) for text in sides(row))


def falls_to_held_out(row: Row, share: float) -> bool:
    """By its document, which is called the same in all languages; else by its text, of a pair the English one."""
    english = "target" if row.get("target_locale") == "en" else "source"
    return is_held_out(row.get("document") or row.get("text") or row[english], share)


class Account:
    """What a task saw, and what went. Examples are the rows whose ids have the least hashes: the same in every run."""

    def __init__(self) -> None:
        self.rows, self.bytes = Counter(), Counter()
        self.gone: dict[str, Counter] = {}
        self.gone_bytes: dict[str, Counter] = {}
        self.examples: dict[tuple[str, str], list[tuple[int, str, Row]]] = {}

    def saw(self, row: Row) -> None:
        self.rows[locale_of(row)] += 1
        self.bytes[locale_of(row)] += size(row)

    def lost(self, row: Row, reason: str) -> None:
        locale = locale_of(row)
        self.gone.setdefault(reason, Counter())[locale] += 1
        self.gone_bytes.setdefault(reason, Counter())[locale] += size(row)
        kept = self.examples.setdefault((reason, locale), [])
        rank = -int.from_bytes(hashlib.blake2b(row["id"].encode(), digest_size=8).digest(), "big")
        (heappush if len(kept) < EXAMPLES else heappushpop)(kept, (rank, row["id"], row))

    def write(self, folder: Path) -> Facts:
        found = sorted(self.examples.items())
        rows = ({"reason": reason, **row} for (reason, _), kept in found for _, _, row in sorted(kept, key=lambda one: one[:2]))
        shards.write(folder / REMOVED, rows)
        return {
            "rows": dict(self.rows),
            "bytes": dict(self.bytes),
            "removed": {reason: dict(counts) for reason, counts in self.gone.items()},
            "removed_bytes": {reason: dict(counts) for reason, counts in self.gone_bytes.items()},
        }
