"""Transformer Engine's user buffers on a CPU: one a product, gathered or scattered with it; here before it or after it, not beside it.

A buffer is tokens x hidden, of bf16 or of FP8's bytes. Where a rank writes its part, the others' are no numbers until they are gathered.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class CommOverlapHelper:
    def __init__(self, world: dist.ProcessGroup, tensor: dist.ProcessGroup):
        self.group = tensor


class CommOverlap:
    """A buffer of one product of every layer: chunks of tokens, one a rank."""

    def __init__(self, shape: list[int], dtype: torch.dtype, helper: CommOverlapHelper, size: int, comm_type: str, **_: object):
        assert dtype in (torch.bfloat16, torch.uint8) and shape[0] % size == 0 and size == dist.get_world_size(helper.group)
        self.kind, self.group = comm_type, helper.group
        self.whole = torch.zeros(shape, dtype=dtype)
        self.own = self.whole.chunk(size)[dist.get_rank(helper.group)]

    def with_cublasmp(self) -> bool:
        return False

    def is_fp8_ubuf(self) -> bool:
        return self.whole.dtype == torch.uint8

    def copy_into_buffer(self, x: Tensor, local_chunk: bool) -> None:
        assert local_chunk and x.is_contiguous() and (x.dtype, x.numel()) == (self.whole.dtype, self.own.numel()), (x.dtype, x.shape)
        self.whole.fill_(0x7F if self.is_fp8_ubuf() else torch.nan)  # 0x7F: no number in E4M3 and in E5M2
        self.own.copy_(x.view_as(self.own))

    def get_buffer(self, local_chunk: bool = False, shape: list[int] | None = None) -> Tensor:
        part = self.own if local_chunk else self.whole
        return part if shape is None else part.view(shape)

    def gather(self) -> None:
        assert self.kind == "CommOverlapType.AG"
        dist.all_gather_into_tensor(self.whole, self.own.clone(), group=self.group)

    def scatter(self, whole: Tensor, out: Tensor) -> None:
        assert self.kind == "CommOverlapType.RS" and whole.dtype == out.dtype == self.whole.dtype and whole.numel() == self.whole.numel()
        own = torch.empty_like(self.own)
        dist.reduce_scatter_tensor(own, whole.reshape(self.whole.shape), group=self.group)
        out.copy_(own.view_as(out))


class CommOverlapP2P(CommOverlap):
    """The same, piece by piece from neighbour to neighbour."""


def beside(product: Callable[[], tuple], buffer: CommOverlap, kind: str, factor: object, extra: Tensor | None, bulk: bool) -> tuple:
    """`product` and its collective: of its own second factor or result, or (bulk) of what another product wants or has made."""
    assert buffer.kind == kind
    if not bulk and kind == "CommOverlapType.AG":
        data = getattr(factor, "_data", factor)
        assert data.data_ptr() == buffer.whole.data_ptr(), "what is multiplied is not what is gathered"
        buffer.gather()
    done = product()
    if bulk and kind == "CommOverlapType.AG":
        buffer.gather()
    elif kind == "CommOverlapType.RS":
        buffer.scatter(buffer.whole if bulk else done[0], buffer.own if extra is None else extra)
    return done
