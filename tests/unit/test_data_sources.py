"""Wheels as text: what is read out of one, and how one reaches the cache."""

import json
import zipfile
from pathlib import Path

import pytest

from megatron_tower.config import InputError
from megatron_tower.data import sources

PO = """
msgid ""
msgstr "Content-Type: text/plain; charset=utf-8\\n"

msgid "Save page"
msgstr "Seite speichern"

#, fuzzy
msgid "Delete page"
msgstr "Seite vielleicht löschen"

msgid "one page"
msgid_plural "many pages"
msgstr[0] "eine Seite"
msgstr[1] "viele Seiten"

#~ msgid "Obsolete"
#~ msgstr "Veraltet"
"""


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "toy-1.0-py3-none-any.whl"
    files = {
        "toy/app/locale/de/LC_MESSAGES/django.po": PO,
        "toy/locale/en/LC_MESSAGES/a-messages.json": json.dumps({"hello": "Hello", "bye": "Goodbye"}),
        "toy/locale/de/LC_MESSAGES/a-messages.json": json.dumps({"bye": "Auf Wiedersehen", "hello": "Hallo"}),
        "toy/dist/vendored/locale/de/LC_MESSAGES/django.po": PO.replace("Seite", "VENDORED"),
        "toy/locale/fr/LC_MESSAGES/django.po": PO.replace("Seite", "FRENCH"),
        "toy-1.0.dist-info/METADATA": "Metadata-Version: 2.4\nName: toy\nVersion: 1.0\nLicense-Expression: MIT\n",
        "toy-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def record(wheel: Path) -> None:
    wheel.with_name(wheel.name + ".sha256").write_text(sources.sha256(wheel))


def test_catalogues_of_both_kinds_are_read_and_vendored_ones_are_not(wheel: Path) -> None:
    pairs = list(sources.read(wheel, ["de_DE"]))
    assert [(p.source, p.target, p.fuzzy, p.plural) for p in pairs] == [
        ("Save page", "Seite speichern", False, False),
        ("Delete page", "Seite vielleicht löschen", True, False),
        ("one page", "eine Seite", False, True),
        ("Hello", "Hallo", False, False),
        ("Goodbye", "Auf Wiedersehen", False, False),
    ]
    assert {p.locale for p in pairs} == {"de_DE"}
    assert list(sources.read(wheel, ["fr_CA"])) == []  # French of France is not taken for it


def test_licence_is_what_the_wheel_states(wheel: Path) -> None:
    assert sources.describe("toy", "1.0", wheel) == sources.Source("toy", "1.0", "MIT", sources.sha256(wheel))


def test_cached_wheel_is_used_and_a_changed_one_refused(wheel: Path) -> None:
    record(wheel)
    assert sources.fetch("Toy", "1.0", wheel.parent) == wheel
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(InputError, match="not what was downloaded"):
        sources.fetch("toy", "1.0", wheel.parent)


def test_no_network_and_no_cache_is_one_clear_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(InputError, match=r"kolibri==0\.19\.5 is not in the cache .* could not be downloaded .* set data\.cache"):
        sources.fetch("kolibri", "0.19.5", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_download_comes_from_pip_under_its_final_name_with_a_checksum(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    cached = sources.fetch("toy", "1.0", tmp_path / "cache")
    assert cached.read_bytes() == wheel.read_bytes()
    assert sorted(p.name for p in cached.parent.iterdir()) == [wheel.name, wheel.name + ".sha256"]


def test_damaged_download_is_refused_and_not_kept(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = bytearray(wheel.read_bytes())
    damaged[damaged.index(b"Seite speichern")] ^= 1
    wheel.write_bytes(damaged)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with pytest.raises(InputError, match="damaged"):
        sources.fetch("toy", "1.0", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
