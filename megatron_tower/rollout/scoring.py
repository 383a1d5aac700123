"""Log-probabilities of given tokens under a model, forward only, through megatron-core's schedule: any tensor and pipeline layout.

For a reference model, and for the policy before an update; what is differentiated is computed in the objective instead.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import MegatronModule
from torch import Tensor

from megatron_tower.data.batch import Batch
from megatron_tower.models.forward import forward_to_head, schedule_shape
from megatron_tower.models.head import Head
from megatron_tower.objectives.logprobs import token_logprobs


@torch.no_grad()
def label_logprobs(chunks: Sequence[MegatronModule], batches: Sequence[Batch], temperature: float = 1.0) -> list[Tensor]:
    """log p of every label of each batch under softmax(logits / temperature), [batch, seq] float32, on every rank of the replica.

    All ranks of a replica call it with the same batches; with pipeline stages these must be of one shape.
    """

    def step(rows: Iterator[Batch], model: MegatronModule) -> tuple[Head | Tensor, Callable[..., Tensor]]:
        batch = next(rows)

        def logprobs(head: Head, non_loss_data: bool) -> Tensor:
            return token_logprobs(head, batch.labels, parallel_state.get_tensor_model_parallel_group(), temperature)

        return forward_to_head(model, batch), logprobs

    found = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(batches),
        **schedule_shape(batches[0]),
        forward_only=True,
        collect_non_loss_data=True,
    )
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last, group = parallel_state.get_pipeline_model_parallel_last_rank(), parallel_state.get_pipeline_model_parallel_group()
        if not parallel_state.is_pipeline_last_stage():
            found = [torch.empty(batch.tokens.shape, device=batch.tokens.device) for batch in batches]
        for logprobs in found:
            dist.broadcast(logprobs, last, group)
    return found
