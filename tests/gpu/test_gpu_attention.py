"""Every attention back end that this machine offers, on its GPU, in bf16, against eager in float32. Not run yet on a card.

Tolerances are relative distances over a whole tensor, |a - b| / |b|. Bare flash-attn-4 was measured at 2.1e-3 (output), 2.7e-3 (gradients),
which is bf16's own rounding; a wrong mask, scale or soft-cap is off by more than 1e-1.

Run:  python -m pytest tests/gpu
"""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: run on a machine with a GPU", allow_module_level=True)

from megatron_tower.config import InputError
from megatron_tower.models.attention import choice
from megatron_tower.models.attention.choice import Wanted
from megatron_tower.models.packing import pack
from megatron_tower.runtime.distributed import device
from tools.bench_attention import Shape, core, error, inputs, results

BACKENDS = ("flash4", "te", "flex", "sdpa", "flash2")  # what the models choose comes first: a run may be cut off
LENGTHS = [700, 1300, 96, 2000]
OUTPUT, GRADIENTS = 5e-3, 1e-2
CAP = 2.0  # low enough to bend scores of unit variance


def made(backend: str, shape: Shape, window: int | None = None, **options: bool):
    try:
        return core(backend, shape, window, torch.bfloat16, **options)
    except InputError as why:
        pytest.skip(str(why))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("window", [None, 511])
@pytest.mark.parametrize("softcap", [CAP, None])
@pytest.mark.parametrize("dim", [256, 128, 64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients(backend: str, dim: int, softcap: float | None, window: int | None, packed: bool):
    shape = Shape(8, 4, dim, softcap)
    attention = made(backend, shape, window)
    qkv, upstream = inputs(shape, sum(LENGTHS), torch.bfloat16)
    packing = pack(torch.tensor([0, *LENGTHS]).cumsum(0), device()) if packed else None
    if not packed:  # two rows of half the tokens
        qkv = [x.detach().unflatten(0, (-1, 2)).requires_grad_() for x in qkv]
        upstream = upstream.unflatten(0, (-1, 2))
    found = results(attention, qkv, upstream, packing)
    wide = [x.detach().float().requires_grad_() for x in qkv]
    expected = results(core("eager", shape, window, torch.float32), wide, upstream.float(), packing)
    assert error(found[:1], expected[:1]) < OUTPUT
    assert error(found[1:], expected[1:]) < GRADIENTS


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_of_one_token(backend: str):
    shape = Shape(8, 4, 128, None)
    attention, packing = made(backend, shape), pack(torch.tensor([0, 1, 2, 3, 4, 5, 4096]), device())
    qkv, upstream = inputs(shape, 4096, torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in qkv]
    expected = results(core("eager", shape, None, torch.float32), wide, upstream.float(), packing)
    assert error(results(attention, qkv, upstream, packing), expected) < GRADIENTS


@pytest.mark.parametrize("softcap", [None, CAP])
def test_flex_compiles_no_more_after_two_steps(softcap: float | None):
    """Other documents, another window's mask: the same kernels. Other lengths make dynamo compile once more, for any length."""
    from torch._dynamo.utils import counters

    shape = Shape(8, 4, 128, softcap)
    layers = [made("flex", shape), made("flex", shape, 300)]

    def step(lengths: list[int]) -> None:
        packing = pack(torch.tensor([0, *lengths]).cumsum(0), device())
        for layer in layers:
            results(layer, *inputs(shape, sum(lengths), torch.bfloat16), packing)

    for lengths in ([2048], [1000, 1048], [1500, 1000]):
        step(lengths)
    before = counters["stats"]["unique_graphs"]
    for lengths in ([500] * 5, [7, 2041], [3000, 96], [128] * 20):
        step(lengths)
    assert counters["stats"]["unique_graphs"] == before


def test_flash4_compiles_no_more_after_the_first_steps():
    shape = Shape(8, 4, 256, 50.0)
    layers = [made("flash4", shape), made("flash4", shape, 300)]
    from flash_attn.cute import interface

    def step(lengths: list[int]) -> None:
        packing = pack(torch.tensor([0, *lengths]).cumsum(0), device())
        for layer in layers:
            results(layer, *inputs(shape, sum(lengths), torch.bfloat16), packing)

    kept = [f.compile_cache for f in (interface._flash_attn_fwd, interface._flash_attn_bwd)]
    sizes = []
    for lengths in ([2048], [1000, 1048], [500] * 5, [7, 2041], [3000, 96]):
        step(lengths)
        sizes.append([len(getattr(cache, "cache", cache)) for cache in kept])
    assert sizes[1:] == [sizes[1]] * 4 and min(sizes[0]) > 0


@pytest.mark.parametrize("backend", ["flash2", "flash4"])
def test_deterministic_gradients_are_equal_bit_for_bit(backend: str):
    shape = Shape(8, 4, 128, None)
    attention = made(backend, shape, deterministic=True)
    qkv, upstream = inputs(shape, 4096, torch.bfloat16)
    packing = pack(torch.tensor([0, 1000, 4096]), device())
    first, second = (results(attention, qkv, upstream, packing) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("shape", [Shape(8, 4, 256, 50.0), Shape(12, 2, 128, None)])
def test_auto_says_what_it_takes(shape: Shape, capsys):
    choice.choose.cache_clear()
    chosen = core("auto", shape, None, torch.bfloat16).backend
    said = capsys.readouterr().err
    print(said)
    wanted = Wanted(shape.softcap is not None, shape.dim, torch.bfloat16, torch.cuda.get_device_capability())
    assert said.startswith(f"attention: {chosen}, the fastest that serves") and choice.obstacle(chosen, wanted) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_with_padding_on_the_left(backend: str):
    """Which no kernel serves: the plain way takes over, and agrees."""
    shape = Shape(8, 4, 128, None)
    (q, k, v), _ = inputs(shape, 2 * 64, torch.bfloat16)
    q, k, v = (x.detach().unflatten(0, (-1, 2)) for x in (q, k, v))
    hidden = (torch.arange(64, device=device()) < torch.tensor([0, 9], device=device())[:, None])[:, None, None]
    attention, eager = made(backend, shape, 20), core("eager", shape, 20, torch.float32)
    with torch.inference_mode():
        for mask in (hidden, None):
            found = attention(q[-3:], k, v, mask)
            assert error([found], [eager(q[-3:].float(), k.float(), v.float(), mask)]) < GRADIENTS
