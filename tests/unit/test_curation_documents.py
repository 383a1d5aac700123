"""Document filters: what each keeps and drops on either side of its threshold; precision and recall on documents labelled by hand."""

from collections import Counter
from pathlib import Path

import pytest
import yaml

from megatron_tower.config import REPOSITORY, InputError
from megatron_tower.curation.documents import FILTERS
from megatron_tower.curation.filters import filters
from megatron_tower.curation.text import Text
from megatron_tower.data.locales import locale
from tests.unit.curation_labelled_documents import CLEAN, DOCUMENTS

PLAN = yaml.safe_load((REPOSITORY / "conf/data/curation/filters.yaml").read_text(encoding="utf-8"))["documents"]
NAMES = [f"w{chr(97 + i)}{chr(97 + k)}x" for i in range(26) for k in range(26)]  # words of four letters, all different


def row(text: str, code: str = "en") -> dict:
    return {"locale": code, "text": text}


def words(count: int, *more: str) -> str:
    return " ".join([*NAMES[:count], *more])


def lines(*counts: int) -> str:
    """Different lines of six words, each as often as `counts` says."""
    return "\n".join(" ".join(NAMES[6 * i : 6 * i + 6]) for i, count in enumerate(counts) for _ in range(count))


def spread(phrase: str, times: int, others: int) -> str:
    """A phrase between words that are all different."""
    each = others // times
    return " ".join(f"{phrase} {' '.join(NAMES[i * each : (i + 1) * each if i < times - 1 else others])}" for i in range(times))


RUSSIAN = next(text for what, code, text in DOCUMENTS if what == "wrong language" and code == "uk_UA" and "мост через реку" in text)
MANY = lines(*[1] * 20)
HAN = "".join(chr(0x4E00 + i) for i in range(300))


@pytest.mark.parametrize(
    ("name", "options", "kept", "dropped"),
    [
        ("length", {"shortest": 20, "longest": 600}, row(words(20)), row(words(19))),
        ("length", {"shortest": 20, "longest": 600}, row(words(600)), row(words(601))),
        ("length", {"shortest": 20, "longest": 100}, row(HAN[:40], "zh_CN"), row(HAN[:39], "zh_CN")),
        ("length", {"shortest": 20, "longest": 100}, row(HAN[:200], "zh_CN"), row(HAN[:201], "zh_CN")),
        ("language", {}, row(CLEAN["uk_UA"][0], "uk_UA"), row(RUSSIAN, "uk_UA")),
        ("language", {}, row(CLEAN["de_DE"][0], "de_DE"), row(CLEAN["fr_FR"][0], "de_DE")),
        ("language", {}, row("Les enfants ont joué dans la cour.", "de_DE"), row("Les enfants ont joué dans la cour. " * 2, "de_DE")),
        ("language", {"sure": 1.1}, row(CLEAN["fr_FR"][0], "de_DE"), row(CLEAN["uk_UA"][0], "de_DE")),
        ("language", {"long_enough": 999}, row("漢字漢字 abcd", "zh_CN"), row("漢字漢 abcd", "zh_CN")),
        ("language", {}, row("Båten ligger vid kajen och väntar på vädret som ska komma från väster i kväll.", "da_DK"), row(HAN, "da_DK")),
        ("repetition", {"grams": 9.0, "line_characters": 1.0}, row(lines(4, 1, 1, 1, 1, 1, 1)), row(lines(4, 1, 1, 1, 1, 1))),
        ("repetition", {"grams": 9.0, "lines": 1.0}, row(lines(*[2] * 2, *[1] * 6)), row(lines(*[2] * 3, *[1] * 6))),
        ("repetition", {"grams": 9.0}, row(lines(1, 1).replace("\n", "\n\n")), row("\n\n".join([lines(1)] * 2))),
        (
            "repetition",
            {"grams": 9.0},
            row("aa\n\naa\n\n" + lines(*[1] * 20).replace("\n", "\n\n")),
            row("aa\n\naa\n\n" + lines(*[1] * 20)),
        ),
        ("repetition", {}, row(spread("aaaa bbbb", 10, 80)), row(spread("aaaa bbbb", 10, 79))),
        ("repetition", {}, row(words(80, *NAMES[:6])), row(words(79, *NAMES[:6]))),
        ("repetition", {}, row(words(266, *NAMES[:14])), row(words(265, *NAMES[:14]))),
        ("repetition", {"grams": 1.3}, row(words(144, *NAMES[:10])), row(words(143, *NAMES[:10]))),
        ("repetition", {}, row(HAN + HAN[:16], "zh_CN"), row(HAN[:240] + HAN[:16], "zh_CN")),
        ("quality", {"shortest_word": 3.0}, row("abc " * 9), row("abc " * 8 + "ab")),
        ("quality", {"longest_word": 10.0}, row("abcdefghij " * 9), row("abcdefghij " * 8 + "abcdefghijk")),
        ("quality", {}, row(words(8, "1234", "--//")), row(words(7, "1234", "--//", "5,67"))),
        ("quality", {}, row("漢字漢字漢字漢字。，", "zh_CN"), row("漢字漢字漢字漢字。，！", "zh_CN")),
        ("quality", {}, row(words(20, "#tag", "#tag")), row(words(17, "#tag", "#tag"))),
        ("quality", {"ellipses": 1.0}, row(words(20) + " x… yyy..."), row(words(16) + "… yyyyy...")),
        (
            "quality",
            {"alphabetic": 0.0, "shortest_word": 0.0},
            row("\n".join(["- item"] * 9 + ["item"])),
            row("\n".join(["• item"] * 19 + ["item"])),
        ),
        ("quality", {"symbols": 9.0}, row("\n".join(["item..."] * 3 + ["item"] * 7)), row("\n".join(["item…"] * 4 + ["item"] * 6))),
        ("boilerplate", {}, row("\n".join(["We use Cookies."] + ["text"] * 4)), row("\n".join(["We use Cookies."] + ["text"] * 3))),
        ("boilerplate", {}, row("Lorem and ipsum"), row("text LOREM Ipsum text")),
        ("markup", {}, row(words(60, "{", "}", "{")), row(words(50, "{", "}", "{"))),
        ("markup", {}, row(words(60, "<b>a</b>", "&amp;")), row(words(55, "<b>a</b>", "&amp;"))),
        ("markup", {}, row(words(100, "a < b > c", "<ann@b.org>", "AT&T")), row(words(16, "<br/>"))),
        ("markup", {}, row(words(100, "caf\u00e9")), row(words(90, "caf\u00c3\u00a9"))),
        ("markup", {}, row(words(100, "a\ufffd")), row(words(90, "a\ufffd"))),
    ],
)
def test_each_filter_has_two_sides(name: str, options: dict, kept: dict, dropped: dict) -> None:
    drop = FILTERS[name](**options)
    assert (drop(kept), drop(dropped)) == (False, True)


