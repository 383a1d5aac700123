"""Transformer Engine's kernels behind our modules: looked up, never required. Weights, names and formulas stay those of the CPU.

    rms_norm    y = x / sqrt(mean(x^2) + eps) * (offset + weight)              keeps x and one number a token
    gated       y = act(gate) * up  of one tensor [..., gate | up]             keeps that tensor, not act(gate)

With them come its linears, with the norm before them in the same call (models/layer.py), their collectives beside their products
(`make_buffers`), and its RoPE (TransformerConfig.apply_rope_fusion; packed rows too, where megatron-core's own cuts a row at each boundary
on the host). Leaves out: CUDA graphs of training (docs/benchmarks.md says why). Not run yet on a card.
"""

import os
import sys
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tower.config import InputError, PrecisionConfig
from megatron_tower.runtime.distributed import device

INSTALL = "pip install -r requirements-gpu.txt on a machine with a GPU, or use precision.layers=torch without fp8"


def transformer_engine(precision: PrecisionConfig) -> bool:
    """Whether layers are made of Transformer Engine's kernels. InputError where they are asked for and can't be had."""
    asked = precision.layers == "te" or precision.fp8 is not None
    if device().type != "cuda":
        if asked:
            raise InputError(f"precision={precision.name} asks for Transformer Engine, which needs a GPU: use precision=bf16 or fp32")
        return False
    found = find_spec("transformer_engine") is not None
    if asked and not found:
        raise InputError(f"precision={precision.name} asks for Transformer Engine, which is not installed: {INSTALL}")
    return found and (asked or (precision.layers == "auto" and precision.params == "bfloat16"))


def make_buffers(tokens: int, hidden_size: int, tensor: int, precision: PrecisionConfig) -> None:
    """Buffers of tokens x hidden size through which hidden states are gathered and scattered piece by piece while a linear multiplies.

    Transformer Engine's user buffers, a dozen for all layers, and another where FP8 leaves some in bf16; those made before are given up. On
    all ranks, before layers are built. InputError where layers will not be Transformer Engine's, or GPUs can't speak to several at once.
    """
    if not transformer_engine(precision):
        raise InputError(
            "parallel.tensor_overlap=true needs Transformer Engine's layers and PyTorch's are used here: "
            "pip install -r requirements-gpu.txt on a machine with a GPU, or use false"
        )
    from transformer_engine.pytorch.module import base as te  # optional dependency

    if not te.tex.device_supports_multicast() and os.environ.get("UB_SKIPMC") != "1":
        raise InputError(
            "parallel.tensor_overlap=true: these GPUs have no multicast: set UB_SKIPMC=1, in jobs by cluster.environment, to do without, "
            "or use false"
        )
    modes = [te.UserBufferQuantizationMode.FP8] if precision.fp8 else []
    if not precision.fp8 or precision.bf16_layers:
        modes.append(te.UserBufferQuantizationMode.NONE)
    drop_buffers()
    te.initialize_ub([tokens, hidden_size], tensor, quantization_modes=modes, bootstrap_backend=dist.get_backend())


def drop_buffers() -> None:
    """Give up the buffers, where there are any: before the process groups that they were made over end."""
    te = sys.modules.get("transformer_engine.pytorch.module.base")
    if te and te.is_ub_initialized():
        te.destroy_ub()


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
    """[..., hidden], weight [hidden] of the same type -> [..., hidden], computed in float32. zero_centered: 1 is added to the weight."""
    return _RMSNorm.apply(x, weight, eps, zero_centered)


def gated(gate_up: Tensor, gelu: bool) -> Tensor:
    """[..., 2 * ffn] -> [..., ffn]. gelu: the activation is GELU in its tanh form, else SiLU."""
    return _Gated.apply(gate_up, gelu)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
        import transformer_engine_torch as tex  # optional dependency
        from transformer_engine.pytorch.constants import TE_DType

        rows = x.contiguous().view(-1, x.shape[-1])
        y, _, inverse = tex.rmsnorm_fwd(rows, weight, eps, None, None, TE_DType[x.dtype], 0, zero_centered)
        ctx.save_for_backward(rows, weight, inverse)
        ctx.zero_centered = zero_centered
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        import transformer_engine_torch as tex  # optional dependency

        rows, weight, inverse = ctx.saved_tensors
        dx, dw = tex.rmsnorm_bwd(grad.contiguous().view(rows.shape), rows, inverse, weight, 0, ctx.zero_centered)
        return dx.view(grad.shape), dw, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor, gelu: bool) -> Tensor:
        import transformer_engine_torch as tex  # optional dependency

        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        ctx.gelu = gelu
        return (tex.geglu if gelu else tex.swiglu)(gate_up, None)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        import transformer_engine_torch as tex  # optional dependency

        (gate_up,) = ctx.saved_tensors
        return (tex.dgeglu if ctx.gelu else tex.dswiglu)(grad.contiguous(), gate_up, None), None
