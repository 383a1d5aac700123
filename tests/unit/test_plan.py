"""The plan beside the truth: parameters and saved tensors of real layers, a real optimizer, megatron-core's schedule, measured rows."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_tower import plan
from megatron_tower.command import load
from megatron_tower.config import REPOSITORY, Config, InputError, check_phase
from megatron_tower.plan import GIB, memory, parameters, weights_on
from megatron_tower.step_time import predict
from tests.unit.kept import NARROW, kept_per_token

SIZES = {"2b": "gemma2_2b", "9b": "gemma2_9b", "72b": "qwen25_72b"}
LAYOUTS = [f"{size}_{gpus}" for size in SIZES for gpus in (8, 64, 256)]
GRPO = {  # words that the files name for GRPO's 8192 tokens
    "2b_8": "phase.rollout.batch_size=32",
    "2b_64": "phase.rollout.batch_size=32",
    "9b_8": "phase.rollout.batch_size=16 parallel.recompute=mlp",
    "9b_64": "phase.rollout.batch_size=16",
    "9b_256": "phase.rollout.batch_size=16",
    "72b_8": "phase.rollout.batch_size=32 parallel.recompute=mlp",
}


@pytest.mark.parametrize("recompute", ["none", "selective", "mlp", "full"])
@pytest.mark.parametrize(("model", "backend"), [("tiny_gemma2", "eager"), ("tiny_qwen2", "eager"), ("tiny_qwen2", "sdpa")])
def test_activations_are_those_that_autograd_saves(single_rank: None, model: str, backend: str, recompute: str) -> None:
    """sdpa keeps what fused kernels do: q, k, v, the output and a sum a row. Transformer Engine's layers: tests/te."""
    words = [f"model={model}", *NARROW, "precision=bf16", "precision.layers=torch", f"parallel.recompute={recompute}"]
    kept, planned = kept_per_token([*words, f"model.attention_backend={backend}"])
    assert planned == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("model", ["tiny_gemma2", "tiny_qwen2", "tiny_llama"])
def test_states_are_those_of_the_optimizer(single_rank: None, model: str, precision: str) -> None:
    from megatron_tower.models.build import build_chunks
    from megatron_tower.training.optimizer import build_optimizer
    from megatron_tower.training.state import bytes_per_weight
    from megatron_tower.training.trainer import wrap

    cfg = load([f"model={model}", f"precision={precision}", "phase.seq_length=256"])
    wrapped = wrap(build_chunks(cfg.model, cfg.parallel, cfg.precision), cfg)
    (chunk,) = wrapped
    optimizer = build_optimizer(wrapped, cfg)
    weights = list(chunk.parameters())
    for weight in weights:
        weight.main_grad.normal_()
    optimizer.step()
    (inner,) = optimizer.chained_optimizers
    states = [t for state in inner.optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    mains = [weight.main_param for weight in weights] if precision == "bf16" else []
    (stage,) = memory(cfg)
    assert parameters(cfg.model) == weights_on(cfg, 0) == sum(weight.numel() for weight in weights)
    assert stage.weights == sum(weight.nbytes for weight in weights)
    assert stage.gradients == sum(buffer.grad_data.nbytes for buffer in chunk.buffers)
    assert stage.optimizer == sum(t.nbytes for t in (*states, *mains))
    assert plan.checkpoint_bytes(cfg) == sum(weight.numel() * bytes_per_weight(weight) for weight in weights)


def test_numbers_that_are_written_twice_are_the_same() -> None:
    """The plan imports no torch, so it can't ask the modules that know."""
    from megatron_tower.models import head
    from megatron_tower.models.families import FAMILIES
    from megatron_tower.objectives import logprobs

    assert (plan.CHUNK, plan.PIECE) == (head.CHUNK, logprobs.PIECE)
    assert set(plan.SANDWICH) == {name for name, family in FAMILIES.items() if family.sandwich_norms}


@pytest.mark.parametrize("batch", [4, 8, 64])
@pytest.mark.parametrize(("pipeline", "virtual"), [(2, None), (4, None), (8, None), (4, 5), (2, 4)])
def test_micro_batches_in_flight_are_those_of_the_schedule(pipeline: int, virtual: int | None, batch: int) -> None:
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    words = ["model=qwen25_72b", "precision=bf16", f"parallel.pipeline={pipeline}", f"phase.global_batch_size={batch}"]
    cfg = load([*words, f"parallel.virtual_pipeline={virtual or 'null'}"])
    for stage in range(pipeline):
        group = SimpleNamespace(size=lambda: pipeline, rank=lambda stage=stage: stage)
        told = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual)
        total, _, warmup, _ = get_pp_rank_microbatches(batch, virtual or 1, pipeline, p2p_communicator=told)
        assert plan.in_flight(cfg, stage) == min(warmup + 1, total)


