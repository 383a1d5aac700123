"""Grammatical error correction, judged by GLEU (JFLEG's measure) and by the edits (evaluation/metrics/correction.py says which).

    gec   `jhu-clsp/jfleg` test, or gec.jsonl      sentence, corrections (one or more); "language" for others than English
          or <language>.m2                         as shared tasks publish theirs; each annotator's edits make one correction

Sentences are shown as they were published, JFLEG's in tokens. `input_gleu` is what the uncorrected sentences score, `unchanged` the share
of those that were left alone.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from evaluation.generators import Decoding
from evaluation.held_out import Row
from evaluation.metrics import correction
from evaluation.metrics.bootstrap import Resampling, estimate, percentage
from evaluation.metrics.translation import plain
from evaluation.tasks.sources import Published, place_of, rows_of
from evaluation.tasks.task import Answer, Score, Task, examples, groups_by, limited
from evaluation.tasks.translation import outputs
from megatron_tower.config import EvalConfig, InputError
from megatron_tower.data.jsonl import is_text
from megatron_tower.data.locales import find

NAME = "gec"
PART = Published(NAME, "jhu-clsp/jfleg", None, "test", NAME)


def load(cfg: EvalConfig) -> list[Row]:
    place = place_of(cfg, NAME)
    files = [] if place is None else [place] if place.suffix == ".m2" else sorted(place.glob("*.m2"))
    found = [(f"{path.stem} {number}", row) for path in files for number, row in enumerate(_m2(path), 1)]
    return [_row(name, row) for name, row in found or ((str(number), row) for number, row in enumerate(rows_of(cfg, PART), 1))]


def _row(name: str, row: Row) -> Row:
    corrections, language = row.get("corrections"), row.get("language") or "en"
    if not is_text(row.get("sentence")) or not isinstance(corrections, list) or not corrections or not all(map(is_text, corrections)):
        raise InputError(f'{NAME}, row {name}: "sentence" must be a text and "corrections" a list of texts, at least 1')
    try:
        find(language)
    except InputError as error:
        raise InputError(f"{NAME}, row {name}: {error}") from error
    return {"id": f"{NAME} {name}", "language": language, "sentence": row["sentence"].strip(), "corrections": corrections}


def _m2(path: Path) -> Iterator[Row]:
    """Blocks of `S tokens` and `A start end|||type|||correction|||...|||annotator`, divided by empty lines."""
    if not path.is_file():
        raise InputError(f"{NAME}: {path} is missing: name another, +eval.sources.{NAME}=...")
    try:
        find(path.stem)
    except InputError as error:
        raise InputError(f"{NAME}: {path} must be named by its language, as en.m2") from error
    words, edits = [], {}
    for number, line in enumerate([*path.read_text(encoding="utf-8-sig").split("\n"), ""], 1):
        if line.startswith("S "):
            words, edits = line[2:].split(), {}
        elif line.startswith("A "):
            try:
                span, kind, text, *_, annotator = line[2:].rstrip().split("|||")
                start, end = map(int, span.split())
            except ValueError as error:
                raise InputError(f"{path}:{number}: an edit is A start end|||type|||correction|||...|||annotator: mend the line") from error
            made = edits.setdefault(annotator, [])
            if kind != "noop":
                made.append((start, end, [] if text == "-NONE-" else text.split("||")[0].split()))  # the first of several ways
        elif not line.strip() and words:
            yield {
                "sentence": " ".join(words),
                "corrections": [_applied(words, made) for made in edits.values() or [[]]],
                "language": path.stem,
            }
            words = []


def _applied(words: Sequence[str], edits: Sequence[tuple[int, int, list[str]]]) -> str:
    corrected = list(words)
    for start, end, text in sorted(edits, key=lambda edit: edit[:2], reverse=True):
        corrected[start:end] = text
    return " ".join(corrected)


def instruction(row: Row) -> str:
    language = find(row["language"]).english.split(" (")[0]
    return (
        f"Correct the grammar and the spelling of the following {language} sentence. Answer with the corrected sentence alone, "
        f"or with the same sentence if nothing is wrong.\nSentence: {row['sentence']}\nCorrected: "
    )


def shots(rows: Sequence[Row]) -> list[str]:
    return examples(rows, lambda row: row["language"], lambda one: f"{instruction(one)}{one['corrections'][0]}", "sentence")


def score(rows: Sequence[Row], answers: Sequence[Answer], how: Resampling) -> list[Score]:
    spaced, given = [find(row["language"]).spaced for row in rows], outputs(answers)
    sources, ours = (
        [correction.tokens(text, one) for text, one in zip(texts, spaced, strict=True)]
        for texts in ([row["sentence"] for row in rows], given)
    )
    references = [[correction.tokens(text, one) for text in row["corrections"]] for row, one in zip(rows, spaced, strict=True)]
    measured = {
        "gleu": (correction.gleu_statistics(sources, ours, references), correction.gleu),
        "input_gleu": (correction.gleu_statistics(sources, sources, references), correction.gleu),
    }
    edits = correction.edit_statistics(sources, ours, references)
    measured |= {
        f"edit_{name}": (edits, value)
        for name, value in (("precision", correction.precision), ("recall", correction.recall), ("f05", correction.f_half))
    }
    flags = {
        "unchanged": [plain(text) == plain(row["sentence"]) for text, row in zip(given, rows, strict=True)],
        "empty": [not text for text in given],
        "truncated": [answer["finish"] == "length" for answer in answers],
    }
    scores = []
    for by, group, of in groups_by(rows, "language"):
        scores += [Score(NAME, name, by, group, estimate([table[of]], value, how)) for name, (table, value) in measured.items()]
        scores += [Score(NAME, name, by, group, percentage([values[i] for i in of], how)) for name, values in flags.items()]
    return scores


GEC = Task(
    NAME,
    ("sentence", "language"),
    "sentence",
    limited(lambda row: row["language"]),
    score,
    instruction,
    load=load,
    published=lambda cfg: [PART],
    decoding=Decoding(max_new_tokens=1024),
    shots=shots,
)
