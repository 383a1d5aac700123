"""What can't work: contradictions of model, layout, precision and phase that show without touching a device, one sentence each."""

import json
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tower.plan import memory_problems

if TYPE_CHECKING:
    from megatron_tower.config import Config, ModelConfig, OptimizerConfig, WPOConfig

ATTENTION_PACKAGES = {  # back end -> package, least version, command
    "flash2": ("flash-attn", (2, 6), "pip install --no-build-isolation flash-attn==2.8.3"),
    "flash4": ("flash-attn-4", (4, 0), "pip install flash-attn-4==4.0.0b36"),
    "te": ("transformer-engine", (2, 0), "pip install --no-build-isolation 'transformer-engine[pytorch]==2.20.2'"),
}
HF_NAMES = {  # ours -> those of config.json, the same in all families
    "family": "model_type",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
ATTENTION_BACKENDS = ("auto", "eager", "sdpa", "flex", *ATTENTION_PACKAGES)


def layout_problems(cfg: "Config") -> Iterator[str]:
    model, par = cfg.model, cfg.parallel
    for name in ("tensor", "pipeline", "context", "data"):
        if getattr(par, name) < 1:
            yield f"parallel.{name}={getattr(par, name)} must be 1 or more"
            return
    for what, count in (
        ("key-value heads", model.num_query_groups),
        ("attention heads", model.num_attention_heads),
        ("MLP channels", model.ffn_hidden_size),
    ):
        if count % par.tensor:
            fits = ", ".join(str(n) for n in range(1, min(count, 64) + 1) if count % n == 0)
            yield f"model={model.name} has {count} {what}; parallel.tensor={par.tensor} does not divide them: use one of {fits}"
    if model.num_attention_heads % model.num_query_groups:
        yield f"model={model.name}: {model.num_attention_heads} attention heads are no multiple of {model.num_query_groups} query groups"
    if model.num_layers % (par.pipeline * (par.virtual_pipeline or 1)):
        yield (
            f"model={model.name} has {model.num_layers} layers; parallel.pipeline={par.pipeline} x virtual_pipeline="
            f"{par.virtual_pipeline or 1} does not divide them: choose a product that does"
        )
    if par.virtual_pipeline and par.pipeline == 1:
        yield "parallel.virtual_pipeline needs parallel.pipeline of 2 or more"
    if par.context > 1:
        yield f"parallel.context={par.context}: attention is not split over a sequence yet, use parallel.context=1"
    if par.sequence_parallel and par.tensor == 1:
        yield "parallel.sequence_parallel needs parallel.tensor of 2 or more"
    yield from _folder_problems(model)
    yield from _unknown_words(
        ("model.attention_backend", model.attention_backend, ATTENTION_BACKENDS),
        ("model.rope_scaling.rope_type", model.rope_scaling and model.rope_scaling.rope_type, (None, "linear", "llama3")),
        ("parallel.recompute", par.recompute, ("none", "selective", "mlp", "full")),
        ("parallel.gradients", par.gradients, ("float32", "bfloat16")),
        ("precision.params", cfg.precision.params, ("float32", "bfloat16")),
        ("precision.layers", cfg.precision.layers, ("auto", "torch", "te")),
        ("precision.fp8", cfg.precision.fp8, (None, "delayed", "tensorwise", "blockwise")),
    )
    yield from _precision_problems(cfg)
    yield from _attention_problems(cfg)
    yield from _cluster_problems(cfg)


def _folder_problems(model: "ModelConfig") -> Iterator[str]:
    """What the folder's config.json says of its size; the weights are looked at when they are read (models/folder.py)."""
    if not model.hf_folder:
        return
    file = Path(model.hf_folder) / "config.json"
    if not file.is_file():
        yield f"model.hf_folder={model.hf_folder} holds no config.json: give a downloaded Hugging Face model folder"
        return
    try:
        stated = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        yield f"model.hf_folder: {file} can't be read ({error}): download it again"
        return
    apart = [(name, hf) for name, hf in HF_NAMES.items() if hf in stated and stated[hf] != getattr(model, name)]
    if apart:
        told = ", ".join(f"{name}={getattr(model, name)} (config.json: {stated[hf]})" for name, hf in apart)
        yield f"model={model.name} and model.hf_folder={model.hf_folder} differ: {told}: choose the model config of this folder"


def _precision_problems(cfg: "Config") -> Iterator[str]:
    precision, par, model = cfg.precision, cfg.parallel, cfg.model
    here = f"precision={precision.name}"
    if precision.params == "float32" and (precision.fp8 or par.gradients == "bfloat16" or par.offload):
        yield f"{here} keeps weights in float32: fp8, parallel.gradients=bfloat16 and parallel.offload need precision.params=bfloat16"
    if precision.fp8 or precision.layers == "te":
        yield from _engine_problems(cfg, here, "precision=bf16")
    if not 0 <= par.offload <= 1 or (par.offload and not par.distributed_optimizer):
        yield f"parallel.offload={par.offload} is a share of what parallel.distributed_optimizer=true divides: set that, and 0 to 1"
    if par.offload and cfg.cluster.device == "cpu":
        yield f"parallel.offload={par.offload} moves state from a GPU to the host and cluster={cfg.cluster.name} has device=cpu: use 0"
    if precision.fp8_param_gather and not (precision.fp8 and par.distributed_optimizer and not par.offload):
        yield (
            f"{here}: fp8_param_gather=true leaves high precision to the optimizer's weights, shared among data-parallel ranks: "
            "it needs precision.fp8, parallel.distributed_optimizer=true and parallel.offload=0"
        )
    layers = model.num_layers // par.pipeline
    if not 0 <= precision.bf16_layers <= layers or (precision.bf16_layers and precision.fp8 in (None, "delayed")):
        yield (
            f"precision.bf16_layers={precision.bf16_layers} must be 0 to {layers}, a stage's layers, and goes with "
            "precision.fp8=tensorwise or blockwise: delayed scaling can't leave FP8 for a layer"
        )
    if precision.fp8 and precision.layers == "torch":
        yield f"{here}: FP8 is Transformer Engine's, use precision.layers=auto"
    if precision.fp8:
        for what, size in (
            ("model.hidden_size", model.hidden_size),
            ("model.ffn_hidden_size / parallel.tensor", model.ffn_hidden_size // par.tensor),
            ("a rank's queries", model.num_attention_heads * model.kv_channels // par.tensor),
            ("a rank's keys", model.num_query_groups * model.kv_channels // par.tensor),
        ):
            if size % 16:
                yield f"{here}: FP8 multiplies multiples of 16 and {what} is {size}: use precision=bf16"


def _engine_problems(cfg: "Config", here: str, instead: str) -> Iterator[str]:
    """Of `here`, which asks for Transformer Engine."""
    if not cfg.cluster.container and not find_spec("transformer_engine"):
        yield (
            f"{here} needs Transformer Engine, which is not installed: "
            f"pip install -r requirements-gpu.txt on a machine with a GPU, or use {instead}"
        )


def _attention_problems(cfg: "Config") -> Iterator[str]:
    word, cluster = cfg.model.attention_backend, cfg.cluster
    if word in ("sdpa", "te") and cfg.model.attention_softcap is not None:
        yield f"model.attention_backend={word} has no soft-cap, which model={cfg.model.name} needs: use auto"
    elif word in ATTENTION_PACKAGES and cluster.device == "cpu":
        yield f"model.attention_backend={word} needs a GPU and cluster={cluster.name} has device=cpu: use auto"
    elif not cluster.container and (lacking := lacking_package(word)):
        yield f"model.attention_backend={word} {lacking}, or use auto"


def lacking_package(backend: str) -> str | None:
    """What `backend` needs that is not installed, and how to install it; None when there is nothing to say. Imports nothing."""
    if backend not in ATTENTION_PACKAGES:
        return None
    name, least, command = ATTENTION_PACKAGES[backend]
    try:
        found = version(name)
    except PackageNotFoundError:
        return f"needs {name}, which is not installed: {command}"
    if tuple(int(part) for part in found.split(".")[:2]) < least:
        return f"needs {name} {least[0]}.{least[1]} or newer, {found} is installed: {command}"
    return None


def _cluster_problems(cfg: "Config") -> Iterator[str]:
    cluster, ranks = cfg.cluster, cfg.parallel.world_size
    yield from _unknown_words(
        ("cluster.launcher", cluster.launcher, ("local", "slurm")),
        ("cluster.device", cluster.device, ("auto", "cpu", "cuda")),
        ("cluster.container.runtime", cluster.container and cluster.container.runtime, (None, "pyxis", "apptainer")),
    )
    if cluster.threads_per_rank < 0:
        yield f"cluster.threads_per_rank={cluster.threads_per_rank} must be 0 or more; 0 divides the cores among the ranks"
    if cluster.ranks_per_node < 1 or cluster.cpus_per_rank < 1:
        yield f"cluster.ranks_per_node={cluster.ranks_per_node} and cpus_per_rank={cluster.cpus_per_rank} must be 1 or more"
    elif cluster.launcher == "slurm":
        if cluster.gpus_per_node and cluster.ranks_per_node != cluster.gpus_per_node:
            yield (
                f"cluster={cluster.name} has ranks_per_node={cluster.ranks_per_node} and gpus_per_node={cluster.gpus_per_node}: "
                "start one rank a GPU, set both to the same number"
            )
        if ranks > cluster.ranks_per_node and ranks % cluster.ranks_per_node:
            yield (
                f"parallel={cfg.parallel.name} makes {ranks} ranks and cluster={cluster.name} has {cluster.ranks_per_node} a node: "
                "change parallel.data so that they fill whole nodes"
            )
        if cluster.max_nodes and ranks > cluster.max_nodes * cluster.ranks_per_node:
            yield (
                f"parallel={cfg.parallel.name} makes {ranks} ranks and cluster={cluster.name} holds {cluster.max_nodes} nodes x "
                f"{cluster.ranks_per_node}: choose a smaller layout or raise cluster.max_nodes"
            )


def phase_problems(cfg: "Config") -> Iterator[str]:
    model, phase, par = cfg.model, cfg.phase, cfg.parallel
    per_step = par.data * (1 if phase.dataset == "prompts" else phase.micro_batch_size)  # a micro-batch of prompts is one of answers
    if phase.micro_batch_size < 1 or phase.global_batch_size < 1 or phase.global_batch_size % per_step:
        yield (
            f"phase.global_batch_size={phase.global_batch_size} is no multiple of parallel.data={par.data} x "
            f"phase.micro_batch_size={phase.micro_batch_size}: use a multiple of {max(per_step, 1)}"
        )
    if par.sequence_parallel and phase.seq_length % par.tensor:
        yield f"phase.seq_length={phase.seq_length} is not divisible by parallel.tensor={par.tensor}, as sequence_parallel needs"
    if phase.seq_length > model.max_position_embeddings:
        yield (
            f"phase.seq_length={phase.seq_length} exceeds model={model.name}'s context of {model.max_position_embeddings}: "
            "use that or less, as in phase.seq_length=256"
        )
    if (phase.train_steps is None) == (phase.epochs is None):
        yield f"phase={phase.name}: give either phase.train_steps or phase.epochs, the other null"
    yield from _out_of_range(
        ("seed", cfg.seed, "from 0 to 4294967295", lambda seed: 0 <= seed < 2**32),
        ("phase.seq_length", phase.seq_length, "2 or more", lambda length: length >= 2),
        ("phase.train_steps", phase.train_steps, "1 or more", lambda steps: steps >= 1),
        ("phase.epochs", phase.epochs, "above 0", lambda epochs: epochs > 0),
        ("phase.log_every", phase.log_every, "1 or more", lambda every: every >= 1),
    )
    yield from _optimizer_problems(phase.optimizer)
    if phase.file and phase.dataset == "documents":
        yield f"phase.file={phase.file}: phase.dataset=documents learns from the corpora of data.folder, leave phase.file out"
    every = phase.evaluate_every
    if every and not (phase.save_every and phase.keep_every and every % phase.save_every == 0 == every % phase.keep_every):
        yield (
            f"phase.evaluate_every={every} is no multiple of save_every={phase.save_every} and of keep_every={phase.keep_every}: no "
            "checkpoint would be there then, or it might be gone before it is scored"
        )
    if phase.keep_last < 1 or phase.save_every < 0 or phase.keep_every < 0:
        yield (
            f"phase.keep_last={phase.keep_last} must be 1 or more, save_every={phase.save_every} and "
            f"keep_every={phase.keep_every} 0 or more"
        )
    yield from _unknown_words(
        ("phase.export", phase.export, (None, "hf")),
        ("phase.optimizer.schedule", phase.optimizer.schedule, ("cosine", "linear", "constant")),
        ("phase.dataset", phase.dataset, ("documents", "chats", "preferences", "prompts")),
    )
    if cfg.precision.fp8 and phase.dataset in ("preferences", "prompts"):
        yield (
            f"phase={phase.name} learns from rows of any length and compares log-probabilities with those of bf16, "
            f"precision={cfg.precision.name} suits neither: use precision=bf16"
        )
    elif cfg.precision.fp8 and (phase.seq_length * phase.micro_batch_size) % (16 * (par.tensor if par.sequence_parallel else 1)):
        yield f"phase.seq_length={phase.seq_length} x micro_batch_size={phase.micro_batch_size}: FP8 takes multiples of 16 tokens a rank"
    if cfg.overlap_tokens:
        yield from _overlap_problems(cfg)
    wanted = {"wpo": ("preferences",), "grpo": ("prompts",)}.get(phase.objective.name, ("documents", "chats"))
    if phase.dataset not in wanted:
        yield f"phase.objective.name={phase.objective.name} does not learn from phase.dataset={phase.dataset}: use {' or '.join(wanted)}"
    if phase.objective.name != "causal_lm" and par.virtual_pipeline:
        yield f"phase={phase.name} generates or scores, which parallel.virtual_pipeline={par.virtual_pipeline} can't: use null"
    if phase.dataset == "preferences" and not phase.file:
        yield f"phase={phase.name} needs phase.file: a JSONL file of preference pairs, as tools/build_pairs.py writes"
    if phase.objective.name == "wpo":
        yield from _wpo_problems(phase.objective)
    if phase.objective.name == "grpo":
        yield from _grpo_problems(cfg)
    if cfg.cluster.gpu_memory_gib:
        yield from memory_problems(cfg)


def _overlap_problems(cfg: "Config") -> Iterator[str]:
    par, precision, cluster = cfg.parallel, cfg.precision, cfg.cluster
    here = "parallel.tensor_overlap=true"
    if not par.sequence_parallel or precision.params != "bfloat16" or precision.layers == "torch" or precision.fp8 == "blockwise":
        yield (
            f"{here}: buffers hold bf16, or FP8 of one scale, of sequence-parallel ranks: it needs parallel.sequence_parallel=true, "
            "precision.params=bfloat16, and other than precision.layers=torch and precision.fp8=blockwise"
        )
    if cluster.device == "cpu":
        yield f"{here} is for ranks on GPUs and cluster={cluster.name} has device=cpu: use false"
    else:
        yield from _engine_problems(cfg, here, "false")
    if cluster.launcher == "slurm" and cluster.ranks_per_node % par.tensor:
        yield (
            f"{here} needs tensor-parallel ranks in one node and parallel.tensor={par.tensor} does not divide the "
            f"{cluster.ranks_per_node} that cluster={cluster.name} has: use a parallel.tensor that does, or false"
        )


def _optimizer_problems(optimizer: "OptimizerConfig") -> Iterator[str]:
    def share(value: float) -> bool:
        return 0 <= value <= 1

    def not_negative(value: float) -> bool:
        return 0 <= value < inf

    for name, says, holds in (
        ("lr", "above 0", lambda lr: 0 < lr < inf),
        ("warmup", "from 0 to 1, a fraction of the steps", share),
        ("min_lr", "from 0 to 1, a fraction of lr", share),
        ("weight_decay", "0 or more", not_negative),
        ("beta1", "0 or more and below 1", lambda beta: 0 <= beta < 1),
        ("beta2", "0 or more and below 1", lambda beta: 0 <= beta < 1),
        ("epsilon", "above 0", lambda epsilon: 0 < epsilon < inf),
        ("clip_grad", "0 or more; 0 clips nothing", not_negative),
    ):
        yield from _out_of_range((f"phase.optimizer.{name}", getattr(optimizer, name), says, holds))


def _wpo_problems(objective: "WPOConfig") -> Iterator[str]:
    if objective.beta <= 0 or objective.clamp <= 0:
        yield f"phase.objective.beta={objective.beta} and clamp={objective.clamp} must be above 0"
    if not 0 <= objective.label_smoothing < 0.5:
        yield f"phase.objective.label_smoothing={objective.label_smoothing} must be 0 or more and below 0.5"
    if objective.sft_coefficient < 0:
        yield f"phase.objective.sft_coefficient={objective.sft_coefficient} must be 0 or more"
    yield from _unknown_words(
        ("phase.objective.weighting", objective.weighting, ("wpo", "none")),
        ("phase.objective.reference", objective.reference, ("stored", "live")),
    )


def _grpo_problems(cfg: "Config") -> Iterator[str]:
    phase, objective, rollout = cfg.phase, cfg.phase.objective, cfg.phase.rollout
    yield from _unknown_words(("phase.objective.aggregation", objective.aggregation, ("grpo", "dr_grpo", "dapo")))
    if not 0 < objective.clip_low < 1 or objective.clip_high <= 0:
        yield f"phase.objective.clip_low={objective.clip_low} must lie between 0 and 1, clip_high={objective.clip_high} above 0"
    if objective.kl < 0 or (objective.importance_cap is not None and objective.importance_cap <= 0):
        yield f"phase.objective.kl={objective.kl} must be 0 or more, importance_cap={objective.importance_cap} above 0 or null"
    if rollout is None:
        yield f"phase={phase.name} needs phase.rollout: how answers are sampled"
        return
    if rollout.rollouts_per_prompt < 2:
        yield f"phase.rollout.rollouts_per_prompt={rollout.rollouts_per_prompt}: a group needs 2 or more answers to be compared"
    if rollout.temperature <= 0 or not 0 < rollout.top_p <= 1:
        yield f"phase.rollout.temperature={rollout.temperature} must be above 0, top_p={rollout.top_p} above 0 and at most 1"
    if not 1 <= rollout.max_new_tokens < phase.seq_length:
        yield f"phase.rollout.max_new_tokens={rollout.max_new_tokens} must be 1 or more and below phase.seq_length={phase.seq_length}"
    if rollout.updates < 1 or phase.global_batch_size % rollout.updates:
        yield f"phase.rollout.updates={rollout.updates} must divide phase.global_batch_size={phase.global_batch_size} prompts"
    elif phase.train_steps and phase.train_steps % rollout.updates:
        yield f"phase.rollout.updates={rollout.updates} must divide phase.train_steps={phase.train_steps}, or the last round is left unused"
    if min(rollout.batch_size, rollout.processes) < 1 or rollout.timeout <= 0 or rollout.refills < 0:
        yield "phase.rollout: batch_size and processes must be 1 or more, timeout above 0, refills 0 or more"


def _out_of_range(*numbers: tuple[str, float | None, str, Callable[[float], bool]]) -> Iterator[str]:
    for key, value, says, holds in numbers:
        if value is not None and not holds(value):
            yield f"{key}={value} must be {says}"


def _unknown_words(*choices: tuple[str, str | None, tuple[str | None, ...]]) -> Iterator[str]:
    for key, value, allowed in choices:
        if value not in allowed:
            yield f"{key}={value} is unknown: use one of {', '.join(str(a) for a in allowed)}"
