"""Named entities: a sentence -> a JSON list of {"text", "type"}; micro precision, recall and F1 over entities.

Rows of `unimelb-nlp/wikiann` or <folder>/<language>.jsonl (tokens and their BIO ner_tags), in the languages of eval.pairs or else of the
recipe; ten thousand a language, so set eval.limit. Your own, ner.jsonl: text, entities (a list of {"text", "type"}) and language, or
tokens and ner_tags as labels; "types" says which types are asked for, else all that the language's rows have.
An entity is right where text and type are exactly those of an entity that is there, each counted as often as it stands there; where in
the sentence it stands isn't asked. A reply without such a list is `unparsable` and finds nothing. WikiANN's entities are not annotated by
people, and its sentences are tokens joined by spaces. Leaves out: nested and discontinuous entities.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from evaluation.generators import Decoding
from evaluation.held_out import Row
from evaluation.metrics.bootstrap import Resampling, estimate, percentage
from evaluation.metrics.translation import plain
from evaluation.tasks.sources import Published, place_of, require, rows_of
from evaluation.tasks.task import Answer, Score, Task, Verify, examples, grouped, groups_by, limited
from megatron_tower.config import EvalConfig, InputError
from megatron_tower.data.jsonl import is_text
from megatron_tower.data.locales import LOCALES, find

NAME = "ner"
OWN = Published(NAME, None, None, "test", NAME)
LANGUAGES = sorted({row.language for row in LOCALES.values()})
WIKIANN_TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")
MEANINGS = {"PER": "person", "ORG": "organisation", "LOC": "location"}

Entity = tuple[str, str]  # text, type


def languages(cfg: EvalConfig) -> list[str]:
    """Raises InputError where eval.pairs has none of the recipe's."""
    if not cfg.pairs:
        return LANGUAGES
    named = {side.split("_")[0] for pair in cfg.pairs for side in pair.split("-")}
    if found := [language for language in LANGUAGES if language in named]:
        return found
    raise InputError(f"eval.pairs has no language of {NAME}: leave it out of eval.tasks, or name a pair of {', '.join(LANGUAGES)}")


def _part(language: str) -> Published:
    return Published(NAME, "unimelb-nlp/wikiann", language, "test", language)


def load(cfg: EvalConfig) -> list[Row]:
    place = place_of(cfg, NAME)
    if place and (place.is_file() or (place / f"{NAME}.jsonl").is_file()):
        rows = [_row(row, f"{NAME}, row {number}", number, None) for number, row in enumerate(rows_of(cfg, OWN), 1)]
    else:
        rows = [
            _row(row, f"{NAME}, {language}, row {number}", number, language)
            for language in languages(cfg)
            for number, row in enumerate(rows_of(cfg, _part(language)), 1)
        ]
    for of in grouped(rows, lambda row: row["language"]).values():
        known = sorted({kind for i in of for _, kind in rows[i]["entities"]})
        for i in of:
            rows[i]["types"] = rows[i]["types"] or known
    return rows


def _row(row: Row, place: str, number: int, language: str | None) -> Row:
    if language is None:
        require(row, ("language",), NAME, number)
        language = row["language"]
    try:
        spaced = find(language).spaced
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    text, entities = _tagged(row, place, spaced) if "tokens" in row else _told(row, place)
    types = row.get("types") or []
    if not isinstance(types, list) or not all(map(is_text, types)):
        raise InputError(f'{place}: "types" must be a list of names, as ["PER", "LOC"]')
    about = {"id": f"{NAME} {language} {number}", "language": language, "types": [kind.strip().upper() for kind in types]}
    return about | {"text": text, "entities": entities}


def _told(row: Row, place: str) -> tuple[str, list[Entity]]:
    text, found = row.get("text"), entities(row.get("entities"))
    if not isinstance(text, str) or not text.strip() or found is None:
        raise InputError(f'{place}: "text" must be a text and "entities" a list of {{"text", "type"}}, which may be empty')
    for name, _ in found:
        if name not in plain(text):
            raise InputError(f"{place}: the entity {name!r} does not stand in the text: write it as it stands there")
    return text, found


def _tagged(row: Row, place: str, spaced: bool) -> tuple[str, list[Entity]]:
    tokens, tags = row["tokens"], row.get("ner_tags")
    if not tokens or not isinstance(tags, list) or len(tokens) != len(tags):
        raise InputError(f"{place}: tokens and ner_tags must be two lists of one length, at least 1")
    try:
        labels = [WIKIANN_TAGS[tag] if isinstance(tag, int) else str(tag) for tag in tags]
    except IndexError as error:
        raise InputError(
            f"{place}: ner_tags as numbers are WikiANN's, 0 to {len(WIKIANN_TAGS) - 1}: write others as labels, B-PER"
        ) from error
    joint = " " if spaced else ""
    return joint.join(tokens), [(plain(joint.join(inside)), kind) for inside, kind in _spans(tokens, labels)]


