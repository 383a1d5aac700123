"""Prompts with their answers as rows of tokens: laid end to end, without padding.

Where pairs or rollouts are trained on, a micro-batch is a number of sequences, not of tokens, so its row is as long as they are.
"""

from collections.abc import Iterable, Sequence

import torch

from megatron_tower.config import ParallelConfig
from megatron_tower.data.batch import SequenceBatch

Encoded = tuple[list[int], list[int]]  # token ids, 1 where the token is to be learnt


def end_to_end(sequences: Sequence[Encoded], pad_id: int, length: int | None = None) -> SequenceBatch:
    """One row [1, tokens] of all sequences, each seeing itself only; padded to `length` tokens with a segment that counts for nothing.

    A sequence of n ids gives n - 1 tokens: the last id is only a label.
    """
    sizes = [len(ids) - 1 for ids, _ in sequences]
    padding = 0 if length is None else length - sum(sizes)
    tokens = [t for ids, _ in sequences for t in ids[:-1]] + [pad_id] * padding
    labels = [t for ids, _ in sequences for t in ids[1:]] + [pad_id] * padding
    mask = [m for _, said in sequences for m in said[1:]] + [0] * padding
    pieces = torch.tensor([*sizes, padding] if padding else sizes)
    return SequenceBatch(
        torch.tensor([tokens]),
        torch.tensor([labels]),
        torch.tensor([mask], dtype=torch.float32),
        torch.cat([torch.arange(n) for n in pieces.tolist()])[None],
        torch.cat([torch.zeros(1), pieces.cumsum(0)]).to(torch.int32),
        segments=torch.arange(len(pieces)).repeat_interleave(pieces)[None],
        count=len(sequences),
    )


def micro_batches(groups: Sequence[Sequence[Encoded]], pad_id: int, parallel: ParallelConfig) -> list[SequenceBatch]:
    """Each group end to end. Padded where the layout asks for it: pipeline stages exchange tensors of one shape, sequence parallelism
    divides a row among the tensor-parallel ranks. An empty group is a row of padding.
    """
    pieces = parallel.tensor if parallel.sequence_parallel else 1
    lengths = [max(1, -(-size(group) // pieces)) * pieces for group in groups]
    if parallel.pipeline > 1:
        lengths = [max(lengths)] * len(groups)
    return [end_to_end(group, pad_id, length) for group, length in zip(groups, lengths, strict=True)]


def size(sequences: Iterable[Encoded]) -> int:
    """Tokens of `end_to_end` without padding."""
    return sum(len(ids) - 1 for ids, _ in sequences)
