"""parallel.overlap and parallel.gradients against the plain way, on four ranks in one launch."""

from pathlib import Path


def test_overlap_and_bf16_gradients_keep_the_course(launch, folder: Path):
    launch("tests.distributed.memory_cases", 4, str(folder))
