"""What `fetch` leaves in the cache: whole or not at all, recorded, once; with stand-ins for apt-get and for the hub."""

import json
import os
import re
import subprocess
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from megatron_tower.config import InputError
from megatron_tower.config_data import SourceConfig
from megatron_tower.curation.fetch import RECORD, fetch, root
from megatron_tower.curation.readers import READERS, inputs
from megatron_tower.data.sources import sha256

COPYRIGHT = "Format: 1.0\n\nFiles: debian/*\nLicense: GPL-3\n\nFiles: *\nCopyright: A\nLicense: CC-BY-SA-3.0\n\nLicense: GPL-3\n text\n"
APT = """#!/bin/sh
echo "$@" >> {log}
echo "W: Download is performed unsandboxed as root" >&2
[ -f {archives}/$3.deb ] || {{ echo "E: Unable to locate package $3" >&2; exit 100; }}
cp {archives}/$3.deb "$3_1.0_all.deb"
"""


def of(*words: str, **options: object) -> SourceConfig:
    return SourceConfig(reader="pages", fetch=list(words), files=["usr/**/*.txt"], licence="MIT", origin="made here", **options)


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An apt-get that copies archives made here, and notes what it was asked."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "archives").mkdir()

    def make(package: str, files: dict[str, str], links: dict[str, str] | None = None) -> None:
        content = tmp_path / "content" / package
        script = content / "DEBIAN/postinst"
        control = f"Package: {package}\nVersion: 1.0\nArchitecture: all\nMaintainer: a <a@b>\nDescription: d\n"
        for name, text in {"DEBIAN/control": control, "DEBIAN/postinst": f"#!/bin/sh\ntouch {tmp_path}/ran\n", **files}.items():
            (content / name).parent.mkdir(parents=True, exist_ok=True)
            (content / name).write_text(text)
        script.chmod(0o755)
        for name, to in (links or {}).items():
            (content / name).symlink_to(to)
        build = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(content), str(tmp_path / f"archives/{package}.deb")]
        subprocess.run(build, check=True, capture_output=True)

    (tmp_path / "bin/apt-get").write_text(APT.format(log=tmp_path / "log", archives=tmp_path / "archives"))
    (tmp_path / "bin/apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return SimpleNamespace(make=make, log=tmp_path / "log", archives=tmp_path / "archives", ran=tmp_path / "ran")


def test_a_package_is_unpacked_and_recorded_once(apt: SimpleNamespace, tmp_path: Path) -> None:
    apt.make("book", {"usr/a.txt": "Hello", "usr/share/doc/book/copyright": COPYRIGHT}, {"usr/leak.txt": "/etc/hostname"})
    cache = tmp_path / "cache"
    (found,) = fetch(of("debian:book"), cache)
    assert (found.word, found.version, found.licence) == ("debian:book", "1.0", "CC-BY-SA-3.0")
    assert set(found.files) == {"usr/a.txt", "usr/share/doc/book/copyright"} and found.files["usr/a.txt"][0] == 5
    assert json.loads((cache / "debian/book" / RECORD).read_text())["sha256"] == found.sha256
    assert fetch(of("debian:book"), cache) == [found] and apt.log.read_text() == "download --quiet book\n"
    assert [path.name for path in (cache / "debian").iterdir()] == ["book"] and not apt.ran.exists()
    (one,) = inputs(of("debian:book"), cache)
    assert (one.name, [path.name for path in one.paths]) == ("debian/book/usr", ["a.txt"])


def test_a_word_for_each_locale(apt: SimpleNamespace, tmp_path: Path) -> None:
    for code in ("en-us", "de", "fr"):
        apt.make(f"help-{code}", {f"usr/{code}.txt": "text"})
    source = of("debian:help-{locale}", locales={"en": "en-us", "de_DE": "de", "fr_FR": "fr"})
    assert [found.word for found in fetch(source, tmp_path / "cache")] == ["debian:help-en-us", "debian:help-de", "debian:help-fr"]
    assert [(one.locale, one.paths[0].name) for one in inputs(source, tmp_path / "cache")] == [
        ("en", "en-us.txt"),
        ("de_DE", "de.txt"),
        ("fr_FR", "fr.txt"),
    ]


def test_what_apt_says_is_told_and_nothing_stays(apt: SimpleNamespace, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(InputError, match=r"debian:nobook could not be .* \(E: Unable to locate package nobook\): run once with a network"):
        fetch(of("debian:nobook"), cache)
    apt.make("book", {"usr/a.txt": "Hello" * 1000})
    archive = apt.archives / "book.deb"
    archive.write_bytes(archive.read_bytes()[:3000])
    with pytest.raises(InputError, match="the download of debian:book is damaged"):
        fetch(of("debian:book"), cache)
    assert not list((cache / "debian").iterdir())


def test_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="debian:book needs apt-get and dpkg-deb, which this machine lacks: fetch on Debian"):
        fetch(of("debian:book"), tmp_path / "cache")


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_text("other size"), Path.unlink, lambda path: (path.parents[1] / RECORD).unlink()]
)
def test_a_cache_that_was_changed_is_met_at_the_door(apt: SimpleNamespace, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    apt.make("book", {"usr/a.txt": "Hello"})
    fetch(of("debian:book"), tmp_path / "cache")
    damage(tmp_path / "cache/debian/book/usr/a.txt")
    with pytest.raises(InputError, match=r"book.*: delete .*book and run again"):
        fetch(of("debian:book"), tmp_path / "cache")


def test_what_was_not_fetched_is_no_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"debian:book is not in the cache .*: run python -m tools.prepare_data on a machine with"):
        inputs(of("debian:book"), tmp_path)


