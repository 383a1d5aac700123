"""Conversations as tokens: the families' chat formats, which tokens are answers, and where generation stops.

The tokenizer's own chat template decides how a conversation is written. It is cut at the start of each answer and tokenized
piece by piece, so that a prompt has the same tokens in training as in generation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_tower.config import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class ChatFormat:
    """A family's special tokens, by role, and its chat template (Jinja)."""

    eos: str
    pad: str
    bos: str | None
    unk: str | None
    turns: tuple[str, str]  # start and end of a turn
    template: str

    @property
    def specials(self) -> list[str]:
        """In the order of their ids, each once."""
        return [t for t in dict.fromkeys((self.pad, self.eos, self.bos, self.unk, *self.turns)) if t]


_GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('Gemma has no system turn') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

FORMATS = {
    "gemma2": ChatFormat("<eos>", "<pad>", "<bos>", "<unk>", ("<start_of_turn>", "<end_of_turn>"), _GEMMA),
    "qwen2": ChatFormat("<|endoftext|>", "<|endoftext|>", None, None, ("<|im_start|>", "<|im_end|>"), _CHATML),
}


def encode(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and, beside each, 1 for what the model has to say: answers and their end-of-turn token.

    Ends with the last answer's end of turn. Raises InputError when there is no answer, or the template refuses.
    """
    return encode_all(tokenizer, [messages])[0]


def encode_all(tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Messages]) -> list[tuple[list[int], list[int]]]:
    """`encode` of many conversations in one call of the tokenizer."""
    pieces = [(row, text, said) for row, messages in enumerate(conversations) for text, said in _pieces(tokenizer, messages)]
    encoded: list[tuple[list[int], list[int]]] = [([], []) for _ in conversations]
    if pieces:
        for (row, _, said), ids in zip(pieces, tokenizer([p[1] for p in pieces], add_special_tokens=False)["input_ids"], strict=True):
            encoded[row][0].extend(ids)
            encoded[row][1].extend([said] * len(ids))
    return encoded


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", user_text: str) -> list[int]:
    """One user turn, ready for the model's answer."""
    text = _render(tokenizer, [{"role": "user", "content": user_text}], open_turn=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def stop_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokens that end an answer: the end of turn and the end of text."""
    return sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer))})


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The family's closing token, known by its being in the vocabulary."""
    for form in FORMATS.values():
        token = form.turns[1]
        if tokenizer.convert_tokens_to_ids(token) not in (None, tokenizer.unk_token_id):
            return token
    raise InputError(f"tokenizer {tokenizer.name_or_path} has no end-of-turn token: use that of one of the families {', '.join(FORMATS)}")


def _pieces(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> list[tuple[str, int]]:
    """The written conversation cut into (text, 1 if said by the model)."""
    closing, done, pieces = end_of_turn(tokenizer), "", []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, answered = _render(tokenizer, messages[:i], open_turn=True), _render(tokenizer, messages[: i + 1], open_turn=False)
            if not (prompt.startswith(done) and answered.startswith(prompt) and closing in answered[len(prompt) :]):
                raise InputError(f"the chat template of {tokenizer.name_or_path} rewrites earlier turns or never closes one: use the family's own")
            end = answered.rindex(closing) + len(closing)
            pieces += [(prompt[len(done) :], 0), (answered[len(prompt) : end], 1)]
            done = answered[:end]
    if not pieces:
        raise InputError("a conversation has no assistant turn: there is nothing to learn from it")
    return pieces


def _render(tokenizer: "PreTrainedTokenizerBase", messages: Messages, open_turn: bool) -> str:
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=open_turn)
