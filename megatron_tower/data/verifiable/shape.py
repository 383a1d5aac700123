"""`json`, `list` and `bare`: the shape of the answer: an object with the translation under a key, a list kept a list, no talk."""

import json
import random
import re
from dataclasses import replace

from megatron_tower.data.locales import locale
from megatron_tower.data.split import words
from megatron_tower.data.verifiable.family import Draft, Family, Proposal, is_number, is_text, one_of

_KEYS = ("translation", "text", "output", "target", "result")
_BULLETS = {"dash": "- ", "star": "* ", "number": "{}. ", "bracket": "{}) "}
_TALK = re.compile(r"^\W*(sure|of course|certainly|okay|here is|here are|here's|here’s|the translation|translation|answer|output)\b", re.I)
_NOTE = re.compile(r"\b(note|explanation|translator's note)\s*:", re.I)


def _propose_json(draft: Draft, rng: random.Random) -> Proposal:
    return draft, {"key": rng.choice(_KEYS)}


def dressed(case: dict, text: str) -> str:
    """The answer as its constraints want it to look."""
    wrapped = next((c for c in case["constraints"] if c["family"] == "json"), None)
    return json.dumps({wrapped["key"]: text}, ensure_ascii=False) if wrapped else text


def undressed(case: dict, answer: str) -> str:
    """The translation inside the answer; the answer itself where it is not the object asked for."""
    wrapped = next((c for c in case["constraints"] if c["family"] == "json"), None)
    found = _value(wrapped["key"], answer) if wrapped else None
    return answer if found is None else found


def _value(name: str, answer: str) -> str | None:
    try:
        found = json.loads(answer)
    except ValueError:  # not JSON: that is what is asked here
        return None
    return found[name] if isinstance(found, dict) and list(found) == [name] and isinstance(found[name], str) else None


def _check_json(constraint: dict, answer: str, case: dict) -> bool:
    return _value(constraint["key"], answer) is not None


def _damage_json(constraint: dict, answer: str, case: dict) -> dict[str, str]:
    text = _value(constraint["key"], answer)
    return {
        "no_json": text,
        "other_key": json.dumps({constraint["key"] + "s": text}, ensure_ascii=False),
        "more_keys": json.dumps({constraint["key"]: text, "language": case["target_locale"]}, ensure_ascii=False),
        "not_closed": answer[:-1],
    }


def _propose_list(draft: Draft, rng: random.Random) -> Proposal:
    if len(draft.others) < 1:
        return None
    items = [(draft.source, draft.reference), *draft.others[: rng.randrange(1, 4)]]
    bullet = rng.choice(list(_BULLETS))
    source, reference = (_listed([item[side] for item in items], bullet) for side in (0, 1))
    return replace(draft, source=source, reference=reference), {"form": bullet, "items": len(items)}


def _listed(items: list[str], bullet: str) -> str:
    return "\n".join(_BULLETS[bullet].format(i) + item for i, item in enumerate(items, 1))


def _check_list(constraint: dict, answer: str, case: dict) -> bool:
    lines = answer.strip().splitlines()
    marks = [_BULLETS[constraint["form"]].format(i) for i in range(1, len(lines) + 1)]
    return len(lines) == constraint["items"] and all(
        line.startswith(mark) and line[len(mark) :].strip() for line, mark in zip(lines, marks, strict=True)
    )


def _damage_list(constraint: dict, answer: str, case: dict) -> dict[str, str]:
    lines = answer.splitlines()
    items = [line.split(" ", 1)[1] for line in lines]
    other = "star" if constraint["form"] == "dash" else "dash"
    return {
        "item_missing": "\n".join(lines[:-1]),
        "other_marks": _listed(items, other),
        "one_line": ", ".join(items),
        "no_marks": "\n".join(items),
    }


def _propose_bare(draft: Draft, rng: random.Random) -> Proposal:
    return draft, {}


def _check_bare(constraint: dict, answer: str, case: dict) -> bool:
    """The translation and nothing else: no talk before or after, no fence, not the source again, not said twice.

    Without a reference the source stands for its number of lines.
    """
    model = case["reference"] or case["source"]
    said, source, wanted = words(answer), words(case["source"]), words(model)
    half = len(said) // 2
    titles = (locale(case["target_locale"]).translation, locale(case["target_locale"]).english)
    return not (
        ("```" in answer and "```" not in model)
        or len(answer.strip().splitlines()) > len(model.strip().splitlines())
        or (_TALK.match(answer) and ":" in answer and not _TALK.match(model))
        or (_titled(answer, titles) and not _titled(model, titles))
        or len(_NOTE.findall(answer)) > len(_NOTE.findall(model))
        or (_within(source, said) and not _within(source, wanted))
        or (said and (said == wanted * 2 or (said[:half] * 2 == said and wanted[: len(wanted) // 2] * 2 != wanted)))
        or (case["reference"] and len(answer) > 1.5 * len(model) + 12)
    )


def _titled(text: str, titles: tuple[str, ...]) -> bool:
    return any(re.match(rf"\W*{re.escape(title)}\W*:", text, re.IGNORECASE) for title in titles)


def _within(part: tuple[str, ...], whole: tuple[str, ...]) -> bool:
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


def _damage_bare(constraint: dict, answer: str, case: dict) -> dict[str, str]:
    row = locale(case["target_locale"])
    return {"titled": f"{row.translation}: {answer}", "named": f"{row.english}:\n{answer}"}


_PLAIN_TEXT = frozenset({"json", "quotes", "placeholder", "date", "number", "currency", "unit", "keep", "formality", "glossary"})
JSON = Family("json", _propose_json, _check_json, _damage_json, needs={"key": is_text})
LIST = Family("list", _propose_list, _check_list, _damage_list, needs={"form": one_of(_BULLETS), "items": is_number}, excludes=_PLAIN_TEXT)
BARE = Family("bare", _propose_bare, _check_bare, _damage_bare)
