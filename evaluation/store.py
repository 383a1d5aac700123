"""Answers, scores and verdicts on disk: JSONL in which every line has the key of what it is the result of.

A key is the digest of all that the result depends on (model, prompt and decoding; or metric, its weights and the texts), so a run that
was cut off, or is repeated, computes what is missing and nothing else. Lines are appended as results come; one that was cut off in
writing is dropped when the file is opened. Leaves out: several writers of one file.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_tower.config import InputError

Record = dict[str, Any]


def digest(*parts: Any) -> str:
    """sha256 (hex) of anything that JSON can hold; the key of what depends on these parts alone."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Store:
    """`with Store(path) as store`: a mapping of key -> record that remembers. A key written twice holds what was written last."""

    def __init__(self, path: Path):
        """Raises InputError for a line that is no record, unless it is the last and was cut off in writing."""
        self.path = path
        self._records: dict[str, Record] = {}
        self._file: BinaryIO | None = None  # nothing is written before there is something to write
        self._whole = 0  # bytes
        if path.is_file():
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        break
                    self._whole += len(line)
                    self._remember(line, number)

    def _remember(self, line: bytes, number: int) -> None:
        try:
            record = json.loads(line)
            self._records[record["key"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f'{self.path}:{number}: not an object with a "key": remove that line, its result is computed again') from error

    def append(self, records: Iterable[Record]) -> None:
        """Each record has its "key". They are on disk for whoever opens the file when this returns."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
            self._file.truncate(self._whole)
        lines = []
        for record in records:
            self._records[record["key"]] = record
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.write("".join(lines).encode())
        self._file.flush()

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> Record:
        return self._records[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
