"""Rows with named fields: JSON Lines, Parquet, TSV."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import orjson

from megatron_tower.config import InputError
from megatron_tower.config_data import SourceConfig
from megatron_tower.curation.lines import lines
from megatron_tower.curation.readers.inputs import Input
from megatron_tower.curation.readers.rows import Mapped
from megatron_tower.curation.shards import Row

BATCH = 256  # rows of a Parquet file at a time


def jsonl(source: SourceConfig, read: Input, anomalies: Counter) -> Iterator[tuple[str, Row]]:
    """A place is a line number; blank lines are none."""
    mapped = Mapped(source, read, anomalies)
    for number, line in enumerate(lines(read.paths[0], anomalies), 1):
        if line is None or not line.strip():
            continue
        try:
            values = orjson.loads(line)
        except orjson.JSONDecodeError:
            values = None
        if not isinstance(values, dict):
            anomalies["not_an_object"] += 1
        elif row := mapped.row(values):
            yield str(number), row


def parquet(source: SourceConfig, read: Input, anomalies: Counter) -> Iterator[tuple[str, Row]]:
    """A place is a row number from 1. Of a file that is damaged, the rows before are used."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    mapped = Mapped(source, read, anomalies)
    number = 0
    try:
        with ParquetFile(read.paths[0], pre_buffer=False) as file:
            _require(file.schema_arrow.names, mapped, read)
            if not file.metadata.num_rows:
                anomalies["empty_file"] += 1
            for batch in file.iter_batches(BATCH, columns=sorted(set(mapped.fields.values()))):
                for values in _values(batch):
                    number += 1
                    if values is None:
                        anomalies["invalid_utf8"] += 1
                    elif row := mapped.row(values):
                        yield str(number), row
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        anomalies["damaged_file"] += 1


def _values(batch: Any) -> list[dict | None]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # Arrow does not look
        if batch.num_rows == 1:
            return [None]
        return [values for index in range(batch.num_rows) for values in _values(batch.slice(index, 1))]


def tsv(source: SourceConfig, read: Input, anomalies: Counter) -> Iterator[tuple[str, Row]]:
    """A place is a line number. Where `fields` are numbers there is no header. Nothing is quoted."""
    mapped = Mapped(source, read, anomalies)
    numbered = all(name.isdecimal() for name in mapped.fields.values())
    at = {name: int(name) - 1 for name in mapped.fields.values()} if numbered else {}
    needed = 1 + max((at[mapped.fields[ours]] for ours in mapped.texts), default=0) if numbered else 0
    for number, line in enumerate(lines(read.paths[0], anomalies), 1):
        if line is None:
            continue
        columns = line.split("\t")
        if not at:
            _require(columns, mapped, read)
            at = {name: columns.index(name) for name in mapped.fields.values()}
            needed = 1 + max(at[mapped.fields[ours]] for ours in mapped.texts)
        elif len(columns) < needed:
            anomalies["columns"] += 1
        elif row := mapped.row({name: columns[index] for name, index in at.items() if index < len(columns)}):
            yield str(number), row


def _require(names: list[str], mapped: Mapped, read: Input) -> None:
    if lacking := [name for name in mapped.fields.values() if name not in names]:
        raise InputError(f"{read.paths[0]} has no field {' or '.join(lacking)}, only {', '.join(names)[:300]}: correct `fields`")
