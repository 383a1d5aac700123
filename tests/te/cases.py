"""Transformer Engine's layers beside plain ones, its kernels computed on a CPU. Run by test_engine.py, a process a rank.

    python -m tests.te.cases FOLDER layers:gemma2 gemma2:tp2_sp gemma2:single:fp8_tensorwise ...

layers:FAMILY checks weights, gradients, answers and checkpoints of one step and the next; `memory` what layers keep of a token. Others are
of tests/distributed/curves.py, on its LAYOUTS and these; goes_on:CASE also saves half-way, beside:CASE has
tensor_overlap. Their curve, and how often each kernel ran, are FOLDER/curves/te_CASE.json.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from megatron_tower.config import Config
from tests.te import plugin

WORDS = ["precision.layers=te", "phase.micro_batch_size=4"]  # two micro-batches: weights are cast at the first
SHARED = "parallel.distributed_optimizer=true"
GATHERED = [SHARED, "precision.fp8_param_gather=true"]
LAYOUTS = {
    "tp2_sp_mlp": ["parallel=tp2_sp", "parallel.recompute=mlp"],
    "tp2_sp_full": ["parallel=tp2_sp", "parallel.recompute=full"],
    "dp2_overlap": ["parallel=dp2", SHARED, "parallel.overlap=true"],
    "dp2_offload": ["parallel=dp2", SHARED, "parallel.offload=0.5"],
    "gathered": GATHERED,
    "edges": [*GATHERED, "precision.bf16_layers=1"],
    "tp2_sp_gathered": ["parallel=tp2_sp", *GATHERED],
    "tp2_sp_edges": ["parallel=tp2_sp", "precision.bf16_layers=1", *GATHERED],
    "pp2_gathered": ["parallel=pp2", *GATHERED],
    "dp2_gathered": ["parallel=dp2", *GATHERED],
    "dp2_gathered_overlap": ["parallel=dp2", "parallel.overlap=true", *GATHERED],
}


def main() -> None:
    folder, *cases = Path(sys.argv[1]), *sys.argv[2:]
    plugin.install()
    from megatron_tower.runtime import distributed
    from tests.distributed import curves
    from tests.te.kernels import CALLS

    curves.LAYOUTS |= LAYOUTS
    for case in cases:
        course, _, rest = case.partition(":")
        if course == "layers":
            layers(folder, rest)
            continue
        if course == "memory":
            memory(folder)
            continue
        CALLS.clear()
        if course == "beside":
            curve = beside(folder, rest)
        elif course == "goes_on":
            curve = goes_on(folder, rest)
        else:
            curve = curves.curve(folder, case, *WORDS)
        told = {"curve": curve, "calls": dict(CALLS)}
        if distributed.is_rank_zero():
            (folder / "curves" / f"te_{case}.json").write_text(json.dumps(told))
    distributed.shutdown()


def config_of(folder: Path, case: str, *more: str) -> Config:
    from tests.distributed import curves

    course, layout, precision = case.split(":")
    return curves.config(folder, course, layout, f"precision={precision}", *WORDS, *more)


def goes_on(folder: Path, case: str) -> list[float]:
    """The curve of a training that saves half-way and goes on."""
    from tests.distributed import curves

    cfg = config_of(folder, case, f"run_dir={folder}/run_on_{case.replace(':', '_')}")
    trainer = curves.saved(cfg)
    return curves.told(trainer, cfg.phase.train_steps - curves.HALF)


def beside(folder: Path, case: str) -> list[float]:
    """The curve with `tensor_overlap`, whose buffers take the bytes that the plan says."""
    import transformer_engine_torch as kernels
    from transformer_engine.pytorch.module import base

    from megatron_tower import plan
    from megatron_tower.config import InputError
    from megatron_tower.models.kernels import drop_buffers
    from megatron_tower.runtime import distributed
    from megatron_tower.train import build
    from tests.distributed import curves

    cfg = config_of(folder, case, "parallel.tensor_overlap=true")
    kernels.device_supports_multicast = lambda: False
    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    with pytest.raises(InputError, match="these GPUs have no multicast: set UB_SKIPMC=1"):
        build(cfg, Path(cfg.phase.start_from))
    kernels.device_supports_multicast = lambda: True
    curve = curves.straight(cfg)
    assert sum(buffer.whole.nbytes for buffer in base._ub_communicators.values()) == plan.overlap_bytes(cfg)
    drop_buffers()
    assert not base.is_ub_initialized()
    return curve


def layers(folder: Path, family: str) -> None:
    """The same weights and gradients by name, the same answers; a run of one kind of layers goes on as the other, and back."""
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear

    from megatron_tower.command import load
    from megatron_tower.rollout.generate import generate
    from megatron_tower.runtime import distributed
    from megatron_tower.train import build
    from megatron_tower.training import checkpoint, saving
    from megatron_tower.training.state import sharded_model
    from tests.distributed import room

    def config(layers: str, run: str):
        return load(room.words(folder, family, "precision=fp32", f"precision.layers={layers}", f"run_dir={folder}/{run}"))

    gradients, shapes, losses, answers, courses = {}, {}, {}, {}, {}
    distributed.initialize(config("te", "run").parallel, 1234, config("te", "run").cluster)
    for kind, other in (("torch", "te"), ("te", "torch")):
        cfg = config(kind, f"layers_{family}_{kind}")
        trainer = build(cfg, Path(cfg.phase.start_from))
        losses[kind] = trainer.step()["loss"]
        (chunk,) = trainer.state.chunks
        answers[kind] = generate(chunk.module, [[5, 6, 7], [8, 9, 10, 11, 12]], max_new_tokens=6, stop_ids=[])
        gradients[kind] = {name: weight.main_grad.clone() for name, weight in chunk.module.named_parameters()}
        shapes[kind] = {name: (place.key, place.data.shape) for name, place in sharded_model([chunk])["model0"].items()}
        saving.save(cfg, trainer.state)
        straight = [trainer.step()["loss"] for _ in range(2)]
        cfg.precision.layers = other
        resumed = build(cfg, checkpoint.latest(cfg.phase_dir))
        courses[kind] = straight, [resumed.step()["loss"] for _ in range(2)]
    for linear in (chunk.module.decoder.layers[0].self_attention.linear_qkv, chunk.module.decoder.layers[0].mlp.linear_fc1):
        assert isinstance(linear, TELayerNormColumnParallelLinear) and linear.fuse_wgrad_accumulation
    assert shapes["te"] == shapes["torch"] and gradients["te"].keys() == gradients["torch"].keys()
    assert answers["te"] == answers["torch"]
    assert losses["te"] == pytest.approx(losses["torch"], rel=1e-5)
    for name, expected in gradients["torch"].items():
        torch.testing.assert_close(gradients["te"][name], expected, atol=1e-5, rtol=1e-3, msg=lambda told, name=name: f"{name}: {told}")
    for straight, resumed in courses.values():
        assert resumed == pytest.approx(straight, rel=1e-4) and straight == pytest.approx(courses["torch"][0], rel=1e-4)


def memory(folder: Path) -> None:
    """What the plan says that layers keep of a token is what they keep; weights take the bytes that it says, and are not saved in FP8."""
    from megatron_tower import plan
    from megatron_tower.command import load
    from megatron_tower.runtime import distributed
    from megatron_tower.train import build
    from megatron_tower.training.fp8 import is_fp8
    from megatron_tower.training.state import sharded_state
    from tests.distributed import room
    from tests.unit.kept import NARROW, kept_per_token

    cfg = load([])
    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    for model, backend in (("tiny_gemma2", "eager"), ("tiny_qwen2", "sdpa")):
        for precision in ("bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise"):
            for recompute in ("none", "mlp", "full"):
                words = [
                    f"model={model}",
                    f"model.attention_backend={backend}",
                    f"precision={precision}",
                    f"parallel.recompute={recompute}",
                ]
                kept, planned = kept_per_token([*NARROW, *words, "precision.layers=te"])
                assert planned == pytest.approx(kept, rel=0.01), (words, kept, planned)
    for words in ([], GATHERED):
        cfg = load(room.words(folder, "gemma2", "precision=fp8_tensorwise", "precision.layers=te", *words))
        trainer = build(cfg, Path(cfg.phase.start_from))
        trainer.step()
        modules = trainer.state.chunks[0].module.modules()
        held = [weight for module in modules for weight in (*module.parameters(recurse=False), *_cast(module))]
        parts = [part for weight in held for part in (weight.get_data_tensors() if is_fp8(weight) else [weight])]
        assert sum(part.nbytes for part in parts) == plan.memory(cfg)[0].weights, words
    saved = sharded_state(trainer.state, loading=False)["model0"]
    for name, weight in trainer.state.chunks[0].module.named_parameters():
        if is_fp8(weight):
            assert torch.equal(saved[name].data, weight.main_param.view(weight.shape).bfloat16()), f"{name} was saved as FP8 rounds it"


def _cast(linear: torch.nn.Module) -> list:
    """FP8 copies that one of Transformer Engine's linears keeps of its weight."""
    return list(getattr(linear, "_fp8_workspaces", {}).values())


if __name__ == "__main__":
    main()
