"""Held-out items: reading `held_out/<task>.jsonl` of the data folder, and choosing which of them are asked."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_tower.config import InputError
from megatron_tower.data import jsonl
from megatron_tower.data.jsonl import Row


def read(path: Path, fields: Sequence[str]) -> list[Row]:
    """Every line as a row with the named string fields. InputError names file and line of what is missing, malformed or empty."""
    missing = "data of an earlier version has no such file; write it with python -m tools.prepare_data"
    rows = []
    for place, row in jsonl.read(path, missing):
        jsonl.require_texts(row, fields, place)
        rows.append(row)
    if not rows:
        raise InputError(f"{path} is an empty split: raise data.held_out or add locales, and run python -m tools.prepare_data again")
    return rows


def choose(rows: Sequence[Row], group: Callable[[Row], str], count: int) -> list[Row]:
    """At most `count` rows a group (0: all), by the hash of their content: the same ones whatever the order in the file."""
    ranked = sorted(rows, key=lambda row: hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest())
    taken: dict[str, list[Row]] = defaultdict(list)
    for row in ranked:
        if not count or len(taken[group(row)]) < count:
            taken[group(row)].append(row)
    return [row for name in sorted(taken) for row in taken[name]]
