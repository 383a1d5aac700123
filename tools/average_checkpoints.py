"""Interpolate the weights of several models, tensor by tensor: merged = sum_i weight_i * model_i.

    python -m tools.average_checkpoints exported/sft exported/grpo --weights 0.3 0.7 --output merged
    python -m tools.average_checkpoints runs/mine/sft@700,800,900 --output merged                           # steps of one phase
    python -m tools.average_checkpoints runs/seed1 runs/seed2 exported/wpo --output merged                  # runs and folders together

An input is a Hugging Face folder, a run, a phase of it, a checkpoint, or PHASE@STEP,STEP. Arithmetic is in float32 and each tensor keeps
its type. The output is a Hugging Face folder with the config and tokenizer of the first input, written like a conversion: run again after
a kill, and finished files are kept. In memory is five times the largest tensor. Leaves out: optimizer states,
quantised weights with separate scales.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from megatron_tower.command import refuse
from megatron_tower.config import InputError, ModelConfig
from megatron_tower.data.tokenizer import carry
from megatron_tower.models.folder import Form, word
from megatron_tower.models.hf import open_model
from megatron_tower.models.mapping import differences
from megatron_tower.runtime.resumable import Plan, describe, produce
from megatron_tower.training import checkpoint
from megatron_tower.training.checkpoint import Checkpoint
from megatron_tower.training.convert import CheckpointSource, Source, beside_weights, folder_plan


@dataclass(frozen=True)
class Input:
    """One of the models. key: tells its weights from any other's; sums: sha256 that its files must have, where that is known."""

    path: Path
    model: ModelConfig
    source: Source
    key: str
    sums: dict[Path, str]


@dataclass(frozen=True)
class Average:
    """The weighted sum of sources as one."""

    sources: Sequence[Source]
    weights: Sequence[float]

    @property
    def tensors(self) -> dict[str, Form]:
        return dict(self.sources[0].tensors)

    def read(self, name: str) -> Tensor:
        """In float32: the writer gives it the inputs' type."""
        first, *others = zip(self.sources, self.weights, strict=True)
        total = first[0].read(name).float().mul_(first[1])
        for source, weight in others:
            total.add_(source.read(name), alpha=weight)
        return total


def average(names: Sequence[str], weights: Sequence[float], output: Path) -> None:
    """Write the weighted sum of the inputs called `names` to `output`; no weights: equal ones. InputError before anything is written."""
    produce(average_plan(names, weights, output))


def average_plan(names: Sequence[str], weights: Sequence[float], output: Path) -> Plan:
    """What `average` will write. A name like PHASE@700,800 is two inputs."""
    inputs = [_open(found) for name in names for found in _named(name)]
    weights = weights or [1 / len(inputs)] * len(inputs)
    if len(inputs) < 2 or len(weights) != len(inputs):
        raise InputError(f"{len(inputs)} inputs and {len(weights)} weights: give two inputs or more, and a weight for each")
    if not abs(math.fsum(weights) - 1) < 1e-6:
        raise InputError(f"the weights {', '.join(map(str, weights))} add up to {math.fsum(weights):g}: they must add up to 1")
    first = inputs[0]
    for other in inputs[1:]:
        _check_alike(first, other)
    key = {"inputs": " ".join(one.key for one in inputs), "weights": " ".join(map(str, weights))}
    sums = {file: sum for one in inputs for file, sum in one.sums.items()}
    return folder_plan(Average([one.source for one in inputs], weights), output, key, _beside(first), sums=sums)


def _beside(first: Input) -> Callable[[Path], None]:
    """What puts config and tokenizer into the output: those of a Hugging Face folder, or of a checkpoint's export."""
    return beside_weights(first.source) if isinstance(first.source, CheckpointSource) else partial(carry, first.path)


def _named(name: str) -> Iterator[Checkpoint | Path]:
    """The models that a word of the command line means."""
    phase, at, steps = name.rpartition("@")
    if not at or Path(name).exists():
        yield checkpoint.resolve(Path(name))
        return
    for step in steps.split(","):
        if not step.isdigit():
            raise InputError(f"{name}: {step or 'nothing'} is no step: name steps of one phase as in {phase or 'PHASE'}@700,800")
        yield checkpoint.read(Path(phase) / "checkpoints" / f"step_{int(step):08d}")


def _open(found: Checkpoint | Path) -> Input:
    if isinstance(found, Checkpoint):
        source = CheckpointSource(found)
        return Input(found.path, found.model, source, checkpoint.fingerprint(found), source.sums)
    folder, model = open_model(found)
    return Input(found, model, folder, folder.fingerprint(), folder.recorded())


def _check_alike(first: Input, other: Input) -> None:
    """Raise InputError where two inputs are not the same architecture, tensor by tensor."""
    if apart := differences(first.model, other.model):
        raise InputError(f"{first.path} and {other.path} differ in {'; '.join(apart)}: give models of one architecture")
    for name, form in first.source.tensors.items():
        dtypes = word(form.dtype), word(other.source.tensors[name].dtype)
        if dtypes[0] != dtypes[1]:
            raise InputError(f"{name} is {dtypes[0]} in {first.path} and {dtypes[1]} in {other.path}: export both with one --dtype")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", help="Hugging Face folders, runs, phases, checkpoints, PHASE@STEP,STEP: two models or more")
    parser.add_argument("--weights", type=float, nargs="+", default=[], help="one a model; equal ones if not given")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="print files, sizes and the room needed, and write nothing")
    arguments = parser.parse_args()
    try:
        plan = average_plan(arguments.inputs, arguments.weights, arguments.output)
        describe(plan) if arguments.dry_run else produce(plan)
    except InputError as error:
        refuse(error)
    if not arguments.dry_run:
        print(f"{' + '.join(arguments.inputs)} -> {arguments.output}")


if __name__ == "__main__":
    main()
