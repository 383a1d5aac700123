"""Model and optimizer as named tensors that don't depend on the layout of the ranks: what a checkpoint holds.

Weights keep megatron-core's names; the optimizer's tensors are named after their weight:

    optimizer.exp_avg.<weight>    optimizer.exp_avg_sq.<weight>    optimizer.param.<weight> (fp32 main weight; bf16 training only)
    and the scales of delayed FP8 (training/fp8.py)

The same names and shapes come out of a plain and of a distributed optimizer, so each resumes from the other, at any TP, PP and DP.
Hyper-parameters and the update count are not state: the trainer knows them from the config and the step.
Leaves out: random states (no step draws random numbers: there is no dropout, and sample order is a function of the seed and the index),
Transformer Engine's `_extra_state` (pickled bytes), mixtures of experts (several optimizers in a chain).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer import MegatronModule
from torch import Tensor

from megatron_tower.training.fp8 import gather, is_fp8, sharded_scales

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainingState:
    """What training changes. `chunks`: this rank's parts of the model, one but for a virtual pipeline.

    Counted over all ranks: `step` updates made, `samples` of the dataset used, `tokens` that went through the model, padding included.
    """

    chunks: list[MegatronModule | DistributedDataParallel]
    optimizer: MegatronOptimizer | None = None
    step: int = 0
    samples: int = 0
    tokens: int = 0

    def gather(self) -> None:
        """All weights whole on every rank: with `parallel.overlap` an update leaves each its own share until the next forward pass."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                gather(chunk)


def sharded_model(chunks: list[MegatronModule | DistributedDataParallel]) -> dict[str, ShardedStateDict]:
    """One sharded state dict a chunk, `_extra_state` left out."""
    return {name: _without(ShardedObject, found) for name, found in _sharded(chunks).items()}


def sharded_state(state: TrainingState, loading: bool) -> dict:
    """All that a checkpoint of `state` holds; when `loading`, places to load into."""
    if state.optimizer is None:
        return sharded_model(state.chunks)
    if not loading:
        state.gather()
    found = _sharded(state.chunks)
    tensors: dict = {name: _without(ShardedObject, places) for name, places in found.items()}
    optimizer = sharded_optimizer(state, tensors, loading)
    scales = [sharded_scales(unwrapped(chunk), places) for chunk, places in zip(state.chunks, found.values(), strict=True)]
    return tensors | {"optimizer": optimizer, "scales": scales}


