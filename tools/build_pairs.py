"""Build preference pairs: answers sampled from a checkpoint, and answers and post-edits made elsewhere, scored, best against worst.

    python -m tools.build_pairs pairs.checkpoint=runs/demo/sft pairs.samples=5
    python -m tools.build_pairs pairs.checkpoint=runs/demo/sft pairs.scorer=comet pairs.scorer_path=wmt22-cometkiwi-da parallel=tp2
    python -m tools.build_pairs pairs.samples=0 pairs.given=post_edits.jsonl pairs.output=pairs.jsonl

Writes <output> and, beside it, <output>.manifest.json with the settings it was made with and what was left out. An answer is
left out when it did not end within pairs.max_new_tokens, and when it has no score (time-out, error, NaN). Does nothing when the
output was made with the same settings from the same files. Leaves out: going on with half-sampled prompts.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tower.command import entry_point
from megatron_tower.config import Config, InputError, PairsConfig
from megatron_tower.data.made import is_made, publish
from megatron_tower.data.preferences import Preference
from megatron_tower.data.prompts import Item
from megatron_tower.data.sources import sha256
from megatron_tower.rollout import pairs, scorers
from megatron_tower.runtime.job import supervised

if TYPE_CHECKING:
    from megatron_tower.rewards.pool import Verdict

VERSION = 1  # of the selection; raised when the same answers would give other pairs
FREE = ("name", "output", "batch_size", "processes")  # settings that change no pair
PATHS = ("checkpoint", "items", "answers", "given", "scorer_path")  # what lies there counts, not where


@dataclass(frozen=True)
class Plan:
    """A checked build. items: chosen ones by their position in the file; answers: given ones by prompt; given: pairs that are ready.

    left_out: rows of the files that nothing can be made of; settings: what tells this build from any other.
    """

    items: dict[int, Item]
    answers: dict[str, list[str]]
    given: list[Preference]
    left_out: dict[str, int]
    settings: dict[str, Any]
    output: Path


@entry_point
def main(cfg: Config) -> None:
    if supervised(cfg, "tools.build_pairs"):
        return
    from megatron_tower.runtime import cpu
    from megatron_tower.runtime.local import relaunch_if_needed

    cpu.install()
    plan = check(cfg)
    made = is_made(plan.output, plan.settings, "pairs.output")
    if not (made or relaunch_if_needed(cfg, "tools.build_pairs", plan.output.parent / "logs")):
        build(cfg, plan)


def check(cfg: Config) -> Plan:
    """Read all that is needed but the weights. Raises InputError for anything missing, malformed or contradictory."""
    wanted = cfg.pairs
    if wanted.samples < 0 or wanted.prompts < 0 or wanted.minimum_gap < 0:
        raise InputError(
            f"pairs.samples={wanted.samples}, pairs.prompts={wanted.prompts}, pairs.minimum_gap={wanted.minimum_gap}: none may be below 0"
        )
    if not (wanted.samples or wanted.answers or wanted.given):
        raise InputError("pairs.samples=0, and neither pairs.answers nor pairs.given is set: there is nothing to build pairs from")
    files = {"items": None, "answers": wanted.answers, "given": wanted.given}
    items, several = {}, 0
    if wanted.samples or wanted.answers:
        files["items"] = wanted.items or f"{cfg.data.folder}/rl/train.jsonl"
        found, several = pairs.read_items(Path(files["items"]))
        items = _chosen(found, wanted.prompts)
        scorers.check(wanted, list(items.values()))
    answers = pairs.read_answers(Path(wanted.answers)) if wanted.answers else {}
    given, unchanged = pairs.read_given(Path(wanted.given)) if wanted.given else ([], 0)
    settings = {f"pairs.{key}": value for key, value in asdict(wanted).items() if key not in FREE + PATHS}
    settings |= {f"pairs.{name}": sha256(Path(path)) if path else None for name, path in files.items()}
    settings |= {"pairs.checkpoint": _fingerprint(wanted) if wanted.samples else None}
    settings |= {"pairs.scorer_path": scorers.fingerprint(wanted) if items else None, "seed": cfg.seed, "version": VERSION}
    left_out = {"unchanged post-edits": unchanged, "chats of several turns": several}
    return Plan(items, answers, given, left_out, settings, Path(wanted.output or f"{cfg.run_dir}/pairs.jsonl"))


def build(cfg: Config, plan: Plan) -> None:
    """Sample as one of the layout's ranks; the first rank scores, chooses and writes."""
    from megatron_tower.runtime import distributed

    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    sampled = _sample(cfg, plan.items) if cfg.pairs.samples else {key: [] for key in plan.items}
    distributed.shutdown()  # the other ranks need not wait for the scores
    if distributed.is_rank_zero():
        counts = Counter(plan.left_out)
        counts["prompts without room for an answer"] = len(plan.items) - len(sampled)
        counts["empty or unfinished answers"] = sum(cfg.pairs.samples - len(answers) for answers in sampled.values())
        made = [*_selected(cfg.pairs, plan, sampled, counts), *plan.given]
        _write(plan, made, {what: count for what, count in counts.items() if count})


