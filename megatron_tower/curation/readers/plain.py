"""Plain text: documents divided by blank lines, and two files whose lines are translations of each other."""

from collections import Counter
from collections.abc import Iterator
from itertools import chain, zip_longest

from megatron_tower.config_data import SourceConfig
from megatron_tower.curation.lines import LONGEST, lines
from megatron_tower.curation.readers import rows
from megatron_tower.curation.readers.inputs import Input
from megatron_tower.curation.shards import Row

_END = object()


def text(source: SourceConfig, read: Input, anomalies: Counter) -> Iterator[tuple[str, Row]]:
    """A place is the number of a document's first line. A line that can't be used is left out of its document."""
    held: list[str] = []
    first = size = 0
    for number, line in enumerate(chain(lines(read.paths[0], anomalies), [""]), 1):
        if line is None:
            continue
        if line.strip():
            first = first or number
            size += len(line)
            if size <= LONGEST:
                held.append(line)
        elif first:
            if size > LONGEST:
                anomalies["too_long"] += 1
            elif row := rows.document(read, "\n".join(held), anomalies):
                yield str(first), row
            held, first, size = [], 0, 0


def moses(source: SourceConfig, read: Input, anomalies: Counter) -> Iterator[tuple[str, Row]]:
    """A place is a line number."""
    sides = (lines(path, anomalies) for path in (*read.partners, *read.paths))
    for number, (one, other) in enumerate(zip_longest(*sides, fillvalue=_END), 1):
        if one is _END or other is _END:
            anomalies["no_partner"] += 1
        elif one is not None and other is not None and (row := rows.pair(read, one, other, anomalies)):
            yield str(number), row
