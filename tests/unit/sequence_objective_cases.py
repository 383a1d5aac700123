# ruff: noqa: E402 (the bridge comes before megatron-core)
"""WPO and GRPO against their formulas in float64; the ranks of test_sequence_objectives.py."""

from megatron_tower.runtime import cpu

cpu.install()

import math
from dataclasses import replace
from itertools import product

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_tower.config import ClusterConfig, GRPOConfig, ParallelConfig, RolloutConfig, WPOConfig
from megatron_tower.data.batch import PreferenceBatch, RolloutBatch, SequenceBatch
from megatron_tower.data.sequences import end_to_end
from megatron_tower.objectives import logprobs
from megatron_tower.objectives.grpo import GRPO
from megatron_tower.objectives.wpo import WPO
from megatron_tower.runtime import distributed

VOCABULARY = 12
LENGTHS = [(3, 5), (2, 9), (4, 2), (1, 7)]  # prompt and answer tokens: two pairs, or two groups of two
WPO_FORMS = [
    WPOConfig(beta=0.3),
    WPOConfig(beta=0.3, clamp=0.2),
    WPOConfig(beta=0.3, weighting="none"),
    WPOConfig(beta=0.3, label_smoothing=0.1, sft_coefficient=0.5),
    WPOConfig(beta=2.0, length_normalised=True),
]
GRPO_FORMS = [
    GRPOConfig(aggregation=form, kl=kl, importance_cap=cap)
    for form, kl, cap in product(("grpo", "dr_grpo", "dapo"), (0.0, 0.2), (None, 1.1))
]
ROLLOUT = RolloutConfig(rollouts_per_prompt=2, temperature=0.7, top_p=1.0, max_new_tokens=16)


def sequences() -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randint(VOCABULARY, (p + a,), generator=generator).tolist(), [0] * p + [1] * a) for p, a in LENGTHS]


def packed(padding: int = 0) -> SequenceBatch:
    """All sequences in one row, perhaps with padding after them."""
    return end_to_end(sequences(), 0, sum(p + a - 1 for p, a in LENGTHS) + padding)


def unpacked() -> SequenceBatch:
    """One sequence a row, padded on the right."""
    rows = [end_to_end([one], 0, 12) for one in sequences()]
    tensors = [torch.cat([getattr(row, name) for row in rows]) for name in ("tokens", "labels", "loss_mask", "position_ids")]
    segments = torch.stack([torch.where(row.segments[0] == 0, i, len(rows)) for i, row in enumerate(rows)])
    return SequenceBatch(*tensors, segments=segments, count=len(rows))


