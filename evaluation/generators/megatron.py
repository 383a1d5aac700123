"""A checkpoint that answers: greedy continuations of prompts, the likelihood of texts and of given answers, at any layout.

A checkpoint that has seen chats is prompted in its chat template. One that hasn't (a CPT phase, a tokenizer without template)
gets the prompt as a text to go on with.
Data-parallel replicas share the items and exchange the answers. Leaves out: context parallelism.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from transformers import PreTrainedTokenizerFast

from evaluation.generators import Chat, Decoding, Generation, Likelihood, cut
from megatron_tower.config import EvalConfig, InputError
from megatron_tower.data.batch import Batch
from megatron_tower.data.chat import encode_all, prompt_ids, stop_ids
from megatron_tower.rollout.generate import generate
from megatron_tower.rollout.scoring import label_logprobs
from megatron_tower.runtime.distributed import device

BATCHES = 4  # of each replica between two looks at the answers
LOGITS_AT_ONCE = 2**28  # elements on one rank: bounds memory where the vocabulary is large
Item, Found = TypeVar("Item"), TypeVar("Found")


@dataclass(frozen=True)
class Scored:
    """Token ids, of which the last `count` are scored given all that stands before them."""

    ids: list[int]
    count: int


@dataclass(frozen=True)
class MegatronGenerator:
    """`chat`: whether prompts go into the tokenizer's chat template."""

    model: GPTModel
    tokenizer: PreTrainedTokenizerFast
    chat: bool
    cfg: EvalConfig
    name: str = "checkpoint"
    identity: str = ""

    def prompt(self, chat: Chat) -> list[int]:
        """Token ids from BOS to where the answer begins."""
        if self.chat:
            return prompt_ids(self.tokenizer, chat)
        return [*self._bos, *self.tokenizer.encode(chat[-1]["content"], add_special_tokens=False)]

    def written(self, prompt: str) -> str:
        return self.tokenizer.decode(self.prompt([{"role": "user", "content": prompt}]))

    def generate(self, chats: Sequence[Chat], decoding: Decoding) -> Iterator[tuple[int, Generation]]:
        """Answers without special tokens, a few batches at a time, the shortest prompts first. InputError where one may not fit."""
        prompts = [self.prompt(chat) for chat in chats]
        longest, context = max(map(len, prompts), default=0), self.model.max_sequence_length
        if longest + decoding.max_new_tokens > context:
            raise InputError(
                f"a prompt has {longest} tokens and its answer may have {decoding.max_new_tokens}, more than the model's context of "
                f"{context}: lower eval.max_new_tokens, or leave a task that sets its own length out of eval.tasks"
            )
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        at_once = BATCHES * self.cfg.batch_size * parallel_state.get_data_parallel_world_size()
        for start in range(0, len(order), at_once):
            rows = order[start : start + at_once]
            yield from zip(rows, _over_replicas([prompts[row] for row in rows], lambda mine: self._decoded(mine, decoding)), strict=True)

    def _decoded(self, prompts: list[list[int]], decoding: Decoding) -> list[Generation]:
        stops = stop_ids(self.tokenizer) if self.chat else [self.tokenizer.eos_token_id]
        ids = generate(
            self.model,
            prompts,
            max_new_tokens=decoding.max_new_tokens,
            stop_ids=stops,
            batch_size=self.cfg.batch_size,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            seed=decoding.seed,
        )
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        found = []
        for text, row, prompt in zip(texts, ids, prompts, strict=True):
            said = cut(text, decoding.stop)
            ended = row[-1] in stops or said != text
            found.append(Generation(said, "stop" if ended else "length", None, len(prompt), len(row)))
        return found

    def likelihood(self, texts: Sequence[str]) -> list[Likelihood]:
        """Bits of text and EOS given BOS; a family without BOS (Qwen) has nothing to predict the first token from: it is not scored.

        A text longer than the model's context is scored window by window.
        """
        return _over_replicas(texts, lambda mine: self._likelihood(mine))

    def _likelihood(self, texts: Sequence[str]) -> list[Likelihood]:
        encoded = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        documents = [[*self._bos, *ids, self.tokenizer.eos_token_id] for ids in encoded]
        context = self.model.max_sequence_length
        windows = [(row, ids[at : at + context + 1]) for row, ids in enumerate(documents) for at in range(0, len(ids) - 1, context)]
        nats = [0.0] * len(texts)
        for (row, _), found in zip(windows, self._nats([Scored(ids, len(ids) - 1) for _, ids in windows]), strict=True):
            nats[row] += found
        return [Likelihood(total / math.log(2), len(ids) - 1) for total, ids in zip(nats, documents, strict=True)]

    def answer_likelihood(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Likelihood]:
        """Bits of each given answer and what ends it (its turn; the text, for a model that has seen no chats) given its prompt.

        Raises InputError for one that is longer than the model's context.
        """
        written = self._written(prompts, answers)
        for prompt, scored in zip(prompts, written, strict=True):
            if len(scored.ids) - 1 > self.model.max_sequence_length:
                raise InputError(
                    f'the prompt "{prompt[:60]}" and its answer have {len(scored.ids)} tokens, more than the model\'s context of '
                    f"{self.model.max_sequence_length}: shorten or drop that item"
                )
        nats = _over_replicas(written, self._nats)
        return [Likelihood(total / math.log(2), scored.count) for total, scored in zip(nats, written, strict=True)]

    def _written(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Scored]:
        """Prompt and answer as training wrote them: a chat of two turns, or one text."""
        if self.chat:
            chats = [[{"role": "user", "content": p}, {"role": "assistant", "content": a}] for p, a in zip(prompts, answers, strict=True)]
            return [Scored(ids, sum(said)) for ids, said in encode_all(self.tokenizer, chats)]
        endings = self.tokenizer([f" {answer}" for answer in answers], add_special_tokens=False)["input_ids"]
        end = [self.tokenizer.eos_token_id]
        return [
            Scored([*self.prompt([{"role": "user", "content": p}]), *ids, *end], len(ids) + 1)
            for p, ids in zip(prompts, endings, strict=True)
        ]

    def _nats(self, sequences: Sequence[Scored]) -> list[float]:
        """-sum log p over the scored tokens of each sequence."""
        nats = [0.0] * len(sequences)
        for rows in self._batches(sequences):
            for row, found in zip(rows, token_nats(self.model, [sequences[row] for row in rows]), strict=True):
                nats[row] = found
        return nats

    def _batches(self, sequences: Sequence[Scored]) -> Iterator[list[int]]:
        """Which go together: neighbours in length, as many as `eval.batch_size` and the logits' memory allow."""
        vocabulary = self.model.vocab_size // parallel_state.get_tensor_model_parallel_world_size()
        batch: list[int] = []
        for row in sorted(range(len(sequences)), key=lambda row: len(sequences[row].ids)):
            if batch and (len(batch) == self.cfg.batch_size or (len(batch) + 1) * len(sequences[row].ids) * vocabulary > LOGITS_AT_ONCE):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    @property
    def _bos(self) -> list[int]:
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]


