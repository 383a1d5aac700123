"""Each format from bytes made here: its rows, every anomaly by its name, nothing opened that a file names, memory flat."""

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from backports import zstd

from megatron_tower.config import InputError
from megatron_tower.config_data import SourceConfig
from megatron_tower.curation.readers import ANOMALIES, READERS, inputs, rows
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


# text


def test_text_is_divided_by_blank_lines(tmp_path: Path) -> None:
    path = file(tmp_path / "a.txt", b"\nOne.\r\nStill one.\n \n\nBad \xff line\nTwo.\n\nNul\0\n\nThree.")
    found, anomalies = read(source("text", path, locale="de_DE"))
    assert found == [
        ("2", {"locale": "de_DE", "text": "One.\nStill one."}),
        ("7", {"locale": "de_DE", "text": "Two."}),
        ("11", {"locale": "de_DE", "text": "Three."}),
    ]
    assert anomalies == {"carriage_return": 1, "invalid_utf8": 1, "nul_byte": 1}


def test_a_document_longer_than_is_looked_at_goes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_tower.curation.readers.plain.LONGEST", 100)
    path = file(tmp_path / "a.txt", "a" * 60 + "\n" + "b" * 60 + "\n\nshort\n")
    found, anomalies = read(source("text", path))
    assert [row["text"] for _, row in found] == ["short"] and anomalies == {"too_long": 1}


# jsonl, parquet, tsv

ROWS = [
    {"content": "One", "id": 7, "score": 0.5},
    {"content": "Two", "id": "x", "score": "0.25"},
    {"id": 9},
    {"content": ["no text"], "id": 8},
    {"content": " \n ", "id": 10, "score": 1},
    {"content": "Nul \0", "id": 11, "score": 1},
    {"content": "Again\r\nand again", "id": "x", "score": True},
    {"content": "No score", "id": 12},
    {"content": "NaN", "id": 13, "score": "high"},
]
FIELDS = {"text": "content", "id": "id", "edu": "score"}
EXPECTED = [
    ("1", "One", "7", {"edu": 0.5}),
    ("2", "Two", "x", {"edu": 0.25}),
    ("7", "Again\nand again", "x", {}),
    ("8", "No score", "12", {}),
    ("9", "NaN", "13", {}),
]
ODD = {
    "missing_field:text": 1,
    "odd_field:text": 1,
    "empty": 1,
    "nul_byte": 1,
    "carriage_return": 1,
    "duplicate_id": 1,
    "odd_field:edu": 2,
    "missing_field:edu": 1,
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_names_what_is_wrong_with_a_row(tmp_path: Path, suffix: str) -> None:
    lines = "\ufeff" + "\n".join([*map(json.dumps, ROWS), "", "[1]", '{"content": "cut sh'])
    packed = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress}[suffix](lines.encode())
    found, anomalies = read(source("jsonl", file(tmp_path / f"a.jsonl{suffix}", packed), fields=FIELDS, locale="fr_FR"))
    assert [(place, row["text"], row["source_id"], row["scores"]) for place, row in found] == EXPECTED
    assert all(row["locale"] == "fr_FR" for _, row in found)
    assert anomalies == ODD | {"not_an_object": 2}