def _sharded(chunks: list[MegatronModule | DistributedDataParallel]) -> dict[str, ShardedStateDict]:
    metadata = {
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    return {f"model{i}": unwrapped(chunk).sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}


def _without(kind: type, places: ShardedStateDict) -> ShardedStateDict:
    return {name: place for name, place in places.items() if not isinstance(place, kind)}


def load_model(chunks: list[MegatronModule | DistributedDataParallel], loaded: dict[str, dict[str, Tensor]]) -> None:
    """Take over loaded weights, but those that are cast from the optimizer's (`load_optimizer`)."""
    for i, chunk in enumerate(chunks):
        cast = {name for name, weight in unwrapped(chunk).named_parameters() if is_fp8(weight)}
        own = {name: weight for name, weight in loaded[f"model{i}"].items() if name not in cast}
        missing, unexpected = unwrapped(chunk).load_state_dict(own, strict=False)
        absent = [name for name in missing if not name.endswith("_extra_state") and name not in cast]
        assert not absent and not unexpected, f"weights without a place or places without weights: {absent + unexpected}"


def sharded_optimizer(state: TrainingState, model: dict[str, ShardedStateDict], loading: bool) -> dict[str, ShardedStateDict]:
    """The optimizer's tensors, weight by weight, placed like the weights in `model`; when `loading`, places to load into."""
    inner = _inner(state.optimizer)
    places = {id(place.data): place for chunk in model.values() for place in chunk.values()}
    if loading:
        _start_moments(inner)
    if isinstance(inner, DistributedOptimizer):  # shards of flat buffers, gathered into the shape of each weight
        tensors = dict(enumerate(_gathered(inner, loading)))
    else:
        tensors = {
            i: {"param": _main(weight)} | {moment: inner.optimizer.state[_main(weight)][moment] for moment in MOMENTS}
            for i, weight in enumerate(_weights(state))
        }
    for i, weight in enumerate(_weights(state)):
        if is_fp8(weight):
            places[id(weight)].data = tensors[i]["param"].to(weight.dtype)  # what it is cast from
    kept = ("param", *MOMENTS) if inner.config.bf16 else MOMENTS  # in fp32 the main weights are the weights
    return {
        str(i): {k: make_sharded_optimizer_tensor(places[id(weight)], tensors[i][k], f"optimizer.{k}") for k in kept}
        for i, weight in enumerate(_weights(state))
    }


def load_optimizer(state: TrainingState, loaded: dict[str, dict[str, Tensor]]) -> None:
    """Take over loaded moments (and main weights), after `load_model` and `load_scales`; `state.step` updates were made."""
    inner = _inner(state.optimizer)
    tensors = {i: {"param": weight.detach()} | loaded[str(i)] for i, weight in enumerate(_weights(state))}
    if isinstance(inner, DistributedOptimizer):
        inner.load_parameter_state_from_fully_reshardable(tensors)
    else:
        for i, weight in enumerate(_weights(state)):
            _main(weight).data.copy_(tensors[i]["param"])
            for moment in MOMENTS:
                inner.optimizer.state[_main(weight)][moment].copy_(tensors[i][moment])
    _set_step(inner.optimizer, state.step)
    if any(map(is_fp8, _weights(state))):
        inner._copy_main_params_to_model_params()
        for chunk in state.chunks:
            gather(chunk)


def bytes_per_weight(weight: Tensor) -> int:
    """Bytes that a checkpoint takes for one number of a weight: itself, two fp32 moments, and the fp32 main weight if it is bf16."""
    return weight.element_size() + 4 * (2 if weight.dtype == torch.float32 else 3)


def unwrapped(chunk: MegatronModule | DistributedDataParallel) -> MegatronModule:
    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk


def _inner(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    """The one optimizer of the chain; a second would be that of a mixture of experts."""
    (inner,) = optimizer.chained_optimizers
    return inner


def _gathered(inner: DistributedOptimizer, loading: bool) -> Iterator[dict[str, Tensor]]:
    """Main weight and moments of each weight, in its shape, from the shards of the flat buffers.

    Megatron-core's own sharded_param_state_fully_reshardable (0.16.1, line 1501) looks for a weight where the buffer has it, but between
    the buckets, which are many where reduction overlaps, the buffer has padding and what was gathered has none.
    """
    gathered = inner.get_parameter_state_dp_zero(use_gloo_comm=False, empty_data=loading, return_on_all_ranks=True)
    for number, buffer in enumerate(inner.buffers):
        (flat,) = gathered[number].values()
        starts = list(accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0))
        for weight, (start, _, bucket) in buffer.param_index_map.items():
            first = start - buffer.buckets[bucket].offset + starts[bucket]
            yield {name: flat[name][first : first + weight.numel()].view(weight.shape) for name in ("param", *MOMENTS)}


def _weights(state: TrainingState) -> list[Tensor]:
    """Trained weights of this rank, in the order in which the optimizer keeps them."""
    inner = _inner(state.optimizer)
    if isinstance(inner, DistributedOptimizer):
        return [weight for buffer in inner.buffers for weight in buffer.param_index_map]
    return [weight for chunk in state.chunks for weight in chunk.parameters() if weight.requires_grad]


def _main(weight: Tensor) -> Tensor:
    """What a plain optimizer steps on: the fp32 copy of a bf16 weight, else the weight itself."""
    return getattr(weight, "main_param", weight)


def _start_moments(inner: MegatronOptimizer) -> None:
    """Zero moments, as before the first update. No `step`: megatron-core would look for it among the loaded tensors."""
    for group in inner.optimizer.param_groups:
        for parameter in group["params"]:
            inner.optimizer.state[parameter] = {moment: torch.zeros_like(parameter) for moment in MOMENTS}


def _set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Tell Adam how many updates were made: PyTorch keeps a tensor of its own for each parameter, TE and Apex a number a group."""
    if isinstance(optimizer, HybridDeviceOptimizer):
        for part in optimizer.sub_optimizers:
            _set_step(part, step)
        return
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.AdamW):
            for parameter in group["params"]:
                optimizer.state[parameter]["step"] = torch.tensor(float(step))
        else:
            group["step"] = step
