"""Packed sequences: many independent sequences laid end to end in one row, `[0, 3, 7, ...]` being their boundaries.

Attention must not cross a boundary. Kernels for packed rows take the boundaries themselves (`cu_seqlens_q`, `max_seqlen_q`). For plain
attention, rather than masking one [total, total] square, segments of similar length are gathered into buckets of [segments, longest], which
are attended as ordinary causal batches: the padding lies to the right, where no query looks.
Carried by `PackedSeqParams`, which megatron-core hands to every layer; what a back end needs beyond the boundaries is made when the first
layer asks for it, once a batch.

    params = pack(cu_seqlens, device); model(tokens.reshape(1, -1), ..., packed_seq_params=params)
"""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

SHORTEST = 16  # tokens; segments up to this length share one bucket


@dataclass
class Packing(PackedSeqParams):
    """`bounds`: the same numbers as `cu_seqlens_q`, on the host. `masks`: of FlexAttention, by window."""

    bounds: tuple[int, ...] = ()
    masks: dict[int | None, object] = field(default_factory=dict)

    def pad(self, x: Tensor) -> list[Tensor]:
        """[total, heads, dim] -> one [segments, longest, heads, dim] a bucket, zeros where a segment is shorter."""
        sizes = [segments * longest for segments, longest in self.buckets]
        padded = x.new_zeros(sum(sizes), *x.shape[1:]).index_copy(0, self.slots, x)
        return [part.unflatten(0, bucket) for part, bucket in zip(padded.split(sizes), self.buckets, strict=True)]

    def unpad(self, parts: list[Tensor]) -> Tensor:
        """The reverse of `pad` on [segments, longest, width] pieces -> [total, width]."""
        return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, self.slots)

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """(segments, longest) of each bucket."""
        return self._layout[0]

    @cached_property
    def slots(self) -> Tensor:
        """[total] int64: where each token goes when buckets lie end to end."""
        return (torch.arange(self.bounds[-1]) + self._each(self._layout[1])).to(self.cu_seqlens_q.device)

    @cached_property
    def starts(self) -> Tensor:
        """[total] int32: where each token's sequence begins."""
        return self._each(self.bounds[:-1]).int().to(self.cu_seqlens_q.device)

    @cached_property
    def _layout(self) -> tuple[tuple[tuple[int, int], ...], list[int]]:
        """The buckets, and how far each segment's tokens move to lie in them."""
        by_length = defaultdict(list)
        for index, length in enumerate(self._lengths):
            by_length[(max(length, SHORTEST) - 1).bit_length()].append(index)
        buckets, moves, offset = [], [0] * len(self._lengths), 0
        for _, segments in sorted(by_length.items()):
            longest = max(self._lengths[index] for index in segments)
            for index in segments:
                moves[index] = offset - self.bounds[index]
                offset += longest
            buckets.append((len(segments), longest))
        return tuple(buckets), moves

    @property
    def _lengths(self) -> list[int]:
        return [end - start for start, end in pairwise(self.bounds)]

    def _each(self, of_segments: list[int] | tuple[int, ...]) -> Tensor:
        """A number a segment -> [total], the number of each token's segment."""
        return torch.tensor(of_segments).repeat_interleave(torch.tensor(self._lengths))


def pack(cu_seqlens: Tensor, device: torch.device | None = None) -> Packing:
    """What the model needs to know of boundaries `cu_seqlens` ([segments + 1]: 0 first, the number of tokens last), for `device`.

    Boundaries that lie on a GPU make the host wait for it: keep them on the CPU. Empty segments are left out.
    """
    bounds = (0, *(end for start, end in pairwise(cu_seqlens.tolist()) if end > start))
    longest = max(end - start for start, end in pairwise(bounds))
    there = torch.tensor(bounds, dtype=torch.int32).to(device or cu_seqlens.device, non_blocking=True)
    return Packing(
        qkv_format="thd",
        cu_seqlens_q=there,
        cu_seqlens_kv=there,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        bounds=bounds,
    )
