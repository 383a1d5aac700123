"""Build the SFT set: public prompts, graded by a judge, answered by several models, the best answer kept; and tasks around translation.

    python -m tools.build_sft sft=mine sft.dry_run=true        # conf/sft/mine.yaml, or --config-dir DIR: what would be asked, and its price
    python -m tools.build_sft sft=mine sft.output=runs/mine/sft_set
    python -m megatron_tower.train phase=sft phase.file=runs/mine/sft_set/train.jsonl ...

Writes <output>/train.jsonl and manifest.json; judgements.jsonl, answers.jsonl and scores.jsonl beside them hold every reply as it came,
so that the same command goes on where it was killed, and other settings ask for what they add. Models of your own: slurm/serve.sbatch.
Leaves out: two builds in one folder at once; more replies than fit into memory.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluation.generators import Decoding
from evaluation.generators.endpoint import EndpointGenerator
from evaluation.judging import GRADES, JUDGE_VERSION, Judge, Question, worth
from evaluation.replies import Replies, price, spent
from evaluation.selection import Best, Rewards, best, candidates
from evaluation.store import Store
from evaluation.tasks import taught
from megatron_tower.command import entry_point
from megatron_tower.config import Config, InputError
from megatron_tower.config_sft import SftConfig, TextConfig
from megatron_tower.curation import pools
from megatron_tower.curation.pools import Prompt
from megatron_tower.data import chat
from megatron_tower.data.sources import sha256
from megatron_tower.rollout import scorers
from megatron_tower.runtime.job import supervised
from megatron_tower.runtime.run_dir import write_text

ANSWER_TOKENS = 600  # of a usual answer, for estimates of the cost
Row = dict[str, Any]

Counts = dict[str, dict[str, int]]  # pool -> reason -> prompts
Answered = tuple[Prompt, Best]


@entry_point
def main(cfg: Config) -> None:
    if not supervised(cfg, "tools.build_sft"):
        build(cfg)


def build(cfg: Config) -> None:
    """Raises InputError for bad input, before anything is asked where that can be known, and for a model that won't answer."""
    wanted, folder = cfg.sft, Path(cfg.sft.output or f"{cfg.run_dir}/sft_set")
    check(wanted)
    for text in _texts(wanted).values():
        text.files = pools.fetched(text.files, Path(cfg.data.cache))
    contaminated = pools.contamination(wanted.decontaminate, wanted.ngram)
    prompts, counts = pools.read(wanted.pools, contaminated, cfg.seed)
    prompts = _writable(wanted, prompts, counts)
    around = taught.mixture(wanted, round(wanted.examples * wanted.translation_share), contaminated, cfg.seed) if wanted.examples else None
    general = wanted.examples - len(around) if around is not None else len(prompts)
    if len(prompts) < max(general, 1):
        raise InputError(f"sft.pools have {len(prompts)} prompts of {general} that sft.examples={wanted.examples} asks for: add pools")
    grader = EndpointGenerator(wanted.judge) if wanted.judge else None
    models = {name: EndpointGenerator(endpoint) for name, endpoint in wanted.answers.items()}
    left_out: Counter[tuple[str, str]] = Counter()  # answers, by model and reason
    with Store(folder / "judgements.jsonl") as judged, Store(folder / "answers.jsonl") as answered:
        judge = Judge(grader, judged) if grader else None
        decoding = Decoding(wanted.max_new_tokens, wanted.temperature, wanted.top_p, cfg.seed)
        replies = Replies(models, answered, decoding, wanted.samples)
        if wanted.dry_run:
            _estimate(wanted, prompts, judge, replies)
            return
        good = _good(wanted, prompts, judge, counts) if judge else prompts
        replies.ask([prompt.messages for prompt in good])
        with Store(folder / "scores.jsonl") as scored:
            found = _best(wanted, good, replies, scored, counts, left_out)
        cost = {"judge": spent(judged, {wanted.judge.model: wanted.judge}, "judge") if judge else {}}
        cost["answers"] = spent(answered, wanted.answers, "model")
        failures = replies.failures([prompt.messages for prompt in good])
        requests = {"judge": grader.summary() if grader else {}} | {name: model.summary() for name, model in models.items()}
    if around is None:
        beside = wanted.translation_share / (1 - wanted.translation_share)
        around = taught.mixture(wanted, round(len(found) * beside), contaminated, cfg.seed)
    elif len(found) < general:
        raise InputError(
            f"{len(found)} of {len(prompts)} prompts have a good answer, {general} are needed for sft.examples={wanted.examples}: "
            "lower it or add pools (all replies are kept)"
        )
    else:
        found = _drawn(found, general, cfg.seed, counts)
    answers = {name: {why: count for (model, why), count in sorted(left_out.items()) if model == name} for name in models}
    facts = {"pools": counts, "answers_left_out": answers, "cost": cost, "failures": failures, "requests_of_this_run": requests}
    _write(folder, cfg, found, around, facts)


