"""A Hugging Face folder answers as the same weights do in Megatron, token for token; vLLM by a stand-in of its documented interface."""

import sys
import types
from pathlib import Path

import pytest

from evaluation.answers import Asker
from evaluation.generators import Decoding
from evaluation.generators.folder import open_folder
from evaluation.store import Store
from megatron_tower.command import load
from megatron_tower.config import Config, InputError, ModelConfig
from megatron_tower.data import tokenizer
from megatron_tower.models.hf import random_hf
from tests.distributed import evaluation_cases as cases

PROMPTS = [text[:20] for text in cases.TEXTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    words = tokenizer.train(cases.TEXTS * 30, "gemma2", 320, root / "tokenizer")
    shape = ModelConfig(
        name="gemma2",
        family="gemma2",
        vocab_size=len(words),
        max_position_embeddings=64,
        init_std=0.2,
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        attention_softcap=50.0,
        final_softcap=30.0,
        sliding_window=8,
        window_layers=[0],
    )
    random_hf(shape, root / "gemma2", root / "tokenizer", seed=5)
    return root / "gemma2"


def config(folder: Path, *words: str) -> Config:
    return load([f"eval.checkpoint={folder}", "eval.batch_size=2", *words])


@pytest.mark.parametrize("chat", [True, False])
def test_transformers_and_megatron_say_the_same(folder: Path, chat: bool, single_rank: None) -> None:
    theirs, told = open_folder(config(folder, "eval.generator=transformers", f"eval.chat={chat}"), "sha")
    ours = cases.answers(folder, "single", chat)
    decoding = Decoding(6, stop=() if chat else ("\n",))
    found = Asker(theirs, None).generate(PROMPTS, decoding)
    assert [(one.text, one.finish, one.tokens) for one in found] == [(o["text"], o["finish"], o["tokens"]) for o in ours["outputs"]]
    likelihoods = [*theirs.likelihood(cases.TEXTS), *theirs.answer_likelihood(*zip(*cases.GIVEN, strict=True))]
    assert [one.bits for one in likelihoods] == pytest.approx(ours["bits"], rel=1e-4)
    assert [one.tokens for one in likelihoods] == ours["tokens"]
    assert told["family"] == "gemma2" and told["parameters"] > 1000


def test_nothing_is_asked_twice(folder: Path, tmp_path: Path, single_rank: None) -> None:
    generator, _ = open_folder(config(folder, "eval.generator=transformers"), "sha")
    with Store(tmp_path / "answers.jsonl") as store:
        first = Asker(generator, store).generate([*PROMPTS, PROMPTS[0]], Decoding(6))
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == len(PROMPTS)
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"key": "torn')
    generator.__dict__["model"] = None  # can't answer any more
    with Store(tmp_path / "answers.jsonl") as store:
        assert Asker(generator, store).generate([*PROMPTS, PROMPTS[0]], Decoding(6)) == first
        with pytest.raises(AttributeError):
            Asker(generator, store).generate(PROMPTS[:1], Decoding(7))


def test_vllm_gets_our_token_ids(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        def __init__(self, **words: object) -> None:
            assert words == {"model": str(folder), "tensor_parallel_size": 2, "trust_remote_code": False}

        def generate(self, prompts: list[dict], how: types.SimpleNamespace) -> list[types.SimpleNamespace]:
            assert how.temperature == 0 and how.max_tokens == 3
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=p["prompt_token_ids"][-3:])]) for p in prompts]

    cfg = config(folder, "eval.generator=vllm", "eval.chat=false", "parallel=tp2")
    monkeypatch.setitem(sys.modules, "vllm", None)
    generator, _ = open_folder(cfg, "sha")
    with pytest.raises(InputError, match="vllm is not installed"):
        list(generator.generate([[{"role": "user", "content": "x"}]], Decoding(3)))
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=Engine, SamplingParams=types.SimpleNamespace))
    [(_, found)] = generator.generate([[{"role": "user", "content": "a red house"}]], Decoding(3))
    assert found.finish == "length" and found.tokens == 3 and "a red house".endswith(found.text.strip())
    with pytest.raises(InputError, match="no likelihoods"):
        generator.likelihood(["x"])


def test_a_template_that_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="has no chat template"):
        open_folder(config(tmp_path, "eval.generator=transformers", "eval.chat=true"), "sha")


@pytest.mark.parametrize("damaged", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_folder_is_one_sentence(folder: Path, tmp_path: Path, damaged: str) -> None:
    for path in folder.iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[: len(content) // 2] if path.name == damaged else content)
    with pytest.raises(InputError, match=rf"eval\.checkpoint={tmp_path} can't be opened \([^\n]+\): give a whole Hugging Face folder"):
        open_folder(config(tmp_path, "eval.generator=transformers"), "sha")
