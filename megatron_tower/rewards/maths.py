r"""Maths: 1.0 where math-verify finds the answer equal to the reference, else 0.0.

    {"reward": "maths", "check": {"answer": "#### 1,234"}}              GSM8K: what follows the last ####
    {"reward": "maths", "check": {"answer": "... \\boxed{\\frac12}"}}   MATH: the last \boxed{}, or bare LaTeX

Of the model's text counts, in this order: the last \boxed{}, what follows the last "####", what follows the last "answer is" or
"answer:", else the last expression or number that math-verify finds. Leaves out: checking the steps; time-outs (math-verify's
own use signals: the pool kills instead).
"""

import logging
import re

import math_verify
from sympy import Basic, MatrixBase

from megatron_tower.config import InputError

_ANNOUNCED = re.compile(r"\banswer(?:\s+is|\s*:)(?:\s*:)?", re.IGNORECASE)
# A sentence ends at a full stop that no digit follows.
_SENTENCE = re.compile(r"\.(?=\s|$)|\n")
_WORD = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{3,}")


def warm_up() -> None:
    """math-verify says in each process that its time-outs are off (as meant), and builds its parser for the first expression."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    _parsed(r"\frac{1}{2}")


def score(item: dict, answer: str) -> float:
    """1.0 or 0.0. Raises InputError when the item has no reference answer, or one that holds no expression."""
    check = item.get("check")
    reference = check.get("answer") if isinstance(check, dict) else None
    if not isinstance(reference, str | int | float) or isinstance(reference, bool) or not str(reference).strip():
        raise InputError(f'a maths item needs check: {{"answer": text or number}}, not {check!r}')
    stated = _boxed(str(reference)) or _after(str(reference), "####") or str(reference)
    gold = _parsed(stated)
    if not gold:
        raise InputError(f"check.answer {reference!r} holds no number or expression: give a number, LaTeX or \\boxed{{}}")
    if not answer.strip():
        return 0.0
    return float(math_verify.verify(gold, _final(answer), timeout_seconds=None))


def _final(answer: str) -> list[Basic | MatrixBase | str]:
    """What a text states as its answer, or else the last expression of it."""
    if stated := _boxed(answer) or _after(answer, "####"):
        return _parsed(stated)
    announced = list(_ANNOUNCED.finditer(answer))
    stated = _SENTENCE.split(answer[announced[-1].end() :].strip(), maxsplit=1)[0].strip() if announced else ""
    if _WORD.search(stated):  # "that he has 42 apples"
        return _read(stated) or _parsed(stated)
    return _parsed(stated) if stated else _read(answer)


def _boxed(text: str) -> str | None:
    r"""Content of the last \boxed{} (or \fbox{}), braces matched; None when there is none or it never closes."""
    starts = list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))
    if not starts:
        return None
    depth, at = 1, starts[-1].end()
    for i in range(at, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0) if text[i - 1] != "\\" else 0
        if depth == 0:
            return text[at:i].strip()
    return None


def _after(text: str, mark: str) -> str | None:
    """The rest of the line after the last `mark`."""
    return text.rpartition(mark)[2].strip().split("\n")[0].strip() if mark in text else None


def _parsed(stated: str) -> list[Basic | MatrixBase | str]:
    """An expression that stands alone, LaTeX or plain; its dollar and per-cent signs don't count, as in MATH's own comparison."""
    bare = re.sub(r"\\?[$%]", "", stated.strip().strip("*")).strip().removesuffix(".")
    return _read(f"\\boxed{{{bare}}}")


def _read(text: str) -> list[Basic | MatrixBase | str]:
    return math_verify.parse(text, parsing_timeout=None)
