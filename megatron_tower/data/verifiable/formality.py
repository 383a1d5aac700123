"""`formality`: the polite or the familiar form of address, told by the words that mark it.

Leaves out Danish, Icelandic, Norwegian and Swedish, whose polite form is out of use.
"""

import random
import re
from dataclasses import replace
from typing import NamedTuple

from megatron_tower.config import InputError
from megatron_tower.data.locales import locale
from megatron_tower.data.pair import plain
from megatron_tower.data.verifiable.family import Draft, Family, Proposal, one_of

FORMS = ("formal", "informal")
SHORT = 6  # words
_ENGLISH = ("How are you?", "And you?")


class _Address(NamedTuple):
    """The two sentences of `_ENGLISH`, each (formal, informal), and the words that mark each form; capitals matter."""

    how: tuple[str, str]
    and_you: tuple[str, str]
    formal: str
    informal: str


# By locale, else by language.
# fmt: off
_ROWS = {
    "de": (("Wie geht es Ihnen?", "Wie geht es dir?"), ("Und Sie?", "Und du?"),
           r"\b(Sie|Ihnen|Ihr|Ihre[mnrs]?)\b", r"\b([Dd]u|[Dd]ich|[Dd]ir|[Dd]ein(e[mnrs]?)?|euch|eure?[mnrs]?)\b"),
    "nl": (("Hoe gaat het met u?", "Hoe gaat het met jou?"), ("En u?", "En jij?"),
           r"\b[Uu]w?\b", r"\b([Jj]e|[Jj]ij|[Jj]ouw?|[Jj]ullie)\b"),
    "es": (("¿Cómo está usted?", "¿Cómo estás tú?"), ("¿Y usted?", "¿Y tú?"),
           r"\b([Uu]sted(es)?)\b", r"\b([Tt]ú|[Tt]e|[Tt]us?|[Tt]i|contigo)\b"),
    "fr": (("Comment allez-vous ?", "Comment vas-tu ?"), ("Et vous ?", "Et toi ?"),
           r"\b([Vv]ous|[Vv]otre|[Vv]os)\b", r"\b([Tt]u|[Tt]oi|[Tt]e|[Tt]on|[Tt]a|[Tt]es)\b"),
    "it": (("Come sta Lei?", "Come stai tu?"), ("E Lei?", "E tu?"),
           r"\b(Lei|Suo|Sua|Suoi|Sue)\b", r"\b([Tt]u|[Tt]i|[Tt]uo|[Tt]ua|[Tt]uoi|[Tt]ue)\b"),
    "pt_PT": (("Como está o senhor?", "Como estás tu?"), ("E o senhor?", "E tu?"),
              r"\b([Ss]enhora?|[Vv]ocê|[Vv]ossa)\b", r"\b([Tt]u|[Tt]e|[Tt]i|[Tt]eus?|[Tt]uas?|contigo)\b"),
    "pt_BR": (("Como vai o senhor?", "Como vai você?"), ("E o senhor?", "E você?"),
              r"\b([Ss]enhora?)\b", r"\b([Vv]ocês?|[Tt]u|[Tt]eus?|[Tt]uas?)\b"),
    "ro": (("Ce mai faceți dumneavoastră?", "Ce mai faci tu?"), ("Și dumneavoastră?", "Și tu?"),
           r"\b([Dd]umneavoastră|[Dd]vs)\b", r"\b([Tt]u|[Tt]ine|[Tt]ău|[Tt]a|[Tt]ăi|[Tt]ale)\b"),
    "pl": (("Jak się Pan ma?", "Jak ty się masz?"), ("A Pan?", "A ty?"),
           r"\b(Pan|Pani|Pana|Panu|Panią|Państwo|Państwa)\b", r"\b([Tt]y|[Cc]iebie|[Cc]i|[Tt]obie|[Tt]wój|[Tt]woj\w+)\b"),
    "ru": (("Как Вы поживаете?", "Как ты поживаешь?"), ("А Вы?", "А ты?"),
           r"\b([Вв]ы|[Вв]ас|[Вв]ам|[Вв]ами|[Вв]аш\w*)\b", r"\b([Тт]ы|[Тт]ебя|[Тт]ебе|[Тт]обой|[Тт]вой|[Тт]во\w+)\b"),
    "uk": (("Як Ви поживаєте?", "Як ти поживаєш?"), ("А Ви?", "А ти?"),
           r"\b([Вв]и|[Вв]ас|[Вв]ам|[Вв]ами|[Вв]аш\w*)\b", r"\b([Тт]и|[Тт]ебе|[Тт]обі|[Тт]обою|[Тт]вій|[Тт]во\w+)\b"),
    "cs": (("Jak se Vy máte?", "Jak se ty máš?"), ("A Vy?", "A ty?"),
           r"\b([Vv]y|[Vv]ás|[Vv]ám|[Vv]ámi|[Vv]áš|[Vv]aš\w+)\b", r"\b([Tt]y|[Tt]ebe|[Tt]obě|[Tt]ebou|[Tt]vůj|[Tt]voj\w*|[Tt]v[áéý]\w*)\b"),
    "hu": (("Hogy van Ön?", "Hogy vagy te?"), ("És Ön?", "És te?"),
           r"\b([Öö]n|[Öö]nt|[Öö]nnek|[Öö]nök\w*)\b", r"\b([Tt]e|[Tt]éged|[Nn]eked|[Tt]ied)\b"),
    "fi": (("Mitä teille kuuluu?", "Mitä sinulle kuuluu?"), ("Entä te?", "Entä sinä?"),
           r"\b([Tt]e|[Tt]eidän|[Tt]eitä|[Tt]eille|[Tt]eillä)\b", r"\b([Ss]inä|[Ss]inun|[Ss]inua|[Ss]inulle|[Ss]inulla)\b"),
    "hi": (("आप कैसे हैं?", "तुम कैसे हो?"), ("और आप?", "और तुम?"),
           r"(आप|आपका|आपके|आपकी)(?!\w)", r"(तुम|तुम्हारा|तुम्हारे|तुम्हारी|तू|तेरा)(?!\w)"),
    "zh_CN": (("您好吗？", "你好吗？"), ("您呢？", "你呢？"), r"您", r"你"),
    "zh_TW": (("您好嗎？", "你好嗎？"), ("您呢？", "你呢？"), r"您", r"你"),
    "ja": (("お元気でいらっしゃいますか？", "元気？"), ("そちらはいかがですか？", "そっちは元気？"),
           r"(です|ます|ません|ました|でした|ください)", r"(元気？|だよ|だね|だぞ|じゃん|してね|しろ)"),
    "ko": (("잘 지내십니까?", "잘 지내?"), ("어떻게 지내십니까?", "너는 어때?"),
           r"(습니다|ㅂ니다|십니까|습니까|십시오|합니다|입니다|됩니다)", r"(지내\?|어때\?|너는|너의|했어|해줘)"),
}
# fmt: on


