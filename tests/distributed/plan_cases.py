"""The real-size layouts scaled down to at most eight ranks: a step of training, and what each rank holds beside the plan. Run by
test_plan_layouts.py.

    python -m tests.distributed.plan_cases FOLDER 72b_64 72b_256 ...      on as many ranks as these layouts have
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from megatron_tower.command import load
from megatron_tower.config import Config
from megatron_tower.data.batch import Batch
from megatron_tower.plan import layer_bytes, memory, weights_on
from megatron_tower.runtime import cpu, distributed

RANKS = 8
NARROW = [
    *("model.num_layers=4", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.kv_channels=16", "model.num_attention_heads=8"),
    *("model.num_query_groups=8", "data.vocab_size=512", "phase.seq_length=64", "phase.micro_batch_size=1", "phase.global_batch_size=8"),
    *("phase.train_steps=2", "phase.optimizer.lr=1e-3", "precision=bf16", "precision.layers=torch", "model.attention_backend=eager"),
    "cluster.threads_per_rank=1",
]


def scaled(layout: str, *more: str) -> Config:
    """A layout's kind on few ranks: data and pipeline 2 at most, tensor what is left. The optimizer stays: a CPU has no other memory."""
    family = "qwen2" if layout.startswith("72b") else "gemma2"
    cfg = load(["phase=cpt", f"model=tiny_{family}", f"parallel={layout}", "parallel.offload=0", *NARROW, *more])
    par = cfg.parallel
    few = {"data": min(par.data, 2), "pipeline": min(par.pipeline, 2)}
    few["tensor"] = min(par.tensor, RANKS // few["data"] // few["pipeline"])
    return replace(cfg, parallel=replace(par, **few))


class Rows:
    """The same row of random tokens whatever is asked for: a loss that falls shows that it learns."""

    def __init__(self, cfg: Config):
        self.tokens = torch.randint(cfg.model.vocab_size, (1, cfg.phase.seq_length + 1), generator=torch.Generator().manual_seed(7))

    def __getitem__(self, index: int) -> Batch:
        length = self.tokens.shape[1] - 1
        return Batch(self.tokens[:, :-1], self.tokens[:, 1:], torch.ones(1, length), torch.arange(length)[None])


def case(layout: str) -> dict[str, list[float]]:
    """Losses of two updates; of each kind of memory what this rank has and what the plan says."""
    from megatron.core import parallel_state

    from megatron_tower.models.build import build_chunks
    from megatron_tower.training.rounds import RowSource
    from megatron_tower.training.trainer import Trainer

    cfg = scaled(layout)
    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    chunks = build_chunks(cfg.model, cfg.parallel, cfg.precision)
    trainer = Trainer(cfg, chunks, RowSource(cfg, Rows(cfg)), cfg.phase.train_steps)
    losses = [trainer.step()["loss"] for _ in range(2)]
    stage = parallel_state.get_pipeline_model_parallel_rank()
    plan = memory(cfg)[stage]
    (inner,) = trainer.state.optimizer.chained_optimizers
    states = [t for state in inner.optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    mains = [p for group in inner.optimizer.param_groups for p in group["params"]]
    (wrapped,) = trainer.state.chunks
    return {
        "losses": losses,
        "weights": [sum(weight.numel() for weight in chunks[0].parameters()), weights_on(cfg, stage)],
        "gradients": [sum(buffer.grad_data.nbytes for buffer in wrapped.buffers), plan.gradients],
        "optimizer": [sum(t.nbytes for t in (*states, *mains)), plan.optimizer],
        "activations": [_kept(cfg, chunks[0]), layer_bytes(cfg)[0] * cfg.model.num_layers / cfg.parallel.pipeline],
    }


def _kept(cfg: Config, chunk: torch.nn.Module) -> float:
    """Bytes a token that this rank's layers save for the backward pass; a last norm's own are left out."""
    owned = {t.untyped_storage().data_ptr() for t in (*chunk.parameters(), *chunk.buffers())}
    storages = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned and tensor.shape != (cfg.model.hidden_size,):
            storages[storage.data_ptr()] = storage
        return tensor

    pieces = cfg.parallel.tensor if cfg.parallel.sequence_parallel else 1
    rows = torch.randn(cfg.phase.seq_length // pieces, 1, cfg.model.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    chunk.decoder.final_layernorm = None
    chunk.decoder.set_input_tensor(rows)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        chunk.decoder(rows, None, rotary_pos_emb=chunk.rotary_pos_emb(cfg.phase.seq_length))
    return sum(storage.nbytes() for storage in storages.values()) / cfg.phase.seq_length


def main() -> None:
    folder, *layouts = Path(sys.argv[1]), *sys.argv[2:]
    cpu.install()
    for layout in layouts:
        told = case(layout)
        (folder / f"{layout}.{distributed.place().rank}.json").write_text(json.dumps(told))
    distributed.shutdown()


if __name__ == "__main__":
    main()
