"""Translation under instructions, two tasks that report the translation and the instructions apart, as Tower+ does.

    if_mt      rows of tools/build_if_mt.py or your own, <folder>/if_mt.jsonl: {"prompt", "source", "source_locale", "target_locale",
               "reference"} with "check" or "requirements"; without such a file the paper's test sets `Unbabel/IF-MT-en-zh` and
               `-en-es`, whose instructions need a judge
    ifmtbench  Tencent's IFMTBench (arXiv 2605.28218), <folder>/ifmtbench.jsonl or `tencent/IFMTBench`

What a program can check is checked here: `instructions_kept` (each) and `prompts_kept` (all of a prompt's). What it can't stands in the
row's "requirements", for a judge. The translation has chrF++ here and neural metrics after, on the text inside JSON.
IFMTBench's checks follow its published description (glossary, layout, structured data, code and tags); they were not compared with its
own program. The column names of IF-MT are taken from lists of likely ones; a set with none of them is refused with its names.
"""

import json
from collections.abc import Callable, Sequence

import numpy as np

from evaluation.generators import Decoding
from evaluation.held_out import Row
from evaluation.metrics.bootstrap import Resampling, estimate, percent, percentage
from evaluation.metrics.segment import Segment
from evaluation.metrics.translation import chrf, chrf_statistics
from evaluation.tasks.general import instruction, opening
from evaluation.tasks.sources import Published, place_of, require, rows_of
from evaluation.tasks.task import Answer, Score, Task, Verify, grouped, groups_by, limited
from megatron_tower.config import EvalConfig, InputError
from megatron_tower.data.locales import find
from megatron_tower.data.verifiable import case_of, kept
from megatron_tower.data.verifiable.shape import undressed

OWN = Published("if_mt", None, None, "test", "if_mt")
PAPER = {
    "es_MX": Published("if_mt", "Unbabel/IF-MT-en-es", None, "train", "es_MX"),
    "zh_CN": Published("if_mt", "Unbabel/IF-MT-en-zh", None, "train", "zh_CN"),
}
TENCENT = Published("ifmtbench", "tencent/IFMTBench", None, "test", "ifmtbench")
COLUMNS = {
    "prompt": ("prompt", "instruction", "input", "question"),
    "source": ("source", "src", "source_text", "original"),
    "reference": ("reference", "target", "ref", "tgt", "output", "answer"),
}
GLOSSARY, STYLE, BACKGROUND, LAYOUT, STRUCTURED, CODE = (
    "术语表约束翻译",
    "风格指令遵循",
    "带上下文背景翻译",
    "布局保留翻译",
    "结构化数据翻译",
    "代码标签保留翻译",
)


def if_mt(cfg: EvalConfig) -> list[Row]:
    """Rows of one's own where there is such a file, else those of the paper."""
    place = place_of(cfg, "if_mt")
    if place and (place.is_file() or not (place / "es_MX.jsonl").is_file()):
        return [_own(number, row) for number, row in enumerate(rows_of(cfg, OWN), 1)]
    return [_published(number, row, target) for target, part in PAPER.items() for number, row in enumerate(rows_of(cfg, part), 1)]


def _own(number: int, row: Row) -> Row:
    require(row, ("prompt", "source", "source_locale", "target_locale"), "if_mt", number)
    if row.get("check"):
        case_of(row)
    elif not row.get("requirements"):
        raise InputError(f'if_mt, row {number}: neither "check" nor "requirements" says what is asked for: give one of them')
    return {"id": f"if_mt {number}", "reference": None, "check": None, "requirements": []} | row


def _published(number: int, row: Row, target: str) -> Row:
    found = {}
    for name, columns in COLUMNS.items():
        column = next((column for column in columns if isinstance(row.get(column), str)), None)
        if column is None and name == "prompt":
            raise InputError(f"if_mt en-{target}: none of its columns {', '.join(row)} is a prompt: write if_mt.jsonl from it by hand")
        found[name] = row[column] if column else None
    about = {"id": f"if_mt {target} {number}", "source_locale": "en", "target_locale": target, "check": None}
    return found | about | {"requirements": ["Every instruction that the prompt gives beside translating."]}


