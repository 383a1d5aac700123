"""Which back end is chosen and what it is asked; whole models on each, behind the fakes of attention_fakes.py."""

import random
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from torch.nn.attention.flex_attention import create_block_mask

from megatron_tower.config import InputError, ParallelConfig, PrecisionConfig
from megatron_tower.data.batch import Batch
from megatron_tower.models import attention
from megatron_tower.models.attention import CoreAttention, choice, flex
from megatron_tower.models.attention.choice import Wanted, choose
from megatron_tower.models.build import build_model
from megatron_tower.models.forward import forward
from megatron_tower.models.packing import pack
from megatron_tower.rollout.generate import sample
from tests.parity import reference
from tests.unit import attention_fakes

ALL = ("te", "flash4", "flash2", "flex")
HOPPER, AMPERE, BLACKWELL, TURING = (9, 0), (8, 0), (10, 0), (7, 5)
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def installed(monkeypatch):
    """`installed("te", ...)`: just these kernels are there."""
    real = choice.lacking_package
    choose.cache_clear()

    def only(*names: str) -> None:
        monkeypatch.setattr(choice, "lacking_package", lambda name: None if name in names else real(name))
        monkeypatch.setattr(choice, "find_spec", lambda name: object() if name != "triton" or "flex" in names else None)
        monkeypatch.setattr(choice, "import_module", lambda name: None)
        monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # the bridge sets it

    yield only
    choose.cache_clear()


@pytest.mark.parametrize(
    ("there", "wanted", "expected"),
    [
        (ALL, Wanted(True, 256, BF16, HOPPER), "flash4"),  # Gemma 2
        (ALL, Wanted(False, 128, BF16, HOPPER), "te"),  # Qwen 2.5
        (ALL, Wanted(False, 256, BF16, HOPPER), "flash4"),
        (("flash2", "flex"), Wanted(True, 256, BF16, HOPPER), "flash2"),
        (("flex",), Wanted(True, 256, BF16, HOPPER), "flex"),
        ((), Wanted(True, 256, BF16, HOPPER), "eager"),
        ((), Wanted(False, 128, BF16, HOPPER), "sdpa"),
        (("flex",), Wanted(False, 128, BF16, HOPPER), "sdpa"),
        (("flash4", "flash2"), Wanted(False, 128, BF16, HOPPER), "flash4"),
        (ALL, Wanted(True, 256, BF16, AMPERE), "flash2"),  # flash-attn-4 has no backward pass there
        (ALL, Wanted(True, 256, BF16, BLACKWELL), "flash2"),  # nor there with a soft-cap
        (ALL, Wanted(True, 128, BF16, BLACKWELL), "flash4"),
        (ALL, Wanted(True, 256, BF16, TURING), "eager"),
        (ALL, Wanted(True, 260, BF16, HOPPER), "flex"),
        (ALL, Wanted(True, 256, FP32, HOPPER), "eager"),
        (ALL, Wanted(False, 128, FP32, HOPPER), "sdpa"),
        (ALL, Wanted(True, 256, BF16, None), "eager"),  # a CPU
        (ALL, Wanted(False, 128, BF16, None), "sdpa"),
    ],
)
def test_auto_takes_the_fastest_that_serves(installed, capsys, there, wanted, expected):
    installed(*there)
    assert choose("auto", wanted) == choose("auto", wanted) == expected
    said = capsys.readouterr().err
    assert said.count("\n") == (wanted.capability is not None)  # once, and nothing on a CPU, where there is no choice
    assert said == "" or f"attention: {expected}, the fastest that serves" in said


def test_the_log_says_why_the_faster_ones_were_passed_over(installed, capsys):
    installed("flex")
    choose("auto", Wanted(True, 256, BF16, HOPPER))
    assert capsys.readouterr().err == (
        "attention: flex, the fastest that serves; "
        "flash4 needs flash-attn-4, which is not installed: pip install flash-attn-4==4.0.0b36; "
        "flash2 needs flash-attn, which is not installed: pip install --no-build-isolation flash-attn==2.8.3\n"
    )


