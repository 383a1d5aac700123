"""From prompts to what GRPO learns from: sample, score, compare within the group, lay out.

    prompts --generate--> answers --rewards--> scores --group--> advantages --deal--> micro-batches of RolloutBatch

Everything follows from the weights, the seed and the number of prompts used up, so a run that was killed half-way through a rollout
makes the same one again. An answer whose reward timed out or failed is left out of its group and counted, never scored 0; a group
whose scores are all equal says nothing and is dropped, counted, and refilled with further prompts up to `rollout.refills` times.
Leaves out: generation by another engine or on other weights than those in training.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import MegatronModule
from transformers import PreTrainedTokenizerBase

from megatron_tower.config import Config
from megatron_tower.data.batch import Batch, RolloutBatch, Round
from megatron_tower.data.chat import pad_id, stop_ids
from megatron_tower.data.prompts import Item, Prompts, family
from megatron_tower.data.sequences import Encoded, micro_batches
from megatron_tower.rewards.pool import Verdict, VerifierPool
from megatron_tower.rollout.generate import Completion, sample
from megatron_tower.rollout.scoring import label_logprobs
from megatron_tower.runtime.distributed import device, place


@dataclass(frozen=True)
class Answer:
    """One sampled answer. advantage: its score beside those of its group."""

    prompt: list[int]
    completion: Completion
    advantage: float

    @property
    def encoded(self) -> Encoded:
        said = len(self.completion.tokens)
        return self.prompt + self.completion.tokens, [0] * len(self.prompt) + [1] * said


@dataclass
class Tally:
    """What a round is told by: scores by family, lengths, and what went wrong."""

    scores: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    lengths: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)

    def stats(self) -> dict[str, float]:
        """Names of metrics.jsonl; rewards and shares are means over answers."""
        everything = [score for scores in self.scores.values() for score in scores]
        answers = max(1, len(self.lengths))
        return {
            "reward": _mean(everything),
            **{f"reward/{family}": _mean(scores) for family, scores in sorted(self.scores.items())},
            "length": sum(self.lengths) / answers,
            "truncated": self.counts["truncated"] / answers,
            **{name: float(self.counts[name]) for name in ("groups", "dropped_groups", "timeouts", "errors", "refills")},
            **{f"seconds_{name}": self.seconds[name] for name in ("rollout", "reward", "logprobs")},
        }


class RolloutSource:
    """`model`: this rank's part of the policy, the very modules that are trained. `reference`: frozen chunks, None without KL."""

    reads_weights = True

    def __init__(
        self,
        cfg: Config,
        dataset: Prompts,
        model: MegatronModule,
        tokenizer: PreTrainedTokenizerBase,
        reference: Sequence[MegatronModule] | None,
        pool: VerifierPool,
    ):
        self.cfg, self.dataset, self.model, self.tokenizer = cfg, dataset, model, tokenizer
        self.reference, self.pool = reference, pool
        self.stops = stop_ids(tokenizer)

    def round(self, samples: int) -> Round:
        """Groups of `global_batch_size` prompts (fewer where groups were dropped), in `rollout.updates` equal shares."""
        wanted, rollout = self.cfg.phase.global_batch_size, self.cfg.phase.rollout
        tally, groups, used = Tally(), [], 0
        for attempt in range(1 + rollout.refills):
            tally.counts["refills"] = attempt
            missing = wanted - len(groups)
            groups += self._groups(range(samples + used, samples + used + missing), tally)
            used += missing
            if len(groups) == wanted:
                break
        share = -(-len(groups) // rollout.updates)
        with _timed(tally, "logprobs"):
            updates = [self._laid_out(groups[i * share : (i + 1) * share]) for i in range(rollout.updates)]
        return Round(updates, used, tally.stats())

    def _groups(self, numbers: range, tally: Tally) -> list[list[Answer]]:
        """The groups of the prompts with these sample indices that have something to say, the same on every rank."""
        rollout, replicas = self.cfg.phase.rollout, self.cfg.parallel.data
        mine = list(numbers)[parallel_state.get_data_parallel_rank() :: replicas]
        asked = [self.dataset[number] for number in mine]
        with _timed(tally, "rollout"):
            sampled = sample(
                self.model,
                [ids for _, ids in asked],
                samples=rollout.rollouts_per_prompt,
                max_new_tokens=rollout.max_new_tokens,
                stop_ids=self.stops,
                temperature=rollout.temperature,
                top_p=rollout.top_p,
                seed=self.cfg.seed,
                keys=mine,
                batch_size=rollout.batch_size,
            )
        with _timed(tally, "reward"):
            verdicts = self._verdicts([item for item, _ in asked], sampled)
            found = dict(zip(mine, zip(sampled, verdicts, strict=True), strict=True)) if _leads() else {}
            parts: list[dict] = [{}] * place().world_size
            dist.all_gather_object(parts, found)
            everyone = {number: of_prompt for part in parts for number, of_prompt in part.items()}
        kept = []
        for number in numbers:
            item, prompt = self.dataset[number]
            completions, judged = everyone[number]
            self._count(item, completions, judged, tally)
            if group := self._compared(prompt, completions, judged):
                kept.append(group)
        tally.counts["groups"] += len(kept)
        tally.counts["dropped_groups"] += len(numbers) - len(kept)
        return kept

    def _verdicts(self, items: list[Item], sampled: list[list[Completion]]) -> list[list[Verdict]]:
        """Scores of each prompt's answers; on one rank of a replica, for all have the same answers."""
        if not _leads():
            return []
        texts = [self.tokenizer.batch_decode([c.tokens for c in group], skip_special_tokens=True) for group in sampled]
        asked = [(item, text.strip()) for item, group in zip(items, texts, strict=True) for text in group]
        judged = iter(self.pool.score(asked))
        return [[next(judged) for _ in group] for group in sampled]

    def _count(self, item: Item, completions: list[Completion], judged: list[Verdict], tally: Tally) -> None:
        for completion, verdict in zip(completions, judged, strict=True):
            tally.lengths.append(len(completion.tokens))
            tally.counts["truncated"] += completion.tokens[-1] not in self.stops
            if verdict.score is not None:
                tally.scores[family(item)].append(verdict.score)
            else:
                tally.counts["timeouts" if verdict.problem == "timeout" else "errors"] += 1

    def _compared(self, prompt: list[int], completions: list[Completion], judged: list[Verdict]) -> list[Answer]:
        """The group's answers with their advantages; none when fewer than two were scored or all scores are equal."""
        scored = [(completion, verdict.score) for completion, verdict in zip(completions, judged, strict=True) if verdict.score is not None]
        advantages = group_advantages([score for _, score in scored], self.cfg.phase.objective.aggregation != "dr_grpo")
        return [Answer(prompt, completion, a) for (completion, _), a in zip(scored, advantages, strict=True)] if any(advantages) else []

    def _laid_out(self, groups: list[list[Answer]]) -> list[Batch]:
        """This rank's micro-batches of one update. Answers are dealt out longest first: ranks and micro-batches are then of like size."""
        phase, ranks = self.cfg.phase, self.cfg.parallel.data
        answers = sorted((answer for group in groups for answer in group), key=lambda a: -len(a.encoded[0]))
        rows = max(1, -(-len(answers) // (phase.micro_batch_size * ranks)))  # micro-batches a rank
        mine = [answers[i :: rows * ranks] for i in range(parallel_state.get_data_parallel_rank(), rows * ranks, ranks)]
        batches = micro_batches([[a.encoded for a in part] for part in mine], pad_id(self.tokenizer), self.cfg.parallel)
        laid = [self._batch(batch, part).to(device()) for batch, part in zip(batches, mine, strict=True)]
        if phase.rollout.updates > 1:
            laid = self._with("old_logprobs", [self.model], laid)
        return laid if self.reference is None else self._with("reference_logprobs", self.reference, laid)

    def _batch(self, batch: Batch, answers: list[Answer]) -> RolloutBatch:
        seen = torch.zeros(batch.tokens.numel())
        seen[batch.loss_mask.flatten().bool()] = torch.tensor([p for a in answers for p in a.completion.logprobs])
        advantages = torch.tensor([a.advantage for a in answers], dtype=torch.float64)
        return RolloutBatch(**vars(batch), advantages=advantages, rollout_logprobs=seen.view(batch.tokens.shape))

    def _with(self, name: str, chunks: Sequence[MegatronModule], batches: list[RolloutBatch]) -> list[RolloutBatch]:
        found = label_logprobs(chunks, batches, self.cfg.phase.rollout.temperature)
        return [replace(batch, **{name: logprobs}) for batch, logprobs in zip(batches, found, strict=True)]


def group_advantages(scores: Sequence[float], standardised: bool) -> list[float]:
    """Scores less their mean, in units of their standard deviation (of the group itself, n in the divisor) if `standardised`.

    All 0 where scores are equal, or fewer than two.
    """
    mean = _mean(scores)
    centred = [score - mean for score in scores]
    spread = (sum(c * c for c in centred) / max(1, len(scores))) ** 0.5
    if max(scores, default=0) == min(scores, default=0):
        return [0.0] * len(scores)
    return [c / spread for c in centred] if standardised else centred


def _leads() -> bool:
    """Whether this rank speaks for its replica."""
    return parallel_state.get_model_parallel_group().rank() == 0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@contextmanager
def _timed(tally: Tally, name: str) -> Iterator[None]:
    """Adds the seconds spent inside to `tally.seconds[name]`."""
    began = time.perf_counter()
    yield
    tally.seconds[name] += time.perf_counter() - began
