"""AdamW of megatron-core and its learning-rate schedule.

Weight decay follows megatron-core's default: matrices (embeddings included) are decayed, vectors (norms, biases) are not. With bf16
weights the optimizer steps on fp32 main weights. Adam is Transformer Engine's or Apex's fused one where megatron-core finds it.
Leaves out: other optimizers, learning rates per parameter, loss scaling (fp16).
"""

import math

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from megatron_tower.config import Config, InputError, OptimizerConfig
from megatron_tower.runtime.distributed import device


def build_optimizer(chunks: list[DistributedDataParallel], cfg: Config) -> MegatronOptimizer:
    """The optimizer over this rank's model chunks, its state shared among data-parallel ranks if `parallel.distributed_optimizer`."""
    o = cfg.phase.optimizer
    bf16 = cfg.precision.params == "bfloat16"
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.epsilon,
        clip_grad=o.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=cfg.parallel.distributed_optimizer,
        fp8_recipe=cfg.precision.fp8 if cfg.precision.fp8_param_gather else None,
        **_offloaded(cfg.parallel.offload),
    )
    optimizer = get_megatron_optimizer(config, chunks)
    for group in optimizer.param_groups:
        group["weight_decay"] = o.weight_decay * group["wd_mult"]
    return optimizer


def _offloaded(share: float) -> dict[str, object]:
    """Megatron-core's words for main weights and moments in host memory. It has a GPU for the rest, and main weights apart from them."""
    if not share:
        return {}
    if device().type != "cuda":
        raise InputError(f"parallel.offload={share} moves state from a GPU to the host, and this run has no GPU: use parallel.offload=0")
    return {"optimizer_cpu_offload": True, "optimizer_offload_fraction": share, "use_precision_aware_optimizer": True}


def set_lr(optimizer: MegatronOptimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def lr_at(step: int, steps: int, o: OptimizerConfig) -> float:
    """Learning rate of update `step` (1 .. steps): linear warm-up to `lr`, then the schedule down to `min_lr * lr` at the last update."""
    warmup = math.ceil(o.warmup * steps)
    if step <= warmup:
        return o.lr * step / warmup
    if o.schedule == "constant":
        return o.lr
    done = (step - warmup) / max(1, steps - warmup)
    remaining = 0.5 * (1 + math.cos(math.pi * done)) if o.schedule == "cosine" else 1 - done
    return o.lr * (o.min_lr + (1 - o.min_lr) * remaining)
