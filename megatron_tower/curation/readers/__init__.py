"""Formats of public text: each reader turns one `Input` of a source into rows, streamed, and counts by name all that it had to leave.

    text        documents divided by blank lines (CC-100)
    pages       HTML or XML files, each a document
    jsonl       one object a line; documents, or pairs where `fields` has a target; also .gz .bz2 .xz .zst
    parquet     the same, row group by row group
    tsv         the same, by the header's names or by column numbers from 1
    moses       two files line by line; `files` names the target's: corpus.de-en.de beside corpus.de-en.en
    tmx         translation memories
    paragraphs  HTML or XML trees in two languages, paragraph by paragraph; a file is a "document"
    catalogue   message catalogues in Python wheels (data/sources.py)

A reader is asked as READERS[source.reader](source, input, anomalies) and yields (place within the input, row), without "id" and "corpus".
Leaves out: normal forms and filters (documents.py, pairs.py); what a PDF, a man page or a word processor's file says.
"""

from collections import Counter
from collections.abc import Callable, Iterator

from megatron_tower.config_data import SourceConfig
from megatron_tower.curation import lines
from megatron_tower.curation.readers import catalogue, plain, rows, tables, tmx, trees
from megatron_tower.curation.readers.inputs import Input, inputs
from megatron_tower.curation.shards import Row

__all__ = ["ANOMALIES", "READERS", "Input", "Reader", "inputs"]

Reader = Callable[[SourceConfig, Input, Counter], Iterator[tuple[str, Row]]]
READERS: dict[str, Reader] = {
    "text": plain.text,
    "pages": trees.pages,
    "jsonl": tables.jsonl,
    "parquet": tables.parquet,
    "tsv": tables.tsv,
    "moses": plain.moses,
    "tmx": tmx.tmx,
    "paragraphs": trees.paragraphs,
    "catalogue": catalogue.catalogue,
}
ANOMALIES = lines.ANOMALIES | rows.ANOMALIES | trees.ANOMALIES | catalogue.ANOMALIES  # a name may go on with `:field`
