"""Text from the training weights: batched decoding with a key-value cache, under tensor and pipeline parallelism.

`generate` gives one answer a prompt, `sample` several with their log-probabilities; the answers of a prompt share its prefill.

The prompts of a batch run end to end in one packed row. In the cache they are padded on the left, so that all rows write the same
slot; rotary scores depend on the distance of two slots alone, and the padding's keys are hidden (`models/decoding.py`). How a batch is
carried on: `rollout/steps.py`.

Leaves out: context parallelism, virtual pipeline stages, refilling a batch with waiting prompts.
Run:  python -m megatron_tower.translate --checkpoint RUN --to de "Good morning"
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_tower.config import InputError
from megatron_tower.objectives.logprobs import token_logprobs
from megatron_tower.rollout.sampling import next_tokens
from megatron_tower.rollout.steps import FixedSteps, GrowingSteps, steps_for

BLOCK = 1024  # rows of a weight; on one thread MKL multiplies larger ones with a handful of tokens a quarter slower


@dataclass(frozen=True)
class Completion:
    """One answer. tokens: with the stop token when one came; logprobs: of each, natural logarithms."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen and when a row ends. temperature 0 is greedy; `stop_ids` are the tokens that end a row.
    samples: answers a prompt; logprobs: whether each token's is wanted."""

    max_new_tokens: int
    stop_ids: list[int]
    temperature: float
    top_p: float
    samples: int = 1
    logprobs: bool = False


