"""PyTorch's FlexAttention (arXiv 2412.05496), compiled once a soft-cap and shape: causal, windowed and packed masks are one function.

Query i sees keys starts[i] .. i, where starts[i] is the beginning of its sequence or of its window, whichever comes later. Which blocks
of 128 x 128 are empty, full or mixed follows from `starts` without looking at single pairs. Compiled with fullgraph=True: where dynamo
would fall back to eager (a graph break, too many recompilations), it raises.
On a CPU, where it runs uncompiled and only its masks can be tested, `choice.py` refuses it. Not run yet on a card inside this module.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_tower.models.packing import Packing

BLOCK = 128  # tokens; flex_attention's own default


class Flex:
    def __init__(self, scale: float, softcap: float | None, window: int | None):
        self.scale, self.window = scale, window
        self.capped = None if softcap is None else _capped(softcap)

    def rows(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [seq, batch, heads, dim], k and v [seq, batch, groups, dim] -> [seq, batch, heads * dim]."""
        mask = _rows_mask(len(q), self._window(len(q)), q.device)
        out = self._attend(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), mask)
        return out.permute(2, 0, 1, 3).flatten(2)

    def packed(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        """q [total, heads, dim], k and v [total, groups, dim] -> [total, heads * dim]."""
        window = self._window(packing.max_seqlen_q)
        if window not in packing.masks:
            packing.masks[window] = block_mask(_starts(packing.starts, window))
        out = self._attend(*(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)), packing.masks[window])
        return out.squeeze(0).transpose(0, 1).flatten(1)

    def _window(self, longest: int) -> int | None:
        """A window that reaches over the longest sequence is none: its mask is shared with the layers that have none."""
        return None if self.window is None or longest <= self.window else self.window

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        return _compiled()(q, k, v, score_mod=self.capped, block_mask=mask, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1])


def block_mask(starts: Tensor) -> BlockMask:
    """starts [total] int32, never decreasing -> the mask in which query i sees keys starts[i] .. i."""
    total = len(starts)
    blocks = -(-total // BLOCK)
    starts = F.pad(starts, (0, blocks * BLOCK - total), value=total)  # queries past the end see nothing
    first, last = starts[::BLOCK, None], starts[BLOCK - 1 :: BLOCK, None]  # of each block's first and last query
    query, key = torch.arange(blocks, device=starts.device)[:, None], torch.arange(blocks, device=starts.device)
    some = (key <= query) & (key >= first // BLOCK)
    full = (key < query) & (key * BLOCK >= last)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[query])

    mixed, whole = _listed(some & ~full), _listed(full)
    return BlockMask.from_kv_blocks(*mixed, *whole, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(total, total))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bool [n, n] -> how many are set in each row, and which, these first: [1, 1, n] and [1, 1, n, n] int32."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None].contiguous()


def _starts(starts: Tensor, window: int | None) -> Tensor:
    return starts if window is None else starts.maximum(torch.arange(1 - window, len(starts) + 1 - window, device=starts.device).int())


@lru_cache(maxsize=16)
def _rows_mask(seq: int, window: int | None, device: torch.device) -> BlockMask:
    with torch.inference_mode(False):  # kept for training, where a tensor made in inference mode can't go
        return block_mask(_starts(torch.zeros(seq, dtype=torch.int32, device=device), window))


@lru_cache
def _capped(cap: float) -> Callable[..., Tensor]:
    """score_mod; the same object for every layer."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@lru_cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, fullgraph=True)
