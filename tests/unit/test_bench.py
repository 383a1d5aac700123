"""The benchmark at its smallest: both sides compute the same, every line is there, a difference is refused. Nothing is timed."""

import pytest

from tools import bench, bench_convert, bench_rl

SHAPE = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 96}
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
    from megatron_tower.training.throughput import parameters

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
