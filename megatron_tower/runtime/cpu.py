"""The CPU bridge: megatron-core 0.16.1 on a machine without CUDA. Does nothing where CUDA exists.

Megatron-core names CUDA in its source (`torch.cuda.current_device()`, `device="cuda"`, `t.type() == "torch.cuda.FloatTensor"`).
PyTorch offers the same surface under `torch.cpu`, so the bridge lets the functions listed in `SITES` run with that one word replaced
in their compiled code: `torch` itself, and everything else of megatron-core, stays as it is. Random states are the one thing that
`torch.cpu` lacks; there the word is `torch.random`. To be called before megatron-core is imported:

    from megatron_tower.runtime import cpu
    cpu.install()

Leaves out: context parallelism, CUDA graphs, FSDP, mixture of experts, optimizer offload.
Model configs on a CPU set `use_cpu_initialization` and no fusion.
"""

import inspect
import os
import warnings
from importlib import import_module
from types import CodeType, FunctionType

import torch

from megatron_tower.command import collect_less

# megatron.core module:function -> upstream lines (0.16.1) that name CUDA.
SITES = {
    # outputs of collectives, weights, buffers: allocated on the current device
    "tensor_parallel.layers:VocabParallelEmbedding.__init__": (261,),
    "tensor_parallel.layers:ColumnParallelLinear.__init__": (873, 899),
    "tensor_parallel.layers:RowParallelLinear.__init__": (1197, 1218),
    "tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication.backward": (552, 597, 607),
    "tensor_parallel.mappings:_gather_along_last_dim": (91,),
    "tensor_parallel.mappings:_gather_along_first_dim": (141, 148),
    "tensor_parallel.mappings:_reduce_scatter_along_first_dim": (181,),
    "tensor_parallel.utils:split_tensor_into_1d_equal_chunks": (70,),
    "tensor_parallel.utils:gather_split_1d_tensor": (91,),
    "utils:GlobalMemoryBuffer.get_tensor": (631,),
    "models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.__init__": (78,),
    "models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.get_emb": (162,),
    "models.common.language_module.language_module:LanguageModule.setup_embeddings_and_output_layer": (244,),
    "models.gpt.gpt_model:GPTModel._preprocess": (415,),
    "transformer.attention:Attention._allocate_memory": (430,),
    "transformer.utils:get_default_causal_mask": (35,),
    "transformer.utils:get_sliding_window_causal_mask": (40,),
    # pipeline: receive buffers, synchronisation after a transfer, token counts
    "pipeline_parallel.p2p_communication:P2PCommunicator._communicate_shapes": (190, 194, 198, 202, 242),
    "pipeline_parallel.p2p_communication:P2PCommunicator._communicate": (313, 321, 398),
    "pipeline_parallel.schedules:forward_step": (418,),
    "pipeline_parallel.schedules:forward_backward_no_pipelining": (596,),
    "pipeline_parallel.schedules:forward_backward_pipelining_with_interleaving": (983,),
    "pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving": (2138,),
    "inference.communication_utils:_is_cuda": (31,),
    "inference.communication_utils:broadcast_from_last_pipeline_stage": (76,),
    "inference.communication_utils:recv_from_prev_pipeline_rank_": (111,),
    "inference.communication_utils:send_to_next_pipeline_rank": (142,),
    "inference.communication_utils:broadcast_tensor": (158,),
    # gradients and the optimizer: buffers, overflow flags, tensor types
    "distributed.param_and_grad_buffer:_ParamAndGradBuffer.__init__": (768, 783, 800, 806),
    "optimizer.optimizer:MixedPrecisionOptimizer.__init__": (473, 481, 485),
    "optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__": (671, 690),
    "optimizer.optimizer:FP32Optimizer.__init__": (907,),
    "optimizer.optimizer:ChainedOptimizer.get_loss_scale": (1141,),
    "optimizer.distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups": (361, 420),
    "optimizer.distrib_optimizer:DistributedOptimizer.__init__": (582,),
    "optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict": (791,),
    "optimizer.distrib_optimizer:DistributedOptimizer.get_parameter_state_dp_zero": (1077, 1089),
    "optimizer.clip_grads:get_grad_norm_fp32": (90, 103, 115),
    "optimizer.clip_grads:clip_grad_by_total_norm_fp32": (167, 174),
    "optimizer.clip_grads:count_zeros_fp32": (207,),
    "utils:local_multi_tensor_l2_norm": (1207,),
    # checkpoints: failure flags, synchronisation before a write, exchanged shards
    "dist_checkpointing.exchange_utils:_get_empty_tensor_for_exchange": (98, 104, 106, 110),
    "dist_checkpointing.exchange_utils:exchange_loaded_tensors_gather_rounds": (326, 336),
    "dist_checkpointing.exchange_utils:exchange_loaded_tensors_broadcast": (499,),
    "dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.preload_tensors": (230,),
    "dist_checkpointing.strategies.fully_parallel:FullyParallelLoadStrategyWrapper.load": (272, 281),
    "dist_checkpointing.strategies.state_dict_saver:verify_global_md_reuse": (204,),
    "dist_checkpointing.strategies.state_dict_saver:save_state_dict_async_finalize": (252,),
}
# The same for functions that read or seed the random state: `torch.cuda.manual_seed` -> `torch.random.manual_seed`.
RANDOM_SITES = {
    "tensor_parallel.random:CudaRNGStatesTracker.add": (235, 237, 238),
    "tensor_parallel.random:model_parallel_cuda_manual_seed": (422,),
}


def install() -> None:
    """Bridge megatron-core to the CPU, once; nothing where CUDA exists."""
    if torch.cuda.is_available():
        return
    collect_less()
    for speaker in (r"megatron\.core", r"torch\.distributed"):  # of CUDA settings, optional kernels and their own deprecations
        warnings.filterwarnings("ignore", module=speaker)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # megatron-core's jit_fuser is torch.compile: on a CPU it only costs
    compiling, torch.compile = torch.compile, lambda function: function  # which would import torch._dynamo even so
    try:
        import_module("megatron.core.jit")
    finally:
        torch.compile = compiling
    for sites, word in ((SITES, "cpu"), (RANDOM_SITES, "random")):
        for site in sites:
            function = find(site)
            function.__code__ = _renamed(function.__code__, word)
    random = import_module("megatron.core.tensor_parallel.random")  # lines 41-113 serve CUDA generators only
    random._get_cuda_rng_state = _get_rng_state
    random._set_cuda_rng_state = _set_rng_state


def find(site: str) -> FunctionType:
    """The plain function behind a site's name, out of its class and decorators."""
    module, path = site.split(":")
    found = import_module(f"megatron.core.{module}")
    for name in path.split("."):
        found = vars(found)[name]
    return inspect.unwrap(getattr(found, "__func__", found))


def _renamed(code: CodeType, word: str) -> CodeType:
    """`code` with `cuda` read as `word` in attribute names and in string constants, nested functions included."""

    def constant(value: object) -> object:
        if isinstance(value, CodeType):
            return _renamed(value, word)
        if isinstance(value, tuple):
            return tuple(map(constant, value))
        if value == "cuda":
            return word
        if isinstance(value, str) and value.startswith("torch.cuda."):
            return value.replace("torch.cuda.", "torch.", 1)
        return value

    names = {"cuda": word, "is_cuda": f"is_{word}"}
    return code.replace(co_names=tuple(names.get(n, n) for n in code.co_names), co_consts=tuple(map(constant, code.co_consts)))


def _get_rng_state(device: object = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: object = None, graph_safe: bool = False) -> None:
    torch.set_rng_state(state)
