"""The schema of `conf/sft`: prompts, the models that judge and answer them, and the tasks around translation. Part of `config.py`."""

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class EndpointConfig:
    """A model behind an OpenAI-compatible address."""

    url: str | None = None  # http://host:8000/v1, or a file that holds it (slurm/serve.sbatch)
    model: str | None = None
    key_variable: str = "OPENAI_API_KEY"  # the environment variable with the key, where one is needed; the key itself is kept nowhere
    concurrency: int = 16  # requests on the way at once
    requests_per_minute: float = 0  # 0: no limit
    tokens_per_minute: float = 0  # of prompts and answers, as the server counts them; 0: no limit
    timeout: float = 300.0  # seconds of one request
    attempts: int = 6  # at a request that fails in a way that may pass
    input_price: float = 0.0  # of a million tokens
    output_price: float = 0.0


@dataclass
class TextConfig:
    """Files of one origin: .jsonl, .jsonl.zst (curation's shards) or .parquet, `*` as in a shell, or hub:org/name@revision:pattern."""

    files: list[str] = field(default_factory=list)
    licence: str = MISSING
    origin: str = MISSING  # where it comes from, with its version, for the manifest


@dataclass
class PoolConfig(TextConfig):
    """An instruction set: rows with "messages", of which the last user turn is answered anew, or "prompt"; "locale" may be there."""

    limit: int = 0  # prompts, drawn by hash; 0: all


@dataclass
class TaskConfig:
    """A task around translation. share: its weight among them; text: files in its form (docs/data.md), null: made from `sft.pairs`."""

    share: float = MISSING
    text: TextConfig | None = None


@dataclass
class SftConfig:
    """General prompts answered by the best of several models, and tasks around translation (tools/build_sft.py)."""

    name: str = "none"
    output: str | None = None  # folder; null: <run_dir>/sft_data
    dry_run: bool = False  # only say what would be asked, and for how much
    examples: int = 0  # in all; 0: what the general prompts come to
    pools: dict[str, PoolConfig] = field(default_factory=dict)
    decontaminate: list[str] = field(default_factory=list)  # JSONL files of evaluation sets
    ngram: int = 13  # words that are enough to call a text contaminated
    tokenizer: str | None = None  # folder; prompts that its chat template refuses are left out
    judge: EndpointConfig | None = None  # of prompts; null: all are good
    minimum: dict[str, int] = field(default_factory=dict)  # reasoning, readability: from 1 to 5
    answers: dict[str, EndpointConfig] = field(default_factory=dict)  # name -> a model that answers each prompt
    samples: int = 1  # of each model
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 4096
    reward_model: str | None = None  # folder of a sequence classifier with one output, which chooses the answer
    batch_size: int = 16  # of the reward model
    translation_share: float = 0.22
    pairs: TextConfig | None = None  # sentences and their translations, from or into English
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
