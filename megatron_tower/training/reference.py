"""Log-probabilities of answers under the reference model of preference optimisation: scored once and stored, or asked of a live copy.

    <phase>/reference/<sha256 of the reference weights>.safetensors      keys [answers, 16] uint8, logprobs [answers] float64

A key is the BLAKE2b digest of the tokens and of which of them are the answer, so that a file serves whatever order, epoch or resume
asks; answers that it lacks are added before the first step. Leaves out: scores of single tokens.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import MegatronModule
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from megatron_tower.config import Config, InputError
from megatron_tower.data.batch import SequenceBatch
from megatron_tower.data.preferences import Preferences
from megatron_tower.data.sequences import Encoded, micro_batches
from megatron_tower.rollout.scoring import label_logprobs
from megatron_tower.runtime import watchdog
from megatron_tower.runtime.distributed import device, is_rank_zero

AT_ONCE = 8  # micro-batches scored in one call: enough to fill a pipeline, few enough that padding to the longest costs little


class StoredReference:
    """Looks answers up by their content."""

    def __init__(self, known: dict[bytes, float]):
        self.known = known

    def __call__(self, groups: list[list[Encoded]], batches: list[SequenceBatch]) -> list[Tensor]:
        return [torch.tensor([self.known[_key(answer)] for answer in group], dtype=torch.float64, device=device()) for group in groups]


class LiveReference:
    """Asks a frozen copy of the reference weights, each time."""

    def __init__(self, chunks: Sequence[MegatronModule]):
        self.chunks = chunks

    def __call__(self, groups: list[list[Encoded]], batches: list[SequenceBatch]) -> list[Tensor]:
        return [batch.sums(found) for batch, found in zip(batches, label_logprobs(self.chunks, batches), strict=True)]


def stored(cfg: Config, dataset: Preferences, samples: int, chunks: Sequence[MegatronModule] | None, weights: str) -> StoredReference:
    """The stored log-probabilities of the first `samples` pairs' answers under the weights whose sha256 is `weights`.

    `chunks` hold those weights and score what the file lacks; None in a run that goes on, whose model has moved on: InputError then.
    """
    path = cfg.phase_dir / "reference" / f"{weights}.safetensors"
    known = _read(path)
    answers = {_key(answer): answer for i in range(min(samples, dataset.rows_per_epoch)) for answer in dataset[i]}
    missing = {key: answer for key, answer in answers.items() if key not in known}
    if missing and chunks is None:
        raise InputError(
            f"{path} lacks {len(missing)} of the {len(answers)} answers of {cfg.phase.file}, which changed since the phase began: "
            "restore the file, or start again in another run_dir"
        )
    if missing:
        known |= _scored(cfg, chunks, missing, dataset.pad_id)
        if is_rank_zero():
            _write(path, known)
        dist.barrier()
    return StoredReference(known)


def _scored(cfg: Config, chunks: Sequence[MegatronModule], answers: dict[bytes, Encoded], pad_id: int) -> dict[bytes, float]:
    """Data-parallel ranks share the answers, by length so that neighbours need little padding, and exchange what they found."""
    ordered = sorted(answers, key=lambda key: (len(answers[key][0]), key))
    size = 2 * cfg.phase.micro_batch_size
    blocks = [ordered[i : i + size * AT_ONCE] for i in range(0, len(ordered), size * AT_ONCE)]
    found: dict[bytes, float] = {}
    for block in blocks[parallel_state.get_data_parallel_rank() :: cfg.parallel.data]:
        watchdog.alive()
        keys = [block[i : i + size] for i in range(0, len(block), size)]
        batches = micro_batches([[answers[key] for key in group] for group in keys], pad_id, cfg.parallel)
        batches = [batch.to(device()) for batch in batches]
        for group, batch, logprobs in zip(keys, batches, label_logprobs(chunks, batches), strict=True):
            found |= dict(zip(group, batch.sums(logprobs).tolist(), strict=True))
    parts: list[dict[bytes, float]] = [{}] * cfg.parallel.data
    dist.all_gather_object(parts, found, group=parallel_state.get_data_parallel_group())
    return {key: value for part in parts for key, value in part.items()}


def _key(answer: Encoded) -> bytes:
    ids, said = answer
    content = np.array([ids, said], dtype="<i4").tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def _read(path: Path) -> dict[bytes, float]:
    if not path.is_file():
        return {}
    try:
        table = load_file(path)
        return dict(zip((key.tobytes() for key in table["keys"]), table["logprobs"].tolist(), strict=True))
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it, it is made again before the first step") from error


def _write(path: Path, known: dict[bytes, float]) -> None:
    """Sorted by key, in one stroke."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = sorted(known)
    table = {
        "keys": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16),
        "logprobs": np.array([known[key] for key in keys], dtype=np.float64),
    }
    aside = path.with_suffix(".part")
    save_file(table, aside)
    aside.replace(path)
