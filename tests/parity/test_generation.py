"""Decoding with a cache against full recomputation, against transformers' `generate`, and across layouts."""

import json
from pathlib import Path

import pytest
import torch

from megatron_tower.config import InputError, ParallelConfig
from megatron_tower.data.batch import Batch
from megatron_tower.models import attention
from tests.parity import generation_cases as cases

FAMILIES = ("gemma2", "qwen2")
SINGLE = ParallelConfig(name="single")
TIE = 1e-4  # logits closer than this may change places between two orders of adding up in float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generation")
    for family in FAMILIES:
        cases.write_folder(family, path / family)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_equals_full_recomputation(single_rank, folder: Path, family: str):
    answers = cases.run(family, folder / family, SINGLE)
    model = cases.load(family, folder / family, SINGLE).eval()
    with torch.no_grad():
        for prompt, answer in zip(cases.prompts(), answers["greedy"], strict=True):
            for count in range(cases.NEW):
                logits = model(torch.tensor([prompt + answer[:count]]), None, None)[0, -1]
                assert answer[count] == logits.argmax(), f"token {count} after a prompt of {len(prompt)}"


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_generate(single_rank, folder: Path, family: str):
    """A row may leave transformers' path only where the two best logits are a tie; none of these rows has one."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(folder / family, attn_implementation="eager").eval()
    prompts = cases.prompts()
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    visible = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    greedy = {"max_new_tokens": cases.NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = hf.generate(tokens, attention_mask=visible, **greedy)[:, width:].tolist()
    ours = cases.run(family, folder / family, SINGLE)["greedy"]
    ties = 0
    for prompt, our, their in zip(prompts, ours, theirs, strict=True):
        if our != their:
            same = next(i for i in range(cases.NEW) if our[i] != their[i])
            with torch.no_grad():
                best = hf(torch.tensor([prompt + our[:same]])).logits[0, -1].topk(2)
            assert {our[same], their[same]} == set(best.indices.tolist()), f"prompt of {len(prompt)}, token {same}"
            assert best.values[0] - best.values[1] < TIE, f"prompt of {len(prompt)}, token {same}"
            ties += 1
    assert ties <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_stops_and_batches(single_rank, folder: Path, family: str):
    answers = cases.run(family, folder / family, SINGLE)
    stops = set(cases.CASES["stopping"]["stop_ids"])
    for whole, stopped in zip(answers["greedy"], answers["stopping"], strict=True):
        first = next((i for i, token in enumerate(whole) if token in stops), cases.NEW)
        assert stopped == whole[: first + 1]
    assert {len(stopped) for stopped in answers["stopping"]} - {cases.NEW}, "no row stopped: the case tests nothing"
    assert answers["sampled"] == answers["small batches"]
    assert answers["sampled"] != answers["greedy"]


def test_two_ranks_equal_one(launch, single_rank, folder: Path):
    alone = {family: cases.run(family, folder / family, SINGLE) for family in FAMILIES}
    launch("tests.parity.generation_cases", 2, str(folder))
    for layout in cases.TWO_RANKS:
        for rank in range(2):
            assert json.loads((folder / f"{layout.name}.{rank}.json").read_text()) == alone, f"{layout.name}, rank {rank}"


@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_on_after_generation(single_rank, folder: Path, family: str):
    """Nothing that generation leaves behind (modes, masks made in inference mode) shows in the gradients."""
    from megatron_tower.models.forward import forward
    from megatron_tower.rollout.generate import generate

    prompts = cases.prompts()
    row = torch.tensor(prompts[7])[None]
    batch = Batch(row, row, torch.ones(row.shape), torch.arange(row.size(1))[None])

    def gradients(model) -> list[torch.Tensor]:
        model.zero_grad()
        forward(model, batch).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for cached in (attention._causal, attention._causal_bias, attention._itself):
        cached.cache_clear()
    model = cases.load(family, folder / family, SINGLE).train()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    generate(model, prompts, **cases.GREEDY)  # with padding
    generate(model, prompts[7:], **cases.GREEDY)  # without
    assert model.training and attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    after = gradients(model)
    untouched = gradients(cases.load(family, folder / family, SINGLE).train())
    assert all(torch.equal(a, b) for a, b in zip(after, untouched, strict=True))


def test_bad_input_is_refused(single_rank, folder: Path):
    from megatron_tower.rollout.generate import generate

    model = cases.load("qwen2", folder / "qwen2", SINGLE)
    assert generate(model, [], **cases.GREEDY) == []
    for prompts, words, told in (
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 105], {}, "context of 128"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0"),
    ):
        with pytest.raises(InputError, match=told):
            generate(model, prompts, **cases.GREEDY | words)
    assert len(generate(model, [[1] * 104], **cases.GREEDY)[0]) == cases.NEW  # just fits
