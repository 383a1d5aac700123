"""Every real-size layout, its kind scaled down: it trains, and its ranks hold what the plan says."""

import json
from collections import defaultdict
from collections.abc import Callable

import pytest

from megatron_tower.config import CONF
from tests.distributed.plan_cases import RANKS, scaled

LAYOUTS = sorted(path.stem for path in (CONF / "parallel").glob("*b_*.yaml"))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict]]:
    """What each rank of a layout has told; layouts of as many ranks share a launch."""
    from megatron_tower.runtime.local import run_ranks

    folder, sizes = tmp_path_factory.mktemp("layouts"), defaultdict(list)
    for layout in LAYOUTS:
        sizes[scaled(layout).parallel.world_size].append(layout)
    for ranks, layouts in sizes.items():
        assert run_ranks(["tests.distributed.plan_cases", str(folder), *layouts], ranks, threads=1, logs=folder / "logs") == 0
    return lambda layout: [json.loads(path.read_text()) for path in sorted(folder.glob(f"{layout}.*.json"))]


def test_they_are_nine() -> None:
    assert sorted(f"{size}_{gpus}" for size in ("2b", "9b", "72b") for gpus in (8, 64, 256)) == LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trains_and_holds_what_the_plan_says(told: Callable[[str], list[dict]], layout: str) -> None:
    ranks, cfg = told(layout), scaled(layout)
    assert 2 <= len(ranks) == cfg.parallel.world_size <= RANKS
    for rank in ranks:
        first, second = rank["losses"]
        assert rank["losses"] == ranks[0]["losses"] and second < first
        assert rank["weights"][0] == rank["weights"][1]
        has, planned = rank["gradients"]
        assert has == pytest.approx(planned, rel=0.03)  # buckets of the distributed optimizer are filled up
        has, planned = rank["activations"]
        assert has == pytest.approx(planned, rel=0.02)
    has, planned = (sum(rank["optimizer"][i] for rank in ranks) for i in (0, 1))  # ranks' shares differ by whole weights
    assert has == pytest.approx(planned, rel=0.01)
