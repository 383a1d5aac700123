"""What a layer keeps of each token for its backward pass, measured, beside what the plan says of it."""

import torch

from megatron_tower.command import load
from megatron_tower.config import Config
from megatron_tower.plan import layer_bytes

NARROW = [
    *("model.hidden_size=64", "model.ffn_hidden_size=96", "model.kv_channels=16"),
    *("model.num_attention_heads=4", "model.num_query_groups=2", "data.vocab_size=400", "phase.seq_length=256"),
    *("phase.global_batch_size=2", "phase.micro_batch_size=1"),
]


def kept_per_token(words: list[str]) -> tuple[float, float]:
    """Bytes, measured and planned. A layer's share is what four layers keep more than two."""
    deep, shallow = (load([*words, f"model.num_layers={layers}", "model.window_layers=[]"]) for layers in (4, 2))
    return (_kept(deep) - _kept(shallow)) / 2 / deep.phase.seq_length, layer_bytes(deep)[0]


def _kept(cfg: Config) -> float:
    """Bytes that the layers of one chunk keep for the backward pass of one row; tensors that share memory count once."""
    from megatron_tower.models.build import build_chunks

    (chunk,) = build_chunks(cfg.model, cfg.parallel, cfg.precision)
    storages = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape != (cfg.model.hidden_size,):  # a norm's weight in fp32 is not a token's
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage  # held, or its memory would be given out again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        rows = torch.randn(cfg.phase.seq_length, 1, cfg.model.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        chunk.decoder(rows, None, rotary_pos_emb=chunk.rotary_pos_emb(len(rows)))
    cast = [weight for module in chunk.modules() for weight in getattr(module, "_fp8_workspaces", {}).values()]
    weights = [*chunk.parameters(), *chunk.buffers(), *(part for weight in cast for part in weight.get_data_tensors())]
    owned = {weight.untyped_storage().data_ptr() for weight in weights if weight is not None}
    return sum(storage.nbytes() for place, storage in storages.items() if place not in owned)
