"""WPO and GRPO through whole models, packed and not, on every layout: loss and gradients of the formulas in float64."""

from pathlib import Path

import pytest

from tests.parity import reference, sequence_cases


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megatron_tower.runtime import distributed

    folder = tmp_path_factory.mktemp("sequences")
    for name in ("gemma2", "qwen2"):
        reference.write(folder / name, reference.MODELS[name])
        sequence_cases.write_expected(folder / name, name)
    distributed.shutdown()
    return folder


@pytest.mark.parametrize("name", ["gemma2", "qwen2"])
def test_one_rank(expected: Path, single_rank, name: str):
    sequence_cases.check(expected / name, name, "single")


def test_two_ranks(expected: Path, launch):
    launch("tests.parity.sequence_cases", 2, str(expected), "tp2", "pp2", "tp2_sp")


def test_four_ranks(expected: Path, launch):
    launch("tests.parity.sequence_cases", 4, str(expected), "tp2pp2")
