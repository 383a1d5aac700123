"""HumanEval: which program an answer is, what is counted of it, and that nothing runs unless it was allowed."""

import json
from pathlib import Path

import pytest

from evaluation import run, sandbox
from evaluation.metrics.bootstrap import Resampling
from evaluation.tasks import TASKS
from evaluation.tasks.humaneval import candidates
from megatron_tower.command import load
from megatron_tower.config import EvalConfig, InputError

# In the published schema, of our own making: an import, a function that the one asked for calls, and an example in the docstring.
PROMPT = '''from typing import List


def double(n: int) -> int:
    """ Twice n. """
    return 2 * n


def doubles(numbers: List[int]) -> List[int]:
    """ Each number twice as large.
    >>> doubles([1, 2])
    [2, 4]
    """
'''
BODY = "    found = []\n    for n in numbers:\n        found.append(double(n))\n    return found\n"
TEST = "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate([]) == []\n    assert candidate([1, 5]) == [2, 10]\n"
PUBLISHED = {"task_id": "T/0", "prompt": PROMPT, "canonical_solution": BODY, "test": TEST, "entry_point": "doubles"}
WHOLE = f"def doubles(numbers: List[int]) -> List[int]:\n{BODY}"
BARE = "found = []\nfor n in numbers:\n    found.append(double(n))\nreturn found\n"

# fmt: off
ANSWERS = {
    "the body, as a base model goes on": BODY,
    "its first line without indentation": BODY.lstrip(),
    "its first line a space short": BODY[1:],
    "empty lines before it": f"\n\n{BODY}",
    "the whole function in a block": f"Here you are:\n\n```python\n{WHOLE}```\nIt doubles each.",
    "the whole prompt and the body": f"```python\n{PROMPT}{BODY}```",
    "a block without a language": f"```\n{WHOLE}```",
    "a block that was not closed": f"```python\n{WHOLE}",
    "another block first": f"For example\n```python\nprint(doubles([1]))\n```\nis what this does:\n```python\n{WHOLE}```",
    "another block last": f"```python\n{WHOLE}```\nUse it so:\n```python\ndoubles('x')\n```",
    "no block": f"{WHOLE}",
    "a body in a block": f"```python\n{BODY}```",
    "a body in a block, without indentation": f"```python\n{BARE}```",
    "one statement without indentation": "```python\nreturn [double(n) for n in numbers]\n```",
    "functions of its own": f"```python\ndef twice(n):\n    return n + n\n\n{WHOLE.replace('double(', 'twice(')}```",
}
# fmt: on


@pytest.fixture
def config(tmp_path: Path) -> EvalConfig:
    (tmp_path / "humaneval.jsonl").write_text(json.dumps(PUBLISHED) + "\n")
    return EvalConfig(name="t", sources={"humaneval": str(tmp_path)}, run_code=True)


def passes(output: str) -> bool:
    """Whether the first candidate that compiles passes: trusted programs, in this process."""
    for source in candidates(PUBLISHED, output):
        try:
            program = compile(source, "program", "exec")
        except SyntaxError:
            continue
        space: dict = {}
        exec(program, space)
        exec(TEST, space)
        try:
            space["check"](space["doubles"])
        except (AssertionError, NameError, TypeError):
            return False
        return True
    return False


@pytest.mark.parametrize("name", ANSWERS)
def test_the_program_is_found_in_each_form_of_answer(name: str) -> None:
    assert passes(ANSWERS[name])


@pytest.mark.parametrize("output", ["", "I can't do that.", "```python\ndoubles = None\n```", WHOLE.replace("double(n)", "n")])
def test_what_is_no_solution_is_not_mended_into_one(output: str) -> None:
    assert not passes(output)


def test_the_prompts_of_a_chat_and_of_a_base_model(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "require", lambda: None)
    task = TASKS["humaneval"]
    rows = task.load(config)
    assert task.prompts(rows, chat=False) == [PROMPT]
    assert task.prompts(rows, chat=True)[0].endswith(f"\n\n```python\n{PROMPT.rstrip()}\n```")


def test_each_kind_of_failure_is_counted(config: EvalConfig) -> None:
    try:
        rows = TASKS["humaneval"].load(config) * 4
    except InputError as error:
        pytest.skip(str(error))
    outputs = [PUBLISHED["canonical_solution"], "    return numbers\n", "    import os\n    os._exit(0)\n", "No."]
    answers = TASKS["humaneval"].verify(rows, [{"output": output, "finish": "stop"} for output in outputs], None)
    assert [answer["outcome"] for answer in answers] == ["passed", "wrong", "error", "unparsable"]
    found = {s.metric: s.estimate.value for s in TASKS["humaneval"].score(rows, answers, Resampling(samples=20))}
    assert found == {"pass@1": 25, "wrong": 25, "error": 25, "timeout": 0, "memory": 0, "unparsable": 25, "truncated": 0}


def test_it_is_refused_before_anything_is_asked_unless_it_was_allowed(config: EvalConfig, tmp_path: Path, monkeypatch) -> None:
    words = ["eval.tasks=[humaneval]", f"+eval.sources.humaneval={tmp_path}", "eval.generator=endpoint", "eval.endpoint.url=http://x/v1"]
    words += ["eval.endpoint.model=m", f"eval.output={tmp_path / 'out'}"]
    monkeypatch.setattr(sandbox, "run", lambda program: pytest.fail("something was run"))
    with pytest.raises(InputError, match=r"humaneval runs programs that the model wrote: allow it by eval\.run_code=true"):
        run.check(load(words))
    monkeypatch.setattr(sandbox, "run", lambda program: sandbox.Outcome("error", "no namespaces"))
    with pytest.raises(InputError, match=r"this machine gives none \(error no namespaces\)"):
        run.check(load([*words, "eval.run_code=true"]))


def test_a_row_without_its_function_is_refused(config: EvalConfig, tmp_path: Path) -> None:
    (tmp_path / "humaneval.jsonl").write_text(json.dumps(PUBLISHED | {"entry_point": "halves"}))
    with pytest.raises(InputError, match='row 1: "prompt" does not define "entry_point", halves'):
        TASKS["humaneval"].load(config)
