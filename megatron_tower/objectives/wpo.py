"""Weighted preference optimisation (arXiv 2406.11827) on vocab-parallel logits; `weighting: none` is DPO (arXiv 2305.18290).

    margin   = beta * [ (log pi(yw|x) - log ref(yw|x)) - (log pi(yl|x) - log ref(yl|x)) ]
    log w(y) = 1/|y| * sum_t [ log pi(y_t|.) - log sum_v pi(v|.)^2 ]
    W        = min(clamp, exp(log w(yw) + log w(yl)))                                        no gradient through W
    L        = - mean[ W * ((1 - e) logsigmoid(margin) + e logsigmoid(-margin)) ] + c * mean[ - 1/|yw| log pi(yw|x) ]

The weight is the authors' released form: length-mean, aligned by the sum of squares, product over the pair, clamped at 1, detached.
Beyond it: label smoothing e (cDPO), margins of length-means instead of sums (`length_normalised`), an SFT term c on the chosen answer.

Run:  python -m megatron_tower.train phase=wpo
"""

import math

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_tower.config import InputError, WPOConfig
from megatron_tower.data.batch import PreferenceBatch
from megatron_tower.models.head import Head
from megatron_tower.objectives.logprobs import token_logprobs_and_collision
from megatron_tower.objectives.terms import LossTerms

START_GAP = {"float32": 1e-3, "bfloat16": 0.1}  # nats a token by which two runs of the same weights may differ


class WPO:
    def __init__(self, cfg: WPOConfig):
        self.cfg = cfg

    def loss(self, given: Head | Tensor, batch: PreferenceBatch) -> LossTerms:
        """given: a `Head`, or logits [batch, seq, vocab / tensor-parallel] -> the sum over pairs and their number."""
        cfg, group = self.cfg, parallel_state.get_tensor_model_parallel_group()
        logprobs, collision = token_logprobs_and_collision(given, batch.labels, group)
        lengths = batch.sums(batch.loss_mask)
        summed = batch.sums(logprobs)  # [2 pairs]: chosen and rejected in turn

        gained = summed - batch.reference
        margin = cfg.beta * _difference(gained / lengths if cfg.length_normalised else gained)
        likely = batch.sums(logprobs.detach() - collision) / lengths
        weight = torch.exp(likely[0::2] + likely[1::2]).clamp(max=cfg.clamp)
        if cfg.weighting == "none":
            weight = torch.ones_like(weight)

        e = cfg.label_smoothing
        preferred = (1 - e) * logsigmoid(margin) + e * logsigmoid(-margin)
        chosen_nll = -summed[0::2] / lengths[0::2]
        total = (-weight * preferred + cfg.sft_coefficient * chosen_nll).sum()
        per_token = (summed / lengths).detach()
        stats = {
            "loss": total,
            "margin": margin.sum(),
            "accuracy": (margin > 0).sum() + 0.5 * (margin == 0).sum(),
            "weight_mean": weight.sum(),
            "weight_squared": weight.square().sum(),
            "weight_clamped": (weight >= cfg.clamp).sum(),
            "chosen_logprob": per_token[0::2].sum(),
            "rejected_logprob": per_token[1::2].sum(),
            "chosen_nll": chosen_nll.sum(),
            "reference_gap": (gained / lengths).abs().reshape(-1, 2).mean(1).sum(),
        }
        return LossTerms(total, torch.tensor(len(margin), device=total.device), {k: v.detach().double() for k, v in stats.items()})

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged of the means over pairs: the weights' spread instead of their second moment."""
        spread = means.pop("weight_squared") - means["weight_mean"] ** 2
        return means | {"weight_std": math.sqrt(max(0.0, spread))}

    def check_start(self, means: dict[str, float], params: str) -> None:
        """Before the first update the policy is the reference: margins are 0 and the loss is W ln 2. Raises InputError when not."""
        expected = means["weight_mean"] * math.log(2) + self.cfg.sft_coefficient * means["chosen_nll"]
        if means["reference_gap"] > START_GAP[params] or abs(means["loss"] - expected) > START_GAP[params]:
            raise InputError(
                f"at the start the policy differs from the reference by {means['reference_gap']:.2g} nats a token (margin "
                f"{means['margin']:.2g}, loss {means['loss']:.4f} instead of W ln 2 = {expected:.4f}): the reference log-probabilities "
                "are not those of phase.start_from; remove the phase's reference/ folder, or start from the checkpoint that made them"
            )


def _difference(of_answers: Tensor) -> Tensor:
    """Chosen less rejected: [2 pairs] -> [pairs]."""
    return of_answers[0::2] - of_answers[1::2]