@pytest.mark.parametrize("word", ["book", "deb:book", "debian:", "pypi:Django", "hub:org/name:*.parquet", "hub:org/name@main"])
def test_words_that_mean_nothing(tmp_path: Path, word: str) -> None:
    with pytest.raises(InputError, match=f"{re.escape(word)} (can't be understood: write|names no version: write)"):
        fetch(of(word), tmp_path)


HUB = {"data/deu/1.parquet": "1", "data/deu/2.parquet": "22", "data/fra/1.parquet": "333", "data/deu/run.py": "code"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub of one dataset; a download breaks off after `until` files."""
    state = SimpleNamespace(until=99, asked=[])

    def info(self: object, repository: str, revision: str) -> SimpleNamespace:
        if repository != "org/web":
            raise OSError(f"404 Client Error.\nRepository Not Found: {repository}")
        return SimpleNamespace(sha="c0ffee", card_data={"license": "odc-by"})

    def snapshot(repository: str, repo_type: str, revision: str, allow_patterns: list, ignore_patterns: list, local_dir: Path) -> None:
        from huggingface_hub.utils import filter_repo_objects

        state.asked.append((repository, repo_type, revision))
        for count, name in enumerate(filter_repo_objects(HUB, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)):
            if count == state.until:
                raise OSError("connection lost")
            for path in (local_dir / name, local_dir / ".cache" / name):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(HUB[name])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return state


def test_the_hub_gives_data_at_a_revision_and_no_code(hub: SimpleNamespace, tmp_path: Path) -> None:
    source = of("hub:org/web@v1:data/{locale}/*", locales={"de_DE": "deu", "fr_FR": "fra"}, locale="de_DE")
    german, french = fetch(source, tmp_path)
    assert (german.version, german.licence, sorted(german.files)) == ("c0ffee", "odc-by", ["data/deu/1.parquet", "data/deu/2.parquet"])
    assert list(french.files) == ["data/fra/1.parquet"] and hub.asked == [("org/web", "dataset", "c0ffee")] * 2
    assert fetch(source, tmp_path) == [german, french] and len(hub.asked) == 2
    folder = root("hub:org/web@v1:data/deu/*", tmp_path)
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["1.parquet", "2.parquet", RECORD]


def test_a_hub_download_that_broke_off_is_not_taken_for_whole(hub: SimpleNamespace, tmp_path: Path) -> None:
    word, hub.until = "hub:org/web@v1:data/deu/*", 1
    with pytest.raises(InputError, match=r"could not be downloaded \(connection lost\): run once with a network"):
        fetch(of(word), tmp_path)
    with pytest.raises(InputError, match="is not in the cache"):
        root(word, tmp_path)
    hub.until = 99
    assert len(fetch(of(word), tmp_path)[0].files) == 2


@pytest.mark.parametrize(
    ("word", "told"),
    [("hub:org/none@v1:*", "Repository Not Found: org/none"), ("hub:org/web@v1:*.zip", r"no file of org/web at v1 matches \*.zip")],
)
def test_what_the_hub_lacks(hub: SimpleNamespace, tmp_path: Path, word: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        fetch(of(word), tmp_path)


def test_a_wheel_is_a_source_too(tmp_path: Path) -> None:
    wheel = tmp_path / "toy-1.0-py3-none-any.whl"
    po = 'msgid ""\nmsgstr "Content-Type: text/plain; charset=utf-8\\n"\n\nmsgid "Save"\nmsgstr "Sichern"\n\n'
    po += '#, fuzzy\nmsgid "Go"\nmsgstr "Los"\n'
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/locale/de/LC_MESSAGES/django.po", po)
        archive.writestr("toy-1.0.dist-info/METADATA", "Name: toy\nVersion: 1.0\nLicense-Expression: MIT\n")
    (tmp_path / f"{wheel.name}.sha256").write_text(sha256(wheel))
    locales = {"de_DE": "", "fr_FR": ""}
    source = SourceConfig(reader="catalogue", fetch=["pypi:toy==1.0"], locales=locales, licence="MIT", origin="toy")
    assert [(found.version, found.licence) for found in fetch(source, tmp_path)] == [("1.0", "MIT")]
    german, french = inputs(source, tmp_path)
    assert (german.name, french.name) == (f"{wheel.name}#de_DE", f"{wheel.name}#fr_FR")
    anomalies = Counter()
    assert [row["target"] for _, row in READERS["catalogue"](source, german, anomalies)] == ["Sichern"] and anomalies == {"fuzzy": 1}
