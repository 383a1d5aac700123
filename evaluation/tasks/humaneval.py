"""HumanEval (arXiv 2107.03374): 164 Python functions to complete; pass@1, the share whose greedy answer passes its tests.

Rows of `openai/openai_humaneval` (task_id, prompt, test, entry_point) or of <folder>/humaneval.jsonl. The answers are programs, so the
task is refused without eval.run_code=true, and they run in `evaluation/sandbox.py` only. A chat is asked for one fenced block, a base
model continues the prompt. Tests share a process with what they test: an answer made to deceive them can.
Leaves out: pass@k for k > 1, since a prompt is answered once; other programming languages.
"""

import re
from collections.abc import Sequence
from textwrap import dedent, indent

from evaluation import sandbox
from evaluation.generators import Decoding
from evaluation.held_out import Row
from evaluation.metrics.bootstrap import Resampling, percentage
from evaluation.tasks.sources import Published, require, rows_of
from evaluation.tasks.task import Answer, Score, Task, Verify, limited
from megatron_tower.config import EvalConfig, InputError

NAME = "humaneval"
PART = Published(NAME, "openai/openai_humaneval", None, "test", NAME)
FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")  # the paper's, and a fence


def load(cfg: EvalConfig) -> list[Row]:
    if not cfg.run_code:
        raise InputError(f"{NAME} runs programs that the model wrote: allow it by eval.run_code=true, or leave it out of eval.tasks")
    rows = []
    for number, row in enumerate(rows_of(cfg, PART), 1):
        require(row, ("task_id", "prompt", "test", "entry_point"), NAME, number)
        if not _definition(row).search(row["prompt"]):
            raise InputError(f'{NAME}, row {number}: "prompt" does not define "entry_point", {row["entry_point"]}')
        rows.append({"id": row["task_id"]} | {name: row[name] for name in ("prompt", "test", "entry_point")})
    sandbox.require()
    return rows


def instruction(row: Row) -> str:
    return f"Complete this Python function. Answer with the whole function in one fenced block.\n\n```python\n{row['prompt'].rstrip()}\n```"


def opening(row: Row) -> str:
    return row["prompt"]


def _definition(row: Row) -> re.Pattern[str]:
    return re.compile(rf"^def {re.escape(row['entry_point'])}\b", re.MULTILINE)


def candidates(row: Row, output: str) -> tuple[str, ...]:
    """What the answer may be as a program, likeliest first: a block with the whole function, after what stands before it in the prompt
    (imports, functions that it calls); or the function's body, whose first line may have lost its indentation."""
    definition = _definition(row)
    before = row["prompt"][: definition.search(row["prompt"]).start()]
    blocks = sorted(FENCED.findall(output), key=lambda block: not definition.search(block))
    found = []
    for code in (*blocks, output):
        if definition.search(code):
            found.append(before + code)
        elif code.strip():
            found += [f"{row['prompt']}    {code.lstrip()}", row["prompt"] + indent(dedent(code), "    ")]
    return tuple(found)


def verified(rows: Sequence[Row], answers: Sequence[Answer], verify: Verify) -> list[Answer]:
    """The answers with {"outcome": one of sandbox.KINDS, "detail"}, found by rank 0."""
    from megatron_tower.runtime.distributed import broadcast, is_rank_zero

    programs = [
        sandbox.Program(candidates(row, answer["output"]), row["test"], row["entry_point"])
        for row, answer in zip(rows, answers, strict=True)
    ]
    outcomes = broadcast(sandbox.run_all(programs) if is_rank_zero() else None)
    return [answer | {"outcome": found.kind, "detail": found.detail} for answer, found in zip(answers, outcomes, strict=True)]


def score(rows: Sequence[Row], answers: Sequence[Answer], how: Resampling) -> list[Score]:
    shares = {"pass@1" if kind == "passed" else kind: [answer["outcome"] == kind for answer in answers] for kind in sandbox.KINDS}
    shares["truncated"] = [answer["finish"] == "length" for answer in answers]
    return [Score(NAME, metric, "all", "all", percentage(share, how)) for metric, share in shares.items()]


HUMANEVAL = Task(
    NAME,
    ("prompt", "test", "entry_point"),
    "prompt",
    limited(lambda row: "all"),
    score,
    instruction,
    opening,
    verify=verified,
    load=load,
    published=lambda cfg: [PART],
    decoding=Decoding(max_new_tokens=1024),
    stop=STOP,
)