@pytest.mark.parametrize(
    ("word", "there", "wanted", "words"),
    [
        (
            "flash4",
            (),
            Wanted(True, 256, BF16, HOPPER),
            r"flash4 needs flash-attn-4, which is not installed: pip install flash-attn-4==.*, or",
        ),
        (
            "flash2",
            (),
            Wanted(True, 256, BF16, HOPPER),
            "flash2 needs flash-attn, which is not installed: pip install --no-build-isolation",
        ),
        ("te", (), Wanted(False, 128, BF16, HOPPER), "te needs transformer-engine, which is not installed: pip install"),
        ("flex", (), Wanted(True, 256, BF16, HOPPER), "flex needs triton: pip install triton"),
        ("te", ALL, Wanted(True, 256, BF16, HOPPER), "te has no soft-cap, which this model needs: use eager, flex, flash2 or flash4"),
        ("sdpa", ALL, Wanted(True, 256, BF16, None), "sdpa has no soft-cap"),
        ("flex", ALL, Wanted(True, 256, BF16, None), "flex needs a GPU: use eager, or"),
        ("flash4", ALL, Wanted(True, 256, FP32, HOPPER), "flash4 does not compute in float32: use precision=bf16"),
        (
            "flash4",
            ALL,
            Wanted(True, 256, BF16, BLACKWELL),
            "flash4 does not serve heads of 256 channels with a soft-cap on a GPU of capability 10.0: use",
        ),
        ("te", ALL, Wanted(False, 256, BF16, HOPPER), "te does not serve heads of 256 channels on"),
    ],
)
def test_one_that_was_asked_for_and_cannot_serve_is_refused(installed, word, there, wanted, words):
    installed(*there)
    with pytest.raises(InputError, match=f"^model.attention_backend={words}"):
        choose(word, wanted)


