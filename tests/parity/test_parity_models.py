"""Every family against transformers in float32: logits, loss, gradients, at each layout; round trips of weights."""

from pathlib import Path

import pytest
import torch

from megatron_tower.config import ParallelConfig, PrecisionConfig
from megatron_tower.data.batch import Batch
from megatron_tower.models.build import build_chunks
from megatron_tower.models.forward import forward
from megatron_tower.models.hf import load_hf
from megatron_tower.objectives.causal_lm import CausalLM
from tests.parity import model_cases, reference


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expected")
    for name in reference.MODELS:
        reference.write(folder / name, reference.MODELS[name])
    return folder


@pytest.mark.parametrize("recompute", ["none", "selective", "mlp", "full"])
@pytest.mark.parametrize("name", reference.MODELS)
def test_one_rank(single_rank, expected: Path, name: str, recompute: str):
    model_cases.check(expected / name, reference.MODELS[name], "single", recompute)


def test_two_ranks(launch, expected: Path):
    launch("tests.parity.model_cases", 2, str(expected), "tp2", "pp2", "tp2_sp", "pp2_vpp2")


def test_four_ranks(launch, expected: Path):
    launch("tests.parity.model_cases", 4, str(expected), "tp2pp2", "tp2pp2_sp")


@pytest.mark.parametrize("name", reference.MODELS)
def test_packed_equals_unpacked_on_every_example(single_rank, expected: Path, name: str):
    model = reference.MODELS[name]
    (chunk,) = chunks = build_chunks(model, ParallelConfig(name="single"), PrecisionConfig(name="fp32"))
    load_hf(chunks, model, expected / name / "model")
    batch, objective = reference.batches(model.vocab_size)["packed"], CausalLM()
    together = forward(chunk, batch).flatten(0, 1)
    start = 0
    for length in reference.lengths(batch):
        piece = slice(start, start + length)
        alone = Batch(*(x.flatten()[None, piece] for x in (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids)))
        apart = forward(chunk, alone)
        torch.testing.assert_close(together[None, piece], apart, atol=1e-5, rtol=0)
        losses = [objective.loss(logits, alone).sum for logits in (together[None, piece], apart)]
        torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-6)
        start += length
