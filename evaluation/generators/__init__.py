"""What answers a task's prompts, behind one small interface: a Megatron checkpoint, a transformers folder, vLLM or an endpoint.

chats, decoding -> (number of the chat, its Generation), one by one as they come, in any order
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

Chat = list[dict[str, str]]  # turns of {"role": system | user | assistant, "content": text}, the last one the user's


@dataclass(frozen=True)
class Decoding:
    """How an answer is sampled: greedy at temperature 0. stop: texts that end it, which are not part of it."""

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generation:
    """An answer. finish: "stop" where it ended by itself, "length" where it was cut, "error" where none came, for `problem`.
    tokens: of prompt and answer, where the generator counts them."""

    text: str
    finish: str = "stop"
    problem: str | None = None
    prompt_tokens: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of a text and its end, in bits, and the number of tokens it is summed over."""

    bits: float
    tokens: int

    @property
    def logprob(self) -> float:
        """Mean log-probability of a token, in nats."""
        return -self.bits * math.log(2) / self.tokens


class Generator(Protocol):
    """name: for tables; identity: a digest or address that tells this model's answers from any other's; chat: False for a base
    model, which gets the text of a single turn to go on with. A generator that has no likelihoods raises InputError for them."""

    name: str
    identity: str
    chat: bool

    def generate(self, chats: Sequence[Chat], decoding: Decoding) -> Iterator[tuple[int, Generation]]: ...

    def likelihood(self, texts: Sequence[str]) -> list[Likelihood]: ...

    def answer_likelihood(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Likelihood]: ...

    def written(self, prompt: str) -> str:
        """What the model reads of a single turn, as far as is known."""
        ...


def cut(text: str, stop: Sequence[str]) -> str:
    """What stands before the first of the texts `stop`; where there are any, empty lines before it do not count."""
    if stop:
        text = text.lstrip("\n")
    return text[: min((at for end in stop if (at := text.find(end)) >= 0), default=len(text))]