def _sample(cfg: Config, items: dict[int, Item]) -> dict[int, list[str]]:
    """The answers, ended and not empty, of each item whose prompt fits the context; every rank gets all."""
    from megatron_tower.data import chat
    from megatron_tower.rollout.answers import answers
    from megatron_tower.training.loading import open_for_inference

    wanted = cfg.pairs
    model, tokenizer, _ = open_for_inference(Path(wanted.checkpoint), cfg.parallel, cfg.precision)
    if tokenizer.chat_template is None:
        raise InputError(f"pairs.checkpoint={wanted.checkpoint} has no chat template: sample from one that was trained on chats")
    encoded = {key: chat.prompt_ids(tokenizer, item["prompt"]) for key, item in items.items()}
    fitting = {key: ids for key, ids in encoded.items() if len(ids) + wanted.max_new_tokens <= model.max_sequence_length}
    if items and not fitting:
        raise InputError(
            f"pairs.max_new_tokens={wanted.max_new_tokens} leaves room for no prompt in a context of {model.max_sequence_length}: "
            "use less, for prompt and answer share it"
        )
    stops = chat.stop_ids(tokenizer)
    found = answers(
        model,
        fitting,
        samples=wanted.samples,
        max_new_tokens=wanted.max_new_tokens,
        stop_ids=stops,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        seed=cfg.seed,
        batch_size=wanted.batch_size,
    )
    ended = {key: [tokens for tokens in row if tokens[-1] in stops] for key, row in found.items()}
    return {key: [t for ids in row if (t := tokenizer.decode(ids, skip_special_tokens=True).strip())] for key, row in ended.items()}


def _selected(cfg: PairsConfig, plan: Plan, sampled: dict[int, list[str]], counts: Counter) -> list[Preference]:
    """Score all candidates at once, then choose prompt by prompt; adds to `counts` what is left out."""
    candidates = {key: _candidates(plan.items[key], sampled[key], plan.answers) for key in sorted(sampled)}
    asked = [(key, answer) for key, answers in candidates.items() for answer in answers]
    verdicts = scorers.score(cfg, [(plan.items[key], answer) for key, answer in asked]) if asked else []
    counts.update(_left_out(verdicts))
    scored: dict[int, list[pairs.Candidate]] = {key: [] for key in candidates}
    for (key, answer), verdict in zip(asked, verdicts, strict=True):
        if verdict.score is not None:
            scored[key].append(pairs.Candidate(answer, candidates[key][answer], verdict.score))
    found = [pairs.best_and_worst(plan.items[key]["prompt"], answers, cfg.minimum_gap) for key, answers in scored.items()]
    counts["prompts whose answers' scores don't differ enough"] = found.count(None)
    return [pair for pair in found if pair]


def _candidates(item: Item, sampled: Sequence[str], given: dict[str, list[str]]) -> dict[str, bool]:
    """Different answers to an item, sampled ones first; the value says whether the checkpoint gave it."""
    found = dict.fromkeys(sampled, True)
    for answer in (*given.get(item["prompt"], ()), item.get("answer") or ""):
        if answer.strip():
            found.setdefault(answer.strip(), False)
    return found


def _left_out(verdicts: "Sequence[Verdict]") -> Counter:
    """How often an answer had no score, by kind; of errors the first is told."""
    problems = [verdict.problem for verdict in verdicts if verdict.score is None]
    if error := next((problem for problem in problems if problem.startswith("error")), None):
        print(f"the first answer that could not be scored: {error}")
    return Counter(f"answers without a score ({problem.split(':')[0]})" for problem in problems)


def _chosen(items: list[Item], count: int) -> dict[int, Item]:
    """`count` items (0: all) at even distances, by their position in the file, which is the key of their random numbers."""
    count = min(count, len(items)) or len(items)
    return {i * len(items) // count: items[i * len(items) // count] for i in range(count)}


def _fingerprint(cfg: PairsConfig) -> str:
    """sha256 of the checkpoint that samples."""
    from megatron_tower.training import checkpoint

    if not cfg.checkpoint:
        raise InputError("pairs.checkpoint is not set: name a run directory, one of its checkpoints or a Hugging Face folder")
    return checkpoint.fingerprint(checkpoint.resolve(Path(cfg.checkpoint), "pairs.checkpoint"))


def _write(plan: Plan, made: list[Preference], counts: dict[str, int]) -> None:
    told = "; ".join(f"{count} {what}" for what, count in counts.items())
    if not made:
        raise InputError(f"no pair came of {len(plan.items)} prompts ({told}): nothing was written")
    origins = dict(Counter(pair.origin or "unknown" for pair in made))
    plan.output.parent.mkdir(parents=True, exist_ok=True)
    part = plan.output.with_name(f".{plan.output.name}.part")
    part.write_text("".join(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in made), encoding="utf-8")
    publish(part, plan.output, {"pairs": len(made), "origins": origins, "left_out": counts}, plan.settings)
    of_origins = ", ".join(f"{count} {origin}" for origin, count in origins.items())
    print(f"{plan.output}: {len(made)} pairs from {len(plan.items)} prompts and {len(plan.given)} given pairs ({of_origins})")
    if told:
        print(f"left out: {told}")


if __name__ == "__main__":
    main()