def check(cfg: SftConfig) -> None:
    """Raise InputError for settings that contradict one another, and for a reward model that is none; asks and writes nothing."""
    known = (*taught.FORMS, *taught.FROM_PAIRS)
    several = cfg.samples * len(cfg.answers) > 1
    for problem, why in (
        (not cfg.pools, "sft.pools is empty: name instruction sets, as in conf/sft/tower_plus.yaml"),
        (
            not cfg.answers,
            "sft.answers is empty: name a model that answers, as in conf/sft/tower_plus.yaml",
        ),
        (cfg.samples < 1 or cfg.examples < 0, f"sft.samples={cfg.samples} must be 1 or more, sft.examples={cfg.examples} 0 or more"),
        (
            cfg.samples > 1 and not cfg.temperature,
            f"sft.samples={cfg.samples} at sft.temperature=0 are all the same: raise one or lower the other",
        ),
        (
            several and not cfg.reward_model,
            "sft.reward_model is not set: it chooses among the answers to a prompt; ask one model once without it",
        ),
        (not 0 <= cfg.translation_share < 1, f"sft.translation_share={cfg.translation_share} must be at least 0 and below 1"),
        (cfg.translation_share and not cfg.tasks, "sft.tasks is empty: name some, or set sft.translation_share=0"),
        (
            cfg.judge and (set(cfg.minimum) != set(GRADES) or not all(1 <= least <= 5 for least in cfg.minimum.values())),
            f"sft.minimum={cfg.minimum} must give {' and '.join(GRADES)} a grade from 1 to 5",
        ),
    ):
        if problem:
            raise InputError(why)
    for name, task in cfg.tasks.items() if cfg.translation_share else ():
        if name not in known:
            raise InputError(f"sft.tasks.{name} is unknown: use some of {', '.join(known)}")
        if task.share <= 0:
            raise InputError(f"sft.tasks.{name}.share={task.share} must be above 0: leave the task out instead, ~sft.tasks.{name}")
        if name in taught.FROM_PAIRS and cfg.pairs is None:
            raise InputError(f"sft.tasks.{name} is made from pairs: set sft.pairs, or leave it out with ~sft.tasks.{name}")
        if name in taught.FORMS and task.text is None:
            raise InputError(
                f"sft.tasks.{name}.text is not set: name files in its form (docs/data.md), or leave it out with ~sft.tasks.{name}"
            )
    if cfg.reward_model:
        scorers.check_folder("reward_model", cfg.reward_model, "sft.reward_model")


def _texts(cfg: SftConfig) -> dict[str, TextConfig]:
    """By the names of their config keys."""
    found = {f"sft.pools.{name}": pool for name, pool in cfg.pools.items()} | {"sft.pairs": cfg.pairs}
    found |= {f"sft.tasks.{name}.text": task.text for name, task in cfg.tasks.items()}
    return {name: text for name, text in found.items() if text}


def _writable(cfg: SftConfig, prompts: list[Prompt], counts: Counts) -> list[Prompt]:
    """Those that the chat template of sft.tokenizer takes: Gemma's has no system turn."""
    if not cfg.tokenizer:
        return prompts
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cfg.tokenizer, local_files_only=True, trust_remote_code=False)
    kept = []
    for prompt in prompts:
        try:
            chat.prompt_ids(tokenizer, prompt.messages)
            kept.append(prompt)
        except TemplateError:
            _leave_out(counts, prompt, "refused by the chat template")
    return kept


def _leave_out(counts: Counts, prompt: Prompt, why: str) -> None:
    of = counts[prompt.pool]
    of[why] = of.get(why, 0) + 1
    of["kept"] -= 1


def _question(prompt: Prompt) -> Question:
    return worth(prompt.text, id=prompt.id)


def _good(cfg: SftConfig, prompts: list[Prompt], judge: Judge, counts: Counts) -> list[Prompt]:
    """Those whose grades are all high enough; one that the judge could not grade is left out, and counted as what it was."""
    good = []
    for prompt, reply in zip(prompts, judge.ask([_question(prompt) for prompt in prompts]), strict=True):
        low = next((name for name, least in cfg.minimum.items() if reply.verdict and reply.verdict[name] < least), None)
        if why := (f"grade: {reply.problem}" if reply.problem else f"low {low}" if low else None):
            _leave_out(counts, prompt, why)
        else:
            good.append(prompt)
    return good


def _best(cfg: SftConfig, prompts: list[Prompt], replies: Replies, scored: Store, counts: Counts, left_out: Counter) -> list[Answered]:
    found = [candidates(replies.of(prompt.messages), left_out) for prompt in prompts]
    asked = [(i, answer) for i, answers in enumerate(found) for answer in answers]
    rewards: list[dict[str, float | None] | None] = [None] * len(prompts)
    if cfg.reward_model:
        rewards = [{} for _ in prompts]
        given = Rewards(cfg.reward_model, cfg.batch_size, scored).of([(prompts[i].messages, answer) for i, answer in asked])
        for (i, answer), reward in zip(asked, given, strict=True):
            rewards[i][answer] = reward
    chosen = []
    for prompt, answers, known in zip(prompts, found, rewards, strict=True):
        if one := best(answers, known, left_out):
            chosen.append((prompt, one))
        else:
            _leave_out(counts, prompt, "no answer")
    return chosen


