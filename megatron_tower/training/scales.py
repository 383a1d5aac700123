"""The scales of FP8's delayed recipe as tensors of a checkpoint: they are made of what a layer's tensors were in the steps before.

    optimizer.fp8_forward.<linear>      [layers, 3]    of its input, weight and output
    optimizer.fp8_backward.<linear>     [layers, 2]    of the gradients of its output and input

Without them the first update after a resume would cast everything unscaled. The other recipes scale by present values and keep nothing.
Transformer Engine keeps scales in a pickle, `_extra_state`, which is neither written nor read. Equal on tensor- and data-parallel ranks.
"""

from collections.abc import Iterator

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from torch import Tensor, nn

from megatron_tower.models.build import Decoder

EXTRA = "._extra_state"
PARTS = {"fp8_forward": "scaling_fwd", "fp8_backward": "scaling_bwd"}


def sharded_scales(model: Decoder, places: ShardedStateDict) -> dict[str, ShardedTensor]:
    """A linear's part -> its scales, placed like the `_extra_state` in the model's `places`; empty without delayed scaling."""
    found = {}
    for name, part, scale in _scales(model):
        place = places[name + EXTRA]
        offsets = [(axis, place.global_offset[axis], layers) for axis, layers in enumerate(place.global_shape)]
        key = f"optimizer.{part}.{place.key.removesuffix(EXTRA)}"
        found[f"{name}.{part}"] = ShardedTensor.from_rank_offsets(
            key, scale, *offsets, replica_id=place.replica_id, prepend_axis_num=len(offsets)
        )
    return found


def load_scales(model: Decoder, loaded: dict[str, Tensor]) -> None:
    """Take over what was loaded of `sharded_scales`; scales that were not are as at the start of a training."""
    for name, part, scale in _scales(model):
        if f"{name}.{part}" in loaded:
            scale.copy_(loaded[f"{name}.{part}"])


def _scales(model: Decoder) -> Iterator[tuple[str, str, Tensor]]:
    """(linear, part, scales), of linears that have not computed yet, too."""
    if not (model.fp8 and model.config.fp8_recipe == "delayed"):
        return
    for name, module in model.named_modules():
        if hasattr(module, "fp8_meta"):
            _start(module, model)
            for part, key in PARTS.items():
                yield name, part, module.fp8_meta[key].scale


def _start(module: nn.Module, model: Decoder) -> None:
    """What Transformer Engine's linear else does in its first forward pass."""
    from megatron.core.fp8_utils import get_fp8_recipe

    if not module.fp8_meta_tensors_initialized:
        module.fp8_meta |= {"num_gemms": 1}
        module.init_fp8_meta_tensors(get_fp8_recipe(model.config))
