"""What a run holds on each GPU, from its config alone: weights, gradients, optimizer, activations, the head, rollouts. Imports no torch.

    for stage in memory(cfg): print(stage.total / GIB, stage)          # one a pipeline stage; every rank of a stage holds the same

Bytes for n weights on a rank, in bf16:   2 n weights,  4 n gradients (2 n in bf16),  12 n / data optimizer (main weights, two moments)
Activations a layer keeps for each token, in numbers of 2 bytes (h hidden, q and k widths of all query and key heads, f MLP):

    (norms + 2) h + 2 q + (q + 2 k) + k + 3 f        norms 2, Gemma's sandwich 4; q, k and f divided by `tensor`, h by it too where
                                                      sequence_parallel; v is a view into the fused q k v, which therefore stays whole;
                                                      4 f without Transformer Engine

times the layers of the stage and the micro-batches in flight there (1F1B: `pipeline` less the stage's number).
Checked against saved tensors, optimizers and checkpoints in tests/unit/test_plan.py, against measured rows in docs/plan.md.
Leaves out: context parallelism, kernels' workspaces beyond OVERHEAD, text on the host. Speed is in `step_time.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_tower.config import Config, ModelConfig

GIB = 2**30
OVERHEAD = 4 * GIB  # assumed: CUDA context, NCCL's buffers, cuBLAS and TE workspaces, what the allocator can't use
CHUNK, PIECE = 2**28, 2**25  # logits at once, and in fp32 at once; a test holds them to models/head.py and objectives/logprobs.py
SANDWICH = ("gemma2",)  # families with four norms a layer; a test holds it to models/families.py


@dataclass(frozen=True)
class Memory:
    """Bytes on each rank of pipeline stage `stage`, at the worst moment of a step. `host`: in the node's memory, for each rank."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    reference: float  # frozen copy of the weights, where the objective keeps one
    activations: float  # of all micro-batches in flight
    working: float  # what comes and goes while they stay: the head's chunk, or the backward pass of one layer
    update: float  # while the optimizer steps, activations being gone
    rollout: float  # key-value cache and prefill, activations being gone
    host: float
    overhead: float  # OVERHEAD, and the buffers of `tensor_overlap`

    @property
    def total(self) -> float:
        fixed = self.weights + self.gradients + self.optimizer + self.reference + self.overhead
        return fixed + max(self.activations + self.working, self.update, self.rollout)


def parameters(model: "ModelConfig") -> int:
    """Number of weights: embeddings, attention, gated MLP, norms."""
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    return embeddings + model.num_layers * (matrices(model) + _vectors(model, 1)) + model.hidden_size


def matrices(model: "ModelConfig") -> int:
    """Weights of one layer's linears."""
    q, k = widths(model)
    return model.hidden_size * (2 * q + 2 * k + 3 * model.ffn_hidden_size)


def widths(model: "ModelConfig") -> tuple[int, int]:
    """Channels of all query heads, of all key heads."""
    return model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels


def flops_per_token(model: "ModelConfig", seq_length: int) -> int:
    """Model FLOPs of one token's forward and backward pass, 6 N + 6 L d_attn S; recomputed activations are not counted."""
    return 6 * parameters(model) + 6 * model.num_layers * widths(model)[0] * seq_length


def micro_batch_tokens(cfg: "Config") -> int:
    """Most tokens of a micro-batch: a pair has two answers."""
    return cfg.phase.micro_batch_size * cfg.phase.seq_length * (2 if cfg.phase.dataset == "preferences" else 1)


