"""The benchmark at its smallest: both sides compute the same, every line is there, a difference is refused. Nothing is timed."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_tower import checks
from megatron_tower.plan import GIB, memory
from tools import bench, bench_convert, bench_gpu, bench_rl, bench_sampling

SHAPE = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 96}
VISIBLE = {"1 x 64": 2080, "4 x 16": 544, "32 x 2": 96, "1 x 64, window 32": 2080 - 528}  # pairs of tokens
WORK = bench.Work(rows=2, tokens=16, decode_rows=(2,), prompt=4, new=3, steps=1, turns=1)


@pytest.mark.parametrize("family", bench.ATTENTION)
def test_compares_training_and_decoding(single_rank, family: str):
    results = list(bench.compare(family, "small", SHAPE, WORK))
    assert [r.work for r in results] == ["decode 2 x (4 + 3)", "train 2 x 16"]
    for r in results:
        assert r.ours > 0 and r.theirs > 0 and r.lowest == r.ratio == r.highest == pytest.approx(r.ours / r.theirs)
        assert r.model.startswith(f"{family} small")
        assert {row.count("|") for row in (bench.line(r), *bench.HEAD.split("\n"))} == {7}


def test_sides_that_differ_are_not_compared():
    with pytest.raises(RuntimeError, match="the two sides differ"):
        bench._take_turns("gemma2", "train", lambda _: 8.3, lambda _: 8.4, 1, WORK)
    with pytest.raises(RuntimeError, match="the two sides differ"):
        bench._take_turns("gemma2", "decode", lambda _: [[1, 2]], lambda _: [[1, 3]], 1, WORK)


@pytest.mark.parametrize("size", bench.SIZES)
def test_sizes_are_what_they_are_called(size: str):
    from megatron_tower.plan import parameters

    for family in bench.ATTENTION:
        count = parameters(bench.configure(family, bench.SIZES[size], bench.Work()).model)
        assert count / 1e6 == pytest.approx(float(size.removesuffix("M")), rel=0.2)


def test_times_preference_optimisation_grpo_and_sampling(single_rank, monkeypatch):
    """The three tables at their smallest: a row each, of as many columns as its head."""
    for name, value in {"PAIRS": 2, "PROMPT": 8, "ANSWER": 4, "SAMPLED": 2, "GROUP": 3, "NEW": 4}.items():
        monkeypatch.setattr(bench_rl, name, value)
    cfg, make, theirs = bench._sides(bench.configure("gemma2", SHAPE, WORK))
    seconds = bench_rl.wpo_beside_sft(cfg, make, turns=2)
    split = bench_rl.grpo_split(cfg, make, steps=1)
    ours, hf = (side(1) for side in bench_rl.samplers(make()[0], theirs))
    assert len(seconds) == 2 and min(map(min, seconds)) > 0
    assert set(split) == {"rollout", "reward", "logprobs", "update"} and min(split.values()) > 0
    assert ours == hf == [4] * 6
    for row, head in ((bench_rl.wpo_line("a", seconds), bench_rl.WPO_HEAD), (bench_rl.grpo_line("a", split), bench_rl.GRPO_HEAD)):
        assert {row.count("|"), *(line.count("|") for line in head.split("\n"))} == {row.count("|")}


def test_conversion_stands_beside_cp(tmp_path):
    """Both ways, a row of as many columns as the head; tensors that come back changed are found."""
    model = bench_convert.sized(bench.load(["model=tiny_gemma2"]).model, 0.002)
    assert model.num_layers < 4 and max(model.window_layers) < model.num_layers
    for row in bench_convert.compare(model, tmp_path):
        assert row.count("|") == bench_convert.HEAD.split("\n")[0].count("|")
    one, other = (bench_convert.Folder.open(tmp_path / name) for name in ("hf", "back"))
    file = other.files[0]
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    assert bench_convert._differing(one, other) == [list(other.tensors)[-1]]


@pytest.mark.parametrize("name", ["gemma2_2b", "qwen25_1.5b"])
def test_attention_back_ends_take_turns(monkeypatch, name: str):
    """Three ways to pack and a window, each back end in each; one that computes something else is told and not timed."""
    from tools import bench_attention

    shape = replace(bench_attention.SHAPES[name], heads=4, dim=8)
    offered = {"eager"} if shape.softcap else {"eager", "sdpa"}
    said = list(bench_attention.compare(name, shape, 64, turns=1, steps=1))
    rows = [row for row in said if not isinstance(row, str)]
    assert [row.packed for row in rows if row.backend == "eager"] == ["1 x 64", "4 x 16", "32 x 2", "1 x 64, window 32"]
    assert {row.backend for row in rows} == offered and len(said) == 4 * len(offered) + 6 - len(offered)
    for row in rows:
        assert row.tflops == pytest.approx(14 * VISIBLE[row.packed] * 4 * 8 / row.both / 1e9)
        assert {bench_attention.line(row, 1.0).count("|")} == {part.count("|") for part in bench_attention.HEAD.split("\n")}
    monkeypatch.setitem(bench_attention.TOLERANCE, torch.float32, 0.0)
    wrong = list(bench_attention.compare(name, shape, 64, turns=1, steps=1))
    assert sum("is wrong" in row for row in wrong if isinstance(row, str)) == 4 * len(offered)


def test_steps_and_sampling_of_the_gpu_tables_run_here(single_rank, monkeypatch, tmp_path):
    """Tiny shapes on this machine: a side that needs no card has a row, another a sentence; vLLM is asked as its interface says."""
    fp32, two = "precision=fp32", "phase.micro_batch_size=2"
    monkeypatch.setattr(bench_gpu, "BF16", fp32)
    ways = (("fp32", (fp32,)), ("fp32, MLP recompute", (fp32, two, bench_gpu.MLP)), ("FP8", (bench_gpu.TENSORWISE,)))
    case = bench_gpu.Case("tiny", "tiny_gemma2", ways, ("eager",), layers=3, seq_length=128, micro_batches=2)
    monkeypatch.setattr(bench_gpu, "CASES", (case,))
    monkeypatch.setattr(bench_gpu, "SAMPLING", ("tiny_gemma2",))
    monkeypatch.setattr(bench_gpu, "sampling", lambda model, *_: bench_sampling.sampling(model, 2, 4, 3))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace))
    sides = bench_gpu.agenda(None, steps=1)
    assert [side.name.startswith("ours") for side in sides] == [True] * 4 + [False] * 3
    report = bench_gpu.Report("here", 1.0, tmp_path / "gpu.json", tmp_path / "gpu.md")
    report.measure(sides, turns=2)
    rows, sampled, (missing,) = report.rows(bench_gpu.Row), report.rows(bench_sampling.Sampled), map(report.missing, report.left_out)
    assert [(row.side, row.rows) for row in rows] == [("ours, fp32", 1), ("ours, fp32, MLP recompute", 2), ("transformers, eager", 1)]
    assert all(row.rate > 0 and abs(row.loss - 8.3) < 0.5 for row in rows), rows  # ln 4096
    assert missing.startswith("tiny: ours, FP8: ") and "Transformer Engine" in missing
    assert [row.side for row in sampled] == ["ours", "transformers, eager", "vLLM"]
    assert all(0 < row.lowest <= row.highest for row in sampled)
    written = (tmp_path / "gpu.md").read_text().splitlines()
    assert [{line.count("|") for line in part} for part in (written[2:7], written[8:13])] == [{9}, {5}] and written[-1] == missing
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert (told["machine"], len(told["training"]), len(told["sampling"]), told["left_out"]) == ("here", 3, 3, [missing])
    with pytest.raises(bench.InputError, match="this machine has no CUDA"):
        bench_gpu.run(None)


class Engine:
    """vLLM's LLM, as far as it is asked."""

    def __init__(self, model: str, load_format: str, skip_tokenizer_init: bool, dtype: str, max_model_len: int, max_num_seqs: int):
        assert load_format == "dummy" and json.loads((Path(model) / "config.json").read_text())["architectures"] == ["Gemma2ForCausalLM"]

    def generate(self, prompts: list[dict], params: SimpleNamespace) -> None:
        assert [len(prompt["prompt_token_ids"]) for prompt in prompts] == [4, 4] and params.ignore_eos and params.max_tokens in (2, 3)


def test_what_was_measured_outlives_a_side_that_fails_and_an_interrupt(tmp_path):
    def fails() -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nmore of it")

    def interrupted() -> None:
        raise KeyboardInterrupt

    row = bench_gpu.Row("m", "ours, a", 1, 2.0, 3.0, 4.0, 5.0)
    report = bench_gpu.Report("here", 1.0, tmp_path / "gpu.json", None)
    sides = [bench_gpu.Side("m", name, measure) for name, measure in (("b", fails), ("ours, a", lambda: row), ("c", interrupted))]
    with pytest.raises(KeyboardInterrupt):
        report.measure(sides, turns=2)
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert [found["side"] for found in told["training"]] == ["ours, a"]
    assert told["left_out"] == ["m: b: RuntimeError: CUDA error: an illegal memory access"]


def test_every_gpu_case_is_a_configuration_that_fits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: True)  # Transformer Engine
    for case in bench_gpu.CASES:
        for name, words in case.ours:
            cfg = bench_gpu.configure(case, words)
            assert max(cfg.model.window_layers, default=0) < cfg.model.num_layers == (case.layers or cfg.model.num_layers)
            assert max(stage.total for stage in memory(cfg)) < 79.6 * GIB, f"{case.name}, {name}"
