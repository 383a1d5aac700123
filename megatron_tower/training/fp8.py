"""What FP8 adds to training's state: weights kept in FP8 alone, and the scales of the delayed recipe as tensors of a checkpoint.

    optimizer.fp8_forward.<linear>      [layers, 3]    of its input, weight and output
    optimizer.fp8_backward.<linear>     [layers, 2]    of the gradients of its output and input

Delayed scales are made of what a layer's tensors were in the steps before: without them the first update after a resume would cast
everything unscaled. The other recipes scale by present values and keep nothing. Transformer Engine keeps scales in a pickle,
`_extra_state`, which is neither written nor read. Scales are equal on tensor- and data-parallel ranks.

With `precision.fp8_param_gather` the optimizer's main weights are the only ones in high precision: it casts its share of them to FP8 after
an update, and that is what ranks gather. Checkpoints hold them rounded to bf16, as those of every other precision do.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from megatron_tower.models.build import Decoder

if TYPE_CHECKING:
    from transformer_engine.pytorch.quantization import DelayedScalingRecipeState

EXTRA = "._extra_state"
PARTS = {"fp8_forward": "scaling_fwd", "fp8_backward": "scaling_bwd"}


def keep_weights(model: Decoder) -> None:
    """Cast the weights of the linears that compute in FP8; what they were is handed to the optimizer when that is built.

    Call it when weights are loaded and before the gradient buffer is made.
    """
    from megatron.core.fp8_utils import is_first_last_bf16_layer
    from transformer_engine.pytorch.constants import FP8FwdTensorIdx

    for layer in model.decoder.layers:
        for _, linear in _linears(layer):
            if is_first_last_bf16_layer(model.config, layer.layer_number - 1):
                continue
            _start(linear, model)
            quantizer = linear.quantizers["scaling_fwd"][FP8FwdTensorIdx.GEMM1_WEIGHT]
            quantizer.set_usage(rowwise=True, columnwise=True)
            quantizer.internal = False
            whole = linear.weight
            linear.weight = nn.Parameter(quantizer(whole.detach()))
            vars(linear.weight).update(vars(whole))  # how it is sharded
            held = [whole.detach()]
            linear.weight.get_high_precision_init_val, linear.weight.clear_high_precision_init_val = held.pop, held.clear
            linear.primary_weights_in_fp8 = True


def is_fp8(weight: Tensor) -> bool:
    """Whether a weight is kept in FP8."""
    from megatron.core.fp8_utils import is_float8tensor

    return is_float8tensor(weight)


def gather(chunk: DistributedDataParallel) -> None:
    """Every weight whole on this rank, with the transpose of those in FP8, which megatron-core makes anew only where it gathers by itself.

    0.16.1, distributed/param_and_grad_buffer.py line 334: after a forced gather the next forward pass finds nothing to wait for.
    """
    from megatron.core.fp8_utils import post_all_gather_processing

    chunk.start_param_sync(force_sync=True)
    if cast := [weight for weight in chunk.parameters() if is_fp8(weight)]:
        post_all_gather_processing(cast)


def sharded_scales(model: Decoder, places: ShardedStateDict) -> dict[str, ShardedTensor]:
    """A linear's part -> its scales, placed like the `_extra_state` in the model's `places`; empty without delayed scaling."""
    found = {}
    for name, part, state in _scales(model):
        place = places[name + EXTRA]
        offsets = [(axis, place.global_offset[axis], layers) for axis, layers in enumerate(place.global_shape)]
        key = f"optimizer.{part}.{place.key.removesuffix(EXTRA)}"
        found[f"{name}.{part}"] = ShardedTensor.from_rank_offsets(
            key, state.scale, *offsets, replica_id=place.replica_id, prepend_axis_num=len(offsets)
        )
    return found


def load_scales(model: Decoder, loaded: dict[str, Tensor]) -> None:
    """Take over what was loaded of `sharded_scales`; scales that were not are as at the start of a training.

    Largest values seen so far are forgotten: those of weights in FP8 are noted again when these are cast.
    """
    for name, part, state in _scales(model):
        if f"{name}.{part}" in loaded:
            state.scale.copy_(loaded[f"{name}.{part}"])
        state.amax_history.zero_()


def _scales(model: Decoder) -> Iterator[tuple[str, str, "DelayedScalingRecipeState"]]:
    """(linear, part, `scale` and `amax_history`), of linears that have not computed yet, too."""
    if not (model.fp8 and model.config.fp8_recipe == "delayed"):
        return
    for name, linear in _linears(model):
        _start(linear, model)
        for part, key in PARTS.items():
            yield name, part, linear.fp8_meta[key]


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Transformer Engine's, by name."""
    return ((name, part) for name, part in module.named_modules() if hasattr(part, "fp8_meta"))


def _start(linear: nn.Module, model: Decoder) -> None:
    """What one of Transformer Engine's linears else does in its first forward pass."""
    from megatron.core.fp8_utils import get_fp8_recipe

    if not linear.fp8_meta_tensors_initialized:
        linear.fp8_meta |= {"num_gemms": 1, "recipe": get_fp8_recipe(model.config)}
        linear.init_fp8_meta_tensors(linear.fp8_meta["recipe"])
