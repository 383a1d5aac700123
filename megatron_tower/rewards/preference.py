"""Translation preference: 1.0 where the model names the translation that people scored higher, else 0.0.

    {"reward": "preference", "check": {"best": "B", "labels": ["A", "B"]}}          prompts: megatron_tower.data.judgements

An answer counts when it gives one clear verdict, whatever reasoning surrounds it: a label alone in its line or sentence ("B",
"**B**", "(b)", "Translation B."), "B is (much) better", "the best translation is B", "Answer: B", "I prefer B", "B because ...",
{"better": "B"}. No verdict, verdicts for several labels, "A is worse than B" (which leaves open whether either is good), a
question or a negation: 0. Leaves out: other languages than the prompt's, and graded credit.
"""

import json
import re
from collections.abc import Iterator

from megatron_tower.config import InputError

_KEYS = ("better", "best", "answer", "choice", "winner", "preferred", "verdict", "translation")
_NOUN = r"(?:(?:translation|option|candidate|version)\s+)?"
_DEGREE = r"(?:(?:the|clearly|much|far|slightly|significantly|definitely|overall|a bit|a little|considerably|probably|by far)\s+)*"
_BETTER = r"(?:better|best|superior|preferable|preferred|winner)"
# Before a verdict in its sentence, these take it back: "if B is better", "I don't think B is better", "neither A nor B is better".
_UNSAID = re.compile(r"\b(?:not|no(?!,)|never|neither|nor|whether|if|unless|both|either|equally|hardly)\b|n['’]t\b", re.IGNORECASE)

_WORST = re.compile(r"\bwors[et]", re.IGNORECASE)  # "worst: A"


def score(item: dict, answer: str) -> float:
    """1.0 or 0.0. Raises InputError for an item without a best label among its labels."""
    check = item.get("check")
    best, labels = (check.get("best"), check.get("labels")) if isinstance(check, dict) else (None, None)
    if not isinstance(labels, list) or not all(isinstance(label, str) and re.fullmatch("[A-Z]", label) for label in labels):
        labels = []
    if len(set(labels)) < 2 or best not in labels:
        raise InputError(f'a preference item needs check: {{"best": one label, "labels": [two or more capital letters]}}, not {check!r}')
    return float(choice(answer, labels) == best)


def choice(answer: str, labels: list[str]) -> str | None:
    """The one label (`A`, `B`, ...) that a text gives as its verdict; None when it gives none or several."""
    content = _json_object(answer)
    if content is None:
        verdicts = set(_verdicts(answer, labels))
    else:
        named = [value for key, value in content.items() if key.lower() in _KEYS and isinstance(value, str)]
        verdicts = {label for value in named for label in _alone(value, labels)}
    return verdicts.pop() if len(verdicts) == 1 else None


def _json_object(answer: str) -> dict | None:
    """The JSON object that an answer consists of, bare or fenced."""
    found = re.fullmatch(r"\s*(?:```(?:json)?)?\s*(\{.*\})\s*(?:```)?\s*", answer, re.DOTALL)
    try:
        return json.loads(found[1]) if found else None
    except ValueError:
        return None


def _alone(text: str, labels: list[str]) -> Iterator[str]:
    """The label that a line or sentence consists of, in either case."""
    if found := re.fullmatch(rf"[\W_]*{_NOUN}[\W_]*({'|'.join(labels)})[\W_]*", text, re.IGNORECASE):
        yield found[1].upper()


def _verdicts(answer: str, labels: list[str]) -> Iterator[str]:
    """Every label that some sentence declares the best."""
    label = "|".join(labels)
    one = rf"[\W_]{{0,4}}({label})(?!\w)(?!['’]\w)"  # maybe in brackets, quotes or stars
    patterns = [
        rf"\b({label})[\W_]{{0,3}}\s+is\s+{_DEGREE}{_BETTER}\b",
        rf"\b({label})[\W_]{{0,3}}\s+wins\b",
        rf"\b(?i:{_BETTER})\s+(?i:(?:one\s+)?{_NOUN})is\s+(?i:{_NOUN}){one}",
        rf"\b(?i:answer|choice|verdict|winner|boxed)(?:\s+is\b|\W{{0,3}}[:={{])(?i:\s*{_NOUN}){one}",
        rf"\bI(?:['’]d|\s+would)?\s+(?:prefer|choose|pick|select|go\s+with)\s+(?i:{_NOUN}){one}",
        rf"^[\W_]*(?i:{_NOUN})({label})[\W_]{{0,3}}\s+(?i:because|since|as)\b",
    ]
    several = re.compile(
        rf"\bor\s+(?i:{_NOUN})[\W_]{{0,3}}(?:{label})\b|\b(?:{label})[\W_]*(?:\band\b|[/&])[\W_]*(?i:{_NOUN})(?:{label})\b"
        rf"|\b(?:{label})[\W_]*,\s*(?:{label})\b(?!\s+(?:is|has|was)\b)"
    )
    for sentence in re.split(r"\n+|(?<=[.!?;])\s+", answer):
        head, _, tail = sentence.rpartition(":")
        if sentence.rstrip().endswith("?") or several.search(sentence) or _UNSAID.search(head):
            continue
        if not _WORST.search(head):
            yield from _alone(tail, labels)
        for pattern in patterns:
            yield from (found[1] for found in re.finditer(pattern, sentence) if not _UNSAID.search(sentence[: found.start(1)]))
