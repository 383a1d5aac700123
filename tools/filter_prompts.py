"""Keep the prompts that are neither too hard nor too easy: the mean reward of a checkpoint's answers to each lies between two bounds.

    python -m tools.filter_prompts prompts.difficulty.items=prompts.jsonl prompts.difficulty.checkpoint=runs/mine/sft parallel=tp2
    sbatch --nodes=1 --ntasks-per-node=2 slurm/filter_prompts.sbatch ... parallel=tp2 cluster=my_cluster

Writes <output>, each prompt with its `mean_reward`, and <output>.manifest.json; prints a histogram by reward. <output>.answers.jsonl
holds the answers by what they depend on, so that a run that was killed goes on with those that are missing. They are sampled and scored
as in training (rollout/experience.py): one that did not end is scored, too, one whose reward fails or times out is left out, never 0.
Leaves out: more answers than fit into memory.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from evaluation.store import Store, digest
from megatron_tower.command import entry_point
from megatron_tower.config import Config, InputError
from megatron_tower.config_prompts import DifficultyConfig
from megatron_tower.data import prompts
from megatron_tower.data.made import is_made, publish
from megatron_tower.data.prompts import Item
from megatron_tower.data.sources import sha256
from megatron_tower.rewards.pool import VerifierPool
from megatron_tower.runtime.job import supervised
from tools.build_prompts import output_of

if TYPE_CHECKING:
    from megatron_tower.rewards.pool import Verdict

VERSION = 1  # raised when the same answers would keep other prompts
SAMPLING = ("rollouts_per_prompt", "temperature", "top_p", "max_new_tokens")
BATCHES = 4  # that each replica samples before the answers are written
BINS, WIDTH = 10, 40


@dataclass(frozen=True)
class Plan:
    """A checked run. keys: of each item's answers; settings: what tells this run from any other."""

    items: list[Item]
    keys: list[str]
    settings: dict[str, Any]
    output: Path

    @property
    def answers(self) -> Path:
        return self.output.with_name(f"{self.output.name}.answers.jsonl")


@entry_point
def main(cfg: Config) -> None:
    if supervised(cfg, "tools.filter_prompts"):
        return
    from megatron_tower.runtime import cpu
    from megatron_tower.runtime.local import relaunch_if_needed

    cpu.install()
    plan = check(cfg)
    made = is_made(plan.output, plan.settings, "prompts.difficulty.output")
    if not (made or relaunch_if_needed(cfg, "tools.filter_prompts", plan.output.parent / "logs")):
        run(cfg, plan)


def check(cfg: Config) -> Plan:
    """Read all that is needed but the weights. Raises InputError for anything missing, malformed or contradictory."""
    from megatron_tower.training import checkpoint

    wanted = cfg.prompts.difficulty
    if not 0 <= wanted.minimum <= wanted.maximum <= 1:
        raise InputError(f"prompts.difficulty.minimum={wanted.minimum} and maximum={wanted.maximum} must lie in this order between 0 and 1")
    if not wanted.checkpoint:
        raise InputError("prompts.difficulty.checkpoint is not set: name a run directory, one of its checkpoints or a Hugging Face folder")
    weights = checkpoint.fingerprint(checkpoint.resolve(Path(wanted.checkpoint), "prompts.difficulty.checkpoint"))
    path = Path(wanted.items or output_of(cfg))
    items = prompts.read(path)
    sampling = {name: getattr(wanted, name) for name in SAMPLING}
    keys = [digest(weights, sampling, cfg.seed, item["prompt"]) for item in items]
    settings = {f"prompts.difficulty.{name}": value for name, value in sampling.items()}
    settings |= {"prompts.difficulty.minimum": wanted.minimum, "prompts.difficulty.maximum": wanted.maximum}
    settings |= {"prompts.difficulty.checkpoint": weights, "prompts.difficulty.items": sha256(path), "seed": cfg.seed, "version": VERSION}
    return Plan(items, keys, settings, Path(wanted.output or f"{cfg.run_dir}/prompts_filtered.jsonl"))


def run(cfg: Config, plan: Plan) -> None:
    """Sample as one of the layout's ranks; the first rank scores and writes."""
    from megatron_tower.runtime import distributed

    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    with Store(plan.answers) as store:
        _sample(cfg, plan, store)
        distributed.shutdown()  # the other ranks need not wait for the scores
        if distributed.is_rank_zero():
            _write(cfg.prompts.difficulty, plan, store)


