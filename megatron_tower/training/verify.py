"""Logits of transformers and of a Megatron checkpoint for the same prompts, in float32, at any layout of ranks.

    Work(folder).expect(hf_folder, prompts)                                     transformers' logits
    python -m megatron_tower.training.verify FOLDER tp2 pp2                      as ranks: the checkpoint's, compared with them

The two models are never in memory together. Leaves out: models that don't fit in it (`training/verify_layers.py`), virtual pipelines.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_tower.command import refuse
from megatron_tower.config import ClusterConfig, InputError, ParallelConfig, PrecisionConfig
from megatron_tower.data.batch import Batch
from megatron_tower.runtime import cpu, distributed
from megatron_tower.training import checkpoint

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

FP32 = PrecisionConfig(name="fp32")
LOGITS = 2**26  # of one prompt that are compared: every position of a short one, evenly spread positions of a long one
ROWS = 64  # positions compared at once, in float64


@dataclass(frozen=True)
class Difference:
    """Of two logits for one prompt. maximum, mean: absolute; relative: the maximum over the standard deviation of transformers' logits;
    argmax: share of the positions that foresee the same token; kl: largest KL(transformers || Megatron) of a position, in nats."""

    positions: int
    maximum: float
    mean: float
    relative: float
    argmax: float
    kl: float


@dataclass(frozen=True)
class Part:
    """How far apart the two sides of one part of the model are, the worst prompt counting. maximum: absolute; relative: the largest
    |ours - theirs| / |theirs| of a position, Euclidean norms over its features. logits: of the head, by prompt."""

    name: str
    maximum: float
    relative: float
    logits: dict[str, Difference] = field(default_factory=dict)


def compare(ours: Tensor, theirs: Tensor) -> Difference:
    """Logits [positions, vocabulary] of Megatron and of transformers. A NaN anywhere makes `maximum` and `relative` NaN."""
    found = torch.cat([_by_position(*rows) for rows in zip(ours.split(ROWS), theirs.split(ROWS), strict=True)])
    maximum, mean, argmax, kl = found.unbind(dim=1)
    relative = maximum.max() / theirs.std()
    return Difference(len(found), maximum.max().item(), mean.mean().item(), relative.item(), argmax.mean().item(), kl.max().item())


def _by_position(ours: Tensor, theirs: Tensor) -> Tensor:
    """[positions, 4] float64: maximum, mean, argmax and kl of `Difference`."""
    ours, theirs = ours.double(), theirs.double()
    apart = (ours - theirs).abs()
    log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return torch.stack([apart.amax(-1), apart.mean(-1), (ours.argmax(-1) == theirs.argmax(-1)).double(), kl], dim=1)


@dataclass(frozen=True)
class Work:
    """A folder through which transformers' process and the ranks speak: expected.safetensors, and of each layout <layout>.plan.json, then
    <layout>.json."""

    folder: Path

    def expect(self, hf: Path, prompts: dict[str, list[int]]) -> None:
        """Write what transformers computes for the prompts (name -> token ids); the folder's weights are cast to float32."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            hf, dtype=torch.float32, attn_implementation="eager", local_files_only=True, use_safetensors=True
        ).to(distributed.device())
        expected = {}
        for name, ids in prompts.items():
            tokens, positions = torch.tensor([ids]), _positions(len(ids), model.config.vocab_size)
            with torch.no_grad():
                logits = model(tokens.to(model.device), use_cache=False, logits_to_keep=positions.to(model.device)).logits
            expected |= {f"{name}/tokens": tokens, f"{name}/positions": positions, f"{name}/logits": logits[0].cpu().contiguous()}
        save_file(expected, self.folder / "expected.safetensors")

    def plan(self, checkpoint_path: Path, layout: ParallelConfig) -> None:
        """Tell the ranks of a layout what to load."""
        self._plan(layout.name).write_text(json.dumps({"checkpoint": str(checkpoint_path), "parallel": asdict(layout)}))

    def differences(self, layout: str) -> dict[str, Difference]:
        """What the ranks of a layout have found, by prompt."""
        return {name: Difference(**numbers) for name, numbers in json.loads(self._found(layout).read_text()).items()}

    def measure(self, layout: str) -> None:
        """As one of the layout's ranks: load the checkpoint, compare, and write the differences."""
        plan = json.loads(self._plan(layout).read_text())
        parallel, start = ParallelConfig(**plan["parallel"]), checkpoint.read(Path(plan["checkpoint"]))
        distributed.initialize(parallel, seed=0, cluster=ClusterConfig(name="local"))
        from megatron_tower.models.build import build_chunks
        from megatron_tower.training.loading import load
        from megatron_tower.training.state import TrainingState

        chunks = build_chunks(start.model, parallel, FP32)
        load(start, TrainingState(chunks))
        expected, found = load_file(self.folder / "expected.safetensors"), {}
        for name in sorted({key.rpartition("/")[0] for key in expected}):
            tokens, positions, theirs = (expected[f"{name}/{what}"] for what in ("tokens", "positions", "logits"))
            ours = logits(chunks[0].eval(), tokens, positions, parallel)
            if ours is not None:
                found[name] = asdict(compare(ours[:, : theirs.shape[1]].cpu(), theirs))  # a padded vocabulary ends in logits of nothing
        if found:
            self._found(layout).write_text(json.dumps(found))

    def _plan(self, layout: str) -> Path:
        return self.folder / f"{layout}.plan.json"

    def _found(self, layout: str) -> Path:
        return self.folder / f"{layout}.json"


def _positions(length: int, vocabulary: int) -> Tensor:
    """Which logits of a prompt are compared: the last one always."""
    count = min(length, max(1, LOGITS // vocabulary))
    return torch.linspace(length - 1, 0, count).long().flip(0)


@torch.no_grad()
def logits(model: "MegatronModule", tokens: Tensor, positions: Tensor, parallel: ParallelConfig) -> Tensor | None:
    """Logits [positions, vocabulary] of one prompt [1, seq] on the first tensor rank of the last stage, None on the other ranks."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_tower.models.forward import forward, schedule_shape

    padding = -tokens.shape[1] % parallel.tensor  # sequence parallelism needs a multiple; nothing looks right
    tokens = torch.nn.functional.pad(tokens, (0, padding)).to(distributed.device())
    batch = Batch(tokens, tokens, torch.ones_like(tokens), torch.arange(tokens.shape[1], device=tokens.device)[None])

    def step(rows: None, stage: "MegatronModule") -> tuple[Tensor, Callable[..., Tensor]]:
        return forward(stage, batch), lambda output, non_loss_data: output[0, positions.to(output.device)]

    kept = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=None,
        model=model,
        num_microbatches=1,
        **schedule_shape(batch),
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not parallel_state.is_pipeline_last_stage():
        return None
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(kept[0]) for _ in range(group.size())]
    dist.all_gather(parts, kept[0].contiguous(), group=group)
    return torch.cat(parts, dim=-1) if group.rank() == 0 else None


def main() -> None:
    folder, *layouts = sys.argv[1:]
    cpu.install()
    try:
        for layout in layouts:
            Work(Path(folder)).measure(layout)
    except InputError as error:
        refuse(error)
    distributed.shutdown()


if __name__ == "__main__":
    main()
