"""Translation memories: each unit that has both languages is a pair. Read as a stream; nothing that a file names is opened."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lxml import etree

from megatron_tower.config_data import SourceConfig
from megatron_tower.curation.lines import chunks
from megatron_tower.curation.readers.inputs import Input
from megatron_tower.curation.readers.rows import Mapped
from megatron_tower.curation.shards import Row
from megatron_tower.data.locales import find, locale

_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"


def tmx(source: SourceConfig, read: Input, anomalies: Counter) -> Iterator[tuple[str, Row]]:
    """A place is the number of a unit. `fields` name properties of units, such as score-bicleaner, and `tuid`."""
    mapped = Mapped(source, read, anomalies)
    wanted = [_codes(source, code) for code in (read.locale, read.target_locale)]
    for number, unit in enumerate(_units(read.paths[0], anomalies), 1):
        if next(unit.iter(etree.Entity), None) is not None:
            anomalies["entity"] += 1
            continue
        texts: list[str | None] = [None, None]
        for version in unit.iter("{*}tuv"):
            code = _normal(version.get(_LANGUAGE) or version.get("lang") or "")
            segment = version.find("{*}seg")
            for side in (0, 1):
                if texts[side] is None and segment is not None and (code in wanted[side] or f"{code.split('_')[0]}_*" in wanted[side]):
                    texts[side] = _text(segment)
        if None in texts:
            anomalies["no_partner"] += 1
        elif row := mapped.row(_properties(unit) | {"source": texts[0], "target": texts[1]}):
            yield str(number), row


def _properties(unit: etree._Element) -> dict[str, str | None]:
    return {"tuid": unit.get("tuid")} | {one.get("type"): one.text for one in unit.iter("{*}prop")}


def _units(path: Path, anomalies: Counter) -> Iterator[etree._Element]:
    """Each unit while it is whole; the tree holds no more than those of one chunk."""
    parser = etree.XMLPullParser(("end",), tag="{*}tu", resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
    found, name = Counter(), "empty_file"
    try:
        for chunk in chunks(path, found):
            name = "damaged_file"
            parser.feed(chunk)
            yield from _whole(parser)
            ended = b"</tmx" in chunk
        name = name if name == "empty_file" or ended else "truncated_file"
        parser.close()
    except etree.XMLSyntaxError:
        yield from _whole(parser)
        found[name] += not found  # or it ends where its compressed bytes do
    anomalies.update(found)


def _whole(parser: etree.XMLPullParser) -> Iterator[etree._Element]:
    for _, unit in parser.read_events():
        yield unit
        unit.clear()
        while unit.getprevious() is not None:
            del unit.getparent()[0]


def _text(segment: etree._Element) -> str:
    """Without the codes of the format that a segment came from (bpt, ept, ph, it, ut)."""
    parts = [segment.text or ""]
    for child in segment:
        if isinstance(child.tag, str) and etree.QName(child).localname == "hi":
            parts.append(_text(child))
        parts.append(child.tail or "")
    return "".join(parts)


def _codes(source: SourceConfig, code: str) -> set[str]:
    """What a file may call a locale: `de` is de_DE, `pt` is pt_PT and never pt_BR, unless `locales` says so; any English is en."""
    row = locale(code)
    names = {row.code, row.cldr, *row.folders}
    if code in source.locales:
        names.add(source.locales[code])
    if find(row.language) == row:
        names.add(row.language)
    return {_normal(name) for name in names} | ({"en_*"} if code == "en" else set())


def _normal(code: str) -> str:
    return code.replace("-", "_").casefold()
