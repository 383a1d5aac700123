"""Sampling at real sizes on one card: ours, transformers' `generate`, and vLLM where it is installed. Rows of bench_gpu.py's tables.

Weights are random, so that nothing is downloaded; answers end at their full length. Not run yet on a card.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_tower.command import load
from megatron_tower.config import Config
from megatron_tower.runtime.distributed import device

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SAMPLED = "| model | side | tokens/s | lowest - highest |\n|---|---|---:|---:|"


@dataclass(frozen=True)
class Sampled:
    """New tokens per second: the median over the turns, the lowest, the highest."""

    model: str
    side: str
    rate: float
    lowest: float
    highest: float


def sampling(model: str, rows: int, prompt: int, new: int) -> Iterator[tuple[str, Callable[[], Sampled]]]:
    """`rows` prompts of `prompt` tokens, `new` sampled ones each at temperature 1, from random weights: ours, transformers, vLLM."""
    cfg = load([f"model={model}", f"precision={'bf16' if device().type == 'cuda' else 'fp32'}"])
    prompts = torch.randint(8, cfg.model.vocab_size, (rows, prompt), generator=torch.Generator().manual_seed(0))
    attention = "eager" if cfg.model.attention_softcap else "sdpa"
    for name, build in (("ours", our_sampler), (f"transformers, {attention}", transformers_sampler), ("vLLM", vllm_sampler)):
        yield name, partial(_sampled, model, name, partial(build, cfg, prompts), rows, new, [])


def _sampled(model: str, name: str, build: Callable[[], Callable[[int], None]], rows: int, new: int, rates: list[float]) -> Sampled:
    """Build, warm up, time; `rates`: of the turns before. What `build` returns samples that many new tokens for each of `rows` prompts."""
    sampler = build()
    sampler(2)
    began = time.perf_counter()
    sampler(new)
    rates.append(rows * new / (time.perf_counter() - began))
    return Sampled(model, name, statistics.median(rates), min(rates), max(rates))


def our_sampler(cfg: Config, prompts: Tensor) -> Callable[[int], None]:
    from megatron_tower.models.build import build_chunks
    from megatron_tower.rollout.generate import sample

    (decoder,) = build_chunks(cfg.model, cfg.parallel, cfg.precision)
    return lambda new: sample(decoder, prompts.tolist(), max_new_tokens=new, stop_ids=[], temperature=1.0, batch_size=len(prompts))


def transformers_sampler(cfg: Config, prompts: Tensor) -> Callable[[int], None]:
    from transformers import AutoModelForCausalLM

    with device():
        attention = "eager" if cfg.model.attention_softcap else "sdpa"
        hf = AutoModelForCausalLM.from_config(hf_config(cfg), attn_implementation=attention).to(dtype()).eval()
    asked = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}

    def run(new: int) -> None:
        with torch.inference_mode():
            there = prompts.to(device())
            hf.generate(there, attention_mask=torch.ones_like(there), max_new_tokens=new, **asked).tolist()

    return run


def vllm_sampler(cfg: Config, prompts: Tensor) -> Callable[[int], None]:
    """Its own engine, scheduler and graphs, on as much of the card as is free."""
    from vllm import LLM, SamplingParams  # optional dependency

    with tempfile.TemporaryDirectory() as folder:
        hf_config(cfg).save_pretrained(folder)
        llm = LLM(folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=1024, max_num_seqs=len(prompts))
    given = [{"prompt_token_ids": ids} for ids in prompts.tolist()]
    return lambda new: llm.generate(given, SamplingParams(max_tokens=new, temperature=1.0, ignore_eos=True, detokenize=False))


def hf_config(cfg: Config) -> "PretrainedConfig":
    from transformers import AutoConfig

    from megatron_tower.models.families import family_of

    return AutoConfig.for_model(**family_of(cfg.model.family).to_hf(cfg.model))


def dtype() -> torch.dtype:
    return torch.bfloat16 if device().type == "cuda" else torch.float32
