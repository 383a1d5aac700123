"""Message catalogues of Python wheels, as pairs (data/sources.py reads them)."""

from collections import Counter
from collections.abc import Iterator

from megatron_tower.config_data import SourceConfig
from megatron_tower.curation.readers import rows
from megatron_tower.curation.readers.inputs import Input
from megatron_tower.curation.shards import Row
from megatron_tower.data import sources

ANOMALIES = {"fuzzy": "entries that nobody has looked at, dropped", "plural": "entries with several forms, dropped: none is the right one"}


def catalogue(source: SourceConfig, read: Input, anomalies: Counter) -> Iterator[tuple[str, Row]]:
    """A place is the number of an entry."""
    for number, entry in enumerate(sources.read(read.paths[0], [read.target_locale]), 1):
        if entry.fuzzy or entry.plural:
            anomalies["fuzzy" if entry.fuzzy else "plural"] += 1
        elif row := rows.pair(read, entry.source, entry.target, anomalies):
            yield str(number), row
