"""IFEval (arXiv 2311.07911): 541 prompts whose instructions a program can check, strict and loose, by prompt and by instruction.

    ifeval     `google/IFEval`, or ifeval.jsonl                 key, prompt, instruction_id_list, kwargs
    ifeval_es  `BSC-LT/IFEval_es` test, or ifeval_es.jsonl      the same, ids es:...
    ifeval_ca  `projecte-aina/IFEval_ca` test, or ifeval_ca.jsonl

Judged by lm-eval's own code: its figures on the same answers are these. Two kinds of instruction need NLTK's punkt_tab, Spanish and
Catalan need spaCy (rewards/instructions.py). Rows may be translations and say their "language", by which they are grouped; what IFEval's
checkers can't judge in it is refused. Leaves out: M-IFEval's French and Japanese, whose checkers no package has.
"""

from collections.abc import Sequence

import numpy as np

from evaluation.generators import Decoding
from evaluation.held_out import Row
from evaluation.metrics.bootstrap import Resampling, estimate, percent, percentage
from evaluation.tasks.general import instruction, opening
from evaluation.tasks.sources import Published, require, rows_of
from evaluation.tasks.task import Answer, Score, Task, Verify, groups_by, limited
from megatron_tower.config import EvalConfig, InputError
from megatron_tower.rewards import instructions

PARTS = (
    Published("ifeval", "google/IFEval", None, "train", "ifeval"),
    Published("ifeval_es", "BSC-LT/IFEval_es", None, "test", "ifeval_es"),
    Published("ifeval_ca", "projecte-aina/IFEval_ca", None, "test", "ifeval_ca"),
)


def _load(cfg: EvalConfig, part: Published) -> list[Row]:
    rows = []
    for number, row in enumerate(rows_of(cfg, part), 1):
        require(row, ("prompt",), part.task, number)
        ids, given = row.get("instruction_id_list"), row.get("kwargs")
        if not ids or not isinstance(given, list) or len(ids) != len(given):
            raise InputError(f"{part.task}, row {number}: instruction_id_list and kwargs must be two lists of one length, at least 1")
        kwargs = [{name: value for name, value in (one or {}).items() if value is not None} for one in given]
        check = {"instruction_ids": ids, "kwargs": kwargs}
        language = row.get("language") or next((own for own in instructions.OWN if str(ids[0]).startswith(f"{own}:")), "en")
        try:
            instructions.validate({"check": check}, language)
        except InputError as error:
            raise InputError(f"{part.task}, row {number}: {error}") from error
        rows.append({"id": str(row.get("key", number)), "language": language, "prompt": row["prompt"], "check": check})
    return rows


def verified(rows: Sequence[Row], answers: Sequence[Answer], verify: Verify) -> list[Answer]:
    """The answers with {"strict", "loose"}: for each instruction whether it is followed."""
    return [
        answer | instructions.followed(row["prompt"], row["check"], answer["output"]) for row, answer in zip(rows, answers, strict=True)
    ]


def _task(part: Published) -> Task:
    def score(rows: Sequence[Row], answers: Sequence[Answer], how: Resampling) -> list[Score]:
        scores = []
        for by, group, of in groups_by(rows, "language"):
            for kind in ("strict", "loose"):
                followed = [answers[i][kind] for i in of]
                counts = np.array([(sum(each), len(each)) for each in followed])  # resampled by prompt
                scores.append(Score(part.task, f"prompt_{kind}", by, group, percentage([all(each) for each in followed], how)))
                scores.append(Score(part.task, f"instruction_{kind}", by, group, estimate([counts], percent, how)))
        return scores

    return Task(
        part.task,
        ("prompt",),
        "prompt",
        limited(lambda row: row["language"]),
        score,
        instruction,
        opening,
        verify=verified,
        load=lambda cfg: _load(cfg, part),
        published=lambda cfg: [part],
        decoding=Decoding(max_new_tokens=1280),
        stop=("\nQuestion:",),
    )


IFEVAL, IFEVAL_ES, IFEVAL_CA = (_task(part) for part in PARTS)
