"""What a run is: the schema of `conf/`, its cross-checks, and the one way in for every command line.

Each group of `conf/` is a dataclass here; a key that no dataclass names is an error. `check` finds what can't work
(an impossible layout, a missing file) before anything is queued or written. Imports no torch: submitting is instant.

    @entry_point
    def main(cfg: Config) -> None: ...
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

REPOSITORY = Path(__file__).resolve().parent.parent
CONF = REPOSITORY / "conf"


class InputError(Exception):
    """Bad input: one sentence that says what, where and how to mend it. Entry points print it and exit with 2."""


@dataclass
class ModelConfig:
    """Shape of a decoder. Sizes are counts; `query_scale` is HF's `query_pre_attn_scalar` (scores are divided by its root)."""

    name: str = MISSING
    family: str = MISSING  # gemma2 | qwen2
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
    layernorm_epsilon: float = 1e-6
    tie_embeddings: bool = True
    qkv_bias: bool = False
    query_scale: float | None = None  # null: kv_channels
    attention_softcap: float | None = None
    final_softcap: float | None = None
    sliding_window: int | None = None  # tokens a query sees on windowed layers, itself included
    window_layers: list[int] = field(default_factory=list)  # layers with the window, counted from 0
    attention_backend: str = "auto"  # auto | eager | sdpa
    init_std: float = 0.02


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
class PhaseConfig:
    """One training phase: which data, which objective, from which weights, for how long."""

    name: str = MISSING  # cpt | sft
    objective: str = MISSING  # causal_lm
    start_from: str = MISSING  # an HF folder or a run directory or one of its checkpoints
    seq_length: int = MISSING
    global_batch_size: int = MISSING  # rows of seq_length tokens
    micro_batch_size: int = MISSING
    train_steps: int | None = None
    epochs: float | None = None  # instead of train_steps
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    recompute: str = "none"  # none | selective | full
    save_every: int = 0  # steps; 0: only at the end
    keep_last: int = 2
    log_every: int = 1
    tensorboard: bool = False
    wandb_project: str | None = None


@dataclass
class DataConfig:
    """What text, and how much of each kind. `folder` holds what the data step writes; `cache` what it downloads."""

    name: str = MISSING
    folder: str = MISSING
    cache: str = MISSING
    catalogues: dict[str, str] = field(default_factory=dict)  # package -> version
    locales: list[str] = field(default_factory=list)  # besides en
    cldr_kinds: list[str] = field(default_factory=list)
    cldr_per_locale: int = 0
    held_out: float = 0.1  # share of source strings
    vocab_size: int = 4096  # trained tokenizer only
    shares: dict[str, float] = field(default_factory=dict)  # of CPT tokens: monolingual, parallel, instruction
    sft_examples: int = 0
    sft_translation_share: float = 0.22
    instruction_kinds: list[str] = field(default_factory=list)  # of the general examples
    seed: int = 1234


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

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data


@dataclass
class PrecisionConfig:
    name: str = MISSING
    params: str = "float32"  # float32 | bfloat16
    fp8: str | None = None  # null | delayed | tensorwise | blockwise


@dataclass
class ClusterConfig:
    name: str = MISSING
    launcher: str = "local"
    device: str = "auto"  # auto | cpu | cuda
    threads_per_rank: int = 0  # 0: the cores divided among the ranks


@dataclass
class EvalConfig:
    """Held-out evaluation of one checkpoint; sizes are counts of items, 0 means all."""

    name: str = MISSING
    checkpoint: str | None = None  # a run directory, a checkpoint or an HF folder
    output: str | None = None  # null: <checkpoint's run>/evaluation
    text_per_locale: int = 0
    translations_per_locale: int = 0
    general: int = 0
    batch_size: int = 64
    max_new_tokens: int = 64
    bootstrap_samples: int = 1000
    confidence: float = 0.95


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
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    run_dir: str = MISSING  # of the whole recipe; a phase lives in run_dir/<phase>
    seed: int = 1234

    @property
    def phase_dir(self) -> Path:
        return Path(self.run_dir) / self.phase.name


def _register_schema() -> None:
    """Let Hydra know every key, so that a command line may set one that no YAML file mentions."""
    ConfigStore.instance().store(name="schema", node=Config)