def _address(code: str) -> _Address | None:
    row = _ROWS.get(code) or _ROWS.get(locale(code).language)
    return _Address(*row) if row else None


def _marked(text: str, form: str, code: str) -> bool:
    return re.search(getattr(_address(code), form), plain(text)) is not None


def propose(draft: Draft, rng: random.Random) -> Proposal:
    """The register that a translation about "you" has; a sentence that has one is added to short texts without "you".

    Longer texts may show their register by verb forms alone, which the added sentence could contradict.
    """
    code = draft.target_locale
    if (address := _address(code)) is None or draft.is_value or draft.source_locale != "en":
        return None
    found = [form for form in FORMS if _marked(draft.reference, form, code)]
    if re.search(r"\byou(r|rs)?\b", draft.source, re.IGNORECASE):
        return (draft, {"form": found[0]}) if len(found) == 1 else None
    if found or len(draft.source.split()) > SHORT:
        return None
    form, which = rng.choice(FORMS), rng.randrange(len(_ENGLISH))
    stop = "" if draft.source[-1:] in ".!?:" else "."
    source, reference = f"{draft.source}{stop} {_ENGLISH[which]}", f"{draft.reference}{stop} {address[which][FORMS.index(form)]}"
    return replace(draft, source=source, reference=reference), {"form": form}


def check(constraint: dict, answer: str, case: dict) -> bool:
    """At least one marker of the form asked for, none of the other; raises InputError for a language with one form of address."""
    code, form = case["target_locale"], constraint["form"]
    if _address(code) is None:
        raise InputError(f"translation item: formality can't be told in {code}: drop that constraint")
    other = FORMS[1 - FORMS.index(form)]
    return _marked(answer, form, code) and not _marked(answer, other, code)


def damage(constraint: dict, answer: str, case: dict) -> dict[str, str]:
    """Its markers turned into one of the other form, taken out, or both forms together."""
    address, form = _address(case["target_locale"]), constraint["form"]
    other = FORMS[1 - FORMS.index(form)]
    own, sentence = getattr(address, form), address.and_you[FORMS.index(other)]
    marker = re.search(getattr(address, other), sentence)[0]
    return {
        "other_register": re.sub(own, marker, plain(answer)),
        "mixed_registers": f"{answer} {sentence}",
        "no_register": re.sub(own, "…", plain(answer)),
    }


FAMILY = Family("formality", propose, check, damage, needs={"form": one_of(FORMS)}, excludes=frozenset({"casing", "list"}))
