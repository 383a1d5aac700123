"""The shipped configs against transformers in float32, narrow and two layers deep, at TP 1, 2, 4 x PP 1, 2: logits, gradients, text.

Kept as they are: heads, query groups, head size, query scale, soft-caps, RoPE, biases, tied head, and the vocabulary's remainder.
Cut down: layers, hidden and MLP width, vocabulary, and the window (to 16 tokens; 4096 of them are tried on one rank).
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_tower.command import load
from megatron_tower.config import ParallelConfig
from megatron_tower.runtime import distributed
from tests.parity import model_cases, real_head_cases, reference

MODELS = {
    "gemma2_2b": (),
    "gemma2_9b": (),
    "gemma2_27b": (),
    "qwen25_0_5b": (),
    "qwen25_7b": (),
    "qwen25_72b": (),
    "llama31_8b": ("model.rope_scaling.original_max_position_embeddings=64",),  # short, so that rows this long feel the scaling
    "tower_7b": ("model.vocab_size=32007",),  # TowerInstruct's: an odd number
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real_heads")
    for name, words in MODELS.items():
        model = load([f"model={name}", *words]).model
        small = {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 64, "vocab_size": 128 + model.vocab_size % 64}
        if model.sliding_window:
            small |= {"sliding_window": reference.WINDOW, "window_layers": [0]}
        reference.write(folder / name, replace(model, **small), forms=("packed",))
        answers = real_head_cases.check(folder / name, "single")
        (folder / name / "answers.json").write_text(json.dumps(answers))  # what the other layouts have to say too
    distributed.shutdown()
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_that_of_transformers(expected: Path, name: str):
    from transformers import AutoModelForCausalLM

    answers = json.loads((expected / name / "answers.json").read_text())
    hf = AutoModelForCausalLM.from_pretrained(expected / name / "model", attn_implementation="eager")
    for prompt, answer in zip(real_head_cases.prompts(hf.config.vocab_size), answers["greedy"], strict=True):
        greedy = {"max_new_tokens": real_head_cases.NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert hf.generate(torch.tensor([prompt]), **greedy)[0, len(prompt) :].tolist() == answer


def test_a_window_of_its_true_size(single_rank, tmp_path: Path):
    """A row of 64 tokens more than Gemma 2's window of 4096: the logits of its end are those of transformers."""
    from transformers import AutoModelForCausalLM

    model = replace(load(["model=gemma2_2b"]).model, num_layers=2, hidden_size=48, ffn_hidden_size=64, vocab_size=128, window_layers=[0])
    reference.write(tmp_path, model, forms=())
    tokens = torch.randint(128, (1, model.sliding_window + 64), generator=torch.Generator().manual_seed(1))
    (chunk,) = model_cases.loaded(tmp_path, model, ParallelConfig(name="single"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    with torch.no_grad():
        ours = chunk(tokens, None, None)[0, -128:]
        expected = theirs(tokens, use_cache=False, logits_to_keep=128).logits[0]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_four_ranks(launch, expected: Path):
    launch("tests.parity.real_head_cases", 4, str(expected), "tp2dp2", "pp2dp2", "tp4", "tp2pp2")


def test_eight_ranks(launch, expected: Path):
    launch("tests.parity.real_head_cases", 8, str(expected), "tp4pp2")
