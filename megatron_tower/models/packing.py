"""Packed sequences: many independent sequences laid end to end in one row, `[0, 3, 7, ...]` being their boundaries.

Attention must not cross a boundary. Rather than masking one [total, total] square, segments of similar length are gathered into
buckets of [segments, longest], which are attended as ordinary causal batches: the padding lies to the right, where no query looks.
Computed once a batch and carried by `PackedSeqParams`, which megatron-core hands to every layer.

    params = pack(cu_seqlens); model(tokens.reshape(1, -1), ..., packed_seq_params=params)
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

SHORTEST = 16  # tokens; segments up to this length share one bucket


@dataclass
class Packing(PackedSeqParams):
    """`buckets`: (segments, longest) of each bucket. `slots`: [total] int64, where each token goes when buckets lie end to end."""

    buckets: tuple[tuple[int, int], ...] = ()
    slots: Tensor = None

    def pad(self, x: Tensor) -> list[Tensor]:
        """[total, heads, dim] -> one [segments, longest, heads, dim] a bucket, zeros where a segment is shorter."""
        sizes = [segments * longest for segments, longest in self.buckets]
        padded = x.new_zeros(sum(sizes), *x.shape[1:]).index_copy(0, self.slots, x)
        return [part.unflatten(0, bucket) for part, bucket in zip(padded.split(sizes), self.buckets, strict=True)]

    def unpad(self, parts: list[Tensor]) -> Tensor:
        """The reverse of `pad` on [segments, longest, width] pieces -> [total, width]."""
        return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, self.slots)


def pack(cu_seqlens: Tensor) -> Packing:
    """What the model needs to know of boundaries `cu_seqlens` ([segments + 1] int32: 0 first, the number of tokens last)."""
    starts = cu_seqlens[:-1].tolist()
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    by_length = defaultdict(list)
    for start, length in zip(starts, lengths, strict=True):
        if length:
            by_length[(max(length, SHORTEST) - 1).bit_length()].append((start, length))
    buckets, shifts, offset = [], {}, 0  # shifts: start of a segment -> how far its tokens move
    for _, segments in sorted(by_length.items()):
        longest = max(length for _, length in segments)
        for start, _ in segments:
            shifts[start] = offset - start
            offset += longest
        buckets.append((len(segments), longest))
    moves = torch.tensor([shifts.get(start, 0) for start in starts]).repeat_interleave(torch.tensor(lengths))
    return Packing(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        buckets=tuple(buckets),
        slots=(torch.arange(sum(lengths)) + moves).to(cu_seqlens.device),
    )
