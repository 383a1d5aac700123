"""One way to run the model on a `Batch`, packed or not.

A packed batch runs as one row of batch * seq tokens. Under sequence parallelism each rank holds its piece of that row between layers.
"""

from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

from megatron_tower.data.batch import Batch
from megatron_tower.models.head import Head
from megatron_tower.models.packing import pack


def schedule_shape(batch: Batch) -> dict[str, int]:
    """The `seq_length` and `micro_batch_size` that Megatron's schedules must be told for batches like this one."""
    rows, seq = batch.tokens.shape
    packed = batch.cu_seqlens is not None
    return {"seq_length": rows * seq if packed else seq, "micro_batch_size": 1 if packed else rows}


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [batch, seq, vocab / tensor-parallel] on the last pipeline stage, else hidden states for the next stage.

    `model`: a Decoder or what wraps it. RoPE counts positions from each sequence's start; `batch.position_ids` is not read.
    """
    output = _output(model, batch, None)
    return output.view(*batch.tokens.shape, -1) if get_attr_wrapped_model(model, "post_process") else output


def forward_to_head(model: nn.Module, batch: Batch) -> Head | Tensor:
    """As `forward`, but the last stage's `Head` in place of logits: for log-probabilities of `batch.labels`."""
    return _output(model, batch, batch.labels)


def _output(model: nn.Module, batch: Batch, labels: Tensor | None) -> Head | Tensor:
    if batch.cu_seqlens is None:
        return model(batch.tokens, None, None, labels=labels)
    return model(batch.tokens.reshape(1, -1), None, None, labels=labels, packed_seq_params=pack(batch.cu_seqlens, batch.tokens.device))
