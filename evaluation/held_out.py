"""Held-out items: reading `held_out/<task>.jsonl` of the data folder, and choosing which of them are asked."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_tower.config import InputError

Row = dict[str, Any]


def read(path: Path, fields: Sequence[str]) -> list[Row]:
    """Every line as a row with the named string fields. InputError names file and line of what is missing, malformed or empty."""
    if not path.is_file():
        raise InputError(f"{path} is missing (data of an earlier version has no such file): write it with python -m tools.prepare_data")
    rows = []
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                rows.append(_row(line, fields, f"{path}:{number}"))
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 after line {len(rows)}: save it as UTF-8") from error
    if not rows:
        raise InputError(f"{path} is an empty split: raise data.held_out or add locales, and run python -m tools.prepare_data again")
    return rows


def _row(line: str, fields: Sequence[str], place: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not a JSON object ({error.msg}, column {error.colno}): mend or drop the line") from error
    if not isinstance(row, dict):
        raise InputError(f"{place}: a JSON {type(row).__name__} where an object is expected: mend or drop the line")
    for field in fields:
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise InputError(f'{place}: "{field}" must be a non-empty string: mend or drop the line')
    return row


def choose(rows: Sequence[Row], group: Callable[[Row], str], count: int) -> list[Row]:
    """At most `count` rows a group (0: all), by the hash of their content: the same ones whatever the order in the file."""
    ranked = sorted(rows, key=lambda row: hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest())
    taken: dict[str, list[Row]] = defaultdict(list)
    for row in ranked:
        if not count or len(taken[group(row)]) < count:
            taken[group(row)].append(row)
    return [row for name in sorted(taken) for row in taken[name]]
