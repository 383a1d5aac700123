"""Chat examples packed into rows of one length: several examples a row, none sees another, each once an epoch.

Which examples share a row follows from (seed, epoch) alone: the examples are taken in a random order and each is put into the
first open row that has room. Leaves out: splitting an example over two rows; one that is too long is dropped, and counted.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_tower.config import InputError
from megatron_tower.data import chat, jsonl
from megatron_tower.data.batch import Batch
from megatron_tower.data.sequences import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN_ROWS = 64  # rows that may still be filled; more would fill better, and slower


def pack(lengths: Sequence[int], seq_length: int, seed: int, epoch: int) -> list[list[int]]:
    """Rows of example indices; the lengths of a row add up to at most `seq_length`."""
    order = list(range(len(lengths)))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    full: list[list[int]] = []
    room: list[tuple[int, list[int]]] = []  # tokens left, examples; oldest first
    for example in order:
        slot = next((i for i, (left, _) in enumerate(room) if left >= lengths[example]), None)
        if slot is None:
            room.append((seq_length - lengths[example], [example]))
            if len(room) > OPEN_ROWS:
                full.append(room.pop(0)[1])
        else:
            left, row = room[slot]
            row.append(example)
            room[slot] = (left - lengths[example], row)
    rows = full + [row for _, row in room]
    random.Random(f"{seed}/{epoch}/rows").shuffle(rows)  # short examples gather in rows that close late
    return rows


def isolated(tokens: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor, cuts: Sequence[int]) -> Batch:
    """A row [seq] as a Batch whose segments end at `cuts` (0 first, seq last); positions count from each segment's start."""
    starts, ends = torch.tensor(cuts[:-1]), torch.tensor(cuts[1:])
    positions = torch.arange(len(tokens)) - torch.repeat_interleave(starts, ends - starts)
    return Batch(tokens[None], labels[None], loss_mask[None].float(), positions[None], torch.tensor(cuts, dtype=torch.int32))


class PackedChats:
    """`dataset[i]`: row i of an endless run of epochs, a function of (seed, i) only.

    rows_per_epoch: of the first epoch; others differ by a row or two, since each packs another order. dropped: too long.
    """

    def __init__(self, encoded: Sequence[Encoded], seq_length: int, pad_id: int, seed: int, num_rows: int) -> None:
        fitting = [e for e in encoded if len(e[0]) - 1 <= seq_length]
        self.dropped = len(encoded) - len(fitting)
        self.examples, self.seq_length, self.pad_id, self.seed, self.num_rows = fitting, seq_length, pad_id, seed, num_rows
        self.lengths = [len(ids) - 1 for ids, _ in fitting]  # a row holds inputs; the last token is only a label
        self.epochs: list[list[list[int]]] = []
        self.rows_per_epoch = len(self._epoch(0)) if fitting else 0

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Batch:
        """Row `index`: inputs of whole examples end to end, then padding, which is a segment of its own."""
        if not 0 <= index < self.num_rows:
            raise IndexError(index)
        tokens = torch.full((self.seq_length,), self.pad_id)
        labels, mask = tokens.clone(), torch.zeros(self.seq_length)
        cuts = [0]
        for example in self.row(index):
            ids, said = self.examples[example]
            span = slice(cuts[-1], cuts[-1] + len(ids) - 1)
            tokens[span], labels[span], mask[span] = torch.tensor(ids[:-1]), torch.tensor(ids[1:]), torch.tensor(said[1:]).float()
            cuts.append(span.stop)
        return isolated(tokens, labels, mask, cuts if cuts[-1] == self.seq_length else [*cuts, self.seq_length])

    def row(self, index: int) -> list[int]:
        """Which examples lie in row `index`."""
        epoch = 0
        while index >= len(rows := self._epoch(epoch)):
            index, epoch = index - len(rows), epoch + 1
        return rows[index]

    def _epoch(self, epoch: int) -> list[list[int]]:
        while len(self.epochs) <= epoch:
            self.epochs.append(pack(self.lengths, self.seq_length, self.seed, len(self.epochs)))
        return self.epochs[epoch]


def read_chats(path: Path) -> list[list[dict[str, str]]]:
    """The conversations of a JSONL file; raises InputError with file and line for one that is malformed, and for an empty file."""
    missing = "run python -m tools.prepare_data, or set data.folder to a prepared folder"
    conversations = [chat.conversation(row, place) for place, row in jsonl.read(path, missing, chat.FORM)]
    if not conversations:
        raise InputError(f"{path} is empty: there is nothing to train on; raise data.sft_examples or bring examples")
    return conversations


def packed_chats(path: Path, tokenizer: "PreTrainedTokenizerBase", seq_length: int, seed: int, num_rows: int) -> PackedChats:
    """The packed dataset of a JSONL file; says how many examples were too long for a row."""
    conversations = read_chats(path)
    packed = PackedChats(chat.encode_all(tokenizer, conversations), seq_length, chat.pad_id(tokenizer), seed, num_rows)
    if not packed.examples:
        raise InputError(f"{path}: none of its {len(conversations)} examples fits phase.seq_length={seq_length}; raise it")
    if packed.dropped:
        print(
            f"{path}: {packed.dropped} of {len(conversations)} examples are longer than phase.seq_length={seq_length} and are left out",
            flush=True,
        )
    return packed
