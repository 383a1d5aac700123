"""What answers a task's prompts, behind one small interface: a Megatron checkpoint, a transformers folder, vLLM or an endpoint.

    chats, decoding -> (number of the chat, its Generation), one by one as they come, in any order
"""

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


class Generator(Protocol):
    """name: for tables; identity: a digest or address that tells this model's answers from any other's; chat: False for a base
    model, which gets the text of a single turn to go on with."""

    name: str
    identity: str
    chat: bool

    def generate(self, chats: Sequence[Chat], decoding: Decoding) -> Iterator[tuple[int, Generation]]: ...
