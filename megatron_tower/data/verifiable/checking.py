"""Which constraints of a case an answer keeps, and the damaged answers that a checker must tell from the right one."""

import random

from megatron_tower.config import InputError
from megatron_tower.data.locales import locale
from megatron_tower.data.verifiable.families import FAMILIES
from megatron_tower.data.verifiable.shape import dressed, undressed

_FIELDS = ("source", "source_locale", "target_locale", "reference", "constraints")
_OTHERS = {  # sentences in a language that the target's is not
    "fi": "Tämä lause on kirjoitettu aivan väärällä kielellä, eikä se käännä mitään.",
    "ru": "Это предложение написано совсем на другом языке и ничего не переводит.",
}


def case_of(item: dict) -> dict:
    """The item's `check`, complete; raises InputError that names what is missing or unknown."""
    case = item.get("check")
    if not isinstance(case, dict) or (missing := [name for name in _FIELDS if name not in case]):
        wanted = missing[0] if isinstance(case, dict) else "everything"
        raise InputError(f"translation item: its check lacks {wanted}: give {', '.join(_FIELDS)} (reference may be null)")
    if not isinstance(case["source"], str) or not isinstance(case["reference"], str | None):
        raise InputError("translation item: check.source must be text, and check.reference text or null")
    for code in (case["source_locale"], case["target_locale"]):
        locale(code)
    if not isinstance(case["constraints"], list) or not case["constraints"]:
        raise InputError("translation item: check.constraints is empty: name at least one family, e.g. [{'family': 'bare'}]")
    for constraint in case["constraints"]:
        _validate(constraint)
    return case


def _validate(constraint: dict) -> None:
    family = FAMILIES.get(constraint.get("family")) if isinstance(constraint, dict) else None
    if family is None:
        raise InputError(f"translation item: constraint {constraint} names no known family: use one of {', '.join(FAMILIES)}")
    for name, valid in family.needs.items():
        if name not in constraint or not valid(constraint[name]):
            wrong = f"has {name}={constraint[name]!r}" if name in constraint else f"lacks {name}"
            raise InputError(f"translation item: constraint {family.name} {wrong}: give valid {', '.join(family.needs)}")


def kept(case: dict, answer: str) -> list[bool]:
    """For each constraint whether it is kept: JSON by the whole answer, the others by the translation inside it."""
    text = undressed(case, answer)
    return [FAMILIES[c["family"]].check(c, answer if c["family"] == "json" else text, case) for c in case["constraints"]]


def damaged(item: dict, rng: random.Random) -> dict[str, str]:
    """Variants of the reference answer, each with one fault, by its name: the general ones, then those of each constraint."""
    case, answer = case_of(item), item["answer"]
    text = undressed(case, answer)
    stray = _OTHERS["ru" if locale(case["target_locale"]).language == "fi" else "fi"]
    variants = {
        "empty": "",
        "white_space": " \n\t ",
        "copied_source": dressed(case, case["source"]),
        "wrong_language": dressed(case, stray),
        "constant": dressed(case, rng.choice(("OK OK OK OK", "1234567890", "lorem ipsum dolor sit amet"))),
        "preamble": f"Sure! Here is the translation: {answer}",
        "trailing_note": f"{answer}\n\nNote: I kept the tone of the original.",
        "inline_note": f"{answer} (Note: this is a literal translation)",
        "repeated": f"{answer} {answer}",
        "truncated": dressed(case, text[: len(text) // 2]),
        "source_first": f"{case['source']}\n{answer}",
        "fenced": f"```\n{answer}\n```",
    }
    for constraint in case["constraints"]:
        own = FAMILIES[constraint["family"]]
        if own.name == "json":
            broken = own.damage(constraint, answer, case)
        else:
            broken = {name: dressed(case, changed) for name, changed in own.damage(constraint, text, case).items()}
        variants |= {f"{own.name}.{name}": changed for name, changed in broken.items()}
    return variants