def test_a_compressed_file_that_was_cut_gives_what_it_has(tmp_path: Path) -> None:
    packed = zstd.compress("".join(f'{{"text": "{i} {i * i}"}}\n' for i in range(30_000)).encode())
    found, anomalies = read(source("jsonl", file(tmp_path / "a.jsonl.zst", packed[: len(packed) // 2])))
    assert anomalies.pop("truncated_file") == 1 and set(anomalies) <= {"not_an_object"}
    assert 1000 < len(found) < 30_000 and found[1000] == ("1001", {"locale": "en", "text": "1000 1000000"})


def test_jsonl_pairs_keep_document_and_scores(tmp_path: Path) -> None:
    line = json.dumps({"src": "Hello", "tgt": "Hallo", "url": "page", "qe": 0.9})
    fields = {"source": "src", "target": "tgt", "document": "url", "kiwi": "qe"}
    found, anomalies = read(source("jsonl", file(tmp_path / "a.jsonl", line), fields=fields, target_locale="de_DE"))
    assert found == [("1", pair("Hello", "Hallo") | {"document": "page", "scores": {"kiwi": 0.9}})] and not anomalies


def parquet(path: Path, content: list[dict], group: int = 4) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(content), path, row_group_size=group)
    return path


def test_parquet_gives_the_rows_that_jsonl_gives(tmp_path: Path) -> None:
    tidy = [{**row, "id": str(row["id"]), "score": str(row["score"]) if "score" in row else None} for row in ROWS]
    tidy = [row | {"content": row.get("content") if isinstance(row.get("content"), str) else None, "unread": 1} for row in tidy]
    found, anomalies = read(source("parquet", parquet(tmp_path / "a.parquet", tidy), fields=FIELDS))
    assert [(place, row["text"], row["source_id"], row["scores"]) for place, row in found] == EXPECTED
    odd = {name: count for name, count in ODD.items() if name != "odd_field:text"}
    assert anomalies == odd | {"missing_field:text": 2}  # "True" is no number either


def test_parquet_with_text_that_is_not_utf8(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    texts = pyarrow.array([b"good", b"bad \xff", None, b"fine"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    if texts.type != pyarrow.string():
        pytest.fail("a column of text was meant")
    write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    found, anomalies = read(source("parquet", tmp_path / "a.parquet"))
    assert [(place, row["text"]) for place, row in found] == [("1", "good"), ("4", "fine")]
    assert anomalies == {"invalid_utf8": 1, "missing_field:text": 1}


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"PAR1" + bytes(500) + b"PAR1"]
)
def test_damaged_parquet_is_named(tmp_path: Path, damage: Any) -> None:
    whole = parquet(tmp_path / "a.parquet", [{"text": "one"}]).read_bytes()
    found, anomalies = read(source("parquet", file(tmp_path / "a.parquet", damage(whole))))
    assert not found and anomalies == {"damaged_file": 1}


def test_parquet_damaged_in_the_middle_gives_what_came_before(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [{"text": f"row {i}"} for i in range(2000)], group=500)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = b"\xff" * 2000
    found, anomalies = read(source("parquet", file(path, bytes(content))))
    assert 400 < len(found) < 1500 and anomalies.get("damaged_file") == 1
    assert [row["text"] for _, row in found[:400]] == [f"row {i}" for i in range(400)]


@pytest.mark.parametrize("header", [True, False])
def test_tsv_by_header_or_by_number(tmp_path: Path, header: bool) -> None:
    lines = ["\ufeffsource\ttarget\turl\tbicleaner"] if header else []
    lines += ['Hello \t"Hallo"\tu\t0.75', "Hello", "\tHallo\tu\t0.1", "Bye\tAde\tu\tnone", "Bye\tAde", "Bye \xa0\tAde\tu\t1\tmore\r"]
    names = ["source", "target", "bicleaner"] if header else ["1", "2", "4"]
    fields = dict(zip(("source", "target", "bicleaner"), names, strict=True))
    found, anomalies = read(source("tsv", file(tmp_path / "a.tsv", "\n".join(lines)), fields=fields, target_locale="de_DE"))
    first = 2 if header else 1
    assert found == [
        (str(first), pair("Hello", '"Hallo"') | {"scores": {"bicleaner": 0.75}}),
        (str(first + 3), pair("Bye", "Ade") | {"scores": {}}),
        (str(first + 4), pair("Bye", "Ade") | {"scores": {}}),
        (str(first + 5), pair("Bye", "Ade") | {"scores": {"bicleaner": 1.0}}),
    ]
    assert anomalies == {"columns": 1, "empty": 1, "odd_field:bicleaner": 1, "missing_field:bicleaner": 1, "carriage_return": 1}


@pytest.mark.parametrize("reader", ["tsv", "parquet"])
def test_a_field_that_a_file_lacks_is_told_with_those_it_has(tmp_path: Path, reader: str) -> None:
    path = parquet(tmp_path / "a", [{"a": "x", "b": "y"}]) if reader == "parquet" else file(tmp_path / "a", "a\tb\nx\ty\n")
    with pytest.raises(InputError, match=r"a has no field content, only a, b: correct `fields`"):
        read(source(reader, path, fields={"text": "content"}))


def test_ids_that_repeat_are_remembered_only_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "REMEMBERED", 3)
    ids = ["a", "b", "a", "c", "d", "e", "b", "e"]
    path = file(tmp_path / "a", "\n".join(json.dumps({"text": "t", "id": name}) for name in ids))
    found, anomalies = read(source("jsonl", path, fields={"text": "text", "id": "id"}))
    assert len(found) == 8 and anomalies == {"duplicate_id": 2}


# moses


def test_moses_pairs_lines_and_counts_those_without_partner(tmp_path: Path) -> None:
    file(tmp_path / "X.de-en.en", b"One\nTwo\nThree\n\xff\nFive\n\nSeven\nEight")
    file(tmp_path / "X.de-en.de", b"Eins\n\nDrei\nVier\nF\0nf\n\n")
    found, anomalies = read(source("moses", tmp_path / "*.de-en.de", target_locale="de_DE"))
    assert found == [("1", pair("One", "Eins")), ("3", pair("Three", "Drei"))]
    assert anomalies == {"empty": 3, "invalid_utf8": 1, "nul_byte": 1, "no_partner": 2}


def test_moses_of_many_languages_by_what_the_corpus_calls_them(tmp_path: Path) -> None:
    for name, text in {"Q.de-en.en": "a", "Q.de-en.de": "b", "Q.en-zh_cn.en": "c", "Q.en-zh_cn.zh_cn": "d"}.items():
        file(tmp_path / f"{name}.gz", gzip.compress(text.encode()))
    many = source("moses", tmp_path / "*.{locale}.gz", locales={"de_DE": "de", "zh_CN": "zh_cn"})
    assert [one.name for one in inputs(many, Path("/nowhere"))] == ["Q.de-en.de.gz", "Q.en-zh_cn.zh_cn.gz"]
    assert [row for _, row in read(many)[0]] == [pair("a", "b"), pair("c", "d", "zh_CN")]
    (tmp_path / "Q.en-zh_cn.en.gz").unlink()
    with pytest.raises(InputError, match=r"has no Q\.en-zh_cn\.en\.gz beside it"):
        inputs(many, Path("/nowhere"))


# tmx


def unit(*versions: tuple[str, str]) -> str:
    return "<tu>" + "".join(f'<tuv xml:lang="{code}"><seg>{text}</seg></tuv>' for code, text in versions) + "</tu>\n"


def memory(*units: str, head: str = "") -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?>{head}<tmx version="1.4"><header/><body>\n{"".join(units)}</body></tmx>'


def test_tmx_maps_its_language_codes(tmp_path: Path) -> None:
    units = [
        unit(("EN-us", "Hello"), ("de-DE", "Hallo"), ("pt", "Olá"), ("zh-Hant", "你好")),
        unit(("de", "A &amp; <ph>{1}</ph>B<hi> C</hi>"), ("en", "Text")),
        unit(("en-GB", "Only English")),
        unit(("en", "Colour"), ("pt-BR", "Cor"), ("de-AT", "Farbe"), ("zh", "颜色")),
        unit(("en", "Empty"), ("de", " "), ("pt_PT", "Vazio")),
    ]
    path = file(tmp_path / "a.tmx", memory(*units, head='<!DOCTYPE tmx SYSTEM "http://nowhere.invalid/tmx14.dtd">'))
    codes = {"de_DE": "de", "pt_BR": "pt-BR", "pt_PT": "pt", "zh_TW": "zh-TW", "zh_CN": "zh"}
    found, anomalies = read(source("tmx", path, locales=codes))
    assert found == [
        ("1", pair("Hello", "Hallo")),
        ("2", pair("Text", "A & B C")),
        ("4", pair("Colour", "Cor", "pt_BR")),
        ("1", pair("Hello", "Olá", "pt_PT")),
        ("5", pair("Empty", "Vazio", "pt_PT")),
        ("1", pair("Hello", "你好", "zh_TW")),
        ("4", pair("Colour", "颜色", "zh_CN")),
    ]
    assert anomalies == {"no_partner": 2 + 4 + 3 + 4 + 4, "empty": 1}


def test_tmx_properties_are_scores_and_ids(tmp_path: Path) -> None:
    scored = unit(("en", "Hello"), ("de", "Hallo")).replace("<tu>", '<tu tuid="7"><prop type="score-bicleaner">0.75</prop>')
    path = file(tmp_path / "a.tmx", memory(scored, unit(("en", "Bye"), ("de", "Ade"))))
    found, anomalies = read(source("tmx", path, target_locale="de_DE", fields={"bicleaner": "score-bicleaner", "id": "tuid"}))
    more = {"source_id": "7", "scores": {"bicleaner": 0.75}}
    assert found == [("1", pair("Hello", "Hallo") | more), ("2", pair("Bye", "Ade") | {"scores": {}})]
    assert anomalies == {"missing_field:bicleaner": 1, "missing_field:id": 1}


@pytest.mark.parametrize("content", [memory(unit(("en", "a"), ("de", "b")), unit(("en", "c"), ("de", "d"))).encode()])
@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (lambda whole: whole[:-30], "truncated_file"),
        (lambda whole: whole.replace(b">c<", b">\xff<"), "damaged_file"),
        (lambda whole: whole.replace(b">c<", b">\0<"), "damaged_file"),
        (lambda whole: whole.replace(b">c<", b">c</b><"), "damaged_file"),
        (lambda whole: whole.replace(b">c<", b">&undefined;<"), "damaged_file"),
    ],
)
def test_tmx_that_breaks_off_gives_what_came_before(tmp_path: Path, content: bytes, damage: Any, name: str) -> None:
    found, anomalies = read(source("tmx", file(tmp_path / "a.tmx", damage(content)), target_locale="de_DE"))
    assert found[:1] == [("1", pair("a", "b"))] and len(found) == 1 and anomalies == {name: 1}


def test_compressed_tmx_that_was_cut_or_damaged(tmp_path: Path) -> None:
    packed = gzip.compress(memory(*(unit(("en", f"a {i * i}"), ("de", f"b {i}")) for i in range(3000))).encode())
    for content, name in (
        (packed[: len(packed) // 2], "truncated_file"),
        (packed[:20_000] + bytes(4000) + packed[24_000:], "damaged_file"),
    ):
        found, anomalies = read(source("tmx", file(tmp_path / "a.tmx.gz", content), target_locale="de_DE"))
        assert 500 < len(found) < 3000 and anomalies == {name: 1}
    assert read(source("tmx", file(tmp_path / "b.tmx", b""), target_locale="de_DE")) == ([], {"empty_file": 1})


ENTITIES = '<!DOCTYPE tmx [<!ENTITY secret SYSTEM "file://{path}"><!ENTITY web SYSTEM "http://nowhere.invalid/"><!ENTITY own "text">]>'


@pytest.mark.parametrize("entity", ["secret", "web", "own"])
def test_no_entity_of_a_tmx_is_opened(tmp_path: Path, entity: str) -> None:
    secret = file(tmp_path / "secret", "SECRET")
    content = memory(unit(("en", f"a &{entity};"), ("de", "b")), unit(("en", "c"), ("de", "d")), head=ENTITIES.format(path=secret))
    found, anomalies = read(source("tmx", file(tmp_path / "a.tmx", content), target_locale="de_DE"))
    assert found == [("2", pair("c", "d"))] and anomalies == {"entity": 1}


# pages and paragraphs

HTML = """<!DOCTYPE html><html><head><title>{0}</title><script>x</script></head><body><header><p>Menu</p></header>
<div class="navheader">Back</div><h1 id="t">{0}</h1><p id="a">{1} <b>bold</b><br>more
text</p><pre>code</pre><ul id="u"><li>{2}<p id="z">{3}</p>{4}</li></ul><footer>foot</footer></body></html>"""
TEXTS = {"en": ("Title", "First", "Item", "Inner", "tail of it"), "de": ("Titel", "Erstes", "Punkt", "Inner", "Rest davon")}
TREES = {"en": "en", "de_DE": "de", "fr_FR": "fr"}


@pytest.fixture
def trees(tmp_path: Path) -> Path:
    for code in ("en", "de", "fr"):
        file(tmp_path / code / "deep/a.html", HTML.format(*TEXTS.get(code, TEXTS["en"])))
    file(tmp_path / "de/only.html", "<p>Nur hier</p>")
    return tmp_path


def test_pages_are_documents_and_untranslated_paragraphs_go(trees: Path) -> None:
    file(trees / "en/b.html", "<p>Word for word the same</p><p>Yes</p>")
    file(trees / "de/b.html", "<p>Word for word the same</p><p>Yes</p>")
    found, anomalies = read(source("pages", trees / "{locale}/**/*.html", locales={"en": "en", "de_DE": "de"}))
    text = "Titel\nErstes bold more text\nPunkt\nInner\nRest davon"
    assert [row for _, row in found if row["locale"] == "de_DE"] == [
        {"locale": "de_DE", "text": "Yes", "document": "b.html"},
        {"locale": "de_DE", "text": text, "document": "deep/a.html"},
        {"locale": "de_DE", "text": "Nur hier", "document": "only.html"},
    ]
    assert [place for place, row in found if row["locale"] == "en"] == ["b.html", "deep/a.html"] and anomalies == {"untranslated": 1}


def test_paragraphs_pair_with_the_same_of_the_other_language(trees: Path) -> None:
    many = source("paragraphs", trees / "{locale}/**/*.html", locales=TREES)
    assert [one.name for one in inputs(many, trees)] == ["de", "fr"]
    found, anomalies = read(many, trees)
    of = {"document": "deep/a.html"}
    assert found == [
        ("deep/a.html:1", pair("Title", "Titel") | of),
        ("deep/a.html:2", pair("First bold more text", "Erstes bold more text") | of),
        ("deep/a.html:3", pair("Item", "Punkt") | of),
        ("deep/a.html:5", pair("tail of it", "Rest davon") | of),
    ]
    assert anomalies == {"no_partner": 1, "untranslated": 1 + 5}


def test_a_paragraph_more_shifts_none(trees: Path) -> None:
    path = trees / "de/deep/a.html"
    file(path, path.read_text().replace("<pre>", '<p id="new">Neu</p><p>Auch neu</p><pre>'))
    found, anomalies = read(source("paragraphs", trees / "{locale}/**/*.html", locales={"en": "en", "de_DE": "de"}))
    assert [row["target"] for _, row in found] == ["Titel", "Erstes bold more text"]  # these have ids of their own
    assert anomalies == {"no_partner": 1, "untranslated": 1, "no_such_block": 4}
    for code in ("en", "de"):
        file(trees / code / "deep/a.html", (trees / code / "deep/a.html").read_text().replace(" id=", " name="))
    found, anomalies = read(source("paragraphs", trees / "{locale}/**/*.html", locales={"en": "en", "de_DE": "de"}))
    assert not found and anomalies == {"no_partner": 1, "not_parallel": 1}


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"<page><p>caf\xe9</p></page>", "invalid_utf8"),
        (b"<page><p>a\0</p></page>", "nul_byte"),
        (b"<page><p>cut", "damaged_file"),
        (b"", "empty_file"),
        (b'<!DOCTYPE page [<!ENTITY s SYSTEM "file:///etc/hostname">]><page><p>&s;</p></page>', "entity"),
    ],
)
def test_a_page_that_cannot_be_used_is_named(tmp_path: Path, content: bytes, name: str) -> None:
    file(tmp_path / "a.page", content)
    file(tmp_path / "b.page", '<page xmlns="urn:x"><info><desc>no</desc></info><p>caf\u00e9 <gui>in</gui>\r\nline</p></page>')
    found, anomalies = read(source("pages", tmp_path / "*.page"))
    assert [row["text"] for _, row in found] == ["caf\u00e9 in line"] and anomalies == {name: 1, "empty": 1}