def test_a_package_that_does_not_import_and_a_forbidden_compiler(installed, monkeypatch):
    installed(*ALL)

    def broken(name: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(choice, "import_module", broken)
    with pytest.raises(InputError, match=r"flash4 does not import \(OSError: libcudart.so.13.*install it again for this torch"):
        choose("flash4", Wanted(True, 256, BF16, HOPPER))
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(InputError, match="flex is compiled, and TORCHDYNAMO_DISABLE=1 forbids it: unset"):
        choose("flex", Wanted(True, 256, BF16, HOPPER))


def test_an_old_package_is_not_enough(monkeypatch):
    monkeypatch.setattr("megatron_tower.checks.version", lambda name: "2.5.9.post1")
    assert "needs flash-attn 2.6 or newer, 2.5.9.post1 is installed" in choice.lacking_package("flash2")
    monkeypatch.setattr("megatron_tower.checks.version", lambda name: "2.8.3")
    assert choice.lacking_package("flash2") is None


@pytest.mark.parametrize("window", [None, 1, 100, 128, 200, 1000])
@pytest.mark.parametrize("lengths", [[1000], [128] * 4, [1, 127, 128, 129, 300, 2, 61], [5] * 100])
def test_flex_knows_blocks_without_looking_at_pairs(lengths: list[int], window: int | None):
    """The same empty, mixed and full blocks, in both directions, as PyTorch finds from all pairs."""
    total, document = sum(lengths), torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    starts = pack(torch.tensor([0, *accumulate(lengths)])).starts
    found = flex.block_mask(flex._starts(starts, window))

    def visible(b, h, i, j):
        here = document[i.clamp(max=total - 1)] == document[j.clamp(max=total - 1)]
        return here & (i >= j) & (i - j < (window or total)) & (i < total)

    expected = create_block_mask(visible, None, None, total, total, device="cpu")
    assert found.shape == expected.shape
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (getattr(found, f"{name}_{what}") for what in ("num_blocks", "indices"))
        assert torch.equal(counts, getattr(expected, f"{name}_num_blocks")), name
        for row, count in enumerate(counts.flatten().tolist()):
            assert torch.equal(indices[0, 0, row, :count], getattr(expected, f"{name}_indices")[0, 0, row, :count]), name
    i, j = torch.meshgrid(torch.arange(total), torch.arange(total), indexing="ij")
    assert torch.equal(found.mask_mod(0, 0, i, j), visible(0, 0, i, j))


def core(backend: str, window: int | None, deterministic: bool = False) -> CoreAttention:
    config = SimpleNamespace(softmax_scale=0.3, kv_channels=8, params_dtype=torch.float32, deterministic_mode=deterministic)
    return CoreAttention(config, 1, backend=backend, softcap=2.0, window=window, window_layers=(0,))


@pytest.fixture
def fakes(monkeypatch):
    attention_fakes.install(monkeypatch)
    monkeypatch.setattr(attention, "choose", lambda word, wanted: word)


@pytest.mark.parametrize(("name", "none"), [("flash2", (-1, -1)), ("flash4", (None, None))])
def test_a_window_longer_than_the_sequence_is_none(fakes, name: str, none: tuple):
    x = torch.randn(20, 2, 8)
    for window, length, expected in ((20, 20, none), (19, 20, (18, 0)), (10, 10, none), (9, 10, (8, 0))):
        packing = pack(torch.arange(0, 21, length))
        core(name, window, deterministic=True)(x, x, x, None, packed_seq_params=packing)
        core(name, window)(*[x[:length, None]] * 3, None)
        assert attention_fakes.CALLS[-2:] == [
            {"window_size": expected, "deterministic": True},
            {"window_size": expected, "deterministic": False},
        ]


@pytest.mark.parametrize(("name", "made"), [("flash4", set()), ("flash2", set()), ("flex", {"starts"}), ("eager", {"slots", "_layout"})])
def test_packing_makes_what_its_back_end_needs_and_makes_it_once(fakes, name: str, made: set[str]):
    packing, x = pack(torch.tensor([0, 3, 3, 20])), torch.randn(20, 2, 8)
    before = set(vars(packing))
    layer = core(name, 4)
    layer(x, x, x, None, packed_seq_params=packing)
    kept = {key: vars(packing)[key] for key in set(vars(packing)) - before}
    assert set(kept) == made and list(packing.masks) == ([4] if name == "flex" else [])
    masks = dict(packing.masks)
    layer(x, x, x, None, packed_seq_params=packing)
    assert all(vars(packing)[key] is value for key, value in kept.items()) and all(packing.masks[w] is m for w, m in masks.items())
    assert packing.cu_seqlens_q.tolist() == [0, 3, 20] and packing.cu_seqlens_q.dtype == torch.int32 and packing.max_seqlen_q == 17


def test_boundaries_stay_where_the_host_reads_them():
    row = torch.zeros(1, 4, dtype=torch.int64)
    moved = Batch(row, row, row.float(), row, torch.tensor([0, 4], dtype=torch.int32)).to(torch.device("meta"))
    assert moved.tokens.is_meta and moved.loss_mask.is_meta and moved.cu_seqlens.tolist() == [0, 4]
    given = []

    class Model(torch.nn.Module):
        post_process = False

        def forward(self, *_: object, packed_seq_params: object, **others: object) -> torch.Tensor:
            given.append(packed_seq_params)
            return moved.tokens

    forward(Model(), moved)
    assert given[0].cu_seqlens_q.is_meta and given[0].bounds == (0, 4)


MODELS = [("gemma2", name) for name in ("flex", "flash2", "flash4")] + [("qwen2", name) for name in ("sdpa", *ALL)]


@pytest.mark.parametrize(("family", "backend"), MODELS)
def test_prompts_of_unequal_length_go_through_the_packed_kernel(single_rank, fakes, monkeypatch, family: str, backend: str):
    """Answers and their log-probabilities are those of eager; a layer asks its kernel once a batch of prompts."""
    random.seed(7)
    prompts = [[random.randrange(reference.SHAPE["vocab_size"]) for _ in range(length)] for length in (3, 30, 11, 1, 30, 19)]
    asked, found = [], {}
    for word in ("eager", backend):
        torch.manual_seed(5)
        model = replace(reference.MODELS[family], attention_backend=word)
        chunk = build_model(model, ParallelConfig(name="single"), PrecisionConfig(name="fp32"))
        for layer in chunk.decoder.layers:
            core = layer.self_attention.core_attention
            real = core.kernel.packed
            monkeypatch.setattr(core.kernel, "packed", lambda *given, real=real: asked.append(given[3].bounds) or real(*given))
        words = {"samples": 2, "max_new_tokens": 12, "stop_ids": [], "temperature": 0.8, "top_p": 0.9, "batch_size": 6}
        found[word] = [answer for row in sample(chunk, prompts, **words) for answer in row]
    assert asked == 2 * ([(0, 30, 60, 79)] * model.num_layers + [(0, 11, 14, 15)] * model.num_layers)
    assert family == "qwen2" or max(map(len, prompts)) > model.sliding_window
    assert [answer.tokens for answer in found[backend]] == [answer.tokens for answer in found["eager"]]
    for one, other in zip(found[backend], found["eager"], strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize(("family", "backend"), MODELS)
def test_models_compute_the_same_on_every_back_end(single_rank, fakes, monkeypatch, family: str, backend: str, recompute: str):
    """Logits and all gradients, packed and not, against eager; no back end leaves anything in the checkpoint."""
    random.seed(3)
    cuts = torch.tensor([0, *sorted(random.sample(range(1, 80), 5)), 80], dtype=torch.int32)
    tokens = torch.randint(reference.SHAPE["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(0))
    weights = torch.randn(2, 40, 1, generator=torch.Generator().manual_seed(1))
    found = {}
    for word in ("eager", backend):
        model = replace(reference.MODELS[family], attention_backend=word)
        torch.manual_seed(5)
        chunk = build_model(model, ParallelConfig(name="single", recompute=recompute), PrecisionConfig(name="fp32"))
        for bounds in (None, cuts):
            logits = forward(chunk, Batch(tokens, tokens, weights, tokens, bounds))
            chunk.zero_grad()
            ((logits * weights).sum() / 100).backward()
            found[word, bounds is None] = [logits.detach(), *(parameter.grad.clone() for parameter in chunk.parameters())]
        found[word] = set(chunk.state_dict())
    assert found["eager"] == found[backend] and not any("core_attention" in name for name in found[backend])
    assert chunk.config.attention_backend == AttnBackend.fused  # TE: cuDNN's kernels or an error
    assert family == "qwen2" or max(cuts.diff()) > model.sliding_window
    for rows in (True, False):
        torch.testing.assert_close(found[backend, rows], found["eager", rows], atol=2e-5, rtol=1e-4)
