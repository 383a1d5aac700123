"""How a translation is put into words: the released models' prompt, and the forms that parallel text takes in CPT.

A template is named with its version; a change of wording is a new version, so that a manifest says what was trained on.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from megatron_tower.data.locales import locale

RELEASED = "released/1"


class Parallel(NamedTuple):
    """A form of parallel text. write: (source locale, target locale, text, translation) -> document.

    spoken: whose words it puts around the texts, as {source} or {target} or a locale; both, where each language has its own name.
    """

    write: Callable[[str, str, str, str], str]
    spoken: str


def translation_prompt(source_locale: str, target_locale: str, text: str) -> str:
    """The three-line prompt of the released Tower+ models, left open after the target's name."""
    source, target = locale(source_locale).english, locale(target_locale).english
    return f"Translate the following {source} source text to {target}:\n{source}: {text}\n{target}: "


def _released(source: str, target: str, text: str, translation: str) -> str:
    return translation_prompt(source, target, text) + translation


def _english_names(source: str, target: str, text: str, translation: str) -> str:
    return f"{locale(source).english}: {text}\n{locale(target).english}: {translation}"


def _own_names(source: str, target: str, text: str, translation: str) -> str:
    """Each language by the name it gives itself."""
    return f"{_name(source, source)}: {text}\n{_name(target, target)}: {translation}"


def _target_titled(source: str, target: str, text: str, translation: str) -> str:
    """The instruction in the target's language: `Übersetzung (Englisch → Deutsch)`."""
    return f"{locale(target).translation} ({_name(source, target)} → {_name(target, target)})\n{text}\n{translation}"


def _source_titled(source: str, target: str, text: str, translation: str) -> str:
    return f"{locale(source).translation} ({_name(source, source)} → {_name(target, source)})\n{text}\n{translation}"


PARALLEL = {
    RELEASED: Parallel(_released, "en"),
    "english_names/1": Parallel(_english_names, "en"),
    "own_names/1": Parallel(_own_names, "{source}, {target}"),
    "target_titled/1": Parallel(_target_titled, "{target}"),
    "source_titled/1": Parallel(_source_titled, "{source}"),
}


def document(template: str, source: str, target: str, texts: Sequence[str], translations: Sequence[str]) -> tuple[str, tuple[str, str]]:
    """Several sentences that follow one another, translated as one text, one sentence a line; and (template, locale of its words).

    Raises KeyError for a template that PARALLEL lacks.
    """
    write, spoken = PARALLEL[template]
    text = write(source, target, "\n".join(texts), "\n".join(translations))
    return text, (template, spoken.format(source=source, target=target))


INSTRUCTION: dict[str, Callable[[str, str], str]] = {
    "question_answer/1": lambda prompt, answer: f"Question: {prompt}\nAnswer: {answer}",
    "bare/1": lambda prompt, answer: f"{prompt}\n{answer}",
}


@lru_cache(maxsize=1024)
def _name(code: str, speaker: str) -> str:
    """What speakers of one locale call the language of another."""
    from babel import Locale as Cldr

    name = Cldr.parse(locale(code).cldr).get_language_name(locale(speaker).cldr)
    return name[:1].upper() + name[1:]
