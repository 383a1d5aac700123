# ruff: noqa: E402 (the bridge comes before megatron-core)
"""Ranks of test_parity_models.py: python -m tests.parity.model_cases FOLDER LAYOUT..."""

import sys
from dataclasses import replace
from pathlib import Path

from megatron_tower.runtime import cpu

cpu.install()

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file

from megatron_tower.config import ClusterConfig, ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tower.models import head as heads
from megatron_tower.models.build import build_chunks
from megatron_tower.models.forward import forward_to_head
from megatron_tower.models.hf import load_hf, save_hf
from megatron_tower.models.mapping import EMBEDDING, HEAD
from megatron_tower.objectives.causal_lm import CausalLM
from megatron_tower.runtime import distributed
from tests.parity import reference

LAYOUTS = {
    "single": {},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "tp2_sp": {"tensor": 2, "sequence_parallel": True},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "tp2pp2": {"tensor": 2, "pipeline": 2},
    "tp2pp2_sp": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
    "tp2dp2": {"tensor": 2, "data": 2},
    "pp2dp2": {"pipeline": 2, "data": 2},
    "tp4": {"tensor": 4},
    "tp4pp2": {"tensor": 4, "pipeline": 2},
}
CHUNKS = {form: heads.CHUNK if i else 500 for i, form in enumerate(reference.FORMS)}  # logits at once: a few positions', or all
FP32 = PrecisionConfig(name="fp32")


def check(folder: Path, model: ModelConfig, layout: str, recompute: str = "none") -> None:
    """One model at one layout: logits, loss and gradients against transformers, and a round trip through the layout's shards."""
    parallel = replace(start(layout), recompute=recompute)
    for form in reference.FORMS:
        heads.CHUNK = CHUNKS[form]
        same_as_transformers(loaded(folder, model, parallel), folder, model, form, folder / f"{layout}-{recompute}-{form}")
    round_trip(folder, model, parallel, folder / f"{layout}-{recompute}")


def start(layout: str) -> ParallelConfig:
    parallel = ParallelConfig(name=layout, **LAYOUTS[layout])
    distributed.initialize(parallel, 1234, ClusterConfig(name="local"))
    return parallel


def loaded(folder: Path, model: ModelConfig, parallel: ParallelConfig) -> list:
    chunks = build_chunks(model, parallel, FP32)
    load_hf(chunks, model, folder / "model")
    return chunks


def same_as_transformers(chunks: list, folder: Path, model: ModelConfig, form: str, out: Path) -> None:
    """Logits, loss and gradients of one batch; `out` receives the gradients, which overwrite the weights."""
    expected, where = reference.read(folder, form), f"{model.name} {out.name}"
    logits, loss = run(chunks, reference.batches(model.vocab_size)[form])
    if logits is not None:
        group = parallel_state.get_tensor_model_parallel_group()
        gathered = [torch.empty_like(logits) for _ in range(group.size())]
        dist.all_gather(gathered, logits, group=group)
        logits = torch.cat(gathered, -1)
        assert (logits[..., model.vocab_size :] == heads.NEVER).all(), f"{where}: padding could be chosen"
        worst = close(logits[..., : model.vocab_size], expected["logits"], 1e-4, f"{where}: logits")
        print(f"{where}: logits within {worst:.1e} of transformers")
        close(loss, expected["loss"], 1e-3, f"{where}: loss")
    padding = [p[c.own_tokens :] for c in chunks for n, p in c.named_parameters() if n in (EMBEDDING.megatron, HEAD.megatron)]
    assert not any(rows.any() for rows in padding), f"{where}: padding has a gradient"
    save_hf(chunks, model, out, None)
    if dist.get_rank() == 0:
        for key, grad in load_file(out / "model.safetensors").items():
            close(grad, expected[f"grad.{key}"], 1e-4, f"{where}: gradient of {key}")


def run(chunks: list, batch: object) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Forward and backward by Megatron's schedule; the mean loss's gradients overwrite the weights. Logits of the last stage, loss."""
    seen, objective = [], CausalLM()
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    wrapped = [DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=False), c) for c in chunks]

    def step(data: object, model: torch.nn.Module):
        def loss(head: heads.Head):
            terms = objective.loss(head, batch)
            logits = head.logits(head.rows()).unflatten(0, (-1, head.hidden.shape[1])).transpose(0, 1)
            seen.extend([logits.reshape(*batch.tokens.shape, -1), terms.sum.detach()])
            return terms.sum, terms.weight.int(), {}

        return forward_to_head(model, batch), loss

    packed = batch.cu_seqlens is not None
    rows, length = (1, batch.tokens.numel()) if packed else batch.tokens.shape
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    interleaved = len(chunks) > 1
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[None] * len(chunks) if interleaved else None,
        model=wrapped if interleaved else wrapped[0],
        num_microbatches=2 if interleaved else 1,  # of the same batch: the mean is the same
        seq_length=length,
        micro_batch_size=rows,
    )
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    return (seen[0], seen[1]) if seen else (None, None)


def round_trip(folder: Path, model: ModelConfig, parallel: ParallelConfig, out: Path) -> None:
    """HF -> Megatron -> its own sharded checkpoint -> Megatron -> HF, bit for bit."""
    chunks = loaded(folder, model, parallel)
    stored = out / "sharded"
    if dist.get_rank() == 0:
        stored.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(sharded(chunks), str(stored))
    fresh = build_chunks(model, parallel, FP32)
    stored_tensors = dist_checkpointing.load(sharded(fresh), str(stored))
    for i, chunk in enumerate(fresh):
        chunk.load_state_dict(
            {key.removeprefix(f"chunk{i}."): value for key, value in stored_tensors.items() if key.startswith(f"chunk{i}.")}
        )
    save_hf(fresh, model, out / "again", None)
    if dist.get_rank() == 0:
        before, after = (load_file(path / "model.safetensors") for path in (folder / "model", out / "again"))
        assert before.keys() == after.keys(), f"{out}: tensors {before.keys() ^ after.keys()}"
        changed = [key for key in before if not torch.equal(before[key], after[key])]
        assert not changed, f"{out}: a round trip changed {changed}"


def sharded(chunks: list) -> dict:
    return {f"chunk{i}.{key}": value for i, chunk in enumerate(chunks) for key, value in chunk.sharded_state_dict().items()}


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> float:
    """The largest difference, which must be below `tolerance`."""
    worst = (found - expected).abs().max().item()
    assert worst < tolerance, f"{what}: {worst:.2e} off, {tolerance} allowed"
    return worst


def main() -> None:
    folder, *layouts = sys.argv[1:]
    for layout in layouts:
        for name in reference.MODELS:
            check(Path(folder) / name, reference.MODELS[name], layout)


if __name__ == "__main__":
    main()
