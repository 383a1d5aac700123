"""Rows for the tasks around translation, as files and as a config that names them."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from evaluation.tasks import AROUND, TASKS
from megatron_tower.config import EvalConfig
from tests.unit.test_tasks_benchmarks import HOW, lines

EDITS = [
    ("de", "The old house stands on a hill.", "Das alte Haus steht an einem Hügel.", "Das alte Haus steht auf einem Hügel."),
    ("de", "It has a red door and two windows.", "Es hat eine rote Tür und zwei Fenster.", "Es hat eine rote Tür und zwei Fenster."),
    ("zh", "Nobody lives there any more.", "没有人生活在那里。", "那里已经没有人居住了。"),
    ("zh", "We shall see tomorrow.", "我们明天见。", "我们明天再看吧。"),
]
APE = [{"source": s, "mt": mt, "post_edit": pe, "source_locale": "en", "target_locale": to} for to, s, mt, pe in EDITS]
RATED = [  # source, translation, MQM
    ("The house is red.", "Das Haus ist rot.", 0.0),
    ("The house is red.", "Haus rot.", -6.0),
    ("It rains.", "Es regnet.", -0.5),
    ("It rains.", "Regen fällt.", -1.0),  # within one point: people's tie
    ("He sang all night.", "Er sang die ganze Nacht.", -1.0),
    ("He sang all night.", "Er singt Nacht.", -11.0),
]
GEC = [
    {"sentence": "She go to school every days .", "corrections": ["She goes to school every day .", "She went to school every day ."]},
    {"sentence": "I likes cats .", "corrections": ["I like cats .", "I like cats ."]},
    {"sentence": "All is well here .", "corrections": ["All is well here .", "Everything is fine here ."]},
]
NER = [
    {
        "text": "Anna Berg met Anna Berg in Oslo.",
        "language": "en",
        "entities": [{"text": name, "type": kind} for name, kind in (("Anna Berg", "PER"), ("Anna Berg", "PER"), ("Oslo", "LOC"))],
    },
    {"text": "It rained.", "language": "en", "entities": []},
    {"text": "Die Bahn hält in Ulm.", "language": "de", "entities": [["Bahn", "ORG"], ["Ulm", "LOC"]], "types": ["org", "LOC"]},
]


def rated(path: Path) -> Path:
    """A TSV of MQM as WMT writes them."""
    rows = [("lp", "source", "hyp", "mqm"), *(("en-de", source, text, str(mqm)) for source, text, mqm in RATED)]
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(name="cfg")
def around_config(tmp_path: Path) -> EvalConfig:
    for name, rows in (("ape", APE), ("gec", GEC), ("ner", NER)):
        lines(tmp_path / f"{name}.jsonl", rows)
    rated(tmp_path / "mt_ranking.tsv")
    own = {"mt_ranking": "", "mt_evaluation": "mt_ranking.tsv"}  # a folder, and its file
    return EvalConfig(name="t", sources={task.name: str(tmp_path / own.get(task.name, f"{task.name}.jsonl")) for task in AROUND})


def scored(task: str, rows: Sequence[dict], outputs: Sequence[str]) -> dict[tuple[str, str, str], float]:
    answers = [{"output": output, "finish": "stop"} for output in outputs]
    if TASKS[task].verify:
        answers = TASKS[task].verify(rows, answers, None)
    found = TASKS[task].score(rows, answers, HOW)
    assert {one.task for one in found} == {task} and all(one.estimate.low <= one.estimate.high for one in found)
    return {(one.metric, one.by, one.group): one.estimate.value for one in found}
