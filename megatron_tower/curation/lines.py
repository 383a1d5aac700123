"""Lines of files from outside, plain or compressed, in memory that does not grow with the file or its longest line.

What is wrong with a file or a line is counted by name, never passed over: ANOMALIES says what each name means. A bad line is
told as None, so that the line numbers of two files stay beside each other. Lines end at \n alone: U+2028 and its like are text;
a byte order mark at the beginning is none.
"""

import bz2
import codecs
import gzip
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from backports import zstd

ANOMALIES = {
    "empty_file": "files without a line",
    "truncated_file": "compressed files that end too early: what came before is used",
    "damaged_file": "compressed files that can't be read further: what came before is used",
    "invalid_utf8": "lines that are not UTF-8, dropped",
    "nul_byte": "lines with NUL bytes, dropped",
    "too_long": "lines of more bytes than are looked at, dropped",
    "carriage_return": "lines that end in CR LF, or hold a CR, read as space",
}
LONGEST = 8 << 20  # bytes of a line
CHUNK = 1 << 20
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": zstd.open}


def lines(path: Path, anomalies: Counter, longest: int = LONGEST) -> Iterator[str | None]:
    """Each line without its end, or None for one that can't be used; raises OSError where the file can't be opened."""
    found = False
    for raw in _split(chunks(path, anomalies), longest):
        if raw and not found:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        found = True
        yield _text(raw, anomalies)
    if not found:
        anomalies["empty_file"] += 1


def _text(raw: bytes | None, anomalies: Counter) -> str | None:
    if raw is None:
        anomalies["too_long"] += 1
        return None
    if b"\0" in raw:
        anomalies["nul_byte"] += 1
        return None
    if b"\r" in raw:
        anomalies["carriage_return"] += 1
        raw = raw.rstrip(b"\r").replace(b"\r", b" ")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        anomalies["invalid_utf8"] += 1
        return None


def _split(chunks: Iterator[bytes], longest: int) -> Iterator[bytes | None]:
    """Lines of a stream of bytes; None for each that is longer than `longest`, of which no more than that is held."""
    rest, skipping = b"", False
    for chunk in chunks:
        *whole, tail = chunk.split(b"\n")
        if whole:
            yield None if skipping or len(rest) + len(whole[0]) > longest else rest + whole[0]
            for line in whole[1:]:
                yield None if len(line) > longest else line
            rest, skipping = b"", False
        rest += tail
        if len(rest) > longest:
            rest, skipping = b"", True
    if rest or skipping:
        yield None if skipping else rest


def chunks(path: Path, anomalies: Counter) -> Iterator[bytes]:
    """Uncompressed bytes, until the file ends or can't be understood further."""
    with OPENERS.get(path.suffix, open)(path, "rb") as stream:
        try:
            while chunk := stream.read1(CHUNK):
                yield chunk
        except EOFError:
            anomalies["truncated_file"] += 1
        except (zlib.error, lzma.LZMAError, zstd.ZstdError):
            anomalies["damaged_file"] += 1
        except OSError as error:
            if error.errno is not None:
                raise
            anomalies["damaged_file"] += 1  # gzip and bz2 have no error of their own
