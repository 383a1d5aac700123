"""Checkpoints into models: this rank's part of what any layout of ranks wrote, verified first.

Leaves out: writing them (`training/saving.py`), what lies on disk (`training/checkpoint.py`).
"""

from pathlib import Path

from megatron.core import dist_checkpointing
from transformers import PreTrainedTokenizerFast

from megatron_tower.config import InputError, ModelConfig, ParallelConfig, PrecisionConfig
from megatron_tower.data import tokenizer
from megatron_tower.models.build import Decoder, build_chunks
from megatron_tower.models.hf import load_hf, model_config
from megatron_tower.runtime.distributed import gathered, place
from megatron_tower.training import checkpoint
from megatron_tower.training.checkpoint import Checkpoint
from megatron_tower.training.fp8 import load_scales
from megatron_tower.training.state import TrainingState, load_model, load_optimizer, sharded_state, unwrapped
from megatron_tower.training.torch_dist import read_metadata


def load(start: Checkpoint, state: TrainingState) -> None:
    """Verify the checkpoint, then fill the model, and the optimizer where `state` has one; every rank must call it."""
    here = place()
    found = gathered({here.rank: checkpoint.problems(start.path, here.rank, here.world_size)})
    checkpoint.refuse(start.path, [problem for rank in sorted(found) for problem in found[rank]])
    places = sharded_state(state, loading=True)
    if any(places.get("scales", ())):  # they are not in what was trained in another precision so far
        held = read_metadata(start.path).state_dict_metadata
        places["scales"] = [{name: p for name, p in scales.items() if p.key in held} for scales in places["scales"]]
    loaded = dist_checkpointing.load(places, str(start.path), validate_access_integrity=False)
    load_model(state.chunks, loaded)
    if state.optimizer is not None:
        state.step, state.samples, state.tokens = start.step, start.samples, start.tokens
        for chunk, scales in zip(state.chunks, loaded["scales"], strict=True):
            load_scales(unwrapped(chunk), scales)
        load_optimizer(state, loaded["optimizer"])


def open_for_inference(
    path: Path, parallel: ParallelConfig, precision: PrecisionConfig
) -> tuple[Decoder, PreTrainedTokenizerFast, ModelConfig]:
    """This rank's part of the trained model, in evaluation mode, its tokenizer and its shape, on initialised ranks.

    `path`: an HF folder, a checkpoint, a phase directory (its newest checkpoint) or a run (the newest of all). InputError for others.
    """
    if parallel.virtual_pipeline:
        raise InputError(f"parallel={parallel.name} has a virtual pipeline, which only trains: use one without to generate or evaluate")
    found = checkpoint.resolve(path)
    if isinstance(found, Checkpoint):
        model, folder = found.model, found.path.parent.parent / "tokenizer"
        (decoder,) = build_chunks(model, parallel, precision)
        load(found, TrainingState([decoder]))
    else:
        model, folder = model_config(found), found
        (decoder,) = build_chunks(model, parallel, precision)
        load_hf([decoder], model, found)
    return decoder.eval(), tokenizer.load(folder), model
