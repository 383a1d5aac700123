"""One room to train in for all tests of the session."""

from pathlib import Path

import pytest

from tests.distributed import room


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and base weights of both families."""
    path = tmp_path_factory.mktemp("room")
    for family in ("gemma2", "qwen2"):
        room.prepare(path, family)
    return path
