"""A checkpoint that answers: greedy continuations of prompts, and the likelihood of texts, under tensor and pipeline parallelism.

A checkpoint that has seen chats is prompted in its chat template. One that hasn't (a CPT phase, a tokenizer without template)
gets the prompt as a text to go on with, and its answer ends with the line: the way its own training text was written.
Data-parallel replicas share the items and exchange the answers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from evaluation.tasks.task import Likelihood
from megatron_tower.config import EvalConfig
from megatron_tower.data.batch import Batch
from megatron_tower.data.chat import prompt_ids, stop_ids
from megatron_tower.models.forward import forward
from megatron_tower.objectives.logprobs import token_logprobs
from megatron_tower.rollout.generate import generate
from megatron_tower.runtime.distributed import device

LOGITS_AT_ONCE = 2**28  # elements on one rank: bounds memory where the vocabulary is large


@dataclass(frozen=True)
class MegatronGenerator:
    """`chat`: whether prompts go into the tokenizer's chat template."""

    model: GPTModel
    tokenizer: PreTrainedTokenizerFast
    chat: bool
    cfg: EvalConfig

    def prompt(self, text: str) -> list[int]:
        """Token ids from BOS to where the answer begins."""
        if self.chat:
            return prompt_ids(self.tokenizer, text)
        return [*self._bos, *self.tokenizer.encode(text, add_special_tokens=False)]

    def generate(self, prompts: Sequence[str]) -> list[str]:
        """Greedy answers, special tokens dropped."""
        stops = stop_ids(self.tokenizer) if self.chat else [self.tokenizer.eos_token_id]
        return _over_replicas(prompts, lambda mine: self._decoded([self.prompt(text) for text in mine], stops))

    def _decoded(self, prompts: list[list[int]], stops: list[int]) -> list[str]:
        ids = generate(
            self.model,
            prompts,
            max_new_tokens=self.cfg.max_new_tokens,
            stop_ids=stops,
            pad_id=self.tokenizer.pad_token_id,
            batch_size=self.cfg.batch_size,
        )
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts if self.chat else [text.lstrip("\n").split("\n")[0] for text in texts]

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
        windows.sort(key=lambda window: len(window[1]))
        nats = [0.0] * len(texts)
        for batch in self._batches(windows):
            for (row, _), found in zip(batch, token_nats(self.model, [ids for _, ids in batch]), strict=True):
                nats[row] += found
        return [Likelihood(total / math.log(2), len(ids) - 1) for total, ids in zip(nats, documents, strict=True)]

    def _batches(self, windows: list[tuple[int, list[int]]]) -> Iterator[list[tuple[int, list[int]]]]:
        """Neighbours in length together, as many as `eval.batch_size` and the logits' memory allow."""
        vocabulary = self.model.vocab_size // parallel_state.get_tensor_model_parallel_world_size()
        batch: list[tuple[int, list[int]]] = []
        for window in windows:
            if batch and (len(batch) == self.cfg.batch_size or (len(batch) + 1) * len(window[1]) * vocabulary > LOGITS_AT_ONCE):
                yield batch
                batch = []
            batch.append(window)
        if batch:
            yield batch

    @property
    def _bos(self) -> list[int]:
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]


@torch.no_grad()
def token_nats(model: GPTModel, sequences: list[list[int]]) -> list[float]:
    """-sum log p(token | those before) over each sequence but its first token, in nats; every rank of a replica gets the answer."""
    batch = _padded(sequences, parallel_state.get_tensor_model_parallel_world_size()).to(device())

    def step(batches: Iterator[Batch], model: GPTModel) -> tuple[Tensor, Callable[..., Tensor]]:
        return forward(model, next(batches)), summed

    def summed(logits: Tensor, non_loss_data: bool) -> Tensor:
        """logits: [batch, seq, vocab/tp] -> [batch] float64."""
        logprobs = token_logprobs(logits, batch.labels, parallel_state.get_tensor_model_parallel_group())
        return -(logprobs * batch.loss_mask).sum(dim=1, dtype=torch.float64)

    model.eval()
    rows, width = batch.tokens.shape
    found = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([batch]),
        model=[model],
        num_microbatches=1,
        seq_length=width,
        micro_batch_size=rows,
        forward_only=True,
        collect_non_loss_data=True,
    )
    nats = found[0] if parallel_state.is_pipeline_last_stage() else torch.empty(rows, dtype=torch.float64, device=device())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(nats, parallel_state.get_pipeline_model_parallel_last_rank(), parallel_state.get_pipeline_model_parallel_group())
    return nats.tolist()


def _padded(sequences: list[list[int]], multiple: int) -> Batch:
    """Rows padded on the right, where causal attention doesn't look; the length a multiple, for sequence parallelism."""
    width = -(-(max(len(ids) for ids in sequences) - 1) // multiple) * multiple
    full = torch.zeros(len(sequences), width + 1, dtype=torch.int64)
    mask = torch.zeros(len(sequences), width)
    for row, ids in enumerate(sequences):
        full[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids) - 1] = 1
    return Batch(full[:, :-1].contiguous(), full[:, 1:].contiguous(), mask, torch.arange(width).repeat(len(sequences), 1))


def _over_replicas(items: Sequence[str], answer: Callable[[Sequence[str]], list]) -> list:
    """Each data-parallel replica answers every n-th item; all get all answers, in the items' order."""
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = answer(items[replica::replicas])
    if replicas == 1:
        return mine
    shares: list = [None] * replicas
    dist.all_gather_object(shares, mine, group=parallel_state.get_data_parallel_group())
    return [shares[i % replicas][i // replicas] for i in range(len(items))]