def micro_batches(cfg: "Config") -> int:
    """Micro-batches of an update on each data-parallel rank; the answers to all prompts, for GRPO."""
    rows = cfg.phase.global_batch_size
    if rollout := cfg.phase.rollout:
        rows = rows * rollout.rollouts_per_prompt / rollout.updates
    return max(1, -int(-rows // (cfg.phase.micro_batch_size * cfg.parallel.data)))


def weights_on(cfg: "Config", stage: int) -> int:
    """Weights that each rank of a pipeline stage holds."""
    model, par = cfg.model, cfg.parallel
    vocabulary = -(-model.vocab_size // par.tensor) * model.hidden_size
    count = model.num_layers // par.pipeline * (matrices(model) // par.tensor + _vectors(model, par.tensor))
    last = stage == par.pipeline - 1
    if stage == 0:
        count += vocabulary
    if last and (stage > 0 or not model.tie_embeddings):
        count += vocabulary
    return count + (model.hidden_size if last else 0)


def memory(cfg: "Config") -> list[Memory]:
    """What the ranks of each pipeline stage hold, stage by stage."""
    return [_of_stage(cfg, stage) for stage in range(cfg.parallel.pipeline)]


def checkpoint_bytes(cfg: "Config") -> int:
    """A checkpoint on disk: weights, two fp32 moments, and the fp32 main weights where training is in bf16."""
    return parameters(cfg.model) * (14 if _bytes(cfg) == 2 else 12)


def memory_problems(cfg: "Config") -> Iterator[str]:
    """A sentence where a stage needs more than cluster.gpu_memory_gib, with the one word that makes it fit if there is one."""
    worst = max(memory(cfg), key=lambda stage: stage.total)
    room = cfg.cluster.gpu_memory_gib
    if worst.total <= room * GIB:
        return
    words = ("weights", "gradients", "optimizer", "reference", "activations", "working", "rollout")
    parts = ", ".join(f"{word} {getattr(worst, word) / GIB:.0f}" for word in words if getattr(worst, word) > GIB / 2)
    mend = next((word for word, other in _milder(cfg) if max(stage.total for stage in memory(other)) <= room * GIB), None)
    yield (
        f"phase={cfg.phase.name} of model={cfg.model.name} on parallel={cfg.parallel.name} needs {worst.total / GIB:.0f} GiB of a GPU "
        f"({parts}) and cluster={cfg.cluster.name} has {room:g}: "
        + (f"use {mend}" if mend else f"ask python -m tools.plan --gpus {cfg.parallel.world_size} for a layout that fits")
    )


def _milder(cfg: "Config") -> Iterator[tuple[str, "Config"]]:
    """The same run with one word changed, what costs least first."""
    par, rollout = cfg.parallel, cfg.phase.rollout
    changes = [("distributed_optimizer", True)] if par.data > 1 and not par.distributed_optimizer else []
    changes += [("sequence_parallel", True)] if par.tensor > 1 and not par.sequence_parallel else []
    changes += [("recompute", word) for word in ("mlp", "full")] + [("gradients", "bfloat16"), ("offload", 1.0)]
    if rollout:
        for size in (rollout.batch_size // n for n in (2, 4, 8) if rollout.batch_size // n >= rollout.rollouts_per_prompt):
            yield f"phase.rollout.batch_size={size}", replace(cfg, phase=replace(cfg.phase, rollout=replace(rollout, batch_size=size)))
    for name, value in changes:
        said = str(value).lower() if isinstance(value, bool) else value
        yield f"parallel.{name}={said}", replace(cfg, parallel=replace(par, **{name: value}))


def _of_stage(cfg: "Config", stage: int) -> Memory:
    model, par, element = cfg.model, cfg.parallel, _bytes(cfg)
    count, tokens = weights_on(cfg, stage), micro_batch_tokens(cfg)
    shards = par.data if par.distributed_optimizer else 1
    states = count * (12 if element == 2 else 8) / shards
    half = par.gradients == "bfloat16" and element == 2
    kept, again = layer_bytes(cfg)
    slots, layers = in_flight(cfg, stage), model.num_layers // par.pipeline // (par.virtual_pipeline or 1)
    passed = 0 if par.pipeline == 1 else model.hidden_size * element / _split(cfg)  # the stage's output, which its sender keeps
    head = head_bytes(cfg) if stage == par.pipeline - 1 else (0, 0)
    backward = 3 * model.ffn_hidden_size * element / par.tensor + again  # gradients of the MLP's middle, and of the layer made again
    gathered = model.hidden_size * element if par.sequence_parallel else 0
    return Memory(
        stage,
        weights=count * element + _fp8_weights(cfg, stage),
        gradients=count * (2 if half else 4),
        optimizer=states * (1 - par.offload),
        reference=count * element if _keeps_reference(cfg) else 0,
        activations=slots * tokens * (layers * kept + passed) + head[0],
        working=max(tokens * (backward + gathered), head[1]),
        update=4 * count / shards * (1 - par.offload) if half else 0,  # fp32 copies of the gradients
        rollout=_rollout(cfg, stage),
        host=(states + 4 * count / shards) * par.offload,  # its gradients too
        overhead=OVERHEAD + overlap_bytes(cfg),
    )


def overlap_bytes(cfg: "Config") -> int:
    """Transformer Engine's user buffers: twelve of tokens x hidden in bf16; in FP8 the eight that gather have a byte a number."""
    bf16, fp8 = 12 * 2, 8 + 4 * 2
    each = (fp8 if cfg.precision.fp8 else 0) + (bf16 if not cfg.precision.fp8 or cfg.precision.bf16_layers else 0)
    return each * (cfg.overlap_tokens or 0) * cfg.model.hidden_size


def in_flight(cfg: "Config", stage: int) -> int:
    """Forward passes whose backward is still to come, at most; of a chunk of the stage's layers where the pipeline is virtual."""
    par = cfg.parallel
    waiting = par.pipeline - stage
    if par.virtual_pipeline:
        waiting = 2 * (waiting - 1) + (par.virtual_pipeline - 1) * par.pipeline + 1
    return min(waiting, micro_batches(cfg) * (par.virtual_pipeline or 1))


def layer_bytes(cfg: "Config") -> tuple[float, float]:
    """What one layer keeps of each token from forward to backward, and what it makes again on the way back."""
    model, par, b = cfg.model, cfg.parallel, _bytes(cfg)
    h, f, (q, k) = model.hidden_size / _split(cfg), model.ffn_hidden_size / par.tensor, (w / par.tensor for w in widths(model))
    sandwich = model.family in SANDWICH
    entry = b * h + 4 / _split(cfg)  # a norm keeps its input and a factor in fp32
    linear = 1 if cfg.precision.fp8 else b  # a linear's input
    kernel, eager = _kernel_bytes(cfg), model.attention_backend == "eager"
    output = (0 if eager else b * q) + q if cfg.precision.fp8 == "delayed" else b * q  # linear_proj's own copy, or attention's, cast again
    attention = b * (2 * q + 3 * k) + output + (entry if sandwich else 0)
    fused = b == 2 and cfg.precision.layers != "torch"  # Transformer Engine: act(gate) * up in one pass, RoPE without sines and cosines
    mlp = b * (2 if fused else 3) * f + linear * f + (entry if sandwich else 0)
    rope = 0 if fused else b * 4 * model.kv_channels
    whole = 2 * (entry + linear * h) + attention + rope + kernel + mlp
    normed = linear * h + entry - b * h if fused else 0  # the norm before the MLP is made again where it is part of the first linear
    made_again = {"none": 0, "selective": kernel, "mlp": normed + mlp, "full": whole}[par.recompute]
    if par.recompute == "full":
        return b * h, whole
    return whole - made_again + (b * h - linear * h if par.recompute == "mlp" and not fused else 0), made_again


def head_bytes(cfg: "Config") -> tuple[float, float]:
    """On the last stage: kept of a micro-batch (the final norm's input and output); at work (a chunk of logits, the states' gradients)."""
    model, b, tokens = cfg.model, _bytes(cfg), micro_batch_tokens(cfg)
    states = tokens * model.hidden_size * b
    logits = tokens * -(-model.vocab_size // cfg.parallel.tensor)
    gathered = states if cfg.parallel.sequence_parallel else 0
    return 2 * states / _split(cfg), states + gathered + min(CHUNK, logits) * b + 3 * 4 * min(PIECE, logits)


def _kernel_bytes(cfg: "Config") -> float:
    """What attention keeps of each token besides q, k, v and its output: row sums in a fused kernel, all scores in eager."""
    heads = cfg.model.num_attention_heads / cfg.parallel.tensor
    if cfg.model.attention_backend != "eager":
        return 4 * heads
    return heads * cfg.phase.seq_length * (_bytes(cfg) % 4 + 4 + (4 if cfg.model.attention_softcap else 0))


def cache_bytes(cfg: "Config", stage_layers: int) -> float:
    """Key-value cache of one batch of rollouts: rows x slots x layers x key heads x 2."""
    _, rows = _rollout_rows(cfg)
    return rows * cfg.phase.seq_length * stage_layers * 2 * widths(cfg.model)[1] / cfg.parallel.tensor * _bytes(cfg)


def _rollout_rows(cfg: "Config") -> tuple[int, int]:
    """Prompts and answers of one batch."""
    rollout = cfg.phase.rollout
    prompts = max(1, rollout.batch_size // rollout.rollouts_per_prompt)
    return prompts, prompts * rollout.rollouts_per_prompt


def _rollout(cfg: "Config", stage: int) -> float:
    """The cache of all answers, that of their prompts beside it, and the widest moment of the prompts' pass: eager's scores (10 bytes each
    with their copies and the mask) or a layer's MLP.
    """
    model, par, rollout = cfg.model, cfg.parallel, cfg.phase.rollout
    if not rollout:
        return 0
    prompts, rows = _rollout_rows(cfg)
    length = max(1, cfg.phase.seq_length - rollout.max_new_tokens)
    cache = cache_bytes(cfg, model.num_layers // par.pipeline)
    wide = prompts * length * _bytes(cfg) * (4 * model.ffn_hidden_size / par.tensor + 3 * model.hidden_size)
    scores = prompts * length**2 * (10 * model.num_attention_heads / par.tensor + 6)
    return cache * (1 + prompts * length / rows / cfg.phase.seq_length) + max(wide, scores if model.attention_backend == "eager" else 0)


def _fp8_weights(cfg: "Config", stage: int) -> float:
    """FP8 weights of the linears, as they are and transposed, beside those in bf16; in their place they take as much as these."""
    if not cfg.precision.fp8 or cfg.precision.fp8_param_gather:
        return 0
    par, layers = cfg.parallel, cfg.model.num_layers
    per_stage = layers // par.pipeline
    edge = cfg.precision.bf16_layers
    mine = range(stage * per_stage, (stage + 1) * per_stage)
    count = sum(edge <= layer < layers - edge for layer in mine) * matrices(cfg.model) / par.tensor
    return 2 * count


def _keeps_reference(cfg: "Config") -> bool:
    objective = cfg.phase.objective
    return (objective.name == "grpo" and objective.kl > 0) or (objective.name == "wpo" and objective.reference == "live")


def _vectors(model: "ModelConfig", tensor: int) -> int:
    """Norms and biases of one layer, on a rank."""
    q, k = widths(model)
    norms = (4 if model.family in SANDWICH else 2) * model.hidden_size
    return norms + ((q + 2 * k) // tensor if model.qkv_bias else 0)


def _bytes(cfg: "Config") -> int:
    return 2 if cfg.precision.params == "bfloat16" else 4


def _split(cfg: "Config") -> int:
    """Ranks that share the hidden states between a layer's parallel regions."""
    return cfg.parallel.tensor if cfg.parallel.sequence_parallel else 1
