"""What all readers ask of the text that they found, and the rows that they make of it."""

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

from megatron_tower.config_data import SourceConfig
from megatron_tower.curation.lines import LONGEST
from megatron_tower.curation.readers.inputs import Input
from megatron_tower.curation.shards import Row
from megatron_tower.curation.source import is_parallel

ANOMALIES = {
    "not_an_object": "lines that are not a JSON object, dropped",
    "columns": "lines with fewer columns than the fields need, dropped",
    "missing_field": "rows without a field that they need, dropped; without a score, kept",
    "odd_field": "fields of another kind than text, or scores that are no number: treated as missing",
    "empty": "documents, or sides of a pair, without text, dropped",
    "no_partner": "lines, units or files that only one of two languages has, dropped",
    "entity": "units or files that use entities of their own, dropped: nothing that a file names is opened",
    "duplicate_id": "rows with an id that one of the 100,000 rows before them has, kept: repeated text is found later",
}
REMEMBERED = 100_000  # ids


def clean(text: str, anomalies: Counter) -> str | None:
    """The text with LF alone between its lines, or None for one that can't be used."""
    if "\0" in text:
        anomalies["nul_byte"] += 1
        return None
    if len(text) > LONGEST:
        anomalies["too_long"] += 1
        return None
    if "\r" in text:
        anomalies["carriage_return"] += 1
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.strip()
    if not text:
        anomalies["empty"] += 1
        return None
    return text


def document(read: Input, text: str, anomalies: Counter) -> Row | None:
    text = clean(text, anomalies)
    return text and {"locale": read.locale, "text": text}


def pair(read: Input, source: str, target: str, anomalies: Counter) -> Row | None:
    source, target = clean(source, anomalies), clean(target, anomalies)
    if source is None or target is None:
        return None
    return {"source_locale": read.locale, "target_locale": read.target_locale, "source": source, "target": target}


class Mapped:
    """Rows from named fields: texts, which are called as here unless `fields` says so, and what else it names: id, document, scores."""

    def __init__(self, source: SourceConfig, read: Input, anomalies: Counter) -> None:
        self.read, self.anomalies = read, anomalies
        self.texts = ("source", "target") if is_parallel(source) else ("text",)
        self.fields = {ours: ours for ours in self.texts} | dict(source.fields)
        self.scores = [ours for ours in self.fields if ours not in (*self.texts, "id", "document")]
        self.ids: OrderedDict[str, None] = OrderedDict()

    def row(self, values: Mapping[str, Any]) -> Row | None:
        texts = [self._get(values, ours, str) for ours in self.texts]
        if None in texts:
            return None
        row = (pair if len(texts) == 2 else document)(self.read, *texts, self.anomalies)
        if row is None:
            return None
        if "id" in self.fields and (name := self._get(values, "id", str | int)) is not None:
            row["source_id"] = str(name)
            self._repeated(row["source_id"])
        if "document" in self.fields and (name := self._get(values, "document", str | int)) is not None:
            row["document"] = str(name)
        if self.scores:
            scores = {ours: self._get(values, ours, float) for ours in self.scores}
            row["scores"] = {ours: score for ours, score in scores.items() if score is not None}
        return row

    def _get(self, values: Mapping[str, Any], ours: str, kind: Any) -> Any:
        value = values.get(self.fields[ours])
        if value is None:
            self.anomalies[f"missing_field:{ours}"] += 1
            return None
        if kind is float:  # a column of text may hold numbers
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = float("nan")
            if number - number == 0 and not isinstance(value, bool):
                return number
        elif isinstance(value, kind) and not isinstance(value, bool):
            return value
        self.anomalies[f"odd_field:{ours}"] += 1
        return None

    def _repeated(self, name: str) -> None:
        if name in self.ids:
            self.anomalies["duplicate_id"] += 1
            self.ids.move_to_end(name)
            return
        self.ids[name] = None
        if len(self.ids) > REMEMBERED:
            self.ids.popitem(last=False)