def _spans(tokens: Sequence[str], labels: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    """Of BIO labels; an I that continues nothing begins an entity."""
    inside: list[str] = []
    kind = ""
    for token, label in zip([*tokens, ""], [*labels, "O"], strict=True):
        begins, _, named = label.partition("-")
        if inside and (begins != "I" or named != kind):
            yield inside, kind
            inside = []
        if begins != "O":
            inside, kind = [*inside, token], named


def entities(value: object) -> list[Entity] | None:
    """Of a list of {"text", "type"} or of [text, type]; None for anything else."""
    if not isinstance(value, list):
        return None
    found = [(one.get("text"), one.get("type")) if isinstance(one, dict) else one for one in value]
    if any(not isinstance(one, list | tuple) or len(one) != 2 or not all(isinstance(part, str) for part in one) for one in found):
        return None
    return [(plain(text), kind.strip().upper()) for text, kind in found]


def replied(reply: str) -> list[Entity] | None:
    """The entities of the one JSON list in a reply, whatever stands around it."""
    begin, end = reply.find("["), reply.rfind("]")
    try:
        return entities(json.loads(reply[begin : end + 1])) if 0 <= begin < end else None
    except ValueError:
        return None


def instruction(row: Row) -> str:
    kinds = ", ".join(f"{kind} ({MEANINGS[kind]})" if kind in MEANINGS else kind for kind in row["types"])
    return (
        f"Find the named entities of these types in the text below: {kinds}. Answer with nothing but a JSON list in the order of the text, "
        f'[{{"text": "...", "type": "..."}}, ...], or [] if there are none.\nText: {row["text"]}\nEntities: '
    )


def shots(rows: Sequence[Row]) -> list[str]:
    def shown(one: Row) -> str:
        told = [{"text": text, "type": kind} for text, kind in one["entities"]]
        return instruction(one) + json.dumps(told, ensure_ascii=False)

    return examples(rows, lambda row: row["language"], shown, "text")


def verified(rows: Sequence[Row], answers: Sequence[Answer], verify: Verify) -> list[Answer]:
    """The answers with {"found": entities, or None}."""
    return [answer | {"found": replied(answer["output"])} for answer in answers]


def precision(sums: NDArray) -> NDArray:
    """[..., 3] (right, given, wanted) -> percent."""
    return 100 * sums[..., 0] / np.maximum(sums[..., 1], 1)


def recall(sums: NDArray) -> NDArray:
    return 100 * sums[..., 0] / np.maximum(sums[..., 2], 1)


def f1(sums: NDArray) -> NDArray:
    return 200 * sums[..., 0] / np.maximum(sums[..., 1] + sums[..., 2], 1)


def counts(rows: Sequence[Row], answers: Sequence[Answer], kind: str | None = None) -> NDArray:
    """[rows, 3]: entities that are right, that were given, that were wanted; kind: only of this type."""
    table = []
    for row, answer in zip(rows, answers, strict=True):
        wanted, given = (
            Counter((text, named) for text, named in of if kind in (None, named)) for of in (row["entities"], answer["found"] or [])
        )
        table.append(((wanted & given).total(), given.total(), wanted.total()))
    return np.array(table)


def score(rows: Sequence[Row], answers: Sequence[Answer], how: Resampling) -> list[Score]:
    table, scores = counts(rows, answers), []
    groups = [(by, group, table[of]) for by, group, of in groups_by(rows, "language")]
    kinds = sorted({kind for row in rows for kind in row["types"]})
    for by, group, found in [*groups, *(("type", kind, counts(rows, answers, kind)) for kind in kinds)]:
        scores += [Score(NAME, value.__name__, by, group, estimate([found], value, how)) for value in (precision, recall, f1)]
    for by, group, of in groups_by(rows, "language"):
        scores.append(Score(NAME, "unparsable", by, group, percentage([answers[i]["found"] is None for i in of], how)))
    return scores


NER = Task(
    NAME,
    ("text", "language"),
    "text",
    limited(lambda row: row["language"]),
    score,
    instruction,
    verify=verified,
    load=load,
    published=lambda cfg: [_part(language) for language in languages(cfg)],
    decoding=Decoding(max_new_tokens=1024),
    shots=shots,
)
