"""How much of what is trained on: planned from measured sizes before anything is tokenized, compared with the tokens after.

Part p of the mixture gets share[p] * tokens. Within a part, language l gets a share ~ available[l] ** temperature; a language that has less
gives all it has once, and the others share the rest. A part that has less in all is repeated by the blend (data/build.py).
"""

from collections.abc import Mapping

Group = tuple[str, str]  # (part, language): of a pair, the language beside English, or the target's


def plan(available: Mapping[Group, float], shares: Mapping[str, float], tokens: int, temperature: float) -> dict[Group, float]:
    """The fraction of each group's text to draw, 0 to 1. available: tokens; tokens 0: everything."""
    if not tokens:
        return {group: 1.0 for group in available}
    fractions: dict[Group, float] = {}
    for part, share in shares.items():
        has = {language: count for (of, language), count in available.items() if of == part and count > 0}
        wanted = _fill(has, share * tokens, temperature)
        fractions |= {(part, language): wanted[language] / has[language] for language in has}
    return fractions


def _fill(has: Mapping[str, float], budget: float, temperature: float) -> dict[str, float]:
    """Tokens of each language: shares ~ has ** temperature, none above what it has."""
    given: dict[str, float] = {}
    open_ = dict(has)
    while open_:
        weights = {language: count**temperature for language, count in open_.items()}
        whole = sum(weights.values())
        offered = {language: max(0.0, budget - sum(given.values())) * weights[language] / whole for language in open_}
        full = [language for language in open_ if offered[language] >= open_[language]]
        if not full:
            return given | offered
        for language in full:
            given[language] = open_.pop(language)
    return given
