"""HTML and XML files by their paragraphs: as documents, or beside the same files in another language.

A paragraph is the text of an element that is a block, or a run of text between blocks; it has that block's tag and id. Code listings,
menus, headers and footers are left out. Files of two languages align where all their blocks do, in order; else the blocks that share an
id, and without ids none: a paragraph more on one side must not shift the rest.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lxml import etree

from megatron_tower.config_data import SourceConfig
from megatron_tower.curation.readers import rows
from megatron_tower.curation.readers.inputs import Input
from megatron_tower.curation.shards import Row

ANOMALIES = {
    "not_parallel": "files with other paragraphs than the source side has, and no ids: dropped",
    "no_such_block": "paragraphs whose id the source side lacks, dropped",
    "untranslated": "paragraphs that are word for word those of the source side, dropped; in documents, those of four words and more",
}
WORDS = 3  # fewer may well be the same in two languages
Block = tuple[tuple[str, str | None], str]  # (tag, id), text

# fmt: off
BLOCKS = frozenset({
    "address", "article", "blockquote", "body", "caption", "center", "dd", "desc", "div", "dl", "dt", "entry", "example", "fieldset",
    "figcaption", "figure", "form", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "html", "item", "li", "list", "main", "note", "ol", "p",
    "page", "para", "section", "steps", "table", "tbody", "td", "tfoot", "th", "thead", "title", "tr", "ul",
})
SKIPPED = frozenset({
    "aside", "button", "footer", "head", "header", "info", "nav", "noscript", "pre", "programlisting", "screen", "script", "select",
    "style", "svg", "template", "textarea",
})
# fmt: on
SKIPPED_CLASSES = frozenset({"docnav", "navfooter", "navheader", "toc"})  # of DocBook's pages


def pages(source: SourceConfig, read: Input, anomalies: Counter) -> Iterator[tuple[str, Row]]:
    """A place is the file's name in its tree. Paragraphs that a translation left as they were go."""
    for name, path, partner in _files(read):
        original = {text for _, text in blocks(partner, Counter())} if partner else set()
        texts = []
        for _, text in blocks(path, anomalies):
            if text in original and text.count(" ") >= WORDS:
                anomalies["untranslated"] += 1
            else:
                texts.append(text)
        if row := rows.document(read, "\n".join(texts), anomalies):
            yield name, row | {"document": name}


def paragraphs(source: SourceConfig, read: Input, anomalies: Counter) -> Iterator[tuple[str, Row]]:
    """A place is the file's name in its tree and the number of the paragraph in it."""
    for name, path, partner in _files(read):
        if partner is None:
            anomalies["no_partner"] += 1
            continue
        for number, one, other in aligned(list(blocks(partner, anomalies)), list(blocks(path, anomalies)), anomalies):
            if one == other:
                anomalies["untranslated"] += 1
            elif row := rows.pair(read, one, other, anomalies):
                yield f"{name}:{number}", row | {"document": name}


def aligned(sources: list[Block], targets: list[Block], anomalies: Counter) -> Iterator[tuple[int, str, str]]:
    """(number, source text, target text) of what is the same paragraph."""
    if [place for place, _ in sources] == [place for place, _ in targets]:
        yield from ((number, one, other) for number, ((_, one), (_, other)) in enumerate(zip(sources, targets, strict=True), 1))
        return
    by_id, again = _by_id(sources), _by_id(targets)
    if not by_id or not again:
        anomalies["not_parallel"] += 1
        return
    for number, (place, text) in enumerate(targets, 1):
        if place in by_id and place in again:
            yield number, by_id[place], text
        else:
            anomalies["no_such_block"] += 1


def blocks(path: Path, anomalies: Counter) -> Iterator[Block]:
    """Paragraphs of a file in order, each on one line."""
    data = path.read_bytes()
    if b"\0" in data:
        anomalies["nul_byte"] += 1
        return
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        anomalies["invalid_utf8"] += 1
        return
    if path.suffix in (".html", ".htm", ".xhtml"):
        parser = etree.HTMLParser(encoding="utf-8", no_network=True, remove_comments=True)
    else:
        parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, remove_comments=True)
    try:
        tree = etree.fromstring(data, parser)
    except etree.XMLSyntaxError:
        anomalies["damaged_file" if data.strip() else "empty_file"] += 1
        return
    if tree is None:
        anomalies["empty_file"] += 1
        return
    if next(tree.iter(etree.Entity), None) is not None:
        anomalies["entity"] += 1
        return
    yield from _walk(tree)


def _walk(tree: etree._Element) -> list[Block]:
    found: list[Block] = []
    run: list[str] = []
    around: list[tuple[str, str | None]] = [("", None)]

    def end() -> None:
        if text := " ".join("".join(run).split()):
            found.append((around[-1], text))
        run.clear()

    def visit(element: etree._Element) -> None:
        if not isinstance(element.tag, str):  # a processing instruction
            return
        tag = element.tag.rpartition("}")[2]
        if tag in SKIPPED or not SKIPPED_CLASSES.isdisjoint(element.get("class", "").split()):
            end()
            return
        block = tag in BLOCKS
        if block:
            end()
            around.append((tag, element.get("id")))
        run.append(" " if tag == "br" else element.text or "")
        for child in element:
            visit(child)
            run.append(child.tail or "")
        if block:
            end()
            around.pop()

    visit(tree)
    end()
    return found


def _by_id(found: list[Block]) -> dict[tuple[str, str | None], str]:
    """Text of the blocks whose id is theirs alone."""
    times = Counter(place for place, _ in found)
    return {place: text for place, text in found if place[1] and times[place] == 1}


def _files(read: Input) -> Iterator[tuple[str, Path, Path | None]]:
    for path, partner in zip(read.paths, read.partners or (None,) * len(read.paths), strict=True):
        yield path.relative_to(read.root).as_posix(), path, partner
