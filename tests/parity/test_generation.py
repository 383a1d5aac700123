"""Decoding with a cache against full recomputation, against transformers' `generate`, and across layouts."""

import json
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from megatron_tower.config import InputError, ParallelConfig
from megatron_tower.data.batch import Batch
from megatron_tower.models.attention import plain
from megatron_tower.rollout import steps
from megatron_tower.rollout.generate import generate, sample
from megatron_tower.rollout.sampling import next_tokens
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


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_equal_full_recomputation(single_rank, folder: Path, family: str):
    """Without cache or shared prefill: one forward pass over prompt and answer says what each random number chooses, and how likely."""
    answers = cases.run(family, folder / family, SINGLE)
    model = cases.load(family, folder / family, SINGLE).eval()
    group, stops = parallel_state.get_tensor_model_parallel_group(), cases.HOT["stop_ids"]
    for name in ("hot", "cold"):
        temperature = cases.SAMPLED[name]["temperature"]
        for prompt, key, row in zip(cases.prompts(), cases.KEYS, answers[name], strict=True):
            assert len(row) == cases.SAMPLES
            for g, answer in enumerate(row):
                tokens = torch.tensor(answer["tokens"])
                assert len(tokens) == cases.NEW or tokens[-1] in stops
                assert not set(answer["tokens"][:-1]) & set(stops)
                numbers = np.random.default_rng((cases.HOT["seed"], key, g)).random(len(tokens))
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + answer["tokens"]]), None, None)[0, len(prompt) - 1 : -1]
                assert torch.equal(next_tokens(logits, torch.from_numpy(numbers), temperature, cases.HOT["top_p"], group), tokens)
                wanted = (logits.double() / (temperature or 1)).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
                assert (wanted - torch.tensor(answer["logprobs"])).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_depend_on_their_key_alone(single_rank, folder: Path, family: str):
    """Not on the batch, on how many answers are asked for, or on which prompts are answered beside (on another replica)."""
    answers = cases.run(family, folder / family, SINGLE)
    _assert_alike(answers["hot"], answers["one prompt at once"], "batch size")
    model = cases.load(family, folder / family, SINGLE)
    share = cases.HOT | {"samples": 1}
    found = sample(model, cases.prompts()[1::2], keys=cases.KEYS[1::2], **share)
    _assert_alike([row[:1] for row in answers["hot"][1::2]], [[asdict(answer) for answer in row] for row in found], "share of the prompts")
    texts = [tuple(answer["tokens"]) for row in answers["hot"] for answer in row]
    assert len(set(texts)) > 0.9 * len(texts), "the answers of a prompt hardly differ"
    assert all(row[0] == row[1] for row in answers["cold"])


@pytest.mark.parametrize("family", FAMILIES)
def test_fixed_shapes_equal_growing_caches(single_rank, folder: Path, family: str, monkeypatch: pytest.MonkeyPatch):
    """What a GPU replays as graphs, run here as it is: rows that stay for a while after they stopped, spans of the cache, its reuse."""
    growing = cases.run(family, folder / family, SINGLE)
    made, sizes = [], set()

    class Watched(steps.FixedSteps):
        def __init__(self, *args: object):
            super().__init__(*args)
            made.append(self)

        def _run(self, rows: int, span: int) -> torch.Tensor:
            sizes.add((rows, span))
            return super()._run(rows, span)

    monkeypatch.setattr(steps, "SPAN", 16)
    monkeypatch.setattr("megatron_tower.rollout.generate.steps_for", Watched)
    fixed = cases.run(family, folder / family, SINGLE)
    for name, answers in growing.items():
        if name in cases.CASES:
            assert fixed[name] == answers, name
        else:
            _assert_alike(fixed[name], answers, name)
    assert len(made) == len(growing)  # one for all batches of a call
    assert len({rows for rows, _ in sizes}) > 3 and len({span for _, span in sizes}) > 2, sizes


def test_layouts_equal_one_rank(launch, single_rank, folder: Path):
    alone = {family: cases.run(family, folder / family, SINGLE, cases.IN_LAYOUTS) for family in FAMILIES}
    launch("tests.parity.generation_cases", cases.RANKS, str(folder))
    for layout in cases.LAYOUTS:
        for rank in range(cases.RANKS):
            where = f"{layout.name}, rank {rank}"
            found = json.loads((folder / f"{layout.name}.{rank}.json").read_text())
            for family in FAMILIES:
                assert found[family]["greedy"] == alone[family]["greedy"], where
                _assert_alike(found[family]["hot"], alone[family]["hot"], where)


def _assert_alike(one: list[list[dict]], other: list[list[dict]], where: str) -> None:
    """The same tokens, and log-probabilities that differ by rounding alone."""
    for a, b in zip(chain(*one), chain(*other), strict=True):
        assert a["tokens"] == b["tokens"], where
        assert np.abs(np.subtract(a["logprobs"], b["logprobs"])).max() < 1e-4, where


@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_on_after_generation(single_rank, folder: Path, family: str):
    """Nothing that generation leaves behind (modes, masks made in inference mode) shows in the gradients."""
    from megatron_tower.models.forward import forward

    prompts = cases.prompts()
    row = torch.tensor(prompts[7])[None]
    batch = Batch(row, row, torch.ones(row.shape), torch.arange(row.size(1))[None])

    def gradients(model) -> list[torch.Tensor]:
        model.zero_grad()
        forward(model, batch).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for cached in (plain._causal, plain._causal_bias, plain._itself):
        cached.cache_clear()
    model = cases.load(family, folder / family, SINGLE).train()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    generate(model, prompts, **cases.GREEDY)  # with padding
    sample(model, prompts[7:], **cases.HOT)  # without
    assert model.training and attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    after = gradients(model)
    untouched = gradients(cases.load(family, folder / family, SINGLE).train())
    assert all(torch.equal(a, b) for a, b in zip(after, untouched, strict=True))


def test_bad_input_is_refused(single_rank, folder: Path):
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
    for words, told in (({"samples": 0}, "samples=0"), ({"keys": [1, 2]}, "2 keys for 1 prompts"), ({"keys": [-1]}, "0 or more")):
        with pytest.raises(InputError, match=told):
            sample(model, [[1]], **cases.GREEDY | words)
    assert len(generate(model, [[1] * 104], **cases.GREEDY)[0]) == cases.NEW  # just fits
