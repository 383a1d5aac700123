"""WMT24++ (arXiv 2502.12404): English to 55 locales, by default the 24 of Tower+; rows of `google/wmt24pp` or <folder>/en-de_DE.jsonl.

The reference is the post-edit (`target`). Bad sources and the canary's domain are dropped. `eval.pairs` chooses (en-de_DE),
`eval.reverse` adds the other direction, `eval.documents` joins a document's segments by empty lines and scores whole documents.
A base model sees three other documents' segments of the pair with their translations first.
"""

from collections.abc import Sequence
from difflib import get_close_matches

from evaluation.generators import Decoding
from evaluation.held_out import Row
from evaluation.metrics.segment import Segment
from evaluation.tasks import translation
from evaluation.tasks.sources import Published, require, rows_of
from evaluation.tasks.task import Answer, Task, examples, grouped, limited
from megatron_tower.config import EvalConfig, InputError
from megatron_tower.data.locales import EVALUATED

NAME = "wmt24pp"
TARGETS = tuple(sorted(set(EVALUATED) - {"en", "es_ES", "nn_NO"}))
TOWER_PLUS = (  # the last one is inferred from the paper's tables
    *("cs_CZ", "da_DK", "de_DE", "es_MX", "fi_FI", "fr_CA", "fr_FR", "hi_IN", "hu_HU", "is_IS", "it_IT", "ja_JP", "ko_KR", "nl_NL"),
    *("no_NO", "pl_PL", "pt_BR", "pt_PT", "ro_RO", "ru_RU", "sv_SE", "uk_UA", "zh_CN", "zh_TW"),
)


def load(cfg: EvalConfig) -> list[Row]:
    rows = []
    for target in targets(cfg.pairs):
        kept = _kept(rows_of(cfg, _part(target)), target)
        if cfg.documents:
            kept = _documents(kept)
        rows += kept
        if cfg.reverse:
            rows += [_turned(row) for row in kept]
    return rows


def published(cfg: EvalConfig) -> list[Published]:
    return [_part(target) for target in targets(cfg.pairs)]


def _part(target: str) -> Published:
    return Published(NAME, "google/wmt24pp", f"en-{target}", "train", f"en-{target}")


def targets(pairs: Sequence[str]) -> list[str]:
    """Target locales of en-xx_CC pairs; raises InputError for a pair that WMT24++ does not have."""
    for pair in pairs:
        if pair.removeprefix("en-") not in TARGETS or not pair.startswith("en-"):
            close = get_close_matches(pair.replace("->", "-"), [f"en-{target}" for target in TARGETS], n=3)
            mend = f"did you mean {', '.join(close)}?" if close else "all are from English, as en-de_DE (eval.reverse=true adds de_DE-en)"
            raise InputError(f"eval.pairs: {pair} is no pair of WMT24++: {mend}")
    return [pair.removeprefix("en-") for pair in pairs] or list(TOWER_PLUS)


def _kept(found: Sequence[Row], target: str) -> list[Row]:
    rows = []
    for number, row in enumerate(found, 1):
        if row.get("is_bad_source") or row.get("domain") == "canary":
            continue
        require(row, ("domain", "document_id", "source", "target"), f"{NAME} en-{target}", number)
        rows.append(
            {
                "id": f"en-{target} {row['document_id']} {row['segment_id']}",
                "domain": row["domain"],
                "document": row["document_id"],
                "source_locale": "en",
                "target_locale": target,
                "source": row["source"],
                "reference": row["target"],
            }
        )
    return rows


def _documents(rows: Sequence[Row]) -> list[Row]:
    """A row a document, its segments in the order they were published in."""
    found = []
    for of in grouped(rows, lambda row: row["document"]).values():
        parts = [rows[i] for i in of]
        text = {side: "\n\n".join(part[side] for part in parts) for side in ("source", "reference")}
        found.append(parts[0] | text | {"id": f"en-{parts[0]['target_locale']} {parts[0]['document']}"})
    return found


def _turned(row: Row) -> Row:
    return row | {
        "id": f"{row['id']} reversed",
        "source_locale": row["target_locale"],
        "target_locale": row["source_locale"],
        "source": row["reference"],
        "reference": row["source"],
    }


def shots(rows: Sequence[Row]) -> list[str]:
    """From the pair's other documents."""
    return examples(rows, translation.pair, lambda one: f"{translation.instruction(one)}{one['reference']}", "source", "document")


def segments(rows: Sequence[Row], answers: Sequence[Answer]) -> list[Segment]:
    return [
        Segment(row["source"], output, row["reference"], _groups(row))
        for row, output in zip(rows, translation.outputs(answers), strict=True)
    ]


def _groups(row: Row) -> tuple[tuple[str, str], ...]:
    return ("direction", translation.direction(row)), ("pair", translation.pair(row)), ("domain", row["domain"])


WMT24PP = Task(
    NAME,
    ("source", "reference"),
    "source",
    limited(translation.pair),
    translation.scorer(NAME, "domain"),
    translation.instruction,
    load=load,
    published=published,
    decoding=Decoding(max_new_tokens=2048),
    stop=("\n\n",),
    shots=shots,
    segments=segments,
)