def test_blocked_words_are_words_where_spaces_divide_them(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("Casino\n\n赌场\n", encoding="utf-8")
    drop, twice = FILTERS["blocked"](str(path)), FILTERS["blocked"](str(path), most=1)
    assert drop(row("a CASINO, here")) and not drop(row("two casinos"))
    assert drop(row("在赌场里", "zh_CN")) and not drop(row("在商场里", "zh_CN"))
    assert not twice(row("a casino")) and twice(row("a casino, a casino"))
    with pytest.raises(InputError, match="holds no words"):
        FILTERS["blocked"](str(path.with_name("empty")) if path.with_name("empty").write_text("\n") else "")
    with pytest.raises(InputError, match="can't be read as a list of words"):
        FILTERS["blocked"](str(tmp_path / "nowhere"))


def test_repeated_n_grams_are_what_a_plain_count_finds() -> None:
    text = "a b c a b c d e a b f g h a b c d d d d d i j a b c d e"
    seen, tokens = Text(text, locale("en")), text.split()
    for n in range(1, 9):
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        counts = Counter(grams)
        within = {i + k for i, gram in enumerate(grams) if counts[gram] > 1 for k in range(n)}
        assert seen.duplicated(n) == len(within) / len(tokens)
        most = max(counts.values())
        assert seen.top(n) == (most * n / len(tokens) if most > 1 else 0)


def test_precision_and_recall_on_labelled_documents() -> None:
    drops = filters("documents", PLAN)
    found = [(what, any(drop(row(text, code)) for drop in drops.values())) for what, code, text in DOCUMENTS]
    kinds, gone = Counter(what for what, _ in found), Counter(what for what, drop in found if drop)
    print(*(f"{what or 'clean'}: {gone[what]} of {kinds[what]}" for what in kinds), sep="\n")
    dropped, noisy = gone.total() - gone[""], kinds.total() - kinds[""]
    assert len(found) >= 60 and dropped / gone.total() >= 0.95 and dropped / noisy >= 0.9
    fluent = ("spam", "word salad")  # for a classifier to find
    assert all(gone[what] == kinds[what] for what in kinds if what and what not in fluent)


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ({"taste": {}}, r"data\.curation\.documents\.taste is unknown: use length, language"),
        ({"length": {"shortes": 3}}, r"documents\.length\.shortes is unknown: use shortest, longest, per_locale"),
        ({"length": {"shortest": 2.5}}, r"documents\.length\.shortest=2\.5 must be a whole number that is not negative"),
        ({"quality": {"symbols": -0.1}}, r"symbols=-0\.1 must be a number"),
        ({"quality": {"symbols": True}}, r"symbols=True must be a number"),
        ({"quality": {"symbols": float("nan")}}, r"symbols=nan must be a number"),
        ({"blocked": {}}, r"documents\.blocked needs file"),
        ({"blocked": {"file": 3}}, r"file=3 must be a text"),
        ({"length": {"per_locale": {"xx_XX": {}}}}, "locale xx_XX is unknown"),
        ({"length": {"per_locale": {"de_DE": {"least": 1}}}}, r"length\.per_locale\.de_DE\.least is unknown"),
    ],
)
def test_a_plan_that_can_not_be_is_refused(plan: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        filters("documents", plan)


def test_a_locale_has_options_of_its_own_and_shares_the_others() -> None:
    drop = filters("documents", {"length": {"shortest": 5, "longest": 9, "per_locale": {"de_DE": {"shortest": 3}}}})["length"]
    assert [drop(row(words(n))) for n in (3, 4, 5, 9, 10)] == [True, True, False, False, True]
    assert [drop(row(words(n), "de_DE")) for n in (2, 3, 9, 10)] == [True, False, False, True]


def test_the_plan_of_conf_names_every_option() -> None:
    from megatron_tower.command import load

    assert set(PLAN) == set(FILTERS) - {"blocked"}
    made = load(["+data/curation=filters", "data.curation.work=somewhere"]).data.curation
    assert list(made.documents) == list(PLAN) and filters("documents", made.documents) and filters("pairs", made.pairs)