ROWS = {  # docs/plan.md: words, measured GiB
    "1.5B bf16": (["model=qwen25_1_5b", "phase.micro_batch_size=4"], 66.7),
    "1.5B tensorwise": (["model=qwen25_1_5b", "phase.micro_batch_size=4", "fp8"], 64.0),
    "72B bf16": (["model=qwen25_72b", "four", "phase.micro_batch_size=2"], 69.2),
    "72B tensorwise": (["model=qwen25_72b", "four", "phase.micro_batch_size=2", "fp8"], 75.2),
    "gemma 1 x 4096": (["model=gemma2_2b"], 61.0),
    "gemma 2 x 4096": (["model=gemma2_2b", "phase.micro_batch_size=2", "parallel.recompute=mlp"], 58.8),
    "gemma 1 x 8192": (["model=gemma2_2b", "phase.seq_length=8192", "parallel.recompute=mlp"], 58.0),
    "gemma fp8": (["model=gemma2_2b", "fp8"], 63.4),
    "gemma fp8 2 x 4096": (["model=gemma2_2b", "phase.micro_batch_size=2", "parallel.recompute=mlp", "fp8"], 62.1),
}
SPEED = {"1.5B bf16": 45434, "1.5B tensorwise": 50033, "72B bf16": 22723, "72B tensorwise": 31978}
FOUR = ["model.num_layers=4", "model.vocab_size=4096", "model.tie_embeddings=true"]


def measured(words: list[str]) -> Config:
    real = [word for word in words if word not in ("fp8", "four")] + (FOUR if "four" in words else [])
    cfg = load(["phase=cpt", "precision=bf16", *real])
    cfg = replace(cfg, phase=replace(cfg.phase, global_batch_size=cfg.phase.micro_batch_size))
    return replace(cfg, precision=replace(cfg.precision, fp8="tensorwise")) if "fp8" in words else cfg


@pytest.mark.parametrize("row", ROWS)
def test_memory_is_within_a_tenth_of_what_was_measured(row: str) -> None:
    """Allocated memory, so without the overhead; those systems held all logits and their gradient in bf16 instead of a chunk."""
    words, found = ROWS[row]
    cfg = measured(words)
    (stage,) = memory(cfg)
    logits = 4 * plan.micro_batch_tokens(cfg) * cfg.model.vocab_size
    fixed = stage.weights + stage.gradients + stage.optimizer
    assert (fixed + stage.activations + logits) / GIB == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("row", SPEED)
def test_speed_is_within_a_tenth_of_what_was_measured(row: str) -> None:
    """Of megatron-core with Transformer Engine, to which two constants are fitted."""
    assert predict(measured(ROWS[row][0])).rate == pytest.approx(SPEED[row], rel=0.1)


def run_of(layout: str, phase: str, *more: str) -> Config:
    own = GRPO.get(layout, "").split() if phase == "grpo" else []
    model = SIZES[layout.partition("_")[0]]
    return load([f"model={model}", f"phase={phase}", f"parallel={layout}", "precision=bf16", "cluster=h100_pyxis", *own, *more])


