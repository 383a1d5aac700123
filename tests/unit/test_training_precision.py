"""What precision and memory words make of a model and its schedule, as far as a CPU can tell."""

from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_tower import checks
from megatron_tower.command import load
from megatron_tower.config import InputError, ParallelConfig, PrecisionConfig, check_phase
from megatron_tower.models import kernels
from megatron_tower.models.build import build_chunks, transformer_config
from megatron_tower.models.layer import GatedMLP
from megatron_tower.runtime import distributed
from megatron_tower.train import build
from megatron_tower.training.optimizer import build_optimizer
from megatron_tower.training.trainer import wrap
from tests.distributed import room

BF16 = PrecisionConfig(name="bf16", params="bfloat16")
FP8 = ["precision=fp8_tensorwise", "model.num_layers=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("room")
    room.prepare(path, "gemma2")
    return path


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine, as far as the checks look."""
    monkeypatch.setattr(checks, "find_spec", lambda name: object())


class Recorder(nn.Module):
    """Stands for one of Transformer Engine's linears: notes at each call whether it would cast its weights anew."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.is_first_microbatch, self.seen = inner, True, []

    def forward(self, *args: object) -> object:
        if self.training:
            self.seen.append(self.is_first_microbatch)
        self.is_first_microbatch = False
        return self.inner(*args)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_fp8_weights_are_cast_anew_at_the_first_micro_batch_of_every_update(single_rank, folder: Path, micro_batches: int):
    """Stale ones let the loss stand still without a word: the weights in use are then those of the first update."""
    cfg = load(room.words(folder, "gemma2", f"phase.micro_batch_size={8 // micro_batches}"))
    trainer = build(cfg, Path(cfg.phase.start_from))
    recorders = []
    for chunk in trainer.state.chunks:
        chunk.module.config.fp8 = "hybrid"  # without Transformer Engine megatron-core's FP8 context does nothing
        for layer in chunk.module.decoder.layers:
            layer.mlp.linear_fc1 = Recorder(layer.mlp.linear_fc1)
            recorders.append(layer.mlp.linear_fc1)
    for _ in range(3):
        trainer.step()
    assert len(recorders) == 4
    for recorder in recorders:
        assert recorder.seen == ([True] + [False] * (micro_batches - 1)) * 3


def test_fp8_is_for_training_only(single_rank, folder: Path):
    cfg = load(room.words(folder, "gemma2"))
    (decoder,) = build_chunks(cfg.model, cfg.parallel, cfg.precision)
    decoder.fp8 = "hybrid"
    layer = decoder.decoder.layers[0]
    assert (decoder.eval().config.fp8, layer.config.fp8) == (None, None)
    assert (decoder.train().config.fp8, layer.config.fp8) == ("hybrid", "hybrid")


@pytest.mark.parametrize("recompute, forwards", [("none", 1), ("selective", 1), ("mlp", 2), ("full", 2)])
def test_recomputed_is_what_the_word_says(single_rank, folder: Path, monkeypatch: pytest.MonkeyPatch, recompute: str, forwards: int):
    calls = []
    forward = GatedMLP.forward
    monkeypatch.setattr(GatedMLP, "forward", lambda self, *args, **kwargs: calls.append(self) or forward(self, *args, **kwargs))
    cfg = load(room.words(folder, "gemma2", f"parallel.recompute={recompute}", "phase.micro_batch_size=8"))
    build(cfg, Path(cfg.phase.start_from)).step()
    assert len(calls) == forwards * cfg.model.num_layers


def test_accumulating_linears_are_told_once_they_have_a_gradient_buffer(single_rank, folder: Path):
    cfg = load(room.words(folder, "gemma2"))
    chunks = build_chunks(cfg.model, cfg.parallel, cfg.precision)
    linear = chunks[0].decoder.layers[0].mlp.linear_fc1
    linear.fuse_wgrad_accumulation = False  # an attribute of Transformer Engine's linears
    wrap(chunks, cfg)
    assert linear.fuse_wgrad_accumulation is True and hasattr(linear.weight, "main_grad")


@pytest.mark.parametrize("params, layers, fp8, installed, cuda, expected", [
    ("bfloat16", "auto", None, True, True, True),
    ("bfloat16", "auto", None, False, True, False),
    ("bfloat16", "auto", None, True, False, False),
    ("bfloat16", "torch", None, True, True, False),
    ("float32", "auto", None, True, True, False),  # the precision of proofs
    ("float32", "te", None, True, True, True),
    ("bfloat16", "auto", "delayed", True, True, True),
    ("bfloat16", "te", None, False, True, "not installed"),
    ("bfloat16", "te", None, True, False, "needs a GPU"),
    ("bfloat16", "auto", "delayed", True, False, "needs a GPU"),
])  # fmt: skip
def test_which_layers(monkeypatch: pytest.MonkeyPatch, params, layers, fp8, installed, cuda, expected):
    monkeypatch.setattr(kernels, "device", lambda: torch.device("cuda" if cuda else "cpu"))
    monkeypatch.setattr(kernels, "find_spec", lambda name: object() if installed else None)
    precision = PrecisionConfig(name="p", params=params, layers=layers, fp8=fp8)
    if isinstance(expected, bool):
        assert kernels.transformer_engine(precision) is expected
    else:
        with pytest.raises(InputError, match=expected):
            kernels.transformer_engine(precision)


def test_first_and_last_layers_stay_in_bf16(monkeypatch: pytest.MonkeyPatch, folder: Path):
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    monkeypatch.setattr(kernels, "transformer_engine", lambda precision: False)
    model = load(room.words(folder, "gemma2")).model
    precision = PrecisionConfig(name="p", params="bfloat16", fp8="tensorwise", bf16_layers=1)
    config = transformer_config(model, ParallelConfig(name="single"), precision)
    assert [is_first_last_bf16_layer(config, layer) for layer in range(4)] == [True, False, False, True]


def test_offload_without_a_gpu_is_refused(single_rank, folder: Path):
    cfg = load(room.words(folder, "gemma2", "precision=bf16", "parallel.distributed_optimizer=true", "parallel.offload=0.5"))
    assert distributed.device().type == "cpu"
    with pytest.raises(InputError, match="this run has no GPU"):
        build_optimizer(wrap(build_chunks(cfg.model, cfg.parallel, BF16), cfg), cfg)


@pytest.mark.parametrize("phase, tokens", [("cpt", 128), ("sft", 128), ("wpo", None), ("grpo", None)])
def test_collectives_are_overlapped_where_every_micro_batch_is_of_one_size(single_rank, folder: Path, phase: str, tokens: int | None):
    cfg = load(room.words(folder, "gemma2", f"phase={phase}", "phase.seq_length=64", "phase.micro_batch_size=2"))
    cfg.parallel.tensor_overlap = True
    assert cfg.overlap_tokens == tokens
    if tokens:
        with pytest.raises(InputError, match="needs Transformer Engine's layers and PyTorch's are used here"):
            build_chunks(cfg.model, cfg.parallel, cfg.precision, tokens)
    else:
        (decoder,) = build_chunks(cfg.model, cfg.parallel, cfg.precision, tokens)
        assert not decoder.config.tp_comm_overlap


BAD = {
    "precision=fp32 precision.fp8=delayed": "keeps weights in float32",
    "precision=fp32 parallel.gradients=bfloat16": "keeps weights in float32",
    "precision=bf16 parallel.offload=0.5": "parallel.distributed_optimizer=true",
    "precision=bf16 parallel.offload=2 parallel.distributed_optimizer=true": "0 to 1",
    "precision=bf16 parallel.offload=1 parallel.distributed_optimizer=true cluster.device=cpu": "device=cpu: use 0",
    "precision.layers=torch": "FP8 is Transformer Engine's",
    "precision.layers=fast": "use one of auto, torch, te",
    "precision.bf16_layers=5": "must be 0 to 4",
    "precision.fp8_param_gather=true": "needs precision.fp8, parallel.distributed_optimizer=true",
    "precision.fp8_param_gather=true parallel.distributed_optimizer=true parallel.offload=0.5": "parallel.offload=0",
    "precision=bf16 precision.fp8_param_gather=true parallel.distributed_optimizer=true": "needs precision.fp8",
    "precision.fp8=delayed precision.bf16_layers=1": "delayed scaling can't leave FP8",
    "model.hidden_size=72": "model.hidden_size is 72",
    "model.ffn_hidden_size=104": "ffn_hidden_size / parallel.tensor is 104",
    "parallel.tensor=2 model.kv_channels=8": "a rank's keys is 8",
}


@pytest.mark.parametrize("words", BAD)
def test_what_can_not_work_is_met_at_the_door(installed, words: str):
    load(FP8)
    with pytest.raises(InputError, match=BAD[words]):
        load([*FP8, *words.split()])


@pytest.mark.parametrize("word", ["precision.layers=te", "precision=fp8_blockwise"])
def test_missing_transformer_engine_is_met_at_the_door(word: str):
    with pytest.raises(InputError, match="needs Transformer Engine, which is not installed: pip install"):
        load(["precision=bf16", word])


OVERLAP = ["phase=cpt", "phase.seq_length=64", "parallel=tp2_sp", "precision=bf16", "parallel.tensor_overlap=true"]
NO_OVERLAP = {
    "precision=fp32": "needs parallel.sequence_parallel=true, precision.params=bfloat16",
    "parallel=tp2": "parallel.sequence_parallel=true",
    "precision=fp8_blockwise": "precision.fp8=blockwise",
    "precision.layers=torch": "precision.layers=torch",
    "cluster.device=cpu": "device=cpu: use false",
    "cluster.launcher=slurm cluster.ranks_per_node=3 parallel.data=3": "parallel.tensor=2 does not divide the 3",
}


@pytest.mark.parametrize("words", NO_OVERLAP)
def test_collectives_that_can_not_be_overlapped(installed, words: str):
    check_phase(load(OVERLAP))
    cfg = load([*OVERLAP, *words.split(), "phase.global_batch_size=24"])  # an evaluation with the same words would go on
    with pytest.raises(InputError, match=NO_OVERLAP[words]):
        check_phase(cfg)


def test_overlap_needs_transformer_engine():
    with pytest.raises(InputError, match=r"tensor_overlap=true needs Transformer Engine, which is not installed: .* or use false"):
        check_phase(load(OVERLAP))


@pytest.mark.parametrize("words, expected", [
    (["phase=sft", "phase.seq_length=250", "phase.micro_batch_size=4"], "multiples of 16 tokens"),
    (["phase=sft", "phase.seq_length=16", "phase.micro_batch_size=1", "parallel=tp2_sp"], "multiples of 16 tokens"),
    (["phase=wpo", "phase.seq_length=256", "phase.file=f"], "suits neither"),
    (["phase=grpo", "phase.seq_length=1024"], "suits neither"),
])  # fmt: skip
def test_batches_that_fp8_does_not_take(installed, words: list[str], expected: str):
    check_phase(load([*FP8, "phase=sft", "phase.seq_length=256", "phase.micro_batch_size=4"]))
    with pytest.raises(InputError, match=expected):
        check_phase(load([*FP8, *words]))


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_every_recipe_has_its_file(installed, recipe: str):
    cfg = load([f"precision=fp8_{recipe}"])
    assert (cfg.precision.fp8, cfg.precision.params) == (recipe, "bfloat16")
