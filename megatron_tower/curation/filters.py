"""Filters as conf/data names them: name -> options, and `per_locale: {locale: options}` among them -> name -> drop(row)."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from megatron_tower.config import InputError
from megatron_tower.curation import documents, pairs
from megatron_tower.curation.shards import Row
from megatron_tower.data.locales import locale

KINDS = {"documents": (documents.FILTERS, "locale"), "pairs": (pairs.FILTERS, "target_locale")}


def filters(kind: str, plan: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Callable[[Row], bool]]:
    """The filters of `documents` or `pairs` in the plan's order. Raises InputError for one that can't be."""
    known, code = KINDS[kind]
    made = {}
    for name, options in plan.items():
        place = f"data.curation.{kind}.{name}"
        if name not in known:
            raise InputError(f"{place} is unknown: use {', '.join(known)}")
        options = dict(options or {})
        special = options.pop("per_locale", None) or {}
        drop = _made(known[name], options, place)
        own = {of: _made(known[name], options | dict(more), f"{place}.per_locale.{locale(of).code}") for of, more in special.items()}
        made[name] = _by_locale(drop, own, code) if own else drop
    return made


def _by_locale(drop: Callable[[Row], bool], own: Mapping[str, Callable[[Row], bool]], code: str) -> Callable[[Row], bool]:
    return lambda row: own.get(row[code], drop)(row)


def _made(factory: Callable[..., Callable[[Row], bool]], options: Mapping[str, Any], place: str) -> Callable[[Row], bool]:
    asked = inspect.signature(factory).parameters
    for name, value in options.items():
        if name not in asked:
            raise InputError(f"{place}.{name} is unknown: use {', '.join([*asked, 'per_locale'])}")
        wanted = asked[name].annotation
        if not _fits(value, wanted):
            form = "a text" if wanted is str else f"{'a whole number' if wanted is int else 'a number'} that is not negative"
            raise InputError(f"{place}.{name}={value} must be {form}")
    for name, parameter in asked.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise InputError(f"{place} needs {name}")
    return factory(**options)


def _fits(value: Any, wanted: type) -> bool:
    if wanted is str:
        return isinstance(value, str) and bool(value)
    numbers = int if wanted is int else int | float
    return isinstance(value, numbers) and not isinstance(value, bool) and value >= 0