def logits_of(batch: SequenceBatch) -> Tensor:
    """[batch, seq, vocabulary] float64, a function of the sequence and the place in it, so that both layouts have the same."""
    out = torch.randn(*batch.tokens.shape, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 0
    for b, t in product(*map(range, batch.tokens.shape)):
        seed = int(batch.segments[b, t]) * 100 + int(batch.position_ids[b, t])
        out[b, t] = torch.randn(VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    return out


def answers(batch: SequenceBatch, logits: Tensor, temperature: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """Of each sequence: distributions [tokens, vocabulary] and labels of its answer, in float64."""
    found = []
    for i in range(batch.count):
        here = (batch.segments == i) & (batch.loss_mask > 0)
        found.append((torch.softmax(logits[here] / temperature, -1), batch.labels[here]))
    return found


def naive_wpo(cfg: WPOConfig, batch: PreferenceBatch, logits: Tensor) -> Tensor:
    """The formula, pair by pair."""
    total = torch.zeros((), dtype=torch.float64)
    of = answers(batch, logits)
    for i in range(0, batch.count, 2):
        gains, weights, means = [], [], []
        for j in (i, i + 1):
            p, y = of[j]
            logp = p.gather(-1, y[:, None])[:, 0].log()
            gain = logp.sum() - batch.reference[j]
            gains.append(gain / len(y) if cfg.length_normalised else gain)
            weights.append((logp - p.square().sum(-1).log()).mean().detach())
            means.append(logp.mean())
        weight = min(cfg.clamp, math.exp(float(weights[0] + weights[1]))) if cfg.weighting == "wpo" else 1.0
        margin = cfg.beta * (gains[0] - gains[1])
        e = cfg.label_smoothing
        total = total - weight * ((1 - e) * torch.sigmoid(margin).log() + e * torch.sigmoid(-margin).log()) - cfg.sft_coefficient * means[0]
    return total / (batch.count // 2)


def naive_grpo(cfg: GRPOConfig, batch: RolloutBatch, logits: Tensor) -> Tensor:
    """The formula, token by token."""
    per_answer = []
    for i, (p, y) in enumerate(answers(batch, logits, ROLLOUT.temperature)):
        here = (batch.segments == i) & (batch.loss_mask > 0)
        logp = p.gather(-1, y[:, None])[:, 0].log()
        terms = []
        for t in range(len(y)):
            old = float(batch.old_logprobs[here][t]) if batch.old_logprobs is not None else float(logp[t].detach())
            ratio = torch.exp(logp[t] - old)
            a = float(batch.advantages[i])
            term = -torch.minimum(ratio * a, ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * a)
            if cfg.importance_cap:
                term = term * min(cfg.importance_cap, math.exp(old - float(batch.rollout_logprobs[here][t])))
            if cfg.kl:
                ratio_to_reference = torch.exp(batch.reference_logprobs[here][t] - logp[t])
                term = term + cfg.kl * (ratio_to_reference - torch.log(ratio_to_reference) - 1)
            terms.append(term)
        per_answer.append(torch.stack(terms))
    if cfg.aggregation == "dapo":
        return torch.cat(per_answer).mean()
    if cfg.aggregation == "dr_grpo":
        return sum(t.sum() for t in per_answer) / (len(per_answer) * ROLLOUT.max_new_tokens)
    return sum(t.mean() for t in per_answer) / len(per_answer)


def preference_batch(batch: SequenceBatch) -> PreferenceBatch:
    return PreferenceBatch(**vars(batch), reference=torch.tensor([-9.0, -30.0, -8.0, -11.0], dtype=torch.float64))


def rollout_batch(batch: SequenceBatch, kl: bool, old: bool = True) -> RolloutBatch:
    """Old, rollout and reference log-probabilities near the policy's, so that ratios fall inside and outside of the clip range."""
    logits, off = logits_of(batch), []
    now = torch.log_softmax(logits / ROLLOUT.temperature, -1).gather(-1, batch.labels[..., None])[..., 0]
    for spread in (0.3, 0.1, 0.5):
        noise = torch.zeros_like(now)
        for b, t in product(*map(range, now.shape)):
            seed = int(batch.segments[b, t]) * 100 + int(batch.position_ids[b, t]) + int(1000 * spread)
            noise[b, t] = spread * torch.randn((), generator=torch.Generator().manual_seed(seed))
        off.append(now + noise)
    names = {"old_logprobs": off[0] if old else None, "rollout_logprobs": off[1], "reference_logprobs": off[2] if kl else None}
    return RolloutBatch(**vars(batch), advantages=torch.tensor([1.0, -1.0, 0.5, -2.0], dtype=torch.float64), **names)


def compare(objective: WPO | GRPO, batch: SequenceBatch, expected: Tensor, logits: Tensor, dtype: torch.dtype) -> None:
    """The objective on this rank's slice of the vocabulary: value and gradient of the mean."""
    expected.backward()
    rank, ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    mine = slice(rank * VOCABULARY // ranks, (rank + 1) * VOCABULARY // ranks)
    part = logits.detach()[..., mine].to(dtype).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()  # strides as the model's
    terms = objective.loss(part, batch)
    (terms.sum / terms.weight).backward()
    torch.testing.assert_close((terms.sum / terms.weight).double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(part.grad.double(), logits.grad[..., mine], rtol=1e-6, atol=1e-6)
    assert not any(value.requires_grad for value in terms.stats.values())


def check(dtype: torch.dtype = torch.float32) -> None:
    for batch in (packed(), packed(padding=5), unpacked()):
        for cfg in WPO_FORMS:
            pairs, logits = preference_batch(batch), logits_of(batch).requires_grad_()
            compare(WPO(cfg), pairs, naive_wpo(cfg, pairs, logits), logits, dtype)
        for cfg, old in product(GRPO_FORMS, (True, False)):
            rollouts, logits = rollout_batch(batch, kl=cfg.kl > 0, old=old), logits_of(batch).requires_grad_()
            compare(GRPO(cfg, ROLLOUT), rollouts, naive_grpo(cfg, rollouts, logits), logits, dtype)


def check_extras() -> None:
    """Sum of squares and entropy, chunked and not, on this rank's slice."""
    batch = packed()
    logits = logits_of(batch)
    group = parallel_state.get_tensor_model_parallel_group()
    part = logits.chunk(group.size(), -1)[group.rank()].float()
    p = torch.softmax(logits, -1)
    q = torch.softmax(logits / 0.7, -1)
    for chunk in (logprobs.PIECE, 30):
        before, logprobs.PIECE = logprobs.PIECE, chunk
        logp, collision = logprobs.token_logprobs_and_collision(part, batch.labels, group)
        _, entropy = logprobs.token_logprobs_and_entropy(part, batch.labels, group, 0.7)
        logprobs.PIECE = before
        torch.testing.assert_close(logp.double(), p.gather(-1, batch.labels[..., None])[..., 0].log(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(collision.double(), p.square().sum(-1).log(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(entropy.double(), -(q * q.log()).sum(-1), rtol=1e-6, atol=1e-6)


def check_chunks() -> None:
    """Reading the logits in chunks of two positions changes neither value nor gradient."""
    batch, whole = packed(), []
    for chunk in (logprobs.PIECE, 2 * VOCABULARY):
        before, logprobs.PIECE = logprobs.PIECE, chunk
        logits = logits_of(batch).chunk(parallel_state.get_tensor_model_parallel_world_size(), -1)[0].clone().requires_grad_()
        WPO(WPO_FORMS[0]).loss(logits, preference_batch(batch)).sum.backward()
        logprobs.PIECE = before
        whole.append(logits.grad)
    assert torch.equal(*whole)


def without_gradient(batch: RolloutBatch) -> RolloutBatch:
    return replace(batch, advantages=torch.zeros_like(batch.advantages))


def main() -> None:
    distributed.initialize(ParallelConfig(name="tp2", tensor=2), 1234, ClusterConfig(name="local"))
    check()
    check_extras()
    check_chunks()


if __name__ == "__main__":
    main()
