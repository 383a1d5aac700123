"""What the hardware made of a step: tokens and model FLOPs a second."""

from megatron_tower.config import ModelConfig
from megatron_tower.plan import flops_per_token


def throughput(model: ModelConfig, seq_length: int, tokens: int, seconds: float) -> dict[str, float]:
    """tokens/s and model TFLOP/s of all ranks together."""
    rate = tokens / seconds
    return {"tokens_per_second": rate, "tflops": rate * flops_per_token(model, seq_length) / 1e12}
