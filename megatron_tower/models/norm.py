"""RMSNorm for every norm of the model (the stock WrappedTorchNorm refuses both the 1+w form and sequence parallelism).

    y = n * w,   n = x / sqrt(mean(x^2) + eps)        w = 1 + weight when the config says `layernorm_zero_centered_gamma` (Gemma)

Computed in float32 whatever the dtype of the activations. On CUDA Transformer Engine does it in one pass where the config says so: in the
linear behind it where there is one (`NormOfLinear`), else alone (models/kernels.py). On a CPU, where PyTorch goes through the tensor some
twenty times, the gradient is written out:
   dx = (g w - n mean(g w n)) / sqrt(mean(x^2) + eps),   dw = sum(g n).
Leaves out: LayerNorm.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_tower.models import kernels


class RMSNorm(nn.Module):
    """Norm over the last dimension; its gradient is summed over tensor-parallel ranks when they hold pieces of the sequence."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.fused = config.transformer_impl == "transformer_engine"
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.full((hidden_size,), 1.0 - self.offset, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # read by megatron's finalize_model_grads

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]"""
        if self.fused:
            return kernels.rms_norm(x, self.weight, self.eps, zero_centered=self.offset == 1.0)
        weight = self.weight.float() + self.offset
        if x.is_cuda or not torch.is_grad_enabled():
            return nn.functional.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)
        return _RMSNorm.apply(x, weight, self.eps)


class NormOfLinear(RMSNorm):
    """A norm that the linear behind it computes: its weight and its name stay here, so that a checkpoint is the same either way.

    It is called all the same and does nothing: on its way in the gradient buffer gathers a weight of which each rank updated a part.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x

    def hand_to(self, linear: nn.Module) -> None:
        """linear: of Transformer Engine's LayerNormLinear, whose own `layer_norm_weight` goes."""
        del linear.layer_norm_weight
        vars(linear)["layer_norm_weight"] = self.weight  # not as a parameter, which would be saved twice


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        product = grad * normed
        mean = (product @ weight).div_(x.shape[-1]).unsqueeze(-1)
        dx = (grad * weight).addcmul_(normed, mean, value=-1.0).mul_(inverse)
        return dx.to(x.dtype), product.flatten(0, -2).sum(0), None
