"""Objectives on a `Head` against the same on logits: values, gradients, `main_grad`; what is never made, and how often W is multiplied."""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tower.config import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tower.data.batch import Batch
from megatron_tower.models import head as heads
from megatron_tower.models.build import build_chunks
from megatron_tower.models.forward import forward, forward_to_head
from megatron_tower.models.head import Head, finished
from megatron_tower.objectives import logprobs
from megatron_tower.objectives.causal_lm import CausalLM
from megatron_tower.objectives.grpo import GRPO
from megatron_tower.objectives.wpo import WPO
from megatron_tower.runtime import compiled
from tests.unit import sequence_objective_cases as cases

HIDDEN, PADDED = 6, cases.VOCABULARY + 4
CHUNKS = {"one": heads.CHUNK, "pairs": 2 * PADDED, "sevens": 7 * PADDED}  # the last leaves a rest
SHAPE = {
    "num_layers": 1,
    "hidden_size": 16,
    "ffn_hidden_size": 16,
    "num_attention_heads": 2,
    "num_query_groups": 1,
    "kv_channels": 8,
    "vocab_size": 509,
    "max_position_embeddings": 64,
}
TIED = ModelConfig(name="tied", family="gemma2", **SHAPE, final_softcap=4.0, attention_softcap=20.0, sliding_window=64, window_layers=[0])
UNTIED = ModelConfig(name="untied", family="qwen2", **SHAPE, qkv_bias=True, tie_embeddings=False)


@pytest.fixture(params=CHUNKS)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CHUNK", CHUNKS[request.param])


def random_head(batch: Batch, dtype: torch.dtype, cap: float | None) -> Head:
    generator = torch.Generator().manual_seed(0)
    rows, seq = batch.tokens.shape
    hidden = torch.randn(seq, rows, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)
    weight[cases.VOCABULARY :] = 0.0
    group = parallel_state.get_tensor_model_parallel_group()
    return Head(*(x.to(dtype).requires_grad_() for x in (hidden, weight)), cap, cases.VOCABULARY, group, False)


def logits_of(head: Head) -> Tensor:
    return finished(F.linear(head.hidden, head.weight), head.softcap, head.tokens).transpose(0, 1)


def objectives() -> Iterator[tuple[object, Callable]]:
    yield CausalLM(), lambda batch: batch
    for form in cases.WPO_FORMS:
        yield WPO(form), cases.preference_batch
    for form, old in product(cases.GRPO_FORMS, (True, False)):
        yield GRPO(form, cases.ROLLOUT), lambda batch, form=form, old=old: cases.rollout_batch(batch, kl=form.kl > 0, old=old)


@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_logits(single_rank, chunk, dtype: torch.dtype, tolerance: float, cap: float | None):
    """Loss, statistics and both gradients of every objective, rows and packed."""
    for batch, (objective, known) in product((cases.packed(padding=5), cases.unpacked()), objectives()):
        found = []
        for through in (lambda head: head, logits_of):
            head = random_head(batch, dtype, cap)
            terms = objective.loss(through(head), known(batch))
            terms.sum.backward()
            found.append([terms.sum.detach(), *terms.stats.values(), head.hidden.grad, head.weight.grad])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance * max(1.0, float(theirs.abs().max())))
        assert not found[0][-1][cases.VOCABULARY :].any(), "padding has a gradient"


def test_bfloat16(single_rank, chunk, monkeypatch: pytest.MonkeyPatch):
    """The same log-probabilities as of bf16 logits, the weight's gradient as near to float64 as theirs; read in pieces too."""
    batch, exact = cases.unpacked(), None
    for dtype, through in ((torch.float64, logits_of), (torch.bfloat16, logits_of), (torch.bfloat16, lambda head: head)):
        head = random_head(batch, dtype, 4.0)
        found = logprobs.token_logprobs(through(head), batch.labels, head.group, 0.7)
        (found * batch.loss_mask).sum().backward()
        if exact is None:
            exact = head.weight.grad
            continue
        torch.testing.assert_close(head.weight.grad.double(), exact, rtol=0.02, atol=0.15)
        monkeypatch.setattr(logprobs, "PIECE", 2 * PADDED)


