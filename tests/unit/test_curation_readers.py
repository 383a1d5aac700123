"""Text, rows and lines from bytes made here: what each format gives, every anomaly by its name, which files are read, memory flat."""

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
from megatron_tower.curation.readers import READERS, inputs, rows
from tests.unit.reader_cases import file, memory, pair, read, source, unit

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
