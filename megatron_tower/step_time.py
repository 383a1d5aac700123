"""How long an update takes on H100s, from the config alone. Imports no torch.

    predict(cfg).seconds        the slowest pipeline stage x micro-batches, the bubble, the reduction of gradients, the optimizer, rollouts

Each stage's micro-batch is a sum of what doesn't overlap: matrix products at a share of the measured ceiling, attention at the rate of
its kernel, what goes through the memory between them, collectives of tensor parallelism (a share of them with `tensor_overlap`). Rows are
taken as full, answers as long as they may be. Every constant is one line that says where it comes from; docs/plan.md compares the sum with
measured rows. Leaves out: launches of kernels in training (micro-batches below some 4,096 tokens are slower than this says), checkpoints,
rewards.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_tower.plan import (
    CHUNK,
    cache_bytes,
    flops_per_token,
    layer_bytes,
    matrices,
    micro_batch_tokens,
    micro_batches,
    parameters,
    weights_on,
    widths,
)

if TYPE_CHECKING:
    from megatron_tower.config import Config

PEAK = 989e12  # data sheet: dense bf16 FLOP/s of an H100 SXM, what MFU is a share of
MATMUL = 798e12  # measured: bf16 matrix products of 8192, one H100
MATMUL_SHARE = 0.80  # fitted: of MATMUL in a whole step, to four bf16 rows of docs/plan.md
FP8_FACTOR = 1.65  # fitted: FP8 products beside bf16 ones, casts not counted, to five FP8 rows of docs/plan.md
FP8_CAST = 6  # assumed: bytes moved to find a number's scale and write it in FP8, as it is and transposed
ATTENTION = 340e12  # measured: flash-attn-4 forward and backward, 8192 tokens (notes in docs/plan.md)
BANDWIDTH = 3.0e12  # assumed: bytes/s of 3.35e12 on the data sheet
PASSES = 4  # fitted: times that each byte of kept activations goes through the memory in forward and backward
LOGIT_BYTES = 16  # assumed: bytes moved for each logit beside its matrix product
ADAM_BYTES = 38  # counted: fp32 main weight and two moments read and written, gradient read three times and zeroed, weight written
NVLINK = 360e9  # assumed: 80 % of 450e9 bytes/s each way (data sheet)
NETWORK = 40e9  # assumed: 80 % of one 400 Gb/s adapter a GPU (data sheet of DGX H100)
OVERLAPPED = 0.7  # assumed: share of tensor parallelism's collectives that `tensor_overlap` hides
PCIE = 50e9  # assumed: 80 % of 63e9 bytes/s each way (data sheet, generation 5)
HOST_ADAM = 25e9  # assumed: bytes/s that one of eight ranks has of a node's memory, ADAM_BYTES a weight
LAYER_LAUNCH = {True: 0.1e-3, False: 0.3e-3}  # assumed: seconds a layer takes for one new token besides reading; replayed as a graph or not


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update; `tokens` over all ranks, `flops` the model FLOPs a token."""

    compute: float  # of the slowest stage, all micro-batches
    collectives: float  # of tensor parallelism, in the same
    bubble: float  # stages that wait
    reduce: float  # gradients and weights over data-parallel ranks, what is not hidden
    optimizer: float
    rollout: float  # sampling, and log-probabilities under the reference
    tokens: int
    ranks: int
    flops: int

    @property
    def seconds(self) -> float:
        return self.compute + self.collectives + self.bubble + self.reduce + self.optimizer + self.rollout

    @property
    def rate(self) -> float:
        """Tokens a second and GPU."""
        return self.tokens / self.seconds / self.ranks

    @property
    def mfu(self) -> float:
        return self.rate * self.flops / PEAK


def predict(cfg: "Config") -> StepTime:
    par, count, gpus = cfg.parallel, micro_batches(cfg), cfg.cluster.gpus_per_node or 8
    stages = [_compute(cfg, stage) for stage in range(par.pipeline)]
    slowest = max(stages)
    collectives = _tensor(cfg, gpus) * cfg.model.num_layers / par.pipeline
    waits = (sum(stages) - slowest + (par.pipeline - 1) * collectives) / (par.virtual_pipeline or 1)
    waits += _sends(cfg, gpus) * (par.pipeline * par.virtual_pipeline if par.virtual_pipeline else par.pipeline + count)  # virtual: hidden
    once = slowest + collectives
    largest = max(weights_on(cfg, stage) for stage in range(par.pipeline))
    updates = cfg.phase.rollout.updates if cfg.phase.rollout else 1
    return StepTime(
        compute=count * slowest,
        collectives=count * collectives,
        bubble=waits,
        reduce=_reduce(cfg, largest, gpus, once),
        optimizer=_optimizer(cfg, largest),
        rollout=_rollout(cfg) / updates + _scoring(cfg) * (count * once + waits) / 3,
        tokens=count * par.data * micro_batch_tokens(cfg),
        ranks=par.world_size,
        flops=flops_per_token(cfg.model, cfg.phase.seq_length),
    )


