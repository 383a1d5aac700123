"""Rows between stages: JSON Lines under zstd, written by us and trusted; the same rows give the same bytes.

A document is {"id", "corpus", "locale", "text"}. A pair is {"id", "corpus", "source_locale", "target_locale", "source", "target"} with,
where the source knows them, "document" and "scores". "id" is `<corpus>/<file>:<line>`: where the row came from.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson
from backports import zstd

Row = dict[str, Any]
LEVEL = 3
BUFFER = 1 << 20  # bytes


class Writer:
    """Rows into one file; a file that was not closed has no end, and is in a folder that was not published (engine.py)."""

    def __init__(self, path: Path) -> None:
        self.file = io.BufferedWriter(zstd.open(path, "wb", level=LEVEL), BUFFER)  # a row at a time would cost as much as the rest

    def write(self, row: Row) -> None:
        self.file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def write(path: Path, rows: Iterable[Row]) -> int:
    """Returns how many rows there were."""
    count = 0
    with Writer(path) as out:
        for row in rows:
            out.write(row)
            count += 1
    return count


def read(path: Path) -> Iterator[Row]:
    if not path.stat().st_size:  # nothing was written, no frame either
        return
    with zstd.open(path, "rb") as file:
        yield from map(orjson.loads, file)
