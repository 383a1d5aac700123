"""The attention module against a loop in float64 that reads like the definition, for every combination of its features and every back end.

Kernels of other packages stand behind fakes of their signatures (attention_fakes.py); FlexAttention runs uncompiled.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_tower.models import attention as module_under_test
from megatron_tower.models.attention import CoreAttention
from megatron_tower.models.attention.choice import choose
from megatron_tower.models.attention.plain import _causal, _causal_bias
from megatron_tower.models.packing import pack
from tests.unit import attention_fakes

DIM, SCALE = 8, 0.4
PLAIN = [("eager", None), ("eager", 1.5), ("sdpa", None), ("auto", None), ("auto", 1.5)]
KERNELS = [(name, softcap) for name in ("flex", "flash2", "flash4") for softcap in (None, 1.5)] + [("te", None)]
BACKENDS = PLAIN + KERNELS
WINDOWS = [None, 1, 5]
GROUPS = [1, 2, 4]


def naive(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, window: int | None, hidden: list[int]) -> Tensor:
    """One sequence: q [s_q, heads, dim], k and v [s_k, groups, dim], `hidden` keys -> [s_q, heads * dim]."""
    (s_q, heads, _), (s_k, groups, _) = q.shape, k.shape
    out = torch.zeros_like(q)
    for i, head in itertools.product(range(s_q), range(heads)):
        at, group = s_k - s_q + i, head * groups // heads
        seen = [j for j in range(at + 1) if (window is None or at - j < window) and j not in hidden]
        scores = [SCALE * (q[i, head] @ k[j, group]).item() for j in seen]
        if softcap:
            scores = [softcap * math.tanh(s / softcap) for s in scores]
        powers = [math.exp(s) for s in scores]
        for j, power in zip(seen, powers, strict=True):
            out[i, head] += power / sum(powers) * v[j, group]
    return out.flatten(1)


def module(backend: str, softcap: float | None, window: int | None) -> CoreAttention:
    asked = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self", "cp_comm_type": None, "pg_collection": None}
    return CoreAttention(config(), 3, backend=backend, softcap=softcap, window=window, window_layers=(0, 2), **asked)


def config(deterministic: bool = False) -> SimpleNamespace:
    return SimpleNamespace(softmax_scale=SCALE, kv_channels=DIM, params_dtype=torch.float32, deterministic_mode=deterministic)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Every back end, on this CPU."""
    torch.manual_seed(0)
    attention_fakes.install(monkeypatch)
    monkeypatch.setattr(module_under_test, "choose", lambda word, wanted: choose(word, wanted) if word == "auto" else word)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("backend", "softcap"), BACKENDS)
def test_rows(backend: str, softcap: float | None, window: int | None, groups: int):
    q, k, v = random(9, 2, 4, DIM), random(9, 2, groups, DIM), random(9, 2, groups, DIM)
    found = module(backend, softcap, window)(*(x.float() for x in (q, k, v)), None)
    expected = torch.stack([naive(q[:, b], k[:, b], v[:, b], softcap, window, []) for b in range(2)], dim=1)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("backend", "softcap"), BACKENDS)
def test_packed(backend: str, softcap: float | None, window: int | None, groups: int):
    lengths = [1, 20, 3, 0, 17, 2]  # an empty one too
    q, k, v = random(43, 4, DIM), random(43, groups, DIM), random(43, groups, DIM)
    packing = pack(torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0))
    found = module(backend, softcap, window)(*(x.float() for x in (q, k, v)), None, packed_seq_params=packing)
    pieces = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    expected = torch.cat([naive(*piece, softcap, window, []) for piece in pieces])
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("s_q", [1, 3, 9])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("backend", "softcap"), BACKENDS)
def test_cache_and_padding_on_the_left(backend: str, softcap: float | None, window: int | None, s_q: int):
    padding = [0, 4]
    q, k, v = random(s_q, 2, 4, DIM), random(9, 2, 2, DIM), random(9, 2, 2, DIM)
    hidden = torch.arange(9) < torch.tensor(padding)[:, None]
    for mask in (hidden[:, None, None], None):
        with torch.inference_mode():
            found = module(backend, softcap, window)(*(x.float() for x in (q, k, v)), mask)
        assert found.isfinite().all()
        for row, pad in enumerate(padding if mask is not None else [0, 0]):
            real = slice(max(0, pad - (9 - s_q)), None)  # queries that are padding themselves may say anything finite
            expected = naive(q[:, row], k[:, row], v[:, row], softcap, window, list(range(pad)))
            torch.testing.assert_close(found[real, row].double(), expected[real], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("backend", "softcap"), BACKENDS)
def test_gradients_of_packed_rows(backend: str, softcap: float | None):
    lengths = [20, 3, 18]
    packing, attention = pack(torch.tensor([0, *lengths]).cumsum(0)), module(backend, softcap, 5)
    packed = [random(41, heads, DIM).float().requires_grad_() for heads in (4, 2, 2)]
    weights = random(41, 4 * DIM).float()
    together = torch.autograd.grad((attention(*packed, None, packed_seq_params=packing) * weights).sum(), packed)
    pieces = [
        attention(*(x.unsqueeze(1) for x in piece), None).squeeze(1) for piece in zip(*(x.split(lengths) for x in packed), strict=True)
    ]
    apart = torch.autograd.grad((torch.cat(pieces) * weights).sum(), packed)
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize(("backend", "softcap"), BACKENDS)
def test_a_mask_made_while_generating_serves_training(backend: str, softcap: float | None):
    """Masks are cached, and a tensor made in inference mode can't be saved for a backward pass."""
    attention, shape = module(backend, softcap, 5), (31, 1, 4, DIM)  # a length no other test uses
    _causal.cache_clear(), _causal_bias.cache_clear()
    with torch.inference_mode():
        attention(random(*shape), random(*shape), random(*shape), None)
    q = random(*shape).requires_grad_()
    attention(q, q, q, None).sum().backward()
    assert q.grad.isfinite().all()


def test_only_layers_of_the_window_have_it():
    layers = [CoreAttention(config(), n, backend="auto", softcap=None, window=4, window_layers=(0, 2)) for n in (1, 2, 3)]
    assert [layer.window for layer in layers] == [4, None, 4]


def test_short_segments_share_small_buckets():
    packing = pack(torch.tensor([0, *[30] * 60, 248]).cumsum(0))
    assert packing.buckets == ((60, 30), (1, 248))
    x = torch.arange(2048 * 2).view(2048, 1, 2).float()
    assert torch.equal(packing.unpad([part.flatten(2) for part in packing.pad(x)]), x.flatten(1))
