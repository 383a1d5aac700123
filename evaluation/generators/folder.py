"""A Hugging Face folder that answers: by transformers on one device, or by vLLM on as many as parallel.tensor says.

Reads safetensors and JSON of the folder, no code from it. Prompts are those of `generators/megatron.py`, token for token. vLLM is looked
up when it is asked for; it has no likelihoods here.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.generators import Chat, Decoding, Generation, Generator, Likelihood, cut
from evaluation.store import digest
from megatron_tower.config import Config, InputError
from megatron_tower.data.chat import encode_all, pad_id, prompt_ids, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LOCAL = {"local_files_only": True, "trust_remote_code": False}


def open_folder(cfg: Config, sha256: str) -> tuple[Generator, dict[str, Any]]:
    """(what answers, {name, family, parameters} of it); raises InputError where a package or device is missing or a file damaged."""
    from safetensors import SafetensorError

    try:
        return _opened(cfg, sha256)
    except Exception as error:
        damaged = isinstance(error, (OSError, ValueError, TypeError, KeyError, SafetensorError)) or type(error) is Exception  # tokenizers'
        if not damaged:
            raise
        raise InputError(
            f"eval.checkpoint={cfg.evaluated} can't be opened ({' '.join(str(error).split())[:200]}): "
            "give a whole Hugging Face folder, with config, tokenizer and safetensors"
        ) from error


def _opened(cfg: Config, sha256: str) -> tuple[Generator, dict[str, Any]]:
    from transformers import AutoConfig, AutoTokenizer

    folder = cfg.evaluated
    tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
    chat = cfg.eval.chat if cfg.eval.chat is not None else tokenizer.chat_template is not None
    if chat and tokenizer.chat_template is None:
        raise InputError(f"eval.chat=true, but the tokenizer of {folder} has no chat template: set eval.chat=false")
    told = {"name": folder.resolve().name, "family": AutoConfig.from_pretrained(folder, **LOCAL).model_type, "parameters": None}
    prompts = Prompts(tokenizer, chat)
    if cfg.eval.generator == "vllm":
        return VLLMGenerator(prompts, told["name"], digest(sha256, chat), folder, cfg.parallel.tensor), told
    generator = TransformersGenerator(prompts, told["name"], digest(sha256, chat), folder, cfg.eval.batch_size)
    return generator, told | {"parameters": generator.model.num_parameters()}


@dataclass(frozen=True)
class Prompts:
    """Token ids of what a model reads, in the tokenizer's chat template or (chat false) as plain text."""

    tokenizer: "PreTrainedTokenizerFast"
    chat: bool

    def ids(self, chat: Chat) -> list[int]:
        if self.chat:
            return prompt_ids(self.tokenizer, chat)
        return [*self.bos, *self.tokenizer.encode(chat[-1]["content"], add_special_tokens=False)]

    @property
    def bos(self) -> list[int]:
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    @property
    def stops(self) -> list[int]:
        return stop_ids(self.tokenizer) if self.chat else [self.tokenizer.eos_token_id]

    def written(self, prompt: str) -> str:
        return self.tokenizer.decode(self.ids([{"role": "user", "content": prompt}]))

    def answered(self, prompt: list[int], ids: list[int], decoding: Decoding) -> Generation:
        """ids: new tokens, the first stop token included where one came."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        said = cut(text, decoding.stop)
        ended = said != text or (ids and ids[-1] in self.stops)
        return Generation(said, "stop" if ended else "length", None, len(prompt), len(ids))


@dataclass(frozen=True)
class TransformersGenerator:
    prompts: Prompts
    name: str
    identity: str
    folder: Path
    batch_size: int

    @property
    def chat(self) -> bool:
        return self.prompts.chat

    @cached_property
    def model(self) -> "PreTrainedModel":
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        kind = "auto" if device == "cuda" else torch.float32
        capped = getattr(AutoConfig.from_pretrained(self.folder, **LOCAL), "attn_logit_softcapping", None)
        attention = "eager" if capped else "sdpa"  # sdpa leaves Gemma 2's soft-cap out
        model = AutoModelForCausalLM.from_pretrained(self.folder, use_safetensors=True, dtype=kind, attn_implementation=attention, **LOCAL)
        return model.to(device).eval()

    def written(self, prompt: str) -> str:
        return self.prompts.written(prompt)

    def generate(self, chats: Sequence[Chat], decoding: Decoding) -> Iterator[tuple[int, Generation]]:
        """Batches of neighbours in length, padded on the left."""
        import torch

        ids = [self.prompts.ids(chat) for chat in chats]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        how = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if decoding.temperature:
            torch.manual_seed(decoding.seed)
            how = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            width = max(len(ids[row]) for row in rows)
            padded = torch.full((len(rows), width), pad_id(self.prompts.tokenizer), device=self.model.device)
            mask = torch.zeros_like(padded)
            for at, row in enumerate(rows):
                padded[at, width - len(ids[row]) :] = torch.tensor(ids[row], device=self.model.device)
                mask[at, width - len(ids[row]) :] = 1
            with torch.inference_mode():
                found = self.model.generate(
                    input_ids=padded,
                    attention_mask=mask,
                    max_new_tokens=decoding.max_new_tokens,
                    eos_token_id=self.prompts.stops,
                    pad_token_id=pad_id(self.prompts.tokenizer),
                    **how,
                )
            for row, new in zip(rows, found[:, width:].tolist(), strict=True):
                end = next((at + 1 for at, token in enumerate(new) if token in self.prompts.stops), len(new))
                yield row, self.prompts.answered(ids[row], new[:end], decoding)

    def likelihood(self, texts: Sequence[str]) -> list[Likelihood]:
        """Bits of text and EOS given BOS, in windows of the model's context."""
        tokenizer, found = self.prompts.tokenizer, []
        context = self.model.config.max_position_embeddings
        for text in texts:
            ids = [*self.prompts.bos, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
            windows = [ids[at : at + context + 1] for at in range(0, len(ids) - 1, context)]
            found.append(Likelihood(sum(self._bits(window, len(window) - 1) for window in windows), len(ids) - 1))
        return found

    def answer_likelihood(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Likelihood]:
        """Bits of each answer and what ends it given its prompt."""
        found = []
        for prompt, answer in zip(prompts, answers, strict=True):
            asked = [{"role": "user", "content": prompt}]
            if self.chat:
                [(ids, said)] = encode_all(self.prompts.tokenizer, [[*asked, {"role": "assistant", "content": answer}]])
                count = sum(said)
            else:
                ending = [*self.prompts.tokenizer.encode(f" {answer}", add_special_tokens=False), self.prompts.tokenizer.eos_token_id]
                ids, count = [*self.prompts.ids(asked), *ending], len(ending)
            if len(ids) - 1 > self.model.config.max_position_embeddings:
                raise InputError(
                    f'the prompt "{prompt[:60]}" and its answer have {len(ids)} tokens, more than the model\'s context of '
                    f"{self.model.config.max_position_embeddings}: shorten or drop that item"
                )
            found.append(Likelihood(self._bits(ids, count), count))
        return found

    def _bits(self, ids: list[int], count: int) -> float:
        """-log2 p of the last `count` tokens given those before."""
        import torch

        row = torch.tensor([ids], device=self.model.device)
        with torch.inference_mode():
            logprobs = self.model(row[:, :-1]).logits[0].float().log_softmax(-1)
        return -logprobs.gather(1, row[0, 1:, None])[-count:].sum(dtype=torch.float64).item() / math.log(2)


@dataclass(frozen=True)
class VLLMGenerator:
    prompts: Prompts
    name: str
    identity: str
    folder: Path
    tensor_parallel: int

    @property
    def chat(self) -> bool:
        return self.prompts.chat

    @cached_property
    def engine(self) -> Any:
        try:
            from vllm import LLM
        except ImportError as error:
            raise InputError(
                "eval.generator=vllm, and vllm is not installed here: install it in an environment of its own and use its server with "
                "eval.generator=endpoint, or eval.generator=transformers"
            ) from error
        return LLM(model=str(self.folder), tensor_parallel_size=self.tensor_parallel, trust_remote_code=False)

    def written(self, prompt: str) -> str:
        return self.prompts.written(prompt)

    def generate(self, chats: Sequence[Chat], decoding: Decoding) -> Iterator[tuple[int, Generation]]:
        """The engine's own batching; answers come all at once."""
        engine = self.engine
        from vllm import SamplingParams

        ids = [self.prompts.ids(chat) for chat in chats]
        how = SamplingParams(
            max_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            seed=decoding.seed,
            stop_token_ids=self.prompts.stops,
        )
        for row, found in enumerate(engine.generate([{"prompt_token_ids": one} for one in ids], how)):
            yield row, self.prompts.answered(ids[row], list(found.outputs[0].token_ids), decoding)

    def likelihood(self, texts: Sequence[str]) -> list[Likelihood]:
        raise InputError("eval.generator=vllm measures no likelihoods: leave the task out of eval.tasks, or use another generator")

    def answer_likelihood(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Likelihood]:
        raise InputError("eval.generator=vllm measures no likelihoods: leave the task out of eval.tasks, or use another generator")