@pytest.mark.parametrize("cap", [None, 4.0])
def test_what_a_gpu_compiles_is_the_same(single_rank, monkeypatch: pytest.MonkeyPatch, cap: float | None):
    """Traced whole, without a break, and run as the tracer left it; code for the card is the compiler's own affair."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # the bridge sets it
    made = cache(lambda function: torch.compile(function, backend="aot_eager", fullgraph=True))
    monkeypatch.setattr(compiled, "_compiled", made)
    found = []
    for fused in (False, True):
        for module in (compiled, logprobs):
            monkeypatch.setattr(module, "fuses", lambda x, fused=fused: fused)
        results = []
        for batch, (objective, known) in product((cases.packed(padding=5), cases.unpacked()), objectives()):
            head = random_head(batch, torch.float32, cap)
            terms = objective.loss(head, known(batch))
            terms.sum.backward()
            results += [terms.sum.detach(), *terms.stats.values(), head.hidden.grad, head.weight.grad]
        found.append(results)
    assert made.cache_info().misses == (2 if cap is None else 3)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def stepped(model: ModelConfig, way: Callable[[torch.nn.Module, Batch], object], overlap: bool = False, params: str = "float32") -> dict:
    """`main_grad` of each weight after two micro-batches, from zero."""
    torch.manual_seed(0)
    (chunk,) = build_chunks(model, ParallelConfig(name="single"), PrecisionConfig(name="p", params=params))
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False, overlap_grad_reduce=overlap)
    wrapped = DistributedDataParallel(chunk.config, ddp, chunk)
    wrapped.zero_grad_buffer()
    batches = [tokens_of(model, seed) for seed in range(2)]
    with wrapped.no_sync():
        CausalLM().loss(way(wrapped, batches[0]), batches[0]).sum.backward()
    CausalLM().loss(way(wrapped, batches[1]), batches[1]).sum.backward()
    wrapped.finish_grad_sync()
    return {name: parameter.main_grad.clone() for name, parameter in chunk.named_parameters()}


def tokens_of(model: ModelConfig, seed: int = 0) -> Batch:
    rows = torch.randint(model.vocab_size, (2, 65), generator=torch.Generator().manual_seed(seed))
    return Batch(rows[:, :-1], rows[:, 1:], torch.ones(2, 64), torch.arange(64).expand(2, -1))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("model", [TIED, UNTIED], ids=lambda model: model.name)
def test_main_grad(single_rank, monkeypatch: pytest.MonkeyPatch, model: ModelConfig, overlap: bool):
    """Megatron's buffer holds the gradients of the logits path, the embedding's share of a tied weight too; no `grad` is left behind."""
    expected = stepped(model, forward)
    for chunk in (heads.CHUNK, 10 * model.vocab_size):
        monkeypatch.setattr(heads, "CHUNK", chunk)
        found = stepped(model, forward_to_head, overlap)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * float(expected[name].abs().max()), msg=name)


def test_main_grad_of_bfloat16_weights(single_rank, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(heads, "CHUNK", 10 * TIED.vocab_size)
    expected, found = stepped(TIED, forward), stepped(TIED, forward_to_head, params="bfloat16")
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.999, name


def test_a_loss_that_is_scaled_is_refused(single_rank):
    """Its weight's gradient is in `main_grad` before anyone knows of the scale."""
    batch = cases.unpacked()
    head = random_head(batch, torch.float32, None)
    (2 * CausalLM().loss(head, batch).sum).backward()
    doubled = head.weight.grad
    head = random_head(batch, torch.float32, None)
    head.weight.main_grad = torch.zeros_like(head.weight)
    loss = CausalLM().loss(head, batch).sum
    torch.testing.assert_close(2 * head.weight.main_grad, doubled)
    with pytest.raises(RuntimeError, match="already in main_grad"):
        (2 * loss).backward()
    CausalLM().loss(head, batch).sum.backward()
    assert head.weight.grad_added_to_main_grad


def test_nothing_is_added_without_gradients(single_rank):
    batch = cases.unpacked()
    head = random_head(batch, torch.float32, None)
    head.weight.main_grad = torch.zeros_like(head.weight)
    with torch.no_grad():
        CausalLM().loss(head, batch)
    assert not head.weight.main_grad.any()


class Watch(TorchDispatchMode):
    """The largest tensor that is made, and the matrix products with a weight of `shape`, its transpose or its gradient."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.weight, self.largest, self.products = shape, 0, 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, Tensor):
                self.largest = max(self.largest, made.numel())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products += any(isinstance(x, Tensor) and {*self.weight} <= {*x.shape} for x in (*args, out))
        return out


@pytest.mark.parametrize("objective", ["causal_lm", "wpo", "grpo"])
def test_logits_never_exist_whole(single_rank, monkeypatch: pytest.MonkeyPatch, objective: str):
    """Forward and backward of a model: no tensor is larger than a chunk of logits. W is used in three products a chunk where the tokens'
    weights are known beforehand (logits and the two gradients) and where all is one chunk; in four where logits are made twice."""
    (chunk,) = build_chunks(TIED, ParallelConfig(name="single"), PrecisionConfig(name="p"))
    weight = chunk.shared_embedding_or_output_weight()
    batch = tokens_of(TIED)
    group = parallel_state.get_tensor_model_parallel_group()
    of = {
        "causal_lm": lambda head: CausalLM().loss(head, batch).sum,
        "wpo": lambda head: logprobs.token_logprobs_and_collision(head, batch.labels, group)[0].sum(),
        "grpo": lambda head: logprobs.token_logprobs_and_entropy(head, batch.labels, group, 0.7)[0].sum(),
    }[objective]
    positions = 64  # in a chunk, of 128
    for size, count, most in ((positions * len(weight), 2, positions), (heads.CHUNK, 1, 128)):
        monkeypatch.setattr(heads, "CHUNK", size)
        with Watch(weight.shape) as watch:
            of(forward_to_head(chunk, batch)).backward()
        assert watch.largest == most * len(weight)
        assert watch.products == count * (3 if objective == "causal_lm" or count == 1 else 4)
    with Watch(weight.shape) as watch:
        CausalLM().loss(forward(chunk, batch), batch).sum.backward()
    assert watch.largest == 128 * len(weight) and watch.products == 3, "the watch sees whole logits where they are"
