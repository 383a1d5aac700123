"""Transformer Engine's linears with their signatures, under megatron-core's own wrappers of them, and its kernels: computed naively, but
keeping for the backward pass what the real ones keep."""

import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from megatron.core import extensions, parallel_state
from megatron.core import utils as core_utils
from megatron.core.extensions import transformer_engine as stock
from megatron.core.models.common.embeddings import rope_utils
from packaging.version import Version
from torch import Tensor, nn

from megatron_tower.models import kernels, norm

VERSION = "2.20.2"


class Linear(nn.Module):
    """Of one rank: no collectives."""

    def __init__(self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None, tp_size=1,
                 get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True, return_bias=False, params_dtype=None,
                 parallel_mode=None, device="cuda", name=None, symmetric_ar_type=None):  # fmt: skip
        super().__init__()
        assert tp_size == 1 and parallel_mode in ("column", "row") and str(device) == "cpu"
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.fuse_wgrad_accumulation, self.return_bias = fuse_wgrad_accumulation, return_bias
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=params_dtype))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=params_dtype))
        else:
            self.bias = torch.Tensor()

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return F.linear(inp, self.weight, self.bias if self.use_bias else None)

    def get_extra_state(self) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        pass


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, eps=1e-5, normalization="LayerNorm", return_layernorm_output=False,
                 zero_centered_gamma=False, **linear):  # fmt: skip
        super().__init__(in_features, out_features, **linear)
        assert normalization == "RMSNorm" and not return_layernorm_output and self.fuse_wgrad_accumulation is False
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.layer_norm_weight = nn.Parameter(torch.full((in_features,), float(not zero_centered_gamma), dtype=self.weight.dtype))
        self.layer_norm_bias = None

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return super().forward(rms_norm(inp, self.layer_norm_weight, self.eps, self.zero_centered_gamma))


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
    return norm._RMSNorm.apply(x, weight.float() + 1.0 if zero_centered else weight.float(), eps)


class Gated(torch.autograd.Function):
    """Keeps its input alone, as the real one."""

    @staticmethod
    def compute(gate_up: Tensor, gelu: bool) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up

    @staticmethod
    def forward(ctx, gate_up: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.gelu = gelu
        return Gated.compute(gate_up, gelu)

    @staticmethod
    @torch.enable_grad
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        gate_up = ctx.saved_tensors[0].detach().requires_grad_()
        return torch.autograd.grad(Gated.compute(gate_up, ctx.gelu), gate_up, grad)[0], None


class Rotated(torch.autograd.Function):
    """rotate(t, freqs), linear in t; keeps nothing of a token."""

    @staticmethod
    def forward(ctx, rotate: Callable[[Tensor, Tensor], Tensor], t: Tensor, freqs: Tensor) -> Tensor:
        ctx.rotate, ctx.freqs = rotate, freqs
        return rotate(t, freqs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, None]:
        return None, ctx.rotate(grad, -ctx.freqs), None


def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """As if a card and Transformer Engine were there; returns megatron-core's wrappers, built anew on the fakes."""
    te, fp8 = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch.fp8")
    te.__version__, te.common, te.pytorch = VERSION, MagicMock(), ModuleType("transformer_engine.pytorch")
    te.common.recipe.DelayedScaling = object
    vars(te.pytorch).update(Linear=Linear, LayerNormLinear=LayerNormLinear, ops=MagicMock(), distributed=MagicMock())
    te.pytorch.DotProductAttention, te.pytorch.GroupedLinear, te.pytorch.distributed.CudaRNGStatesTracker = nn.Module, nn.Module, object
    fp8.FP8GlobalStateManager, fp8.fp8_autocast = MagicMock(), MagicMock()
    monkeypatch.setattr(core_utils, "_te_version", Version(VERSION))
    spec = spec_from_file_location("megatron.core.extensions.transformer_engine", stock.__file__)
    wrappers = module_from_spec(spec)
    with monkeypatch.context() as while_it_imports:
        for module in (te, te.pytorch, fp8):
            while_it_imports.setitem(sys.modules, module.__name__, module)
        while_it_imports.setitem(sys.modules, "transformer_engine.pytorch.router", MagicMock())
        spec.loader.exec_module(wrappers)
    monkeypatch.setitem(sys.modules, spec.name, wrappers)
    monkeypatch.setattr(extensions, "transformer_engine", wrappers)
    group = parallel_state.get_context_parallel_group

    def rows(t: Tensor, freqs: Tensor, interleaved: bool) -> Tensor:
        return Rotated.apply(lambda t, freqs: rope_utils._apply_rotary_pos_emb_bshd(t, freqs, interleaved), t, freqs)

    def packed(t: Tensor, ends: Tensor, freqs: Tensor, **cp: int) -> Tensor:
        return Rotated.apply(lambda t, freqs: rope_utils._apply_rotary_pos_emb_thd(t, ends, freqs, cp_group=group()), t, freqs)

    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", rows)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", packed)
    monkeypatch.setattr(kernels, "transformer_engine", lambda precision: precision.layers == "te")
    monkeypatch.setattr(kernels, "rms_norm", rms_norm)
    monkeypatch.setattr(kernels, "gated", Gated.apply)
    return wrappers
