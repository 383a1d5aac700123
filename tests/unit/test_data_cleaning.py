"""Filters, the split by source, and the normal forms of text."""

import pytest

from megatron_tower.data import cleaning
from megatron_tower.data.pair import Pair, key, plain
from megatron_tower.data.split import HeldOut, is_held_out, split, words


def pair(source: str, target: str, locale: str = "de_DE", **flags: bool) -> Pair:
    return Pair(locale, source, target, "toy.po", **flags)


GOOD = [
    pair("Save page", "Seite speichern"),
    pair("Are you sure you want to delete these pages?", "Tem a certeza que quer apagar estas páginas?", "pt_PT"),
    pair("Loading...", "加载中...", "zh_CN"),
    pair("You do not have permission to see this page.", "Du har ikkje løyve til å sjå denne sida.", "nn_NO"),
    pair("100% of learners, e.g. yours", "100 % der Lernenden, z. B. Ihre"),
    pair("in 3 days", "3日後", "ja_JP"),
]
BAD = [
    ("untranslated", pair("Save page", "")),
    ("untranslated", pair("Kolibri", "kolibri")),
    ("fuzzy", pair("Save page", "Seite speichern", fuzzy=True)),
    ("plural", pair("one page", "eine Seite", plural=True)),
    ("placeholder", pair("Delete %(title)s now", "%(title)s jetzt löschen")),
    ("placeholder", pair("Delete {name}", "{name} löschen")),
    ("placeholder", pair("%d pages", "%d Seiten")),
    ("tag", pair("Read <b>this</b> now", "Lies <b>das</b> jetzt")),
    ("tag", pair("Terms &amp; conditions", "Allgemeine Bedingungen")),
    ("accelerator", pair("&File menu", "&Datei-Menü")),
    ("accelerator", pair("page_id given", "page_id angegeben")),
    ("technical", pair("See https://example.org for more", "Mehr unter https://example.org zu lesen")),
    ("technical", pair("Add it to robots.txt first", "Erst in robots.txt eintragen")),
    ("technical", pair("6 a.m. (7)", "6:00 Uhr (7)")),
    ("length", pair("S", "So")),
    ("length", pair("word " * 80, "Wort " * 80)),
    ("length_ratio", pair("Undo", "Den letzten Schritt rückgängig machen")),
    ("wrong_language", pair("Choose the language of this site", "Veuillez choisir la langue de ce site internet maintenant")),
]


@pytest.mark.parametrize(("reason", "bad"), BAD)
def test_each_filter_removes_what_it_names(reason: str, bad: Pair) -> None:
    kept, removed = cleaning.clean([bad])
    assert kept == []
    assert {name: dict(counts) for name, counts in removed.items() if counts} == {reason: {bad.locale: 1}}


@pytest.mark.parametrize("good", GOOD)
def test_good_pairs_stay(good: Pair) -> None:
    assert cleaning.clean([good])[0] == [good]


def test_duplicates_and_second_translations_go_and_text_becomes_plain() -> None:
    kept, removed = cleaning.clean(
        [pair("Save\n page", "Seite\u00a0speichern"), pair("save page", "Seite speichern"), pair("Save page", "Speichern")]
    )
    assert [(p.source, p.target) for p in kept] == [("Save page", "Seite speichern")]
    assert removed["duplicate"]["de_DE"] == removed["alternative"]["de_DE"] == 1


def test_normal_forms() -> None:
    assert plain(" 12\u202f345,67\u00a0€\u200e ") == "12 345,67 €"
    assert key("ＡＢＣ  Straße") == key("abc STRASSE")
    assert words("2024年3月12日") == ("2024", "年", "3", "月", "12", "日")


def test_split_depends_on_the_source_alone() -> None:
    sources = [f"Sentence number {i}" for i in range(4000)]
    share = sum(is_held_out(s, 0.1) for s in sources) / len(sources)
    assert 0.08 < share < 0.12
    assert all(is_held_out(s, 0.1) == is_held_out(f"  {s.upper()}\u00a0", 0.1) for s in sources)
    assert all(is_held_out(s, 0.2) for s in sources if is_held_out(s, 0.1))  # a larger share only adds


def test_training_pairs_that_repeat_a_held_out_string_are_dropped() -> None:
    test_source = next(f"Open page {i}" for i in range(1000) if is_held_out(f"Open page {i}", 0.05))
    train_sources = [s for s in (f"Show item {i}" for i in range(20)) if not is_held_out(s, 0.05)][:5]
    pairs = [
        pair(test_source, "Seite jetzt öffnen"),
        pair(test_source, "ページを開く", "ja_JP"),
        pair(train_sources[0], "Seite jetzt öffnen"),  # the same translation
        pair(train_sources[1], "Bitte die Seite jetzt öffnen."),  # contains it
        pair(train_sources[2], "このページを開くには", "ja_JP"),  # contains it, without spaces between words
        pair(train_sources[3], "Seite öffnen"),
    ]
    train, test, held, dropped = split(pairs, 0.05)
    assert [p.target for p in train] == ["Seite öffnen"]
    assert [p.source for p in test] == [test_source] * 2
    assert len(dropped) == 3
    assert held.leaks(f"First line\nGerman: {test_source}")


def test_guard_sees_short_strings_as_a_whole_line_or_after_a_label_only() -> None:
    held = HeldOut(["14:07"])
    assert held.leaks("14:07") and held.leaks("Text\nGerman: 14:07") and not held.leaks("at 14:07 sharp")
