"""Files to read made on the spot, what reading them gives, and pairs as TMX."""

from collections import Counter
from pathlib import Path
from typing import Any

from megatron_tower.config_data import SourceConfig
from megatron_tower.curation.readers import ANOMALIES, READERS, inputs
from megatron_tower.curation.shards import Row


def source(reader: str, files: str | Path | list, **options: Any) -> SourceConfig:
    files = [str(one) for one in (files if isinstance(files, list) else [files])]
    return SourceConfig(reader=reader, files=files, licence="MIT", origin="made here", **options)


def read(of: SourceConfig, cache: Path = Path("/nowhere")) -> tuple[list[tuple[str, Row]], dict[str, int]]:
    """(place, row) of every input, and the anomalies, each of which has an explanation."""
    found, anomalies = [], Counter()
    for one in inputs(of, cache):
        found += READERS[of.reader](of, one, anomalies)
    assert {name.partition(":")[0] for name in anomalies} <= set(ANOMALIES)
    return found, dict(anomalies)


def file(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pair(one: str, other: str, target: str = "de_DE") -> Row:
    return {"source_locale": "en", "target_locale": target, "source": one, "target": other}


# tmx


def unit(*versions: tuple[str, str]) -> str:
    return "<tu>" + "".join(f'<tuv xml:lang="{code}"><seg>{text}</seg></tuv>' for code, text in versions) + "</tu>\n"


def memory(*units: str, head: str = "") -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?>{head}<tmx version="1.4"><header/><body>\n{"".join(units)}</body></tmx>'
