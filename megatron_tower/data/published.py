r"""Rows of public sets with checkable answers, as they were published, as items that a reward can check.

    gsm8k    {"question": "...", "answer": "... #### 42"}                                                openai/gsm8k
    math     {"problem": "...", "solution": "... \\boxed{42}", "type": "Algebra"}                        Hendrycks' MATH
    ifeval   {"prompt": "...", "instruction_id_list": [...], "kwargs": [...]}                            IFEval's own form
    rlvr     {"messages": [one user turn], "ground_truth": "...", "dataset": "gsm8k | MATH | ifeval"}    Tulu 3's, allenai/RLVR-*

Tulu's instructions name functions; those become IFEval's checkers. An exact number and "around" a number are two checkers.
Leaves out: whether the reward can read the answer (curation/prompts.py asks it).
"""

import ast
import json
from collections.abc import Callable

from megatron_tower.config import InputError
from megatron_tower.data import jsonl
from megatron_tower.data.jsonl import Row
from megatron_tower.data.prompts import Item

Checks = list[tuple[str, dict]]  # an IFEval checker and its arguments

_CHOICES = {"My answer is yes.", "My answer is no.", "My answer is maybe."}  # that IFEval's checker knows
_PLAIN = {
    "validate_title": "detectable_format:title",
    "validate_json_format": "detectable_format:json_format",
    "validate_two_responses": "combination:two_responses",
    "validate_uppercase": "change_case:english_capital",
    "validate_lowercase": "change_case:english_lowercase",
    "validate_quotation": "startend:quotation",
    "validate_no_commas": "punctuation:no_comma",
}
_RENAMED = {  # Tulu's function -> the checker, {its argument: Tulu's}
    "verify_keywords": ("keywords:existence", {"keywords": "keyword_list"}),
    "validate_forbidden_words": ("keywords:forbidden_words", {"forbidden_words": "forbidden_words"}),
    "validate_response_language": ("language:response_language", {"language": "language"}),
    "validate_paragraphs": (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": "N", "nth_paragraph": "i", "first_word": "first_word"},
    ),
    "verify_postscript": ("detectable_content:postscript", {"postscript_marker": "postscript_marker"}),
    "validate_placeholders": ("detectable_content:number_placeholders", {"num_placeholders": "N"}),
    "verify_bullet_points": ("detectable_format:number_bullet_lists", {"num_bullets": "N"}),
    "validate_highlighted_sections": ("detectable_format:number_highlighted_sections", {"num_highlights": "N"}),
    "validate_sections": ("detectable_format:multiple_sections", {"num_sections": "N", "section_spliter": "section_splitter"}),
    "validate_repeat_prompt": ("combination:repeat_prompt", {"prompt_to_repeat": "original_prompt"}),
    "validate_end": ("startend:end_checker", {"end_phrase": "end_phrase"}),
}
_COUNTED = {  # Tulu's function -> the checker, its names for the number and the relation, and of other arguments {its: Tulu's}
    "verify_keyword_frequency": ("keywords:frequency", "frequency", "relation", {"keyword": "word"}),
    "verify_letter_frequency": ("keywords:letter_frequency", "let_frequency", "let_relation", {"letter": "letter"}),
    "validate_word_constraint": ("length_constraints:number_words", "num_words", "relation", {}),
    "verify_sentence_constraint": ("length_constraints:number_sentences", "num_sentences", "relation", {}),
    "validate_frequency_capital_words": ("change_case:capital_word_frequency", "capital_frequency", "capital_relation", {}),
}
_UNCHECKED = ("verify_paragraph_count",)  # it divides by "* * *", IFEval's by "***"


def _gsm8k(row: Row, place: str) -> Item:
    jsonl.require_texts(row, ("question", "answer"), place)
    return _maths(row["question"], row["answer"].rpartition("####")[2].strip() if "####" in row["answer"] else "", "gsm8k", place)


def _math(row: Row, place: str) -> Item:
    jsonl.require_texts(row, ("problem", "solution"), place)
    return _maths(row["problem"], row["solution"] if "\\boxed" in row["solution"] else "", "math", place)


