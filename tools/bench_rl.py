"""Speed of preference optimisation and GRPO on this machine: three tables, of `python -m tools.bench rl`.

a WPO step beside two SFT steps of the same tokens, the reference log-probabilities stored
where the seconds of a GRPO step go: rollout, reward, log-probabilities, update
sampling G answers a prompt, which share its prefill, beside transformers' `generate` with `num_return_sequences`
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_tower.config import Config, GRPOConfig, RolloutConfig, WPOConfig
from megatron_tower.data.batch import Batch
from megatron_tower.data.order import dealt
from megatron_tower.data.packing import isolated

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAIRS, PROMPT, ANSWER = 4, 64, 64  # pairs a step; tokens of a prompt and of an answer
SAMPLED, GROUP, NEW = 8, 8, 32  # prompts, answers each, new tokens
WPO_HEAD = "| model | two SFT steps, ms | WPO step, ms | WPO / SFT | lowest - highest |\n|---|---:|---:|---:|---:|"
GRPO_HEAD = "| model | rollout, s | reward, s | log-probs, s | update, s | step, s |\n|---|---:|---:|---:|---:|---:|"


def _tokens(index: int, count: int, vocabulary: int) -> list[int]:
    return torch.randint(8, vocabulary, (count,), generator=torch.Generator().manual_seed(index)).tolist()


class Conversations:
    """Row i: one random prompt and answer, loss on the answer, as SFT packs it."""

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def __getitem__(self, index: int) -> Batch:
        ids = torch.tensor(_tokens(index, PROMPT + ANSWER + 1, self.vocabulary))
        mask = torch.arange(PROMPT + ANSWER) >= PROMPT - 1
        return isolated(ids[:-1], ids[1:], mask, [0, PROMPT + ANSWER])


class RandomPrompts:
    """Prompt i and an item that even a model with random weights satisfies now and then."""

    def __init__(self, vocabulary: int, seed: int):
        self.vocabulary, self.seed = vocabulary, seed

    def __getitem__(self, index: int) -> tuple[dict, list[int]]:
        check = {
            "instruction_ids": ["keywords:letter_frequency"],
            "kwargs": [{"let_relation": "at least", "letter": "e", "let_frequency": 12}],
        }
        item = {"prompt": "", "reward": "instructions", "family": "letters", "locale": "en", "answer": None, "check": check}
        return item, _tokens(dealt(index, 10_000, self.seed), PROMPT, self.vocabulary)


class Letters:
    """As much of a tokenizer as a rollout asks for: each token is a letter, and none ends an answer."""

    eos_token_id = pad_token_id = 0
    unk_token_id = name_or_path = None

    def convert_tokens_to_ids(self, token: str) -> int:
        return 1

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return ["".join(chr(ord("a") + token % 26) for token in row) for row in rows]


def wpo_beside_sft(cfg: Config, make: Callable[[], list], turns: int) -> list[tuple[float, float]]:
    """(seconds of two SFT steps, seconds of a WPO step) of each turn; an SFT step has as many tokens as one side of a WPO step's pairs."""
    from megatron_tower.data.preferences import Preferences
    from megatron_tower.training import reference
    from megatron_tower.training.rounds import PreferenceSource, RowSource
    from megatron_tower.training.trainer import Trainer

    phase = replace(cfg.phase, seq_length=PROMPT + ANSWER, global_batch_size=PAIRS, micro_batch_size=PAIRS)
    own = replace(cfg, phase=phase)
    sft = Trainer(own, make(), RowSource(own, Conversations(cfg.model.vocab_size)), 1000)
    said = [0] * (PROMPT + 1) + [1] * ANSWER
    answers = [(_tokens(i, PROMPT + ANSWER + 1, cfg.model.vocab_size), said) for i in range(2 * PAIRS * (turns + 1))]
    data = Preferences(list(zip(answers[0::2], answers[1::2], strict=True)), PROMPT + ANSWER, 0, cfg.seed)
    chunks = make()
    with tempfile.TemporaryDirectory() as folder:
        own = replace(cfg, run_dir=folder, phase=replace(phase, name="wpo", objective=WPOConfig(beta=0.1)))
        known = reference.stored(own, data, len(data.pairs), chunks, "random")
    wpo = Trainer(own, chunks, PreferenceSource(own, data, known), 1000)
    seconds = []
    for _ in range(turns + 1):
        began = time.perf_counter()
        sft.step()
        sft.step()
        middle = time.perf_counter()
        wpo.step()
        seconds.append((middle - began, time.perf_counter() - middle))
    return seconds[1:]  # the first turn warms up


def grpo_split(cfg: Config, make: Callable[[], list], steps: int) -> dict[str, float]:
    """Mean seconds a step of each part, after a first step that starts the reward's worker. The KL term is on."""
    from megatron_tower.rewards.pool import VerifierPool
    from megatron_tower.rollout.experience import RolloutSource
    from megatron_tower.training.trainer import Trainer

    rollout = RolloutConfig(rollouts_per_prompt=GROUP, temperature=1.0, top_p=1.0, max_new_tokens=NEW)
    phase = replace(cfg.phase, name="grpo", objective=GRPOConfig(kl=1e-3), rollout=rollout, seq_length=PROMPT + NEW)
    own = replace(cfg, phase=replace(phase, global_batch_size=SAMPLED, micro_batch_size=SAMPLED * GROUP))
    with VerifierPool(1, 10.0) as pool:
        chunks, prompts = make(), RandomPrompts(cfg.model.vocab_size, cfg.seed)
        trainer = Trainer(own, chunks, RolloutSource(own, prompts, chunks[0], Letters(), make(), pool), steps + 1)
        told = [trainer.step() for _ in range(steps + 1)][1:]
    return {part: statistics.fmean(t[f"seconds_{part}"] for t in told) for part in ("rollout", "reward", "logprobs", "update")}


def samplers(model: torch.nn.Module, hf: "PreTrainedModel") -> tuple[Callable, Callable]:
    """Two functions that sample GROUP answers of SAMPLED prompts at temperature 1 and return how many answers there are."""
    from megatron_tower.rollout.generate import sample

    prompts = [_tokens(i, PROMPT, hf.config.vocab_size) for i in range(SAMPLED)]
    options = {"max_new_tokens": NEW, "do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0, "num_return_sequences": GROUP}

    def ours(_: int) -> list[int]:
        found = sample(model, prompts, samples=GROUP, max_new_tokens=NEW, stop_ids=[], temperature=1.0, batch_size=SAMPLED * GROUP)
        return [len(answer.tokens) for group in found for answer in group]

    def theirs(_: int) -> list[int]:
        ids = torch.tensor(prompts)
        tokens: Tensor = hf.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return [len(row) - PROMPT for row in tokens]

    hf.eval()
    return ours, theirs


def wpo_line(name: str, seconds: list[tuple[float, float]]) -> str:
    """A row of the table that begins with WPO_HEAD."""
    ratios = [wpo / sft for sft, wpo in seconds]
    sft, wpo = (1000 * statistics.median(side) for side in zip(*seconds, strict=True))
    return f"| {name} | {sft:.0f} | {wpo:.0f} | {statistics.median(ratios):.2f} | {min(ratios):.2f} - {max(ratios):.2f} |"


def grpo_line(name: str, seconds: dict[str, float]) -> str:
    """A row of the table that begins with GRPO_HEAD."""
    cells = " | ".join(f"{s:.2f}" for s in (*seconds.values(), sum(seconds.values())))
    return f"| {name} | {cells} |"
