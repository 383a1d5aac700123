"""Likelihoods of texts and given answers against transformers in float64, one by one; the same at every layout; n-gram models."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from evaluation import baselines
from evaluation.generators import Decoding
from megatron_tower.config import EvalConfig, InputError, ModelConfig
from megatron_tower.data import corpora, tokenizer
from megatron_tower.models.hf import random_hf
from megatron_tower.runtime import distributed
from tests.distributed import evaluation_cases as cases

SHAPE = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8}
FAMILIES = {
    "gemma2": {"attention_softcap": 50.0, "final_softcap": 30.0, "sliding_window": 8, "window_layers": [0]},
    "qwen2": {"qkv_bias": True, "tie_embeddings": False},
}
CONTEXT = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model with a tokenizer, one a family."""
    root = tmp_path_factory.mktemp("models")
    for family, features in FAMILIES.items():
        words = tokenizer.train(cases.TEXTS * 30, family, 320, root / "tokenizer" / family)
        model = ModelConfig(
            name=family, family=family, vocab_size=len(words), max_position_embeddings=CONTEXT, init_std=0.2, **SHAPE, **features
        )
        random_hf(model, root / family, root / "tokenizer" / family, seed=5)
    return {family: root / family for family in FAMILIES}


def naive_bits(folder: Path, words: PreTrainedTokenizerFast, text: str) -> float:
    """-log2 p of each token given those before it, one text at a time, in float64, in windows as long as the context."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()
    bos = [] if words.bos_token_id is None else [words.bos_token_id]
    ids = [*bos, *words.encode(text, add_special_tokens=False), words.eos_token_id]
    bits = 0.0
    for start in range(0, len(ids) - 1, CONTEXT):
        window = torch.tensor([ids[start : start + CONTEXT + 1]])
        with torch.no_grad():
            logprobs = model(window[:, :-1]).logits[0].log_softmax(-1)
        bits -= sum(float(logprobs[t, window[0, t + 1]]) for t in range(window.shape[1] - 1)) / math.log(2)
    return bits


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihood_equals_a_naive_computation(family: str, folders: dict[str, Path], single_rank: None) -> None:
    words = tokenizer.load(folders[family])
    found = cases.answers(folders[family], "single", chat=False)
    assert found["bits"][: len(cases.TEXTS)] == pytest.approx([naive_bits(folders[family], words, text) for text in cases.TEXTS], rel=1e-5)
    first = 0 if words.bos_token_id is not None else 1
    lengths = [len(words.encode(text, add_special_tokens=False)) + 1 - first for text in cases.TEXTS]
    assert found["tokens"][: len(cases.TEXTS)] == lengths and max(lengths) > CONTEXT  # the longest takes two windows
    assert not any("\n" in output["text"] for output in found["outputs"])


def naive_answer_bits(folder: Path, words: PreTrainedTokenizerFast, written: str, answer: str) -> tuple[float, int]:
    """-log2 p of the text `written` from where `answer`, which it ends with, begins; and how many tokens that is."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()
    opening, ending = (words.encode(text, add_special_tokens=False) for text in (written.removesuffix(answer), answer))
    ids = torch.tensor([[*opening, *ending]])
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    return -sum(float(logprobs[t - 1, ids[0, t]]) for t in range(len(opening), ids.shape[1])) / math.log(2), len(ending)


CHATS = {
    "gemma2": "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n{}<end_of_turn>",
    "qwen2": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>",
}
TEXTS = {"gemma2": "<bos>{} {}<eos>", "qwen2": "{} {}<|endoftext|>"}


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_given_answer_is_scored_from_its_first_token_to_its_end(
    family: str, chat: bool, folders: dict[str, Path], single_rank: None
) -> None:
    words = tokenizer.load(folders[family])
    found = cases.answers(folders[family], "single", chat)
    form, ends = (CHATS if chat else TEXTS)[family], "" if chat else " "
    expected = []
    for prompt, answer in cases.GIVEN:
        tail = ends + answer + form.split("{}")[2]
        expected.append(naive_answer_bits(folders[family], words, form.format(prompt, answer), tail))
    assert found["bits"][len(cases.TEXTS) :] == pytest.approx([bits for bits, _ in expected], rel=1e-5)
    assert found["tokens"][len(cases.TEXTS) :] == [count for _, count in expected]


def test_an_item_longer_than_the_context_is_named(folders: dict[str, Path], single_rank: None) -> None:
    generator = cases.opened(folders["gemma2"], "single", chat=True)
    with pytest.raises(InputError, match=r'"one two three.*" and its answer have \d+ tokens, more than the model\'s context of 64'):
        generator.answer_likelihood([*cases.TEXTS[:1], cases.TEXTS[-1]], ["x", "x"])
    with pytest.raises(InputError, match=r"a prompt has \d+ tokens and its answer may have 60, .* of 64: lower eval.max_new_tokens"):
        next(generator.generate([[{"role": "user", "content": "one two three"}]], Decoding(max_new_tokens=60)))


def test_every_layout_gives_the_same(folders: dict[str, Path], launch: Callable[..., None], single_rank: None) -> None:
    folder = folders["gemma2"]
    (folder / "expected.json").write_text(json.dumps(cases.answers(folder, "single", chat=True)))
    distributed.shutdown()
    launch("tests.distributed.evaluation_cases", 2, str(folder), "tp2", "pp2", "dp2", "tp2_sp")


def test_ngram_models_read_the_corpus_and_are_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    words = tokenizer.load(folders["gemma2"])
    data = tmp_path / "data"
    (data / "cpt").mkdir(parents=True)
    corpora.write(data / "cpt" / "monolingual", ["a red house", "a red door"], words)
    corpora.write(data / "cpt" / "parallel", ["house: Haus"], words)
    words.save_pretrained(data / "tokenizer")
    (data / "held_out").mkdir()
    rows = [{"locale": "en", "text": "a red house"}, {"locale": "de_DE", "text": "Haus"}]
    (data / "held_out" / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = EvalConfig(name="test")
    found = baselines.bits_per_byte(data, "sha", cfg, tmp_path / "ngrams.json")
    documents = [words.encode(text, add_special_tokens=False) for text in ("a red house", "a red door", "house: Haus")]
    counts = np.bincount([t for d in documents for t in [*d, words.eos_token_id]], minlength=len(words))
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice)
    share = (np.maximum(counts - discount, 0) + discount * np.count_nonzero(counts) / len(words)) / counts.sum()
    asked = [*documents[0], words.eos_token_id]
    assert found["unigram"]["en"] == pytest.approx(-np.log2(share[asked]).sum() / len("a red house"))
    assert found["trigram"]["en"] < found["unigram"]["en"] and set(found["trigram"]) == {"en", "de_DE"}
    (data / "held_out" / "text.jsonl").unlink()
    assert baselines.bits_per_byte(data, "sha", cfg, tmp_path / "ngrams.json") == found  # from the cache
