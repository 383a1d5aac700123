"""The learning-rate schedule, and what a model costs."""

import pytest

from megatron_tower.command import load
from megatron_tower.config import OptimizerConfig
from megatron_tower.plan import flops_per_token, parameters
from megatron_tower.training.optimizer import lr_at
from megatron_tower.training.throughput import throughput


@pytest.mark.parametrize(("schedule", "last", "middle"), [("cosine", 0.1, 0.55), ("linear", 0.1, 0.55), ("constant", 1.0, 1.0)])
def test_warms_up_and_comes_down(schedule: str, last: float, middle: float) -> None:
    o = OptimizerConfig(lr=2.0, schedule=schedule, warmup=0.1, min_lr=0.1)
    rates = [lr_at(step, 110, o) for step in range(1, 111)]
    assert rates[0] == pytest.approx(2.0 / 11) and rates[10] == max(rates) == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(2.0 * last)
    assert lr_at(11 + 99 // 3, 110, o) >= lr_at(11 + 2 * 99 // 3, 110, o)
    assert lr_at(60, 109, OptimizerConfig(lr=2.0, schedule=schedule, warmup=0.1, min_lr=0.1)) == pytest.approx(2.0 * middle)


def test_cosine_is_not_linear() -> None:
    o = OptimizerConfig(lr=1.0, schedule="cosine", warmup=0.0, min_lr=0.0)
    assert lr_at(25, 100, o) == pytest.approx(0.8535533905932737)
    assert lr_at(1, 1, o) == pytest.approx(0.0)


@pytest.mark.parametrize("name", ["tiny_gemma2", "tiny_qwen2"])
def test_parameters_are_those_of_the_model(single_rank: None, name: str) -> None:
    from megatron_tower.models.build import build_chunks

    cfg = load([f"model={name}"])
    (decoder,) = build_chunks(cfg.model, cfg.parallel, cfg.precision)
    assert parameters(cfg.model) == sum(p.numel() for p in decoder.parameters())


@pytest.mark.parametrize(("name", "billions"), [("gemma2_2b", 2.61), ("gemma2_9b", 9.24), ("qwen25_1_5b", 1.54), ("qwen25_72b", 72.7)])
def test_parameters_of_the_real_models(name: str, billions: float) -> None:
    assert parameters(load([f"model={name}"]).model) / 1e9 == pytest.approx(billions, rel=0.003)


def test_throughput_counts_attention() -> None:
    """6 N + 6 L d_attn S, for the measured 45,434 tokens/s and 469 TFLOP/s of the 1.5B shape at 4096 tokens."""
    model = load(["model=qwen25_1_5b"]).model
    assert flops_per_token(model, 4096) == 6 * parameters(model) + 6 * 28 * 1536 * 4096
    assert throughput(model, 4096, tokens=45434 * 2, seconds=2.0) == {"tokens_per_second": 45434, "tflops": pytest.approx(469, rel=0.01)}
