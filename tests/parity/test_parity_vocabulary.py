"""A vocabulary that no tensor-parallel size divides: a run stopped at TP2 goes on at TP1 and TP4 with its moments, as if on one rank.

Logits, losses and gradients under such a vocabulary are in test_parity_models.py and test_parity_sequences.py, which all have one.
"""

import json
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_tower.models.head import NEVER
from megatron_tower.models.hf import random_hf
from megatron_tower.objectives.logprobs import token_logprobs_and_collision, token_logprobs_and_entropy
from megatron_tower.rollout.sampling import next_tokens
from megatron_tower.runtime import distributed
from tests.distributed import curves, room
from tests.parity import reference, vocabulary_cases


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """By family, the losses of a run in one go; by family and layout, those of the second half."""
    from megatron_tower.runtime.local import run_ranks

    folder, found = tmp_path_factory.mktemp("vocabulary"), {}
    reference.write(folder / "few", vocabulary_cases.FEW)
    for family in vocabulary_cases.CASES:
        room.prepare(folder, family)
        cfg = vocabulary_cases.config(folder, family)
        random_hf(cfg.model, Path(cfg.phase.start_from), folder / family / "tokenizer", seed=1)
        found[family] = curves.straight(cfg, vocabulary_cases.STEPS)
    distributed.shutdown()
    assert run_ranks(["tests.parity.vocabulary_cases", str(folder)], 4, threads=1, logs=folder / "logs") == 0
    return found | {path.stem: json.loads(path.read_text()) for path in folder.glob("*.*.json")}


@pytest.mark.parametrize("family, layout", [(family, name) for family, names in vocabulary_cases.CASES.items() for name in names])
def test_resumed_at_another_tensor_parallel_size(losses: dict[str, list[float]], family: str, layout: str):
    assert losses[f"{family}.{layout}"] == pytest.approx(losses[family][vocabulary_cases.HALF :], abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 1e-3])
def test_padding_is_never_seen(single_rank, temperature: float):
    """Log-probabilities, collision, entropy and samples of logits with padding are those without, but for the order of adding up."""
    group = parallel_state.get_tensor_model_parallel_group()
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(15).view(3, 5) % 7
    padded = torch.nn.functional.pad(logits, (0, 6), value=NEVER)
    for of in (token_logprobs_and_collision, lambda *given: token_logprobs_and_entropy(*given, temperature)):
        for with_padding, without in zip(of(padded, labels, group), of(logits, labels, group), strict=True):
            torch.testing.assert_close(with_padding, without, rtol=1e-6, atol=1e-6)
    numbers = torch.linspace(0, 1 - 1e-7, 3, dtype=torch.float64)
    for cut in (1.0, 0.9):
        assert torch.equal(
            next_tokens(padded[:, 0], numbers, temperature, cut, group), next_tokens(logits[:, 0], numbers, temperature, cut, group)
        )
