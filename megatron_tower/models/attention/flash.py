"""flash-attn 2 (arXiv 2307.08691) and flash-attn-4 (in CuTe DSL, for Hopper and Blackwell): every feature, packed rows by their boundaries.

The two differ in the name of their module, in how they spell "no window", and in that the fourth also returns log-sum-exps.
Leaves out: dropout, paged caches. Not run yet on a card inside this module; bare flash-attn-4 was, and was right (docs/benchmarks.md).
"""

from functools import partial
from importlib import import_module

from torch import Tensor

from megatron_tower.models.packing import Packing

MODULE = {2: "flash_attn", 4: "flash_attn.cute.interface"}
NO_WINDOW = {2: (-1, -1), 4: (None, None)}


class Flash:
    def __init__(self, version: int, scale: float, softcap: float | None, window: int | None, *, deterministic: bool):
        """`deterministic`: equal gradients from run to run, somewhat slower."""
        module = import_module(MODULE[version])
        options = {"softmax_scale": scale, "causal": True, "softcap": softcap or 0.0, "deterministic": deterministic}
        self.flash = partial(module.flash_attn_func, **options)
        self.flash_packed = partial(module.flash_attn_varlen_func, **options)
        self.version, self.window = version, window

    def rows(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [seq, batch, heads, dim], k and v [seq, batch, groups, dim] -> [seq, batch, heads * dim]."""
        out = self.flash(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), window_size=self._sides(len(q)))
        return self._only(out).transpose(0, 1).flatten(2)

    def packed(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        """q [total, heads, dim], k and v [total, groups, dim] -> [total, heads * dim]."""
        bounds, longest = packing.cu_seqlens_q, packing.max_seqlen_q
        lengths = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}
        return self._only(self.flash_packed(q, k, v, **lengths, window_size=self._sides(longest))).flatten(1)

    def _sides(self, longest: int) -> tuple[int | None, int | None]:
        """Keys seen to the left and right of a query's own; a window that reaches over the longest sequence is none, which is faster."""
        return NO_WINDOW[self.version] if self.window is None or longest <= self.window else (self.window - 1, 0)

    def _only(self, out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return out[0] if self.version == 4 else out
