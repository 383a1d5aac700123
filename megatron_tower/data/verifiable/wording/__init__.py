"""An instruction in words: in English, or in the target's own language, of which every one of the recipe has a table.

A table leaves out what its language lacks: capitals, a polite form of address, words divided by spaces.
"""

from megatron_tower.data.locales import locale
from megatron_tower.data.verifiable.wording.english import ENGLISH
from megatron_tower.data.verifiable.wording.germanic import GERMANIC
from megatron_tower.data.verifiable.wording.others import OTHERS
from megatron_tower.data.verifiable.wording.romance import ROMANCE
from megatron_tower.data.verifiable.wording.slavic import SLAVIC

WORDINGS: dict[str, dict[str, str]] = {"en": ENGLISH, **GERMANIC, **ROMANCE, **SLAVIC, **OTHERS}


def wording(code: str) -> dict[str, str]:
    """The table of a locale: its own first (zh_TW), else its language's."""
    return WORDINGS.get(code) or WORDINGS[locale(code).language]


def instruction(constraints: list[dict], code: str, *, own_language: bool) -> str:
    """One sentence a constraint, in the language of the target `code` or in English."""
    table = wording(code) if own_language else ENGLISH
    sentences = []
    for constraint in constraints:
        name = f"{constraint['family']}.{constraint.get('form')}"
        shown = {parameter: ", ".join(value) if isinstance(value, list) else value for parameter, value in constraint.items()}
        sentences.append(table[name if name in table else constraint["family"]].format(language=locale(code).english, **shown))
    return ("" if own_language and not locale(code).spaced else " ").join(sentences)
