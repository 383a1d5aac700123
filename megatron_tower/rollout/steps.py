"""One new token for every row of a batch: how the key-value cache is kept from step to step.

    GrowingSteps   the cache is read as far as it is filled, and a row that stopped leaves at once: a CPU, and pipelines
    FixedSteps     rows, cache and masks keep their size, and the slot to write is a number on the device: then a step is the same
                   kernels on the same memory, which CUDA replays as one graph (a step of 26 layers is a thousand launches otherwise)

Both give the same tokens. Leaves out: the choice of tokens (`rollout/sampling.py`), paged caches, CUDA graphs under pipeline parallelism.
Not run yet on a card: capture and replay.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_tower.models.decoding import Context, FixedContext, GrowingContext, PromptContext

SPAN = 256  # slots; a step reads the cache up to a multiple of it, and each span is a graph of its own


class GrowingSteps:
    """Caches of this batch alone, cut down as rows stop."""

    def __init__(self, model: GPTModel):
        self.model = model

    def prefill(self, prompts: list[list[int]], copies: Tensor, new: int) -> Tensor | None:
        """Run the prompts and give row i of the batch the cache of prompt copies[i], with room for `new` tokens.

        Returns the logits [rows, vocab / tp] that follow the prompts on the last pipeline stage, None elsewhere.
        """
        context, logits = _prefilled(self.model, prompts, new)
        self.context = GrowingContext(context)
        if len(copies) == len(prompts):
            return logits
        self.context.take(copies)
        return None if logits is None else logits[copies]

    def step(self, tokens: Tensor) -> Tensor | None:
        """tokens [rows, 1] -> the logits that follow, as `prefill` gives them."""
        logits = _forward(self.model, tokens, self.context)
        self.context.increment_sequence_len_offset(1)
        return logits

    def keep(self, alive: Sequence[bool]) -> list[int]:
        """Tell which rows go on; returns those that stay in the batch, in order."""
        stay = [row for row, goes_on in enumerate(alive) if goes_on]
        if len(stay) < len(alive):
            self.context.take(stay)
        return stay


class FixedSteps:
    """Caches and graphs for up to `rows` rows of `slots` tokens, kept for every batch of one call."""

    def __init__(self, model: GPTModel, rows: int, slots: int):
        self.model, self.slots = model, slots
        device = next(model.parameters()).device
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.padding = torch.zeros(rows, dtype=torch.int64, device=device)
        self.caches: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys and values [slots, rows, groups, dim]
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # (rows, span) -> a step, its logits
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def prefill(self, prompts: list[list[int]], copies: Tensor, new: int) -> Tensor:
        """As `GrowingSteps.prefill`; the room is there already."""
        context, logits = _prefilled(self.model, prompts, 0)
        self.filled = context.width
        for layer, cache in context.key_value_memory_dict.items():
            if layer not in self.caches:
                self.caches[layer] = tuple(part.new_zeros(self.slots, len(self.tokens), *part.shape[2:]) for part in cache)
            for kept, part in zip(self.caches[layer], cache, strict=True):
                kept[: self.filled, : len(copies)] = part[:, copies]
        self.padding[: len(copies)] = context.padding.to(copies.device)[copies]
        return logits[copies]

    def step(self, tokens: Tensor) -> Tensor:
        """As `GrowingSteps.step`; the result is overwritten by the next step."""
        rows, span = len(tokens), min(-(-(self.filled + 1) // SPAN) * SPAN, self.slots)
        self.tokens[:rows] = tokens
        self.slot.fill_(self.filled)
        self.filled += 1
        if self.pool is None:
            return self._run(rows, span)
        if (rows, span) not in self.graphs:
            self.graphs[rows, span] = self._capture(rows, span)
        graph, logits = self.graphs[rows, span]
        graph.replay()
        return logits

    def keep(self, alive: Sequence[bool]) -> list[int]:
        """As `GrowingSteps.keep`; a batch is halved once half of its rows are enough, and what stopped is computed until then."""
        size = len(alive)
        while size % 2 == 0 and sum(alive) <= size // 2:
            size //= 2
        if size == len(alive):
            return list(range(size))
        stay = sorted(sorted(range(len(alive)), key=lambda row: not alive[row])[:size])
        for cache in self.caches.values():
            for kept in cache:
                kept[: self.filled, :size] = kept[: self.filled, stay]
        self.padding[:size] = self.padding[stay]
        return stay

    def _run(self, rows: int, span: int) -> Tensor:
        context = FixedContext(self.caches, self.slot, self.padding[:rows], self.slots, span)
        return _forward(self.model, self.tokens[:rows], context)

    def _capture(self, rows: int, span: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A step as a graph. Before it one runs as it is, in which libraries allocate what they keep; it writes what the replay writes."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._run(rows, span)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = self._run(rows, span)
        return graph, logits


def steps_for(model: GPTModel, rows: int, slots: int) -> GrowingSteps | FixedSteps:
    """What suits the device and the layout."""
    if next(model.parameters()).is_cuda and parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return FixedSteps(model, rows, slots)
    return GrowingSteps(model)


def _prefilled(model: GPTModel, prompts: list[list[int]], new: int) -> tuple[PromptContext, Tensor | None]:
    """Caches with room for `new` tokens behind the longest prompt, and the logits after each prompt as `_forward` gives them."""
    device = next(model.parameters()).device
    context = PromptContext([len(prompt) for prompt in prompts], max(map(len, prompts)) + new, device)
    return context, _forward(model, torch.tensor([[token for prompt in prompts for token in prompt]], device=device), context)


def _forward(model: GPTModel, tokens: Tensor, context: Context) -> Tensor | None:
    """Run this pipeline stage on tokens [rows, 1], or on prompts end to end; the last stage gets logits [rows, vocab / tp], others None."""
    if not parallel_state.is_pipeline_first_stage():
        shape = tokens.size(1), tokens.size(0), model.config.hidden_size
        received = torch.empty(shape, dtype=model.config.pipeline_dtype, device=tokens.device)
        dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank(), parallel_state.get_pipeline_model_parallel_group())
        model.set_input_tensor(received)
    out = model(tokens, None, None, inference_context=context)
    if parallel_state.is_pipeline_last_stage():
        return out.flatten(0, 1)
    dist.send(out, parallel_state.get_pipeline_model_parallel_next_rank(), parallel_state.get_pipeline_model_parallel_group())
    return None
