"""What a run is: the schema of `conf/` and its cross-checks.

Each group of `conf/` is a dataclass here; a key that no dataclass names is an error. `check` finds what can't work
(an impossible layout, a missing file) before anything is queued or written. Imports no torch: submitting is instant.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from megatron_tower.checks import layout_problems, phase_problems
from megatron_tower.config_data import DataConfig
from megatron_tower.config_prompts import PromptsConfig
from megatron_tower.config_sft import EndpointConfig, SftConfig

REPOSITORY = Path(__file__).resolve().parent.parent
CONF = REPOSITORY / "conf"


class InputError(Exception):
    """Bad input: one sentence that says what, where and how to mend it. Entry points print it and exit with 2."""


@dataclass
class RopeScaling:
    """RoPE stretched over a longer context, in HF's words; the last three are for llama3 (models/rope.py)."""

    rope_type: str = MISSING  # linear | llama3
    factor: float = MISSING
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass
class ModelConfig:
    """Shape of a decoder. Sizes are counts; `query_scale` is HF's `query_pre_attn_scalar` (scores are divided by its root)."""

    name: str = MISSING
    family: str = MISSING  # gemma2 | qwen2 | llama
    hf_folder: str | None = None  # base weights and tokenizer; null: random weights, tokenizer trained by the data step
    num_layers: int = MISSING
    hidden_size: int = MISSING
    ffn_hidden_size: int = MISSING
    num_attention_heads: int = MISSING
    num_query_groups: int = MISSING
    kv_channels: int = MISSING
    vocab_size: int = MISSING
    max_position_embeddings: int = MISSING
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    layernorm_epsilon: float = 1e-6
    tie_embeddings: bool = True
    qkv_bias: bool = False
    query_scale: float | None = None  # null: kv_channels
    attention_softcap: float | None = None
    final_softcap: float | None = None
    sliding_window: int | None = None  # tokens a query sees on windowed layers, itself included
    window_layers: list[int] = field(default_factory=list)  # layers with the window, counted from 0
    attention_backend: str = "auto"  # auto | eager | sdpa | flex | flash2 | flash4 | te (models/attention)
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):  # of a checkpoint's manifest
            self.rope_scaling = RopeScaling(**self.rope_scaling)


@dataclass
class OptimizerConfig:
    """AdamW and its schedule; `warmup` and `min_lr` are fractions (of the steps, of `lr`)."""

    lr: float = MISSING
    schedule: str = "cosine"  # cosine | linear | constant
    warmup: float = 0.01
    min_lr: float = 0.1
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class CausalLMConfig:
    """Next-token cross entropy (objectives/causal_lm.py); has no settings."""

    name: str = "causal_lm"


@dataclass
class WPOConfig:
    """Weighted preference optimisation (objectives/wpo.py); `weighting: none` is DPO."""

    name: str = "wpo"
    weighting: str = "wpo"  # wpo | none
    beta: float = MISSING
    clamp: float = 1.0  # upper bound of the weight
    label_smoothing: float = 0.0  # probability that a pair is labelled the wrong way round
    length_normalised: bool = False  # margins of mean instead of summed log-probabilities
    sft_coefficient: float = 0.0  # of the chosen answer's mean negative log-likelihood, added to the loss
    reference: str = "stored"  # stored: scored once before the first step | live: a frozen copy of the weights is kept


@dataclass
class GRPOConfig:
    """Group-relative policy optimisation (objectives/grpo.py)."""

    name: str = "grpo"
    aggregation: str = "grpo"  # grpo | dr_grpo | dapo
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.0  # coefficient of the k3 estimate of KL(policy || start_from); 0: no reference model is kept
    importance_cap: float | None = None  # truncated importance sampling: weight min(pi_train / pi_rollout, cap); null: off


OBJECTIVES = {"causal_lm": CausalLMConfig, "wpo": WPOConfig, "grpo": GRPOConfig}


