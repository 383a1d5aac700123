"""What a step costs and what the hardware made of it, from the shape alone: parameters, model FLOPs a token.

FLOPs a token, forward and backward = 6 N + 6 L d_attn S        (N parameters, L layers, d_attn heads x head size, S tokens)
"""

from megatron_tower.config import ModelConfig
from megatron_tower.models.families import family_of


def parameters(model: ModelConfig) -> int:
    """Number of weights: embeddings, attention, gated MLP, norms."""
    hidden, head = model.hidden_size, model.kv_channels
    qkv = (model.num_attention_heads + 2 * model.num_query_groups) * head
    attention = hidden * qkv + (qkv if model.qkv_bias else 0) + model.num_attention_heads * head * hidden
    norms = (4 if family_of(model.family).sandwich_norms else 2) * hidden
    embeddings = model.vocab_size * hidden * (1 if model.tie_embeddings else 2)
    return embeddings + model.num_layers * (attention + 3 * hidden * model.ffn_hidden_size + norms) + hidden


def flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Model FLOPs of one token's forward and backward pass; recomputed activations are not counted."""
    return 6 * parameters(model) + 6 * model.num_layers * model.num_attention_heads * model.kv_channels * seq_length


def throughput(model: ModelConfig, seq_length: int, tokens: int, seconds: float) -> dict[str, float]:
    """tokens/s and model TFLOP/s of all ranks together."""
    rate = tokens / seconds
    return {"tokens_per_second": rate, "tflops": rate * flops_per_token(model, seq_length) / 1e12}
