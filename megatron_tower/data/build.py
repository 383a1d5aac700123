"""`training_dataset`: rows for a phase, in an order that is a pure function of (seed, row index).

CPT: Megatron's GPTDataset over each part of the mixture, joined by its BlendedDataset in proportion to the shares; a row is
cut at every EOS, so that no document sees another. SFT: packed chats (packing.py). Megatron shuffles by (seed, length of the
run), so each epoch of a part is a GPTDataset of its own: a run that is prolonged keeps the rows it has seen.
Leaves out: index files on disk; every rank builds the index of the epochs that it reads, in memory.
"""

import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_tower.config import Config, InputError
from megatron_tower.data import manifest
from megatron_tower.data.batch import Batch
from megatron_tower.data.packing import PackedChats, isolated, packed_chats
from megatron_tower.data.preferences import Preferences, preferences
from megatron_tower.data.prompts import Prompts, prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def training_dataset(
    cfg: Config, tokenizer: "PreTrainedTokenizerBase", num_rows: int
) -> "BlendedDocuments | PackedChats | Preferences | Prompts":
    """`dataset[i]` for i below `num_rows`: a Batch of one row [1, phase.seq_length], a preference pair, or a prompt.

    `.rows_per_epoch`: how many of them the data hold once.

    Raises InputError when the folder is missing, damaged, made with another tokenizer, or too small.
    """
    folder = Path(cfg.data.folder)
    facts = manifest.verify(folder)
    if facts["vocab_size"] != len(tokenizer):
        raise InputError(
            f"{folder} was tokenized with {facts['vocab_size']} entries, the model's tokenizer has {len(tokenizer)}: "
            "prepare the data with the same model= (data.folder is another for each)"
        )
    if cfg.phase.dataset == "preferences":
        return preferences(Path(cfg.phase.file), tokenizer, cfg.phase.seq_length, cfg.seed)
    if cfg.phase.dataset == "prompts":
        longest = cfg.phase.seq_length - cfg.phase.rollout.max_new_tokens
        return prompts(Path(cfg.phase.file or folder / "rl" / "train.jsonl"), tokenizer, longest, cfg.seed)
    if cfg.phase.dataset == "documents":
        return BlendedDocuments(folder / "cpt", tokenizer.eos_token_id, cfg.phase.seq_length, cfg.seed, num_rows)
    return packed_chats(Path(cfg.phase.file or folder / "sft" / "train.jsonl"), tokenizer, cfg.phase.seq_length, cfg.seed, num_rows)


class BlendedDocuments:
    """The CPT mixture of a folder with `blend.json`: Megatron's rows, as Batches in which documents are isolated."""

    def __init__(self, folder: Path, eos_id: int, seq_length: int, seed: int, num_rows: int) -> None:
        from megatron.core.datasets.blended_dataset import BlendedDataset

        logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)  # it warns that indices are not saved
        blend = [part for part in json.loads((folder / "blend.json").read_text()) if part["share"] > 0]
        self.eos_id, self.num_rows = eos_id, num_rows
        parts = [_Part(str(folder / part["prefix"]), eos_id, seq_length, seed + i) for i, part in enumerate(blend)]
        self.rows_per_epoch = sum(part.rows_per_epoch for part in parts)
        self.blended = BlendedDataset(parts, [part["share"] for part in blend], num_rows, parts[0].config)

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self.num_rows:
            raise IndexError(index)
        row = self.blended[index]
        tokens = row["tokens"]
        ends = (torch.nonzero(tokens == self.eos_id).flatten() + 1).tolist()
        cuts = [0, *ends] if ends and ends[-1] == len(tokens) else [0, *ends, len(tokens)]
        return isolated(tokens, row["labels"], row["loss_mask"], cuts)


class _Part:
    """One part of the mixture without end: epoch after epoch, each a GPTDataset with a seed of its own.

    Carries the attributes by which BlendedDataset knows a MegatronDataset.
    """

    def __init__(self, prefix: str, eos_id: int, seq_length: int, seed: int) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split

        self.documents, self.seq_length, self.seed = IndexedDataset(prefix), seq_length, seed
        self.config = _gpt_config(eos_id, seq_length, seed)
        self.index_split, self.unique_identifiers = Split.train, {"prefix": prefix, "seed": seed}
        tokens = int(self.documents.sequence_lengths.sum())
        self.rows_per_epoch = (tokens - 1) // seq_length  # Megatron leaves the rest of an epoch out
        if self.rows_per_epoch < 1:
            raise InputError(
                f"{prefix}.bin holds {tokens} tokens, less than one row of phase.seq_length={seq_length}: prepare more, or shorten rows"
            )
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)

    def __len__(self) -> int:
        return 2**62  # BlendedDataset asks whether a part can give as many rows as it wants

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        epoch, row = divmod(int(index), self.rows_per_epoch)
        return self._epoch(epoch)[row]

    def _build_epoch(self, epoch: int) -> torch.utils.data.Dataset:
        import numpy
        from megatron.core.datasets.gpt_dataset import GPTDataset

        everything = numpy.arange(len(self.documents), dtype=numpy.int32)
        config = _gpt_config(self.config.tokenizer.eod, self.seq_length, self.seed + 1_000_003 * epoch)
        return GPTDataset(self.documents, self.documents.path_prefix, everything, None, self.index_split, config)


class _Eod:
    """All that GPTDataset asks of a tokenizer. No pad: in Qwen it is the end of document, whose loss would go."""

    vocab_size = None

    def __init__(self, eod: int) -> None:
        self.eod = eod
        self.unique_identifiers = {"eod": eod}


def _gpt_config(eos_id: int, seq_length: int, seed: int):
    """Megatron's config; without a `blend` it builds indices in memory. No loss at EOS, whose label is the next document's start."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        tokenizer=_Eod(eos_id),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