@dataclass
class RolloutConfig:
    """How answers are sampled and scored during training (rollout/experience.py)."""

    rollouts_per_prompt: int = MISSING
    temperature: float = MISSING
    top_p: float = MISSING
    max_new_tokens: int = MISSING
    updates: int = 1  # optimizer updates made from one round of rollouts, on equal shares of its prompts
    refills: int = 0  # further rounds of prompts when groups without variance leave a step short of prompts
    batch_size: int = 64  # answers decoded at once
    timeout: float = 10.0  # seconds a reward may take for one answer
    processes: int = 1  # that compute rewards, on each data-parallel rank


@dataclass
class PhaseConfig:
    """One training phase: which data, which objective, from which weights, for how long."""

    name: str = MISSING  # cpt | sft | wpo | grpo: also the phase's directory
    dataset: str = MISSING  # documents | chats | preferences | prompts
    file: str | None = None  # JSONL of chats, preferences or prompts; null: what the data step wrote
    objective: Any = MISSING  # one of OBJECTIVES, by its `name`
    rollout: RolloutConfig | None = None  # for grpo
    start_from: str = MISSING  # an HF folder or a run directory or one of its checkpoints
    seq_length: int = MISSING  # tokens of a row; of a prompt with its answer for preferences and prompts
    global_batch_size: int = MISSING  # rows of seq_length tokens, pairs, or prompts
    micro_batch_size: int = MISSING  # rows, pairs, or answers
    train_steps: int | None = None
    epochs: float | None = None  # instead of train_steps
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    save_every: int = 0  # steps; 0: only at the end
    async_save: bool = False  # write beside the training, from a copy of weights and moments in host memory
    keep_last: int = 2  # checkpoints
    keep_every: int = 0  # steps, of which the first checkpoint stays for ever; 0: none does
    evaluate_every: int = 0  # steps: each checkpoint that is a multiple of them is scored by a job of its own; 0: none is
    evaluate_words: list[str] = field(default_factory=list)  # of that job, beside the phase's own: parallel=single, ...
    export: str | None = None  # hf: the last checkpoint also becomes a Hugging Face folder, <phase>/hf, with a model card
    log_every: int = 1
    tensorboard: bool = False
    wandb_project: str | None = None


@dataclass
class ParallelConfig:
    """How the model is spread over ranks; world size is the product of the five degrees but `virtual_pipeline`."""

    name: str = MISSING
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    recompute: str = "none"  # none | selective (attention) | mlp | full: made again in the backward pass, at most a forward pass more
    gradients: str = "float32"  # float32 | bfloat16: accumulated and reduced in; bfloat16 halves memory and traffic, sums lose digits
    offload: float = 0.0  # share of main weights and moments in host memory: 12 bytes a weight less on the GPU, Adam there is slower
    overlap: bool = False  # reduce gradients and gather weights beside the computation; costs kernels that share the GPU
    tensor_overlap: bool = False  # CPT, SFT: collectives of tensor parallelism beside products; costs 16 to 40 x tokens x hidden bytes

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data


@dataclass
class PrecisionConfig:
    name: str = MISSING
    params: str = "float32"  # float32 | bfloat16
    fp8: str | None = None  # null | delayed | tensorwise | blockwise
    layers: str = "auto"  # auto | torch | te: linears of megatron-core or Transformer Engine; auto: te for bf16 on CUDA where installed
    fp8_param_gather: bool = False  # linears keep FP8 weights alone: 2 bytes a weight less, and data-parallel ranks gather half as much
    bf16_layers: int = 0  # first and as many last layers that FP8 leaves in bf16: steadier, and slower by their share


@dataclass
class ContainerConfig:
    """What the ranks of a Slurm job run in."""

    runtime: str = MISSING  # pyxis | apptainer
    image: str = MISSING
    mounts: list[str] = field(default_factory=list)  # host paths, or host:container


