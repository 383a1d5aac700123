"""Precision on a card: Transformer Engine's layers and FP8 against plain ones, checkpoints that leave the card, optimizer offload.

    python -m pytest tests/gpu -s          # -s: distances are printed too

Skipped without a GPU or without Transformer Engine. Not run yet on a card: the bounds are what Transformer Engine's own code showed on a
CPU, over kernels in PyTorch (`-p tests.te.plugin`; docs/benchmarks.md), with room to spare.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_tower.command import load
from megatron_tower.config import REPOSITORY, Config
from megatron_tower.data.batch import Batch
from megatron_tower.models.build import Decoder, build_chunks
from megatron_tower.models.forward import forward
from megatron_tower.models.hf import load_hf
from megatron_tower.rollout.generate import sample
from megatron_tower.rollout.scoring import label_logprobs
from megatron_tower.runtime.distributed import device
from megatron_tower.train import build
from megatron_tower.training import checkpoint, saving
from tests.distributed import room

EMULATED = "tests.te.plugin" in sys.modules
HERE = EMULATED or (find_spec("transformer_engine") is not None and torch.cuda.is_available())
pytestmark = pytest.mark.skipif(not HERE, reason="needs a CUDA device and Transformer Engine (requirements-gpu.txt)")

EAGER = ["model.attention_backend=eager"]
TORCH = [*EAGER, "precision=bf16", "precision.layers=torch"]
TE = [*EAGER, "precision=bf16", "precision.layers=te"]
RECIPES = ("delayed", "tensorwise", "blockwise")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("room")
    for family in ("gemma2", "qwen2"):
        room.prepare(path, family)
    return path


@pytest.fixture(autouse=True)
def rank(single_rank) -> Iterator[None]:
    yield


def model(cfg: Config) -> Decoder:
    (decoder,) = build_chunks(cfg.model, cfg.parallel, cfg.precision)
    load_hf([decoder], cfg.model, Path(cfg.phase.start_from))
    return decoder


def batch(cfg: Config, rows: int = 4) -> Batch:
    ids = torch.randint(0, cfg.model.vocab_size, (rows, 65), generator=torch.Generator().manual_seed(3)).to(device())
    tokens = ids[:, :-1].contiguous()
    positions = torch.arange(64, device=device()).expand(rows, -1)
    return Batch(tokens, ids[:, 1:].contiguous(), torch.ones(rows, 64, device=device()), positions)


@torch.no_grad()
def logits(decoder: Decoder, cfg: Config) -> Tensor:
    """[batch, seq, vocabulary] in the mode that the model is in: FP8 only while it trains."""
    return forward(decoder, batch(cfg))[..., : cfg.model.vocab_size].float()


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def losses(cfg: Config, steps: int) -> list[float]:
    trainer = build(cfg, Path(cfg.phase.start_from))
    return [trainer.step()["loss"] for _ in range(steps)]


@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
def test_fused_layers_give_the_logits_and_gradients_of_plain_ones(folder: Path, family: str):
    exact = load(room.words(folder, family, *EAGER, "precision=fp32"))
    expected = logits(model(exact).eval(), exact)
    distance = {}
    for name, words in (("torch", TORCH), ("te", TE)):
        cfg = load(room.words(folder, family, *words))
        distance[name] = apart(logits(model(cfg).eval(), cfg), expected)
    print(f"{family}: bf16 logits from fp32: {distance}")
    assert distance["te"] < 2 * distance["torch"] + 1e-3
    names, plain = gradients(load(room.words(folder, family, *TORCH)))
    _, fused = gradients(load(room.words(folder, family, *TE)))
    for name, one, other in zip(names, fused, plain, strict=True):
        if not name.endswith("linear_qkv.bias"):  # a key's is zero but for rounding
            assert apart(one, other) < 5e-2, f"{family} {name}"


def gradients(cfg: Config) -> tuple[list[str], list[Tensor]]:
    """Of one update of several micro-batches, as they stand in the gradient buffer: fused accumulation must add, not overwrite."""
    trainer = build(cfg, Path(cfg.phase.start_from))
    trainer.step()
    named = [(name, weight) for chunk in trainer.state.chunks for name, weight in chunk.module.named_parameters()]
    return [name for name, _ in named], [weight.main_grad.float().clone() for _, weight in named]


@pytest.mark.parametrize("fp8", RECIPES)
@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
def test_fp8_distances_are_bounded(folder: Path, family: str, fp8: str):
    """Of logits, and of what WPO and GRPO compare: log-probabilities of tokens and of whole answers."""
    bf16, cfg = load(room.words(folder, family, *TE)), load(room.words(folder, family, *EAGER, f"precision=fp8_{fp8}"))
    plain, quantized = model(bf16).train(), model(cfg).train()
    distance = apart(logits(quantized, cfg), logits(plain, bf16))
    assert distance > 1e-3, "FP8 was not on"
    tokens = [label_logprobs([decoder], [batch(cfg)])[0] for decoder in (quantized, plain)]
    each, whole = (tokens[0] - tokens[1]).abs(), (tokens[0].sum(1) - tokens[1].sum(1)).abs()
    print(f"{family} fp8_{fp8}: logits {distance:.4f}; token log-probability {each.mean():.4f}, 64 tokens' sum {whole.mean():.4f}")
    assert distance < 0.15 and each.mean() < 0.15
    assert apart(logits(quantized.eval(), cfg), logits(plain.eval(), bf16)) == 0.0, "evaluation is not in FP8"


@pytest.mark.parametrize("words", [TE, [*EAGER, "precision=fp8_tensorwise"]], ids=["bf16", "fp8"])
def test_what_the_card_writes_a_cpu_reads_and_says_the_same(folder: Path, tmp_path: Path, words: list[str]):
    cfg = load(room.words(folder, "gemma2", *words, f"run_dir={tmp_path}/run", "phase.train_steps=4"))
    trainer = build(cfg, Path(cfg.phase.start_from))
    for _ in range(4):
        trainer.step()
    saving.save(cfg, trainer.state)
    (decoder,) = (chunk.module.eval() for chunk in trainer.state.chunks)
    torch.save(batch(cfg).tokens.cpu(), tmp_path / "tokens.pt")
    subprocess.run(
        [sys.executable, "-m", "tests.gpu.read_on_cpu", str(checkpoint.latest(cfg.phase_dir).path), str(tmp_path)],
        cwd=REPOSITORY, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=True,
    )  # fmt: skip
    elsewhere = torch.load(tmp_path / "logits.pt", weights_only=True).to(device())
    distance = apart(logits(decoder, cfg), elsewhere)
    spoken, told = answers(decoder), json.loads((tmp_path / "answers.json").read_text())
    agree = sum(a == b for one, other in zip(spoken, told, strict=True) for a, b in zip(one, other, strict=True)) / (len(spoken) * 16)
    print(f"logits on the card (bf16) within {distance:.4f} of a CPU's in fp32; {agree:.0%} of greedy tokens equal")
    assert distance < 2e-2 and agree > 0.8


def answers(decoder: Decoder) -> list[list[int]]:
    """Greedy answers of 16 tokens."""
    prompts = [[5, 6, 7, 8], [9, 10, 11], [12, 13]]
    found = sample(decoder, prompts, samples=1, max_new_tokens=16, stop_ids=frozenset(), temperature=0.0, top_p=1.0, seed=1, keys=[0, 1, 2], batch_size=8)  # fmt: skip # noqa: E501
    return [completion.tokens for (completion,) in found]


@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
def test_rollouts_and_training_agree(folder: Path, family: str):
    """Log-probabilities that sampling reports against those that training computes of the same tokens, on fused layers."""
    cfg = load(room.words(folder, family, *TE))
    decoder = model(cfg)
    prompts = [[5, 6, 7, 8]] * 4
    found = sample(decoder, prompts, samples=1, max_new_tokens=32, stop_ids=frozenset(), temperature=1.0, top_p=1.0, seed=1, keys=range(4), batch_size=8)  # fmt: skip # noqa: E501
    ids = torch.tensor([prompt + completion.tokens for prompt, (completion,) in zip(prompts, found, strict=True)]).to(device())
    rows = ids[:, :-1]
    given = Batch(
        rows, ids[:, 1:], torch.ones(rows.shape, device=device()), torch.arange(rows.shape[1], device=device()).expand(rows.shape)
    )
    trained = label_logprobs([decoder.train()], [given])[0][:, 3:]
    sampled = torch.tensor([completion.logprobs for (completion,) in found]).to(device())
    mismatch = (trained - sampled).abs()
    print(f"{family}: rollout and training log-probabilities {mismatch.mean():.5f} apart, at most {mismatch.max():.5f}")
    assert mismatch.mean() < 2e-2


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_offloaded_state_gives_the_same_course_and_is_saved(folder: Path, tmp_path: Path, share: float):
    shared = [*TE, "parallel.distributed_optimizer=true", f"run_dir={tmp_path}/run"]
    plain = losses(load(room.words(folder, "gemma2", *shared)), 8)
    cfg = load(room.words(folder, "gemma2", *shared, f"parallel.offload={share}"))
    trainer = build(cfg, Path(cfg.phase.start_from))
    found = [trainer.step()["loss"] for _ in range(4)]
    saving.save(cfg, trainer.state)
    resumed = build(cfg, checkpoint.latest(cfg.phase_dir))
    found += [resumed.step()["loss"] for _ in range(4)]
    assert found == pytest.approx(plain, rel=5e-3)


@pytest.mark.parametrize("fp8", RECIPES)
@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
def test_fp8_follows_the_curve_of_bf16(folder: Path, family: str, fp8: str):
    """Weights that are not cast anew at each update leave the loss where it was."""
    plain, found = curve(folder, family, "bf16"), curve(folder, family, f"fp8_{fp8}")
    means = [(sum(found[i : i + 20]) / 20, sum(plain[i : i + 20]) / 20) for i in range(0, 200, 20)]
    worst = max(abs(a - b) / b for a, b in means)
    print(f"{family} fp8_{fp8}: means of 20 steps within {worst:.2%} of bf16; {means[0]} to {means[-1]}")
    assert means[-1][1] < means[0][1] - 1 and worst < 0.01


@pytest.mark.parametrize("fp8", RECIPES)
def test_weights_kept_in_fp8_learn_what_cast_ones_learn(folder: Path, fp8: str):
    words = room.words(folder, "gemma2", *EAGER, f"precision=fp8_{fp8}", "parallel.distributed_optimizer=true")
    cast, kept = (losses(load([*words, f"precision.fp8_param_gather={kept}"]), 20) for kept in ("false", "true"))
    assert kept == pytest.approx(cast, rel=5e-3)


@lru_cache
def curve(folder: Path, family: str, precision: str) -> list[float]:
    """Losses of 200 steps, slow enough that the few documents are not learnt by heart: there curves part by far more than 1 %."""
    words = ["phase=cpt", "phase.optimizer.lr=1e-3", "phase.train_steps=200", *EAGER, f"precision={precision}"]
    return losses(load(room.words(folder, family, *words)), 200)
