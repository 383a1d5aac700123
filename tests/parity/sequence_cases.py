# ruff: noqa: E402 (the bridge comes before megatron-core)
"""Ranks of test_parity_sequences.py: python -m tests.parity.sequence_cases FOLDER LAYOUT...

WPO and GRPO through a whole model on a layout: the loss and the gradient of every weight, against the formula written out in float64 on
the logits of a model in one piece.
"""

from megatron_tower.runtime import cpu

cpu.install()

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file, save_file

from megatron_tower.config import ClusterConfig, GRPOConfig, ParallelConfig, WPOConfig
from megatron_tower.data.batch import PreferenceBatch, RolloutBatch, SequenceBatch
from megatron_tower.data.sequences import Encoded, micro_batches
from megatron_tower.models import head as heads
from megatron_tower.models.build import build_chunks
from megatron_tower.models.forward import forward, forward_to_head
from megatron_tower.models.hf import load_hf, save_hf
from megatron_tower.objectives.grpo import GRPO
from megatron_tower.objectives.wpo import WPO
from megatron_tower.runtime import distributed
from tests.parity import reference
from tests.parity.model_cases import FP32, LAYOUTS, close
from tests.unit.sequence_objective_cases import ROLLOUT, naive_grpo, naive_wpo

WPO_CONFIG = WPOConfig(beta=0.3, sft_coefficient=0.1)
GRPO_CONFIG = GRPOConfig(kl=0.2, importance_cap=1.1)
LENGTHS = [(5, 9), (5, 14), (11, 30), (11, 6)]  # prompt and answer: two pairs; longer than the window
FORMS = ("packed", "unpacked")
CHUNKS = {"packed": 500, "unpacked": heads.CHUNK}  # logits at once: those of a few positions, made again; all, kept


def sequences() -> list[Encoded]:
    generator = torch.Generator().manual_seed(11)
    vocabulary = reference.SHAPE["vocab_size"]
    return [(torch.randint(vocabulary, (p + a,), generator=generator).tolist(), [0] * p + [1] * a) for p, a in LENGTHS]


def batches(form: str, parallel: ParallelConfig) -> list[SequenceBatch]:
    """Two micro-batches of a pair each: end to end, or one sequence a row, padded on the right."""
    halves = [sequences()[:2], sequences()[2:]]
    if form == "packed":
        return micro_batches(halves, 0, parallel)
    width = max(p + a for p, a in LENGTHS) + 1
    out = []
    for half in halves:
        rows = [micro_batches([[one]], 0, replace(parallel, sequence_parallel=False, pipeline=1))[0] for one in half]
        padded = {}
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            padded[name] = torch.cat([torch.nn.functional.pad(getattr(row, name), (0, width - row.tokens.shape[1])) for row in rows])
        segments = torch.stack([torch.where(torch.arange(width) < row.tokens.shape[1], i, len(rows)) for i, row in enumerate(rows)])
        out.append(SequenceBatch(**padded, segments=segments, count=len(rows)))
    return out


def with_knowledge(kind: str, batch: SequenceBatch, first: int) -> PreferenceBatch | RolloutBatch:
    """What comes from outside of the model, by the number of the sequence (`first` is the batch's) and the place in its answer."""
    if kind == "wpo":
        return PreferenceBatch(**vars(batch), reference=torch.tensor([-40.0, -66.0, -140.0, -25.0], dtype=torch.float64)[first : first + 2])
    known = []
    for spread in (0.3, 0.1, 0.5):
        values = torch.zeros(batch.tokens.shape)
        for i in range(batch.count):
            here = (batch.segments == i) & (batch.loss_mask > 0)
            noise = torch.randn(int(here.sum()), generator=torch.Generator().manual_seed(1000 * (first + i) + int(100 * spread)))
            values[here] = -4.6 + spread * noise  # about log 1/96
        known.append(values)
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0], dtype=torch.float64)[first : first + 2]
    names = dict(zip(("old_logprobs", "rollout_logprobs", "reference_logprobs"), known, strict=True))
    return RolloutBatch(**vars(batch), advantages=advantages, **names)