@dataclass
class ClusterConfig:
    """Where ranks run, what a job asks of Slurm, and how it outlives what happens to it (docs/clusters.md)."""

    name: str = MISSING
    launcher: str = "local"  # local | slurm
    device: str = "auto"  # auto | cpu | cuda
    threads_per_rank: int = 0  # 0: the cores divided among the ranks
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str = "24:00:00"  # of a job, as Slurm writes it
    max_nodes: int | None = None  # that one job may take
    ranks_per_node: int = 1  # with GPUs: one each
    gpus_per_node: int = 0
    gpu_memory_gib: float = 0.0  # that a GPU must have and a phase must fit into (plan.py); 0: not looked at
    cpus_per_rank: int = 1
    memory_per_node: str | None = None  # as Slurm writes it
    sbatch: dict[str, str] = field(default_factory=dict)  # further options, by their long names
    srun: list[str] = field(default_factory=list)  # further words
    setup: list[str] = field(default_factory=list)  # shell lines before a job's work, on its first node: modules, virtual environment
    environment: dict[str, str] = field(default_factory=dict)  # of the ranks
    container: ContainerConfig | None = None
    signal_seconds: int = 120  # before the time limit, when ranks are asked to save and end
    idle_restarts: int = 3  # starts in a row that saved nothing new, after which a job gives up; 0: it never requeues itself
    exclude_failed_nodes: bool = True  # from the restart of a job that they failed
    preflight_seconds: int = 60  # until a rank that has not arrived is called missing
    clock_seconds: float = 10.0  # that the nodes' clocks may differ by
    disk_gib: float = 0.0  # free where run_dir is
    hang_seconds: int = 0  # without a step, after which all stacks are dumped and the ranks killed; 0: off


GENERATORS = ("megatron", "transformers", "vllm", "endpoint")
STAGES = ("all", "generate", "score")
HELD_OUT_TASKS = ("text", "translation", "general", "preference", "verifiable")  # what the data step holds out


@dataclass
class EvalConfig:
    """Evaluation of one model on the tasks named; sizes are counts of items, 0 means all."""

    name: str = MISSING
    checkpoint: str | None = None  # a run directory, a checkpoint or an HF folder
    output: str | None = None  # null: <checkpoint's run>/evaluation
    stage: str = "all"  # all | generate: answers and cheap metrics | score: neural metrics of the answers that are there
    generator: str = "megatron"  # megatron | transformers | vllm | endpoint
    chat: bool | None = None  # null: in the chat template where there is one, but for a CPT phase
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    metrics: dict[str, str] = field(default_factory=dict)  # neural metric -> its folder or name on the hub
    metric_precision: str = "fp32"  # fp32 | fp16, as comet-score has it | bf16
    metric_tokens: int = 16384  # of a metric's batch, padding included; a CPU takes 1,024 at most
    metric_processes: int = 0  # that score at once; 0: one a GPU
    tasks: list[str] = field(default_factory=lambda: list(HELD_OUT_TASKS))
    assets: str = "assets"  # what tools/fetch_assets.py fetched: a folder for each benchmark, metric and model
    sources: dict[str, str] = field(default_factory=dict)  # benchmark -> a local folder or file, where it is not among the assets
    limit: int = 0  # rows of each group (pair, language) of a benchmark
    pairs: list[str] = field(default_factory=list)  # en-de_DE, ...; empty: the task's default
    reverse: bool = False  # also xx->en
    documents: bool = False  # whole documents instead of segments
    text_per_locale: int = 0
    translations_per_locale: int = 0
    general: int = 0
    preference: int = 0
    verifiable: int = 0
    batch_size: int = 64
    max_new_tokens: int = 64
    reward_timeout: float = 10.0  # seconds for one answer
    run_code: bool = False  # whether a benchmark may run programs that the model wrote (evaluation/sandbox.py)
    bootstrap_samples: int = 1000
    confidence: float = 0.95