# inputs


def test_what_cannot_be_is_told_in_a_sentence(tmp_path: Path) -> None:
    file(tmp_path / "a/x.jsonl", "")
    file(tmp_path / "b/x.jsonl", "")
    for of, told in (
        (source("jsonl", tmp_path / "*.jsonl"), "no file matches .*jsonl: correct data.curation.sources"),
        (source("tmx", tmp_path / "a/x.jsonl"), "tmx reads pairs: name target_locale, or locales"),
        (source("jsonl", tmp_path / "a/x.jsonl", locale="xx_XX"), "locale xx_XX is unknown"),
        (source("jsonl", [tmp_path / "a/*.jsonl", tmp_path / "b/*.jsonl"]), "two inputs would both be called x.jsonl"),
    ):
        with pytest.raises(InputError, match=told):
            inputs(of, Path("/nowhere"))


def test_identity_follows_names_and_sizes_wherever_the_files_are(tmp_path: Path) -> None:
    def identity(folder: str, content: str) -> list[str]:
        file(tmp_path / folder / "x.jsonl", content)
        return [one.identity for one in inputs(source("jsonl", tmp_path / folder / "*.jsonl"), Path("/nowhere"))]

    assert identity("a", "one") == identity("b", "two") != identity("a", "more")


# memory


def _jsonl(path: Path, megabytes: int) -> Path:
    line = json.dumps({"text": "Some words of a document. " * 800}) + "\n"
    return file(path, line * (megabytes * 1_000_000 // len(line)))


def _tmx(path: Path, megabytes: int) -> Path:
    one = unit(("en", "Some words of a sentence. " * 400), ("de", "Einige Worte eines Satzes. " * 400))
    return file(path, memory(*[one] * (megabytes * 1_000_000 // len(one))))


@pytest.mark.parametrize("write", [_jsonl, _tmx], ids=["jsonl", "tmx"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, write: Any) -> None:
    reader = write.__name__.strip("_")
    options = {"target_locale": "de_DE"} if reader == "tmx" else {}
    (one,) = inputs(of := source(reader, write(tmp_path / f"a.{reader}", 50), **options), Path("/nowhere"))
    rows_of: Iterator = READERS[reader](of, one, Counter())
    resident = psutil.Process().memory_info  # the trees of libxml2 are not Python's to trace
    before = resident().rss
    held = [resident().rss - before for _ in rows_of]
    assert len(held) > 2000 and max(held) < 20_000_000