def _ifeval(row: Row, place: str) -> Item:
    jsonl.require_texts(row, ("prompt",), place)
    names, arguments = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(names, list) or not isinstance(arguments, list) or not names or len(names) != len(arguments):
        raise InputError(f"{place}: instruction_id_list and kwargs must be two lists of one length: mend or drop the row")
    return _instructions(row["prompt"], list(zip(names, arguments, strict=True)))


def _rlvr(row: Row, place: str) -> Item | None:
    messages = row.get("messages")
    if not isinstance(messages, list) or [turn.get("role") if isinstance(turn, dict) else None for turn in messages] != ["user"]:
        raise InputError(f"{place}: messages must be one user turn: mend or drop the row")
    jsonl.require_texts(messages[0], ("content",), place)
    jsonl.require_texts(row, ("ground_truth", "dataset"), place)
    prompt, truth, name = messages[0]["content"], row["ground_truth"], row["dataset"].lower()
    if name in ("gsm8k", "math"):
        return _maths(prompt, truth, name, place)
    if name != "ifeval":
        raise InputError(f"{place}: dataset is {row['dataset']!r}, and gsm8k, MATH and ifeval are known: drop the row")
    asked = _asked(truth, place)
    return _instructions(prompt, asked) if asked else None


FORMS: dict[str, Callable[[Row, str], Item | None]] = {"gsm8k": _gsm8k, "math": _math, "ifeval": _ifeval, "rlvr": _rlvr}


def _asked(truth: str, place: str) -> Checks:
    """What the ground truth of an instruction says; nothing where IFEval has no such checker."""
    told = _literal(truth)
    if isinstance(told, list) and len(told) == 1 and isinstance(told[0], dict) and "instruction_id" in told[0]:
        return list(zip(told[0]["instruction_id"], told[0].get("kwargs", ()), strict=False))
    name = told.get("func_name") if isinstance(told, dict) else None
    known = (*_PLAIN, *_RENAMED, *_COUNTED, *_UNCHECKED, "validate_choice")
    if name not in known:
        raise InputError(f"{place}: ground_truth names the function {name!r}, none of {', '.join(sorted(known))}: drop the row")
    if name in _PLAIN:
        return [(_PLAIN[name], {})]
    if name in _RENAMED:
        checker, names = _RENAMED[name]
        return [(checker, {ours: told.get(theirs) for ours, theirs in names.items()})]
    if name in _COUNTED:
        return _counted(told, place)
    if name == "validate_choice" and set(told.get("options") or ()) == _CHOICES:
        return [("detectable_format:constrained_response", {})]
    return []


def _literal(text: str) -> object:
    """JSON, or a Python literal as some of Tulu's later sets write it; None for neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return None


def _counted(told: dict, place: str) -> Checks:
    """A number of something: at least, at most, around (a tenth more or less, of sentences one), or without a word for it exactly."""
    checker, number, relation, others = _COUNTED[told["func_name"]]
    count, how = told.get("N"), told.get("quantifier")
    if not isinstance(count, int) or how not in ("at least", "at most", "around", None):
        raise InputError(f"{place}: ground_truth has N={count!r} and quantifier={how!r}: mend or drop the row")
    rest = {ours: told.get(theirs) for ours, theirs in others.items()}
    slack = 0 if how != "around" else 1 if "sentences" in checker else max(round(count / 10), 1)
    least = [(checker, {number: max(count - slack, 0), relation: "at least", **rest})]
    most = [(checker, {number: count + slack + 1, relation: "less than", **rest})]
    return {"at least": least, "at most": most}.get(how, least + most)


def _maths(prompt: str, answer: str, family: str, place: str) -> Item:
    if not answer.strip():
        raise InputError(f"{place}: its solution states no answer (after #### or in \\boxed{{}}): mend or drop the row")
    return {"prompt": prompt, "reward": "maths", "family": family, "locale": "en", "answer": answer, "check": {"answer": answer}}


def _instructions(prompt: str, checks: Checks) -> Item:
    names, arguments = zip(*checks, strict=True)
    spec = {"instruction_ids": list(names), "kwargs": [_given(argument) for argument in arguments]}
    return {"prompt": prompt, "reward": "instructions", "family": "ifeval", "locale": "en", "answer": None, "check": spec}


def _given(arguments: dict | None) -> dict:
    """Without nulls, with which published rows fill up every argument that a checker of theirs may have."""
    return {name: value for name, value in (arguments or {}).items() if value is not None}