@dataclass
class PairsConfig:
    """Preference pairs: which answers of which checkpoint, how they are scored (tools/build_pairs.py)."""

    name: str = MISSING
    checkpoint: str | None = None  # samples the answers: a run directory, a checkpoint or an HF folder
    items: str | None = None  # JSONL of prompts with their rewards, or of SFT's chats; null: what the data step wrote
    answers: str | None = None  # JSONL of answers that were made elsewhere: {prompt, answers}
    given: str | None = None  # JSONL of ready pairs, or of post-edits {source, mt, post_edit, source_locale, target_locale}
    output: str | None = None  # null: <run_dir>/pairs.jsonl
    prompts: int = 0  # 0: all items
    samples: int = 5
    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 512
    batch_size: int = 64
    scorer: str = "rewards"  # rewards | comet | reward_model
    scorer_path: str | None = None
    minimum_gap: float = 0.0  # no pair of scores as close as this
    timeout: float = 10.0  # seconds a reward may take for one answer
    processes: int = 1


@dataclass
class RecipeConfig:
    """Phases in order; `overrides` are Hydra words each phase adds, the user's own words come last."""

    name: str = MISSING
    phases: list[str] = field(default_factory=list)
    overrides: dict[str, list[str]] = field(default_factory=dict)
    sentence: str | None = None  # translated at the end, to show that it works
    sentence_locale: str | None = None


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    phase: PhaseConfig = field(default_factory=PhaseConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    run_dir: str = MISSING  # of the whole recipe; a phase lives in run_dir/<phase>
    seed: int = 1234

    @property
    def phase_dir(self) -> Path:
        return Path(self.run_dir) / self.phase.name

    @property
    def overlap_tokens(self) -> int | None:
        """Tokens of each micro-batch where `parallel.tensor_overlap` is to be had; None for pairs and answers, which are of any length."""
        fixed = self.phase.dataset in ("documents", "chats")
        return self.phase.seq_length * self.phase.micro_batch_size if self.parallel.tensor_overlap and fixed else None

    @property
    def evaluation_dir(self) -> Path:
        return Path(self.eval.output or self.evaluated / "evaluation")

    @property
    def evaluated(self) -> Path:
        """What eval.checkpoint means: a path, or for org/name of the hub where it was fetched to (tools/fetch_assets.py)."""
        path, kept = Path(self.eval.checkpoint or ""), Path(self.eval.assets) / (self.eval.checkpoint or "").replace("/", "--")
        return kept if self.eval.checkpoint and kept.is_dir() and not path.exists() else path


def check(cfg: Config) -> None:
    """Raise InputError with every contradiction of model, layout and precision that shows without touching a device."""
    _refuse(layout_problems(cfg))


def check_phase(cfg: Config) -> None:
    """Raise InputError where the phase's batch, sequence or length does not fit the model and the layout."""
    _refuse(phase_problems(cfg))


def _refuse(problems: Iterator[str]) -> None:
    if found := "; ".join(problems):
        raise InputError(found)


NOT_A_RUN = ("parallel", "cluster", "eval", "pairs", "sft", "prompts", "recipe")


def difference(old: Config, new: Config, ignore: tuple[str, ...] = NOT_A_RUN) -> list[str]:
    """Keys that differ, as `phase.train_steps: 300 -> 400`; groups in `ignore` may change between runs of one directory."""

    def walk(a: object, b: object, path: str) -> Iterator[str]:
        for f in fields(a):
            name = f"{path}{f.name}"
            x, y = getattr(a, f.name), getattr(b, f.name)
            if name in ignore:
                continue
            if hasattr(x, "__dataclass_fields__") and type(x) is type(y):
                yield from walk(x, y, f"{name}.")
            elif x != y:
                yield f"{name}: {x} -> {y}"

    return list(walk(old, new, ""))


def digest(cfg: Config, ignore: tuple[str, ...]) -> str:
    """Tells a configuration from any other; what `ignore` names of Config's fields makes no difference."""
    told = {name: value for name, value in asdict(cfg).items() if name not in ignore}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
