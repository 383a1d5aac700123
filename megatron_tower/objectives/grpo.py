"""Group-relative policy optimisation on vocab-parallel logits, in its published form (arXiv 2402.03300) and two others.

For answer i of G to one prompt, with reward r_i and tokens t = 1 .. |o_i|:

    A_i    = (r_i - mean_j r_j) / std_j r_j                 dr_grpo: r_i - mean_j r_j               (rollout/experience.py)
    rho_it = pi(o_it) / pi_old(o_it)                        pi_old: the policy before the round's first update
    p_it   = - min( rho_it A_i, clip(rho_it, 1 - clip_low, 1 + clip_high) A_i ) * sg(c_it)
    k_it   = ref/pi - log(ref/pi) - 1                       k3 estimate of KL(pi || ref), in the loss
    c_it   = min( pi_old(o_it) / pi_rollout(o_it), importance_cap )           truncated importance sampling; 1 when off

    grpo     L = mean_i [ 1/|o_i| sum_t (p_it + kl k_it) ]                    every answer counts the same
    dr_grpo  L = 1/(N max_new_tokens) sum_i sum_t (p_it + kl k_it)            arXiv 2503.20783: no length or difficulty bias
    dapo     L = 1/(sum_i |o_i|) sum_i sum_t (p_it + kl k_it)                 arXiv 2503.14476: every token counts the same

All probabilities are of softmax(logits / temperature), the distribution that was sampled from but for top-p.

Run:  python -m megatron_tower.train phase=grpo
"""

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_tower.config import GRPOConfig, RolloutConfig
from megatron_tower.data.batch import RolloutBatch
from megatron_tower.models.head import Head
from megatron_tower.objectives.logprobs import token_logprobs_and_entropy
from megatron_tower.objectives.terms import LossTerms


class GRPO:
    def __init__(self, cfg: GRPOConfig, rollout: RolloutConfig):
        self.cfg, self.rollout = cfg, rollout

    def loss(self, given: Head | Tensor, batch: RolloutBatch) -> LossTerms:
        """given: a `Head`, or logits [batch, seq, vocab / tensor-parallel] -> the sum over answers (dapo: tokens) and their number."""
        cfg, group = self.cfg, parallel_state.get_tensor_model_parallel_group()
        logprobs, entropy = token_logprobs_and_entropy(given, batch.labels, group, self.rollout.temperature)
        old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        advantages = batch.spread(batch.advantages)

        ratio = torch.exp(logprobs - old)
        kept = torch.min(ratio * advantages, ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * advantages)
        drift = (old - batch.rollout_logprobs) * batch.loss_mask
        importance = torch.exp(drift)
        policy = -kept * (importance.clamp(max=cfg.importance_cap) if cfg.importance_cap else 1.0)
        kl = torch.zeros_like(ratio)
        if batch.reference_logprobs is not None:
            gap = batch.reference_logprobs - logprobs
            kl = torch.exp(gap) - gap - 1

        total = self._aggregated(policy + cfg.kl * kl, batch)
        clipped = ((ratio < 1 - cfg.clip_low) & (advantages < 0)) | ((ratio > 1 + cfg.clip_high) & (advantages > 0))
        stats = {
            "policy_loss": policy,
            "kl": kl,
            "clip_fraction": clipped,
            "entropy": entropy,
            "mismatch_kl": importance - drift - 1,  # k3 estimate of KL(rollout || training)
            "importance": importance,
            "importance_squared": importance.square(),
        }
        means = {name: self._mean(value.detach(), batch) for name, value in stats.items()}
        weight = batch.loss_mask.sum() if cfg.aggregation == "dapo" else torch.tensor(batch.count, device=total.device)
        return LossTerms(total, weight, {"loss": total.detach()} | means)

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Adds the effective sample size of the importance weights as a share of the sample: (mean w)^2 / mean w^2."""
        squared = means.pop("importance_squared")
        return means | {"effective_sample_size": means.pop("importance") ** 2 / squared if squared else 1.0}

    def _aggregated(self, of_tokens: Tensor, batch: RolloutBatch) -> Tensor:
        """[batch, seq] -> the sum that, over the weight, is the form named by `aggregation`."""
        if self.cfg.aggregation == "dr_grpo":
            return batch.sums(of_tokens).sum() / self.rollout.max_new_tokens
        return self._mean(of_tokens, batch)

    def _mean(self, of_tokens: Tensor, batch: RolloutBatch) -> Tensor:
        """[batch, seq] -> the sum that, over the weight, is a mean: over tokens for dapo, else over answers of the mean over tokens."""
        summed = batch.sums(of_tokens)
        if self.cfg.aggregation == "dapo":
            return summed.sum()
        return (summed / batch.sums(torch.ones_like(of_tokens, dtype=torch.float64))).sum()

    def check_start(self, means: dict[str, float], params: str) -> None:
        """Nothing to compare with: ratios are 1 by construction, and the mismatch with the rollout is logged at each step."""
