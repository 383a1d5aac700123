"""All families, in the order in which they change a draft when several are composed."""

from megatron_tower.data.verifiable import dates, formality, measures, numbers, shape, terms, writing
from megatron_tower.data.verifiable.family import Family

_ORDERED = (
    *(shape.LIST, terms.GLOSSARY, dates.FAMILY, numbers.NUMBER, numbers.CURRENCY, measures.FAMILY, formality.FAMILY),
    *(terms.KEEP, writing.QUOTES, terms.PLACEHOLDER, writing.CASING, writing.SCRIPT, writing.LENGTH, shape.JSON, shape.BARE),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ORDERED}


def compatible(names: tuple[str, ...]) -> bool:
    return not any(name in FAMILIES[other].excludes for name in names for other in names)
