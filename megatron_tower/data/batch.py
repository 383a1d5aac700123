"""`Batch`: what the data room hands to the model and the objective."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of tokens ready for a forward pass.

    tokens, labels, position_ids: [batch, seq] int64; `labels[b, t]` is the token after `tokens[b, t]`.
    loss_mask: [batch, seq] float32, 1 where the label counts.
    cu_seqlens: [segments + 1] int32 or None. Boundaries of independent sequences in the rows laid end to end
        (0 first, batch * seq last): attention never crosses one. None: each row is one causal sequence.
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
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in moved.items() if v is not None})
