"""The schema of `conf/data`: what text, and how much of each kind. Part of `config.py`, where every other group is."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class SourceConfig:
    """Files of one origin, read alike (curation/readers). Documents have a `locale`; pairs have it for the source side and
    `target_locale`, or many target sides: `{locale}` in `files` and `fetch` stands for what the source calls each of `locales`."""

    reader: str = MISSING
    files: list[str] = field(default_factory=list)  # patterns below what was fetched, or paths
    fetch: list[str] = field(default_factory=list)  # debian:package, pypi:package==version, hub:org/name@revision:pattern
    locale: str = "en"
    target_locale: str | None = None
    locales: dict[str, str] = field(default_factory=dict)  # locale -> what the source calls it; `locale` may be among them
    fields: dict[str, str] = field(default_factory=dict)  # ours -> the file's: text, source, target, id, document, a score's name
    licence: str = MISSING
    origin: str = MISSING  # where it comes from, with its version, for the manifest


@dataclass
class ScoreConfig:
    """A model whose score a row needs to stay: a Hugging Face folder of sequence classification, or a COMET folder for pairs."""

    model: str = MISSING
    minimum: float = MISSING
    minimum_of: dict[str, float] = field(default_factory=dict)  # locale -> another minimum


@dataclass
class CurationConfig:
    """Public text to training sets (curation/pipeline.py). Filters: name -> options, in the order in which they are asked."""

    work: str = MISSING  # where stages write; may go once data.folder is there
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    pairs: dict[str, dict[str, Any]] = field(default_factory=dict)
    document_scores: dict[str, ScoreConfig] = field(default_factory=dict)
    pair_scores: dict[str, ScoreConfig] = field(default_factory=dict)
    near_duplicates: bool = True  # of documents, by MinHash; repeated texts always go
    unique_sides: list[str] = field(default_factory=lambda: ["source", "target"])  # of pairs, beside source with target
    decontaminate: list[str] = field(default_factory=list)  # JSONL files of evaluation sets, besides what is held out
    ngram: int = 13  # words that are enough to call a text contaminated
    tokens: int = 0  # of CPT in all; 0: everything, once, whatever shares it makes
    temperature: float = 1.0  # of the languages within a part: share ~ tokens ** temperature
    document_tokens: int = 4096  # longest text of translated sentences that follow one another
    sft_pairs: int = 5000  # of each locale that SFT, WPO and GRPO are made from
    workers: int = 0  # processes; 0: one a core
    part: str = "0/1"  # of the files: that of the first of so many array tasks, which work on the same folders
    stages: list[str] = field(default_factory=list)  # to run, and no data folder; none named: all, and the folder
    patience: float = 600.0  # seconds without news after which a task of an array does what another has left


@dataclass
class DataConfig:
    """What text, and how much of each kind. `folder` holds what the data step writes; `cache` what it downloads."""

    name: str = MISSING
    folder: str = MISSING
    cache: str = MISSING
    catalogues: dict[str, str] = field(default_factory=dict)  # package -> version
    curation: CurationConfig | None = None  # public text instead of catalogues
    locales: list[str] = field(default_factory=list)  # besides en
    cldr_kinds: list[str] = field(default_factory=list)
    cldr_per_locale: int = 0
    held_out: float = 0.1  # share of source strings
    vocab_size: int = 4096  # trained tokenizer only
    shares: dict[str, float] = field(default_factory=dict)  # of CPT tokens: monolingual, parallel, instruction
    sft_examples: int = 0
    sft_translation_share: float = 0.22
    instruction_kinds: list[str] = field(default_factory=list)  # of the general examples
    verifiable_families: list[str] = field(default_factory=list)  # of translation instructions that can be checked; none named: all
    verifiable_kinds: list[str] = field(default_factory=list)  # of pairs that they are made from; none named: all
    verifiable_composed: float = 0.3  # share of them with two or three constraints
    verifiable_own_language: float = 0.3  # share of them in the target's language
    verifiable_share: float = 0.0  # of SFT's translation-related examples
    rl_prompts: int = 0
    rl_shares: dict[str, float] = field(default_factory=dict)  # of the prompts: reward -> share
    preference_pairs: int = 0  # of a good answer against a damaged one
    seed: int = 1234
