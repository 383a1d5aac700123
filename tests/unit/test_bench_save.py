"""The cost of saving at its smallest: every figure is there, for a checkpoint of the size that weights and moments have."""

import pytest

from megatron_tower.plan import parameters
from tools import bench, bench_save

SHAPE = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 96}


def test_measures_both_ways_of_saving(single_rank) -> None:
    cfg, make, _ = bench._sides(bench.configure("qwen2", SHAPE, bench.Work(rows=2, tokens=16)))
    result = bench_save.measure(cfg, make, bench.Rows(cfg), turns=2)
    assert result.megabytes == pytest.approx(parameters(cfg.model) * 12 / 1e6, rel=0.05)
    assert min(result.step, result.plain, result.beside, result.step_beside) > 0 and result.published > result.beside
    assert {row.count("|") for row in (bench_save.line("qwen2", result), *bench_save.HEAD.split("\n"))} == {8}