def token_nats(model: GPTModel, sequences: list[Scored]) -> list[float]:
    """-sum log p(token | those before) over each sequence's scored tokens, in nats; every rank of a replica gets the answer."""
    batch = _padded(sequences, parallel_state.get_tensor_model_parallel_world_size()).to(device())
    (logprobs,) = label_logprobs([model.eval()], [batch])
    return (-(logprobs * batch.loss_mask).sum(dim=1, dtype=torch.float64)).tolist()


def _padded(sequences: list[Scored], multiple: int) -> Batch:
    """Rows padded on the right, where causal attention doesn't look; the length a multiple, for sequence parallelism."""
    width = -(-(max(len(s.ids) for s in sequences) - 1) // multiple) * multiple
    full = torch.zeros(len(sequences), width + 1, dtype=torch.int64)
    mask = torch.zeros(len(sequences), width)
    for row, scored in enumerate(sequences):
        last = len(scored.ids) - 1
        full[row, : last + 1] = torch.tensor(scored.ids)
        mask[row, last - scored.count : last] = 1
    return Batch(full[:, :-1].contiguous(), full[:, 1:].contiguous(), mask, torch.arange(width).repeat(len(sequences), 1))


def _over_replicas(items: Sequence[Item], answer: Callable[[Sequence[Item]], list[Found]]) -> list[Found]:
    """Each data-parallel replica answers every n-th item; all get all answers, in the items' order."""
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = answer(items[replica::replicas])
    if replicas == 1:
        return mine
    shares: list = [None] * replicas
    dist.all_gather_object(shares, mine, group=parallel_state.get_data_parallel_group())
    return [shares[i % replicas][i // replicas] for i in range(len(items))]