@pytest.mark.parametrize("phase", ["cpt", "sft", "wpo", "grpo"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_real_sizes_fit_every_phase(layout: str, phase: str) -> None:
    cfg = run_of(layout, phase)
    assert cfg.parallel.world_size == int(layout.partition("_")[2])
    check_phase(cfg)
    assert max(stage.total for stage in memory(cfg)) < 0.97 * cfg.cluster.gpu_memory_gib * GIB
    comment = (REPOSITORY / "conf" / "parallel" / f"{layout}.yaml").read_text().splitlines()[0]
    assert comment.partition("GRPO: ")[2] == GRPO.get(layout, "")


def test_says_no_with_the_reason_and_the_mend() -> None:
    with pytest.raises(InputError, match=r"needs 1,?\d+ GiB of a GPU \(weights 135, gradients 271, optimizer 813.* has 79: ask python -m"):
        check_phase(load(["model=qwen25_72b", "phase=cpt", "precision=bf16", "cluster=h100_pyxis"]))
    with pytest.raises(InputError, match=r"use parallel\.distributed_optimizer=true$"):
        check_phase(run_of("2b_8", "cpt", "parallel.distributed_optimizer=false", "phase.micro_batch_size=4"))
    with pytest.raises(InputError, match=r"use parallel\.recompute=mlp$"):
        check_phase(run_of("2b_8", "cpt", "phase.micro_batch_size=8"))
    with pytest.raises(InputError, match=r"use phase\.rollout\.batch_size=32$"):
        check_phase(run_of("2b_8", "grpo", "phase.rollout.batch_size=64"))


def test_a_tied_embedding_is_on_both_ends_of_a_pipeline() -> None:
    cfg = load(["model=gemma2_2b", "parallel=pp2"])
    assert weights_on(cfg, 0) + weights_on(cfg, 1) == parameters(cfg.model) + 256000 * 2304


def test_rollouts_cost_rows_x_slots_x_layers_x_groups_x_2() -> None:
    cfg = run_of("2b_256", "grpo")
    assert plan.cache_bytes(cfg, 26) == 64 * 8192 * 26 * (4 // 2) * 256 * 2 * 2


def test_prompts_cost_scores_in_eager_attention_alone() -> None:
    """Prompts of unequal length run packed, which every kernel serves, soft-cap or not."""
    fused, eager = (memory(run_of("2b_256", "grpo", f"model.attention_backend={word}"))[0].rollout for word in ("auto", "eager"))
    assert fused < 1.13 * plan.cache_bytes(run_of("2b_256", "grpo"), 26)
    assert eager - fused > 8 * 4096**2 * 10 * (8 // 2) - 8 * 4096 * 2 * (4 * 9216 // 2 + 3 * 2304)


def test_what_costs_shows() -> None:
    """Each word moves what it is said to move."""
    plain = run_of("72b_64", "cpt")

    def time(**changes: object) -> object:
        return predict(replace(plain, parallel=replace(plain.parallel, **changes)))

    def room(**changes: object) -> object:
        return memory(replace(plain, parallel=replace(plain.parallel, **changes)))[0]

    assert room().activations > 1.5 * room(recompute="mlp").activations > 3 * room(recompute="full").activations
    assert time(recompute="full").compute > time(recompute="mlp").compute > 1.15 * time().compute
    assert time(overlap=False).reduce > time().reduce and time(virtual_pipeline=5).bubble < time().bubble / 2
    assert room(gradients="bfloat16").gradients == room().gradients / 2
    assert room(offload=0.5).optimizer == room().optimizer / 2 and room(offload=0.5).host > 0
    assert time(offload=0.5).optimizer > 5 * time().optimizer
    assert time(tensor_overlap=True).collectives == pytest.approx(0.3 * time().collectives)
    assert room(tensor_overlap=True).overhead - room().overhead == 12 * 2 * 4096 * 8192
    stages = memory(plain)
    assert stages[0].activations > 1.9 * stages[1].activations  # two micro-batches in flight, and one


def asked(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "tools.plan", *words], cwd=REPOSITORY, capture_output=True, text=True)


def test_command_line_reports_ranks_and_refuses() -> None:
    real = ["model=qwen25_72b", "cluster=h100_pyxis", "phase=cpt"]
    ranked = asked(*real, "--gpus", "64")
    rates = [float(line.split("|")[4].replace(",", "")) for line in ranked.stdout.splitlines() if line.startswith("| tensor")]
    assert ranked.returncode == 0 and len(rates) > 3 and rates == sorted(rates, reverse=True)
    whole = asked(*real, "parallel=72b_64")
    assert whole.returncode == 0 and "15,259 steps" in whole.stdout and "a checkpoint has 1,018 GB" in whole.stdout
    none = asked(*real, "--gpus", "1")
    assert none.returncode == 2 and none.stderr.startswith("error: ") and "fits no layout of 1 GPUs" in none.stderr
    long = asked(*real, "--gpus", "64", "phase.seq_length=1000000")
    assert long.returncode == 2 and "exceeds model=qwen25_72b's context" in long.stderr
    nothing = asked(*real, "--gpus", "0")
    assert nothing.returncode == 2 and nothing.stderr == "error: --gpus 0 must be 1 or more\n"
    unknown = asked("model=qwen25_72b", "phase=cpt")
    assert unknown.returncode == 2 and "cluster=h100_pyxis" in unknown.stderr