def _drawn(found: list[Answered], count: int, seed: int, counts: Counts) -> list[Answered]:
    drawn = {prompt.id for prompt in pools.drawn([prompt for prompt, _ in found], count, seed)}
    for prompt, _ in found:
        if prompt.id not in drawn:
            _leave_out(counts, prompt, "beyond sft.examples")
    return [one for one in found if one[0].id in drawn]


def _estimate(cfg: SftConfig, prompts: list[Prompt], judge: Judge | None, replies: Replies) -> None:
    """What asking would take if every prompt passed the judge: four bytes a token."""
    total = 0.0
    if judge:
        count, reads, says = judge.estimate([_question(prompt) for prompt in prompts])
        total += (cost := price(cfg.judge, reads, says))
        print(f"judge {cfg.judge.model}: {count} requests, about {reads} tokens to read and {says} to write: {cost:.2f}")
    chats = [prompt.messages for prompt in prompts]
    for name, endpoint in cfg.answers.items():
        missing = [chat for decoding in replies.decodings for chat in replies.missing(name, chats, decoding)]
        reads, says = sum(len(turn["content"].encode()) for chat in missing for turn in chat) // 4, len(missing) * ANSWER_TOKENS
        total += (cost := price(endpoint, reads, says))
        print(f"{name} {endpoint.model}: at most {len(missing)} requests, about {reads} tokens to read and {says} to write: {cost:.2f}")
    print(f"{len(prompts)} prompts; {total:.2f} in all, at the prices given, if the judge lets every prompt pass")


def _general(prompt: Prompt, best: Best, licence: str) -> Row:
    told = {"task": "general", "kind": prompt.pool, "locale": prompt.locale, "id": prompt.id, "licence": licence}
    told |= {"model": best.model, "reward": best.reward, "margin": best.margin}
    return {"messages": [*prompt.messages, {"role": "assistant", "content": best.answer}], **told}


def _translation(one: taught.Taught) -> Row:
    messages = [{"role": "user", "content": one.prompt}, {"role": "assistant", "content": one.answer}]
    return {"messages": messages, "task": "translation", "kind": one.kind, "locale": one.locale, "id": one.id, "licence": one.licence}


def _write(folder: Path, cfg: Config, found: Sequence[Answered], around: Sequence[taught.Taught], facts: dict[str, Any]) -> None:
    """In random order, read back as training reads it, then the manifest, then the set in its place."""
    from megatron_tower.data.packing import read_chats

    rows = [_general(prompt, best, cfg.sft.pools[prompt.pool].licence) for prompt, best in found] + [_translation(one) for one in around]
    rows.sort(key=lambda row: hashlib.sha256(f"{cfg.seed}/{row['id']}".encode()).digest())
    if not rows:
        raise InputError(f"no prompt has an answer: {folder}/train.jsonl was not written; failures: {facts['failures']}")
    output, partial = folder / "train.jsonl", folder / ".train.jsonl"
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    read_chats(partial)
    kinds = Counter(row["kind"] for row in rows if row["task"] == "translation")
    told = {
        "examples": len(rows),
        "translation_share": round(len(around) / len(rows), 4),
        "stages": {stage: sum(kinds[kind] for kind in of) for stage, of in taught.STAGES.items()},
        "tasks": dict(sorted(kinds.items())),
        "models": dict(sorted(Counter(best.model for _, best in found).items())),
        "licences": dict(sorted(Counter(row["licence"] for row in rows).items())),
        **facts,
        "sources": {
            name: {"origin": text.origin, "licence": text.licence, "files": {str(path): sha256(path) for path in pools.files(text, name)}}
            for name, text in _texts(cfg.sft).items()
        },
        "settings": asdict(cfg.sft) | {"seed": cfg.seed, "judge_version": JUDGE_VERSION},
        "sha256": sha256(partial),
    }
    write_text(folder / "manifest.json", json.dumps(told, ensure_ascii=False, indent=1) + "\n")
    os.replace(partial, output)
    _report(output, told)


def _report(output: Path, told: dict[str, Any]) -> None:
    print(f"{output}: {told['examples']} examples, {100 * told['translation_share']:.1f} % around translation {told['stages']}")
    for name, counts in told["pools"].items():
        print(f"{name}: {', '.join(f'{count} {what}' for what, count in counts.items())}")
    for of in told["cost"].values():
        for model, cost in of.items():
            print(f"{model}: {', '.join(f'{value} {what}' for what, value in cost.items())}")
    if told["failures"]:
        print(f"no answer for {told['failures']}: run it again to ask for them")


if __name__ == "__main__":
    main()