def objective_of(kind: str) -> WPO | GRPO:
    return WPO(WPO_CONFIG) if kind == "wpo" else GRPO(GRPO_CONFIG, ROLLOUT)


def write_expected(folder: Path, name: str) -> None:
    """`folder`/sequences.safetensors: the naive losses and gradients of one model, each summed over the micro-batches."""
    model, parallel = reference.MODELS[name], ParallelConfig(name="single")
    distributed.initialize(parallel, 1234, ClusterConfig(name="local"))
    found = {}
    for kind in ("wpo", "grpo"):
        (chunk,) = chunks = build_chunks(model, parallel, FP32)
        load_hf(chunks, model, folder / "model")
        total = torch.zeros((), dtype=torch.float64)
        for i, batch in enumerate(batches("packed", parallel)):
            known = with_knowledge(kind, batch, 2 * i)
            logits = forward(chunk, batch).double()
            total = total + (naive_wpo(WPO_CONFIG, known, logits) if kind == "wpo" else 2 * naive_grpo(GRPO_CONFIG, known, logits))
        total.backward()
        found[f"{kind}.loss"] = total.detach()
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.grad)
        save_hf(chunks, model, folder / f"expected_{kind}", None)
        found |= {f"{kind}.{key}": grad for key, grad in load_file(folder / f"expected_{kind}" / "model.safetensors").items()}
    save_file(found, folder / "sequences.safetensors")


def check(folder: Path, name: str, layout: str) -> None:
    model, parallel = reference.MODELS[name], ParallelConfig(name=layout, **LAYOUTS[layout])
    distributed.initialize(parallel, 1234, ClusterConfig(name="local"))
    expected = load_file(folder / "sequences.safetensors")
    for kind in ("wpo", "grpo"):
        for form in FORMS:
            chunks = build_chunks(model, parallel, FP32)
            load_hf(chunks, model, folder / "model")
            heads.CHUNK = CHUNKS[form]
            where = f"{name} {layout} {kind} {form}"
            loss = run(chunks, kind, [with_knowledge(kind, batch, 2 * i) for i, batch in enumerate(batches(form, parallel))])
            if loss is not None:
                relative = abs(float(loss / expected[f"{kind}.loss"]) - 1)
                assert relative < 1e-6, f"{where}: loss {relative:.1e} off"
            out = folder / f"{layout}-{kind}-{form}"
            save_hf(chunks, model, out, None)  # `run` has put the gradients where the weights were
            if dist.get_rank() == 0:
                worst = 0.0
                for key, grad in load_file(out / "model.safetensors").items():
                    size = expected[f"{kind}.{key}"].abs().max()
                    worst = max(worst, close(grad / size, expected[f"{kind}.{key}"] / size, 1e-5, f"{where}: gradient of {key}, relative"))
                print(f"{where}: gradients within {worst:.1e} of the largest of each weight")


def run(chunks: list, kind: str, given: list) -> torch.Tensor | None:
    """Forward and backward by Megatron's schedule; the summed loss's gradients overwrite the weights. The loss, on the last stage."""
    objective, seen = objective_of(kind), []
    config = chunks[0].config
    config.finalize_model_grads_func = lambda models, tokens=None, **more: finalize_model_grads(models, None, **more)  # a sum, not a mean
    wrapped = [DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=False), c) for c in chunks]

    def step(data, model):
        batch = next(data)

        def loss(head: heads.Head):
            terms = objective.loss(head, batch)
            seen.append(terms.sum.detach())
            return terms.sum, terms.weight.int(), {}

        return forward_to_head(model, batch), loss

    packed = given[0].cu_seqlens is not None
    rows, length = (1, given[0].tokens.numel()) if packed else given[0].tokens.shape
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(given),
        model=wrapped[0],
        num_microbatches=len(given),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=False,
    )
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    return sum(seen) if seen else None


def main() -> None:
    folder, *layouts = sys.argv[1:]
    for layout in layouts:
        for name in ("gemma2", "qwen2"):
            check(Path(folder) / name, name, layout)
    distributed.shutdown()


if __name__ == "__main__":
    main()
