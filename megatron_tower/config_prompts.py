"""The schema of `conf/prompts`: what GRPO is asked, and how hard it may be for a checkpoint. Part of `config.py`."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from megatron_tower.config_sft import TextConfig


@dataclass
class PromptSourceConfig(TextConfig):
    """Prompts of one origin."""

    form: str = MISSING  # gsm8k | math | ifeval | rlvr (data/published.py), judgements, pairs
    share: float = MISSING  # of prompts.count


@dataclass
class DifficultyConfig:
    """Prompts kept where the mean reward of a checkpoint's answers lies between two bounds (tools/filter_prompts.py)."""

    checkpoint: str | None = None  # a run directory, a checkpoint or an HF folder
    items: str | None = None  # null: what tools/build_prompts.py wrote
    output: str | None = None  # null: <run_dir>/prompts_filtered.jsonl
    minimum: float = 0.3
    maximum: float = 0.95
    rollouts_per_prompt: int = 8
    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 4096
    batch_size: int = 64
    timeout: float = 10.0  # seconds a reward may take for one answer
    processes: int = 1


@dataclass
class PromptsConfig:
    """Prompts whose answers can be verified (tools/build_prompts.py)."""

    name: str = MISSING
    output: str | None = None  # null: <run_dir>/prompts.jsonl
    count: int = 0
    sources: dict[str, PromptSourceConfig] = field(default_factory=dict)
    decontaminate: list[str] = field(default_factory=list)  # JSONL files of evaluation sets
    ngram: int = 13  # words that are enough to call a prompt contaminated
    tokenizer: str | None = None  # folder; null: no prompt is too long
    max_prompt_tokens: int = 4096
    families: list[str] = field(default_factory=list)  # of translation instructions; none named: all
    composed: float = 0.3  # share of them with two or three constraints
    own_language: float = 0.3  # share of them in the target's language
    timeout: float = 10.0  # seconds in which a reward must find that it can check a prompt
    processes: int = 1
    difficulty: DifficultyConfig = field(default_factory=DifficultyConfig)
