"""RMSNorm and the soft-cap on logits against their formulas in float64, gradients too."""

from types import SimpleNamespace

import pytest
import torch

from megatron_tower.models.norm import RMSNorm
from megatron_tower.models.softcap import softcap


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(zero_centered: bool, dtype: torch.dtype):
    config = SimpleNamespace(
        layernorm_zero_centered_gamma=zero_centered,
        params_dtype=dtype,
        sequence_parallel=True,
        use_cpu_initialization=True,
        transformer_impl="local",
    )
    norm = RMSNorm(config, 16, 1e-2)
    assert norm.weight.dtype == dtype and norm.weight.sequence_parallel
    x = torch.randn(3, 2, 16).to(dtype).requires_grad_()
    reference = x.detach().double().requires_grad_()
    plain = reference / (reference.square().mean(-1, keepdim=True) + 1e-2).sqrt()
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(norm(x).double(), plain, **tolerance)  # as built it only normalises
    torch.nn.init.normal_(norm.weight)
    weight = norm.weight.detach().double().requires_grad_()
    expected = plain * (weight + 1 if zero_centered else weight)
    up = torch.randn(3, 2, 16).to(dtype)
    found = norm(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, **tolerance)
    ours = torch.autograd.grad(found, (x, norm.weight), up)
    theirs = torch.autograd.grad(expected, (reference, weight), up.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, **tolerance)


def test_softcap_of_logits():
    z = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: softcap(x * 3, 2.0), (z,))
    torch.testing.assert_close(softcap(z.detach().clone(), 2.0), 2 * torch.tanh(z.detach() / 2))
