"""Answers to prompts from a checkpoint, as one of a layout's ranks. Leaves out: training on them (experience.py), scoring them."""

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from megatron_tower.rollout.generate import sample


def answers(
    model: GPTModel,
    prompts: dict[int, list[int]],
    *,
    samples: int,
    max_new_tokens: int,
    stop_ids: list[int],
    temperature: float,
    top_p: float,
    seed: int,
    batch_size: int,
) -> dict[int, list[list[int]]]:
    """Tokens of `samples` answers to each prompt, which a number tells: with the seed it also decides what is drawn.

    Data-parallel replicas share the prompts; every rank gets all answers. The words are those of `generate.sample`.
    """
    mine = list(prompts)[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    found = sample(
        model,
        [prompts[number] for number in mine],
        samples=samples,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        keys=mine,
        batch_size=batch_size,
    )
    own = {number: [answer.tokens for answer in row] for number, row in zip(mine, found, strict=True)}
    shares: list[dict[int, list[list[int]]]] = [{}] * parallel_state.get_data_parallel_world_size()
    dist.all_gather_object(shares, own, group=parallel_state.get_data_parallel_group())
    return {number: row for share in shares for number, row in share.items()}