def generate(
    model: GPTModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_ids: list[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
) -> list[list[int]]:
    """New tokens of each prompt, the stop token included when one came: those of `sample` with its defaults."""
    decoding = Decoding(max_new_tokens, stop_ids, temperature, top_p)
    return [answer.tokens for [answer] in _complete(model, prompts, decoding, seed, range(len(prompts)), batch_size)]


def sample(
    model: GPTModel,
    prompts: list[list[int]],
    *,
    samples: int = 1,
    max_new_tokens: int,
    stop_ids: list[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    keys: list[int] | None = None,
    batch_size: int = 64,
) -> list[list[Completion]]:
    """`samples` answers of each prompt, at most `batch_size` at once (but all answers of a prompt together).

    A token's log-probability is that under softmax(logits / temperature) before the nucleus is cut; under softmax(logits) where
    temperature is 0. Every rank of a model replica calls it with the same arguments and gets the same answer. Answer g of prompt i
    draws its random numbers from (seed, keys[i], g), keys being the positions if not given: samples depend neither on `batch_size`
    nor on the layout, nor on which data-parallel replica makes them. Raises InputError before any work.
    """
    decoding = Decoding(max_new_tokens, stop_ids, temperature, top_p, samples, logprobs=True)
    return _complete(model, prompts, decoding, seed, range(len(prompts)) if keys is None else keys, batch_size)


def _complete(
    model: GPTModel, prompts: list[list[int]], decoding: Decoding, seed: int, keys: Sequence[int], batch_size: int
) -> list[list[Completion]]:
    _check(model, prompts, decoding, keys)
    answers: list[list[Completion]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))  # little padding, and the largest batch first
    at_once = max(1, batch_size // decoding.samples)
    device = next(model.parameters()).device
    with _inference(model):
        longest = max(map(len, prompts), default=0)
        steps = steps_for(model, min(at_once, len(prompts)) * decoding.samples, longest + decoding.max_new_tokens)
        for start in range(0, len(prompts), at_once):
            rows = by_length[start : start + at_once]
            streams = [np.random.default_rng((seed, keys[row], g)) for row in rows for g in range(decoding.samples)]
            numbers = np.stack([stream.random(decoding.max_new_tokens) for stream in streams])
            found = _decode(steps, [prompts[row] for row in rows], numbers, decoding, device)
            for i, row in enumerate(rows):
                answers[row] = found[i * decoding.samples : (i + 1) * decoding.samples]
    return answers


def _check(model: GPTModel, prompts: list[list[int]], decoding: Decoding, keys: Sequence[int]) -> None:
    if model.config.context_parallel_size > 1:
        raise InputError(f"generation can't split a sequence over parallel.context={model.config.context_parallel_size}: use 1")
    if decoding.max_new_tokens < 1 or decoding.samples < 1:
        raise InputError(f"max_new_tokens={decoding.max_new_tokens}, samples={decoding.samples}: each must be 1 or more")
    if decoding.temperature < 0 or not 0 < decoding.top_p <= 1:
        raise InputError(f"temperature={decoding.temperature}, top_p={decoding.top_p}: must be 0 or more, and above 0 up to 1")
    if len(keys) != len(prompts) or any(key < 0 for key in keys):
        raise InputError(f"{len(keys)} keys for {len(prompts)} prompts: give each prompt one, 0 or more")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {row} is empty: give it at least one token")
        if len(prompt) + decoding.max_new_tokens > model.max_sequence_length:
            raise InputError(
                f"prompt {row} has {len(prompt)} tokens; with max_new_tokens={decoding.max_new_tokens} it exceeds the model's "
                f"context of {model.max_sequence_length}: shorten it or ask for fewer new tokens"
            )


@contextmanager
def _inference(model: GPTModel) -> Iterator[None]:
    """Evaluation mode. A decoding step has one token, which sequence parallelism can't split: off; linears do without a backward pass."""
    meanwhile = dict.fromkeys(("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings"), False)
    meanwhile["fp8"] = None  # whose matrix products want more rows than a step has; the weights are the same
    meanwhile["allreduce_dgrad"] = True  # "the linear will see to the gradient of its input": then nothing is wrapped around that
    owners = [model.config, *model.modules()]
    switched = [(owner, name, getattr(owner, name)) for owner in owners for name in meanwhile if hasattr(owner, name)]
    linears = [module for module in model.modules() if hasattr(module, "_forward_impl")]
    training = model.training
    model.eval()
    for owner, name, _ in switched:
        setattr(owner, name, meanwhile[name])
    for linear in linears:
        linear._forward_impl = _linear
    try:
        with torch.inference_mode():
            yield
    finally:
        for linear in linears:
            del linear._forward_impl
        for owner, name, value in switched:
            setattr(owner, name, value)
        model.train(training)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None, **_: object) -> Tensor:
    """What megatron-core's parallel linears compute between their collectives; one decoding step on a CPU, block by block."""
    if input.is_cuda or bias is not None or input.size(0) > 1 or weight.size(0) <= BLOCK:
        return F.linear(input, weight, bias)
    return torch.cat([F.linear(input, block) for block in weight.split(BLOCK)], dim=-1)


def _decode(
    steps: GrowingSteps | FixedSteps, prompts: list[list[int]], numbers: np.ndarray, decoding: Decoding, device: torch.device
) -> list[Completion]:
    """One batch to its end, a prompt's answers side by side. numbers: [prompts * samples, max_new_tokens] uniform in [0, 1)."""
    copies = torch.arange(len(prompts), device=device).repeat_interleave(decoding.samples)
    draws = torch.from_numpy(numbers).to(device)

    answers = [Completion() for _ in numbers]
    batch, alive = list(range(len(answers))), [True] * len(answers)  # the answer of each row, and whether it goes on
    logits = steps.prefill(prompts, copies, decoding.max_new_tokens)
    for step in range(decoding.max_new_tokens):
        chosen, logprobs = _choose(logits, draws[:, step], decoding)
        told = chosen.tolist(), [] if logprobs is None else logprobs.tolist()
        for row in (row for row, goes_on in enumerate(alive) if goes_on):
            answers[batch[row]].tokens.append(told[0][row])
            answers[batch[row]].logprobs.extend(told[1][row : row + 1])
            alive[row] = told[0][row] not in decoding.stop_ids
        if not any(alive) or step + 1 == decoding.max_new_tokens:
            break
        stay = steps.keep(alive)
        if len(stay) < len(batch):
            batch, alive = [batch[row] for row in stay], [alive[row] for row in stay]
            chosen, draws = chosen[stay], draws[stay]
        logits = steps.step(chosen[:, None])
    return answers


def _choose(logits: Tensor | None, numbers: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor | None]:
    """Next token of each row [batch], and its log-probability where wanted: found on the last pipeline stage, told to the others."""
    chosen = torch.empty(len(numbers), dtype=torch.int64, device=numbers.device)
    logprobs = torch.empty(len(numbers), device=numbers.device) if decoding.logprobs else None
    if logits is not None:
        group = parallel_state.get_tensor_model_parallel_group()
        chosen = next_tokens(logits, numbers, decoding.temperature, decoding.top_p, group)
        if decoding.logprobs:
            logprobs = token_logprobs(logits, chosen, group, decoding.temperature or 1.0)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        for told in (chosen, logprobs):
            if told is not None:
                last = parallel_state.get_pipeline_model_parallel_last_rank()
                dist.broadcast(told, last, parallel_state.get_pipeline_model_parallel_group())
    return chosen, logprobs