def _compute(cfg: "Config", stage: int) -> float:
    """Forward and backward of one micro-batch on a stage."""
    model, par, tokens = cfg.model, cfg.parallel, micro_batch_tokens(cfg)
    layers = model.num_layers // par.pipeline
    seconds = tokens * layers * _layer(cfg)
    if stage == par.pipeline - 1:
        logits = -(-model.vocab_size // par.tensor)
        again = cfg.phase.objective.name != "causal_lm" and tokens * logits > CHUNK  # then the backward pass makes the logits again
        products = 8 if again else 6
        seconds += tokens * logits * (products * model.hidden_size / (MATMUL * MATMUL_SHARE) + LOGIT_BYTES / BANDWIDTH)
    return seconds


def _layer(cfg: "Config") -> float:
    """Forward and backward of one token in one layer, on one of `tensor` ranks."""
    model, par, rate = cfg.model, cfg.parallel, MATMUL * MATMUL_SHARE
    kept, again = layer_bytes(cfg)
    mlp = 3 * model.hidden_size * model.ffn_hidden_size
    remade = {"none": 0, "selective": 0, "mlp": mlp, "full": matrices(model)}[par.recompute]
    products = (6 * matrices(model) + 2 * remade) / par.tensor / rate
    casts = 0.0
    if cfg.precision.fp8:
        in_fp8 = 1 - 2 * cfg.precision.bf16_layers / model.num_layers
        q, k = widths(model)
        numbers = 4 * model.hidden_size + 2 * q + 2 * k + 3 * model.ffn_hidden_size + q  # inputs, and gradients of outputs
        products *= 1 - in_fp8 * (1 - 1 / FP8_FACTOR)
        casts = in_fp8 * FP8_CAST * numbers / par.tensor / BANDWIDTH
    reach = _reach(model.sliding_window, cfg.phase.seq_length)
    windowed = len([layer for layer in model.window_layers if layer < model.num_layers]) / model.num_layers
    seen = windowed * reach + (1 - windowed) * cfg.phase.seq_length / 2  # keys of a query, on average
    passes = 3.5 + (1 if par.recompute in ("selective", "full") else 0)  # backward is 2.5 forwards
    attention = passes * 4 * seen * widths(model)[0] / par.tensor / ATTENTION
    through = (kept + (2 if par.recompute == "full" else 1) * again) * PASSES / BANDWIDTH
    return products + casts + attention + through


def _reach(window: int | None, length: int) -> float:
    """Keys that a query of a windowed layer sees, on average over `length` positions."""
    window = min(window or length, length)
    return window - window * window / (2 * length)


def _tensor(cfg: "Config", gpus: int) -> float:
    """Collectives of one micro-batch in one layer: two gathers and two scatters each way, or as much in all-reduces."""
    par = cfg.parallel
    size = micro_batch_tokens(cfg) * cfg.model.hidden_size * _element(cfg) * (par.tensor - 1) / par.tensor
    times = 8 + (2 + (4 if par.recompute == "full" else 2 if par.recompute == "mlp" else 0) if par.sequence_parallel else 0)
    if not par.sequence_parallel and par.recompute != "none":
        times += 4 if par.recompute == "full" else 2
    hidden = OVERLAPPED if cfg.overlap_tokens else 0
    return (1 - hidden) * times * size / (NVLINK if par.tensor <= gpus else NETWORK)


def _sends(cfg: "Config", gpus: int) -> float:
    """One micro-batch's hidden states to the next stage and their gradient back; sequence parallelism sends pieces."""
    par = cfg.parallel
    if par.pipeline == 1:
        return 0.0
    size = 2 * micro_batch_tokens(cfg) * cfg.model.hidden_size * _element(cfg) / (par.tensor if par.sequence_parallel else 1)
    return size / (NVLINK if par.world_size <= gpus else NETWORK)


def _reduce(cfg: "Config", weights: int, gpus: int, micro_batch: float) -> float:
    """Gradients summed and weights gathered; with `overlap` beside the last backward and the first forward."""
    par = cfg.parallel
    if par.data == 1:
        return 0.0
    together = max(1, gpus // par.tensor)  # data-parallel ranks in a node: each brings its adapter
    speed = NVLINK if par.data <= together else min(NVLINK, together * NETWORK)
    share = (par.data - 1) / par.data
    gradient = 2 if par.gradients == "bfloat16" and cfg.precision.params == "bfloat16" else 4
    back = weights * share * gradient / speed
    out = weights * share * _element(cfg) / speed
    if not par.distributed_optimizer:
        out = back  # an all-reduce
    if par.overlap:
        return max(0.0, back - micro_batch * 2 / 3) + max(0.0, out - micro_batch / 3)
    return back + out


def _optimizer(cfg: "Config", weights: int) -> float:
    par = cfg.parallel
    own = weights / (par.data if par.distributed_optimizer else 1)
    away = own * par.offload
    return (own - away) * ADAM_BYTES / BANDWIDTH + away * (6 / PCIE + ADAM_BYTES / HOST_ADAM)


def _rollout(cfg: "Config") -> float:
    """Sampling the answers of a round, all as long as they may be; each step reads the weights and the cache of every stage in turn."""
    model, par, rollout = cfg.model, cfg.parallel, cfg.phase.rollout
    if not rollout:
        return 0.0
    answers = cfg.phase.global_batch_size * rollout.rollouts_per_prompt / par.data
    rows = max(rollout.batch_size, rollout.rollouts_per_prompt)
    filled = 1 - rollout.max_new_tokens / cfg.phase.seq_length / 2  # of the cache, on average
    read = parameters(model) * _element(cfg) / par.tensor + filled * cache_bytes(cfg, model.num_layers)
    step = read / BANDWIDTH + model.num_layers * LAYER_LAUNCH[par.pipeline == 1]
    return -(-answers // rows) * rollout.max_new_tokens * step


def _scoring(cfg: "Config") -> int:
    """Forward passes of an update besides training's own: under the reference, under the policy before several updates."""
    objective, rollout = cfg.phase.objective, cfg.phase.rollout
    if objective.name == "wpo":
        return 1 if objective.reference == "live" else 0
    return (objective.kl > 0) + (rollout.updates > 1) if objective.name == "grpo" else 0


def _element(cfg: "Config") -> int:
    return 2 if cfg.precision.params == "bfloat16" else 4
