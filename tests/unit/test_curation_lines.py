"""Lines from outside: every anomaly is named, none takes memory or a neighbour with it."""

import bz2
import gzip
import lzma
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from backports import zstd

from megatron_tower.curation.lines import ANOMALIES, lines

COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": lambda content: bz2.compress(content, 1), ".xz": lzma.compress, ".zst": zstd.compress}


def read(path: Path, content: bytes, **options: int) -> tuple[list[str | None], Counter]:
    path.write_bytes(content)
    found: Counter = Counter()
    return list(lines(path, found, **options)), found


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_compression_gives_the_same_lines(tmp_path: Path, suffix: str) -> None:
    text = "".join(f"line {i} \u2028 é\x85\x0b\n" for i in range(50_000))
    found, anomalies = read(tmp_path / f"a{suffix}", COMPRESS[suffix](text.encode()))
    assert found == text.removesuffix("\n").split("\n") and not anomalies


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESS if suffix])
def test_a_file_that_ends_early_gives_what_it_has(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(1)
    text = "".join(f"{rng.random()}\n" for _ in range(60_000)).encode()
    packed = COMPRESS[suffix](text)
    found, anomalies = read(tmp_path / f"a{suffix}", packed[: len(packed) // 2])
    assert anomalies == {"truncated_file": 1} and len(found) > 1000
    assert found[:-1] == text.decode().split("\n")[: len(found) - 1]


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESS if suffix])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str) -> None:
    found, anomalies = read(tmp_path / f"a{suffix}", b"this is no compressed file\n" * 9)
    assert anomalies["damaged_file"] == 1 and set(found) <= {None}


def test_several_frames_are_one_file(tmp_path: Path) -> None:
    frame = zstd.compress
    assert read(tmp_path / "a.zst", frame(b"a\nb") + frame(b"c\n"))[0] == ["a", "bc"]


def test_bad_lines_keep_their_place(tmp_path: Path) -> None:
    content = b"a\r\nb\rc\n\xff\xfe\nnul \x00 byte\n" + b"x" * 101 + b"\n\nlast"
    found, anomalies = read(tmp_path / "a", content, longest=100)
    assert found == ["a", "b c", None, None, None, "", "last"]
    assert anomalies == {"carriage_return": 2, "invalid_utf8": 1, "nul_byte": 1, "too_long": 1}
    assert set(anomalies) < set(ANOMALIES)


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    assert read(tmp_path / "a", b"") == ([], {"empty_file": 1})


def test_a_line_of_100_megabytes_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "a.zst"
    path.write_bytes(zstd.compress(b"first\n" + b"x" * 100_000_000 + b"\nlast\n"))
    tracemalloc.start()
    anomalies: Counter = Counter()
    assert list(lines(path, anomalies)) == ["first", None, "last"] and anomalies == {"too_long": 1}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000
