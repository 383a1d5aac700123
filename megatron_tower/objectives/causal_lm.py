"""Next-token cross entropy, for continued pre-training (every token counts) and SFT (the answers' tokens).

L = - sum_t mask_t log p(y_t | y_<t) / sum_t mask_t        divided by the trainer, over the global batch
"""

from megatron.core import parallel_state
from torch import Tensor

from megatron_tower.data.batch import Batch
from megatron_tower.models.head import Head
from megatron_tower.objectives.logprobs import weighted_logprob
from megatron_tower.objectives.terms import LossTerms


class CausalLM:
    def loss(self, given: Head | Tensor, batch: Batch) -> LossTerms:
        """given: a `Head`, or logits [batch, seq, vocab / tensor-parallel] -> summed negative log-likelihood, how many tokens count."""
        total = weighted_logprob(given, batch.labels, -batch.loss_mask, parallel_state.get_tensor_model_parallel_group())
        return LossTerms(total, batch.loss_mask.sum(), {"loss": total.detach()})

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged: the loss alone."""
        return means

    def check_start(self, means: dict[str, float], params: str) -> None:
        """Nothing is known of the first loss."""