def ifmtbench(cfg: EvalConfig) -> list[Row]:
    rows = []
    for number, row in enumerate(rows_of(cfg, TENCENT), 1):
        require(row, ("input", "output", "origin_text"), "ifmtbench", number)
        kinds = row["class"] if isinstance(row["class"], list) else [row["class"]]
        asked = {
            STYLE: f"The style is: {row.get('selected_style')}",
            BACKGROUND: f"It fits this background: {row.get('generated_background')}",
        }
        rows.append(
            {
                "id": str(row.get("md5", number)),
                "prompt": row["input"],
                "source": row["origin_text"],
                "reference": row["output"],
                "source_locale": find(row["origin_language"]).code,
                "target_locale": find(row["target_language"]).code,
                "classes": kinds,
                "terms": _mapping(row.get("term_dict")),
                "about": _mapping(row.get("meta_data")),
                "check": None,
                "requirements": [asked[kind] for kind in kinds if kind in asked],
            }
        )
    return rows


def _mapping(value: object) -> dict:
    found = json.loads(value) if isinstance(value, str) and value.strip() else value
    return found if isinstance(found, dict) else {}


def gates(row: Row, output: str) -> list[bool]:
    """For each constraint of an IFMTBench row that a program can check, whether the output keeps it."""
    layout, assets = row["about"].get("primary_delimiter"), row["about"].get("extracted_assets") or []
    checks = {
        GLOSSARY: lambda: all(str(term).casefold() in output.casefold() for term in row["terms"].values()),
        LAYOUT: lambda: not layout or output.count(layout) == row["source"].count(layout),
        STRUCTURED: lambda: _is_json(output) or not _is_json(row["source"]),
        CODE: lambda: all(str(asset) in output for asset in assets),
    }
    return [bool(output.strip()) and checks[kind]() for kind in row["classes"] if kind in checks]


def _is_json(text: str) -> bool:
    try:
        json.loads(text.strip().removeprefix("```json").removesuffix("```"))
    except ValueError:
        return False
    return True


def pair(row: Row) -> str:
    return f"{row['source_locale']}->{row['target_locale']}"


def verified(rows: Sequence[Row], answers: Sequence[Answer], verify: Verify) -> list[Answer]:
    """The answers with {"kept": of each checkable instruction, "translation": the text inside what was asked for}."""
    found = []
    for row, answer in zip(rows, answers, strict=True):
        output = answer["output"].strip()
        if row["check"]:
            found.append(answer | {"kept": kept(case_of(row), output), "translation": undressed(case_of(row), output).strip()})
        else:
            found.append(answer | {"kept": gates(row, output) if "classes" in row else [], "translation": output})
    return found


def score(task: str, rows: Sequence[Row], answers: Sequence[Answer], how: Resampling) -> list[Score]:
    scores = []
    for by, group, of in groups_by([row | {"pair": pair(row)} for row in rows], "pair"):
        if judged := [answers[i]["kept"] for i in of if answers[i]["kept"]]:
            counts = np.array([(sum(each), len(each)) for each in judged])
            scores.append(Score(task, "instructions_kept", by, group, estimate([counts], percent, how)))
            scores.append(Score(task, "prompts_kept", by, group, percentage([all(each) for each in judged], how)))
        if known := [i for i in of if rows[i]["reference"]]:
            texts = [[answers[i]["translation"] for i in known], [_reference(rows[i]) for i in known]]
            counts, signature = chrf_statistics(*texts)
            strata = [counts[at] for at in grouped([rows[i] for i in known], pair).values()]
            scores.append(Score(task, "chrf", by, group, estimate(strata, chrf, how), signature))
        scores.append(Score(task, "empty", by, group, percentage([not answers[i]["translation"] for i in of], how)))
        scores.append(Score(task, "truncated", by, group, percentage([answers[i]["finish"] == "length" for i in of], how)))
    return scores


def _reference(row: Row) -> str:
    return undressed(case_of(row), row["reference"]) if row["check"] else row["reference"]


def segments(rows: Sequence[Row], answers: Sequence[Answer]) -> list[Segment | None]:
    """None where the row does not give its source apart from the prompt."""
    return [
        Segment(row["source"], answer["translation"], row["reference"] and _reference(row), (("pair", pair(row)),))
        if row["source"]
        else None
        for row, answer in zip(rows, answers, strict=True)
    ]


def _task(name: str, load: Callable[[EvalConfig], list[Row]], parts: Sequence[Published]) -> Task:
    return Task(
        name,
        ("prompt",),
        "prompt",
        limited(pair),
        lambda rows, answers, how: score(name, rows, answers, how),
        instruction,
        opening,
        verify=verified,
        load=load,
        published=lambda cfg: parts,
        decoding=Decoding(max_new_tokens=2048),
        stop=("\n\n",),
        segments=segments,
    )


IF_MT = _task("if_mt", if_mt, [*PAPER.values()])
IFMTBENCH = _task("ifmtbench", ifmtbench, [TENCENT])
