"""TMX, HTML and Mallard pages: their pairs and paragraphs, every anomaly by its name, nothing opened that a file names."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from megatron_tower.curation.readers import inputs
from tests.unit.reader_cases import file, memory, pair, read, source, unit


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