def typed(composed: DictConfig) -> Config:
    """The composed config as dataclasses; raises InputError for a key that was added (`+x=`), a missing value, a broken interpolation."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.to_container(composed)))
    except OmegaConfBaseException as error:
        raise InputError(_one_line(error)) from error


def load(overrides: list[str]) -> Config:
    """Compose `conf/` with Hydra words, as a command line would, and check it; also inside a Hydra command line (a recipe's phases)."""
    _register_schema()
    hydras, outer = GlobalHydra.instance(), GlobalHydra.instance().hydra
    hydras.hydra = None
    try:
        with hydra.initialize_config_dir(str(CONF), version_base=None):
            cfg = typed(hydra.compose("config", overrides=overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_one_line(error)) from error
    finally:
        hydras.hydra = outer
    check(cfg)
    return cfg


def entry_point(main: Callable[[Config], None]) -> Callable[[], None]:
    """Make `main(cfg)` a Hydra command line (multirun included): checked config in, one sentence and exit 2 on bad input."""

    def run(composed: DictConfig) -> None:
        try:
            cfg = typed(composed)
            check(cfg)
            main(cfg)
        except InputError as error:  # here, where Hydra has not yet announced a failed job
            refuse(error)

    def command_line() -> None:
        _register_schema()
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # what can't be composed is raised to us, not printed by Hydra
        try:
            hydra.main(version_base=None, config_path=str(CONF), config_name="config")(run)()
        except (HydraException, OmegaConfBaseException) as error:
            refuse(error)

    return command_line


def refuse(error: Exception) -> NoReturn:
    """End this process over bad input: one sentence on stderr, exit code 2."""
    print(f"error: {_one_line(error)}", file=sys.stderr)
    sys.exit(2)


def check(cfg: Config) -> None:
    """Raise InputError with every contradiction of model, layout and precision that shows without touching a device."""
    _refuse(_layout_problems(cfg))


def check_phase(cfg: Config) -> None:
    """Raise InputError where the phase's batch, sequence or length does not fit the model and the layout."""
    _refuse(_phase_problems(cfg))


def _refuse(problems: Iterator[str]) -> None:
    if found := "; ".join(problems):
        raise InputError(found)


def _layout_problems(cfg: Config) -> Iterator[str]:
    model, par = cfg.model, cfg.parallel
    for name in ("tensor", "pipeline", "context", "data"):
        if getattr(par, name) < 1:
            yield f"parallel.{name}={getattr(par, name)} must be 1 or more"
            return
    for what, count in (
        ("key-value heads", model.num_query_groups),
        ("attention heads", model.num_attention_heads),
        ("vocabulary entries", model.vocab_size),
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
    if par.sequence_parallel and par.tensor == 1:
        yield "parallel.sequence_parallel needs parallel.tensor of 2 or more"
    if cfg.precision.fp8 and not find_spec("transformer_engine"):
        yield (
            f"precision={cfg.precision.name} needs Transformer Engine, which is not installed: "
            "pip install -r requirements-gpu.txt on a machine with a GPU, or use precision=bf16"
        )
    if model.hf_folder and not (Path(model.hf_folder) / "config.json").is_file():
        yield f"model.hf_folder={model.hf_folder} holds no config.json: give a downloaded Hugging Face model folder"
    yield from _unknown_words(
        ("model.attention_backend", model.attention_backend, ("auto", "eager", "sdpa")),
        ("precision.params", cfg.precision.params, ("float32", "bfloat16")),
        ("precision.fp8", cfg.precision.fp8, (None, "delayed", "tensorwise", "blockwise")),
        ("cluster.launcher", cfg.cluster.launcher, ("local",)),
        ("cluster.device", cfg.cluster.device, ("auto", "cpu", "cuda")),
    )


def _phase_problems(cfg: Config) -> Iterator[str]:
    model, phase, par = cfg.model, cfg.phase, cfg.parallel
    per_step = par.data * phase.micro_batch_size
    if phase.micro_batch_size < 1 or phase.global_batch_size < 1 or phase.global_batch_size % per_step:
        yield (
            f"phase.global_batch_size={phase.global_batch_size} is no multiple of parallel.data={par.data} x "
            f"phase.micro_batch_size={phase.micro_batch_size}: use a multiple of {max(per_step, 1)}"
        )
    if phase.seq_length % par.context:
        yield f"phase.seq_length={phase.seq_length} is not divisible by parallel.context={par.context}"
    if par.sequence_parallel and phase.seq_length % par.tensor:
        yield f"phase.seq_length={phase.seq_length} is not divisible by parallel.tensor={par.tensor}, as sequence_parallel needs"
    if phase.seq_length > model.max_position_embeddings:
        yield f"phase.seq_length={phase.seq_length} exceeds model={model.name}'s context of {model.max_position_embeddings}"
    if (phase.train_steps is None) == (phase.epochs is None):
        yield f"phase={phase.name}: give either phase.train_steps or phase.epochs, the other null"
    yield from _unknown_words(
        ("phase.recompute", phase.recompute, ("none", "selective", "full")),
        ("phase.optimizer.schedule", phase.optimizer.schedule, ("cosine", "linear", "constant")),
    )


def _unknown_words(*choices: tuple[str, str | None, tuple[str | None, ...]]) -> Iterator[str]:
    for key, value, allowed in choices:
        if value not in allowed:
            yield f"{key}={value} is unknown: use one of {', '.join(str(a) for a in allowed)}"


def difference(old: Config, new: Config, ignore: tuple[str, ...] = ("parallel", "cluster", "eval", "recipe")) -> list[str]:
    """Keys that differ, as `phase.train_steps: 300 -> 400`; groups in `ignore` may change between runs of one directory."""

    def walk(a: object, b: object, path: str) -> Iterator[str]:
        for f in fields(a):
            name = f"{path}{f.name}"
            x, y = getattr(a, f.name), getattr(b, f.name)
            if name in ignore:
                continue
            if hasattr(x, "__dataclass_fields__"):
                yield from walk(x, y, f"{name}.")
            elif x != y:
                yield f"{name}: {x} -> {y}"

    return list(walk(old, new, ""))


def _one_line(error: Exception) -> str:
    """First line of an error's text, the rest being Hydra's and OmegaConf's advice for programmers."""
    text = str(error).strip()
    if isinstance(error, InputError):
        return text
    cause = str(error.__cause__).strip() if error.__cause__ else ""
    lines = [line.strip() for line in (text + "\n" + cause).splitlines() if line.strip()]
    key = next((m.group(1) for line in lines if (m := re.match(r"full_key: (\S+)", line))), None)
    first = ", ".join(dict.fromkeys(lines[:2] if text.startswith("Could not override") else lines[:1]))
    return f"{first} (at {key})" if key else first
