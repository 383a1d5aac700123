"""What the data room hands to the model and the objective: `Batch`, and its kinds that know where a sequence ends."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of tokens ready for a forward pass.

    tokens, labels, position_ids: [batch, seq] int64; `labels[b, t]` is the token after `tokens[b, t]`.
    loss_mask: [batch, seq] float32, 1 where the label counts.
    cu_seqlens: [segments + 1] int32 or None. Boundaries of independent sequences in the rows laid end to end
        (0 first, batch * seq last): attention never crosses one. None: each row is one causal sequence. Stays on the CPU.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor | None = None

    @staticmethod
    def stack(rows: "Sequence[Batch]") -> "Batch":
        """Rows of equal length under one another; their boundaries shift by the tokens before them."""
        joined = {f.name: torch.cat([getattr(r, f.name) for r in rows]) for f in fields(Batch) if f.name != "cu_seqlens"}
        if rows[0].cu_seqlens is None:
            return Batch(**joined)
        cuts, offset = [rows[0].cu_seqlens[:1]], 0
        for row in rows:
            cuts.append(row.cu_seqlens[1:] + offset)
            offset += row.tokens.numel()
        return Batch(**joined, cu_seqlens=torch.cat(cuts))

    def to(self, device: torch.device) -> "Batch":
        """On `device`, but for the boundaries: the host reads them, and would have to wait for a GPU to do so."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor) and f.name != "cu_seqlens"}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


@dataclass(frozen=True, kw_only=True)
class SequenceBatch(Batch):
    """`count` sequences of a prompt and its answer, end to end in one row (`cu_seqlens`) or one a row; the mask covers the answers.

    segments: [batch, seq] int64, the number of the sequence that a token is part of; `count` for padding between or after them.
    """

    segments: Tensor
    count: int

    def sums(self, values: Tensor) -> Tensor:
        """Sum over each sequence's answer tokens: [batch, seq] -> [count], in float64, for thousands of tokens add up."""
        counted = (values.double() * self.loss_mask).flatten()
        return counted.new_zeros(self.count + 1).index_add(0, self.segments.flatten(), counted)[: self.count]

    def spread(self, values: Tensor) -> Tensor:
        """One number a sequence to each of its tokens: [count] -> [batch, seq], 0 on padding."""
        return torch.cat([values, values.new_zeros(1)])[self.segments]


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch(SequenceBatch):
    """Pairs: sequence 2i is the chosen answer of pair i, 2i + 1 the rejected one.

    reference: [count] float64, each answer's summed log-probability under the reference model.
    """

    reference: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class RolloutBatch(SequenceBatch):
    """Sampled answers. advantages: [count] float64. The others are log-probabilities of the labels, [batch, seq] float32:
    as the rollout saw them, of the policy before the round's first update (None: this is it), of the reference (None: no KL).
    """

    advantages: Tensor
    rollout_logprobs: Tensor
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None


@dataclass(frozen=True)
class Round:
    """What the next updates learn from, on this data-parallel rank: the micro-batches of each update (of equal number and, where there
    is a pipeline, size on all ranks), how many samples of the dataset were used up, and what to log beside the loss.
    """

    updates: list[list[Batch]]
    samples: int
    stats: dict[str, float] = field(default_factory=dict)
