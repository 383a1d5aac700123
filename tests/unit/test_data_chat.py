"""Chat formats that tokenizers of our own do not have: Llama's two, told apart by the vocabulary. The others: test_data_tokenizer.py."""

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_tower.config import InputError
from megatron_tower.data import chat

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hallo"}]
WRITTEN = {
    "llama": "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHallo<|im_end|>",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHallo<|eot_id|>",
}
FORMS = {"llama": chat.FORMATS["llama"], "llama3": chat.LLAMA3}


def tokenizer(specials: list[str], **named: str) -> PreTrainedTokenizerFast:
    """A base model's: one token a byte after the special ones, no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=specials, clean_up_tokenization_spaces=False, **named)


@pytest.mark.parametrize("name", FORMS)
def test_llama_s_format_follows_from_the_vocabulary(name: str) -> None:
    form = FORMS[name]
    words = tokenizer([*form.specials, "<|end_header_id|>"], bos_token=form.bos, eos_token=form.eos)
    words.chat_template = chat.template(words, "llama")
    ids, said = chat.encode(words, TALK)
    assert words.decode(ids) == WRITTEN[name]
    assert words.decode([i for i, s in zip(ids, said, strict=True) if s]) == f"Hallo{form.turns[1]}"
    assert ids[: said.index(1)] == chat.prompt_ids(words, "Hi") and ids[-1] in chat.stop_ids(words)


def test_a_vocabulary_without_turns_is_refused() -> None:
    """Llama 2's own: a chat needs tokens that its base model never had."""
    words = tokenizer(["<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    words.chat_template = chat.template(words, "llama")
    with pytest.raises(InputError, match="has no end-of-turn token"):
        chat.encode(words, TALK)
