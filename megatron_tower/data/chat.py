"""Conversations as tokens: the families' chat formats, which tokens are answers, and where generation stops.

The tokenizer's own chat template decides how a conversation is written. It is cut at the start of each answer and tokenized
piece by piece, so that a prompt has the same tokens in training as in generation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_tower.config import InputError
from megatron_tower.data.jsonl import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]
FORM = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


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
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

FORMATS = {
    "gemma2": ChatFormat("<eos>", "<pad>", "<bos>", "<unk>", ("<start_of_turn>", "<end_of_turn>"), _GEMMA),
    "qwen2": ChatFormat("<|endoftext|>", "<|endoftext|>", None, None, ("<|im_start|>", "<|im_end|>"), _CHATML),
    "llama": ChatFormat("</s>", "</s>", "<s>", "<unk>", ("<|im_start|>", "<|im_end|>"), "{{ bos_token }}" + _CHATML),  # Tower v1, EuroLLM
}
LLAMA3 = ChatFormat("<|end_of_text|>", "<|end_of_text|>", "<|begin_of_text|>", None, ("<|start_header_id|>", "<|eot_id|>"), _LLAMA3)


def conversation(row: Row, place: str) -> list[dict[str, str]]:
    """The turns of a row; raises InputError for one that is no conversation which ends with an answer."""
    try:
        messages = row["messages"]
        roles = [message["role"] for message in messages]
        texts = [message["content"] for message in messages]
    except (KeyError, TypeError) as error:
        raise InputError(f"{place}: no messages with role and content; each line must look like {FORM}") from error
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or len(turns) % 2 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        raise InputError(f"{place}: roles are {roles}; user and assistant must take turns, the assistant last")
    if blank := next((roles[i] for i, text in enumerate(texts) if not isinstance(text, str) or not text.strip()), None):
        raise InputError(f"{place}: the {blank} turn has no text; drop the line or fill it in")
    return messages


def encode(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and, beside each, 1 for what the model has to say: answers and their end-of-turn token.

    Ends with the last answer's end of turn. Raises InputError when there is no answer, or the template refuses.
    """
    return encode_all(tokenizer, [messages])[0]


def encode_all(tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Messages]) -> list[tuple[list[int], list[int]]]:
    """`encode` of many conversations at once."""
    pieces = _pieces(tokenizer, conversations)
    encoded: list[tuple[list[int], list[int]]] = [([], []) for _ in conversations]
    if pieces:
        for (row, _, said), ids in zip(pieces, tokenizer([p[1] for p in pieces], add_special_tokens=False)["input_ids"], strict=True):
            encoded[row][0].extend(ids)
            encoded[row][1].extend([said] * len(ids))
    return encoded


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", asked: str | list[dict[str, str]]) -> list[int]:
    """One user turn, or a chat that ends with one, ready for the model's answer."""
    chat = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    [text] = _render(tokenizer, [chat], open_turn=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def stop_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokens that end an answer: the end of turn and the end of text."""
    return sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer))})


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """What fills rows up; the end of text where a tokenizer has no padding token. It never counts."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def template(tokenizer: "PreTrainedTokenizerBase", family: str) -> str:
    """The chat template for a base model that has none: the family's, or Llama 3's where the vocabulary has its tokens."""
    return (LLAMA3 if _knows(tokenizer, LLAMA3) else FORMATS[family]).template


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The family's closing token, known by its being in the vocabulary."""
    for form in (*FORMATS.values(), LLAMA3):
        if _knows(tokenizer, form):
            return form.turns[1]
    raise InputError(f"tokenizer {tokenizer.name_or_path} has no end-of-turn token: use that of one of the families {', '.join(FORMATS)}")


def _knows(tokenizer: "PreTrainedTokenizerBase", form: ChatFormat) -> bool:
    return tokenizer.convert_tokens_to_ids(form.turns[1]) not in (None, tokenizer.unk_token_id)


def _pieces(tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Messages]) -> list[tuple[int, str, int]]:
    """The written conversations cut into (which of them, text, 1 if said by the model)."""
    closing = end_of_turn(tokenizer)
    answers = [
        (row, i) for row, messages in enumerate(conversations) for i, message in enumerate(messages) if message["role"] == "assistant"
    ]
    if {row for row, _ in answers} != set(range(len(conversations))):
        raise InputError("a conversation has no assistant turn: there is nothing to learn from it")
    prompts = _render(tokenizer, [conversations[row][:i] for row, i in answers], open_turn=True)
    answered = _render(tokenizer, [conversations[row][: i + 1] for row, i in answers], open_turn=False)
    pieces, done = [], [""] * len(conversations)
    for (row, _), prompt, whole in zip(answers, prompts, answered, strict=True):
        if not (prompt.startswith(done[row]) and whole.startswith(prompt) and closing in whole[len(prompt) :]):
            raise InputError(
                f"the chat template of {tokenizer.name_or_path} rewrites earlier turns or never closes one: use the family's own"
            )
        end = whole.rindex(closing) + len(closing)
        pieces += [(row, prompt[len(done[row]) :], 0), (row, whole[len(prompt) : end], 1)]
        done[row] = whole[:end]
    return pieces


def _render(tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[Messages], open_turn: bool) -> list[str]:
    written = [list(messages) for messages in conversations]
    return tokenizer.apply_chat_template(written, tokenize=False, add_generation_prompt=open_turn) if written else []