def _sample(cfg: Config, plan: Plan, store: Store) -> None:
    """The answers that the store lacks; it gets them batch by batch on the first rank. Prompts that leave no room for answers have none."""
    from megatron_tower.data import chat
    from megatron_tower.rollout.answers import answers
    from megatron_tower.runtime.distributed import is_rank_zero
    from megatron_tower.training.loading import open_for_inference

    missing = {key: item["prompt"] for key, item in zip(plan.keys, plan.items, strict=True) if key not in store}
    if not missing:
        return
    wanted = cfg.prompts.difficulty
    model, tokenizer, _ = open_for_inference(Path(wanted.checkpoint), cfg.parallel, cfg.precision)
    if tokenizer.chat_template is None:
        raise InputError(f"prompts.difficulty.checkpoint={wanted.checkpoint} has no chat template: name one that was trained on chats")
    encoded = {key: chat.prompt_ids(tokenizer, prompt) for key, prompt in missing.items()}
    fitting = [key for key, ids in encoded.items() if len(ids) + wanted.max_new_tokens <= model.max_sequence_length]
    size = BATCHES * cfg.parallel.data * max(1, wanted.batch_size // wanted.rollouts_per_prompt)
    for start in range(0, len(fitting), size):
        asked = {_number(key): key for key in fitting[start : start + size]}
        found = answers(
            model,
            {number: encoded[key] for number, key in asked.items()},
            samples=wanted.rollouts_per_prompt,
            max_new_tokens=wanted.max_new_tokens,
            stop_ids=chat.stop_ids(tokenizer),
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            seed=cfg.seed,
            batch_size=wanted.batch_size,
        )
        if is_rank_zero():
            texts = {
                number: [text.strip() for text in tokenizer.batch_decode(row, skip_special_tokens=True)] for number, row in found.items()
            }
            store.append({"key": key, "answers": texts[number]} for number, key in asked.items())
            print(f"{start + len(asked):,} of {len(fitting):,} prompts answered", flush=True)


def _number(key: str) -> int:
    """What a prompt's answers are drawn by: the same wherever it stands in a file, and in whichever run it is asked."""
    return int(key[:15], 16)


def _write(cfg: DifficultyConfig, plan: Plan, store: Store) -> None:
    answered = [(item, store[key]["answers"]) for key, item in zip(plan.keys, plan.items, strict=True) if key in store]
    with VerifierPool(cfg.processes, cfg.timeout) as pool:
        verdicts = iter(pool.score([(item, answer) for item, answers in answered for answer in answers]))
    counts = {item["reward"]: Counter() for item in plan.items}
    means: dict[str, list[float]] = {name: [] for name in counts}
    for key, item in zip(plan.keys, plan.items, strict=True):
        counts[item["reward"]]["prompts"] += 1
        counts[item["reward"]]["longer than the context"] += key not in store
    part = plan.output.with_name(f".{plan.output.name}.part")
    with part.open("w", encoding="utf-8") as file:
        for item, answers in answered:
            mean = _mean([next(verdicts) for _ in answers], counts[item["reward"]])
            fate = _fate(cfg, mean)
            counts[item["reward"]][fate] += 1
            if mean is not None:
                means[item["reward"]].append(mean)
            if fate == "kept":
                file.write(json.dumps(item | {"mean_reward": mean}, ensure_ascii=False) + "\n")
    for name, of in means.items():
        print("\n".join(histogram(name, of)))
    told = "; ".join(f"{name}: {', '.join(f'{count:,} {what}' for what, count in of.items() if count)}" for name, of in counts.items())
    if not any(of["kept"] for of in counts.values()):
        part.unlink()
        raise InputError(f"no prompt lies between {cfg.minimum} and {cfg.maximum} ({told}): nothing was written but the answers")
    publish(part, plan.output, {"kept": sum(of["kept"] for of in counts.values()), "rewards": counts}, plan.settings)
    print(f"{plan.output}: {told}")


def _mean(verdicts: "Sequence[Verdict]", counts: Counter) -> float | None:
    """Of the answers that have a score; the others are counted."""
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    counts["answers timed out"] += sum(verdict.problem == "timeout" for verdict in verdicts)
    counts["answers without a score"] += sum(verdict.score is None and verdict.problem != "timeout" for verdict in verdicts)
    return fmean(scores) if scores else None


def _fate(cfg: DifficultyConfig, mean: float | None) -> str:
    if mean is None:
        return "no score"
    return "too hard" if mean < cfg.minimum else "too easy" if mean > cfg.maximum else "kept"


def histogram(reward: str, means: Sequence[float]) -> Iterator[str]:
    """A line a tenth of the reward; 1 stands in the last."""
    bins = Counter(min(int(mean * BINS), BINS - 1) for mean in means)
    yield f"{reward}: mean reward of {len(means):,} prompts"
    for at in range(BINS):
        bar = "#" * round(WIDTH * bins[at] / max(bins.values(), default=1))
        yield f"  {at / BINS:.1f} {bins[at]:>8,} {bar}".rstrip()


if __name__ == "__main__":
    main()
