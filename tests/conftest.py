"""Shared by all tests: the CPU bridge, a single rank with megatron-core's groups, and launches of several ranks."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatron_tower.runtime import cpu
from tests.progress import Progress

cpu.install()


@pytest.hookimpl(trylast=True)  # the terminal is there by then
def pytest_configure(config: pytest.Config) -> None:
    if terminal := config.pluginmanager.get_plugin("terminalreporter"):  # xdist's workers have none
        config.pluginmanager.register(Progress(terminal))


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Left as they were: training in this process catches what would end it (`runtime/stop.py`)."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGALRM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def single_rank() -> Iterator[None]:
    """This process as the only rank, with a process group and megatron-core's parallel state; left as it was afterwards."""
    from megatron_tower.config import ClusterConfig, ParallelConfig
    from megatron_tower.runtime import distributed

    distributed.initialize(ParallelConfig(name="single"), seed=1234, cluster=ClusterConfig(name="local"))
    yield
    distributed.shutdown()


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., None]:
    """`launch("tests.distributed.cases", world_size, *words)`: run a module as ranks of this machine; it must exit with 0."""
    from megatron_tower.runtime.local import run_ranks

    def run(module: str, world_size: int, *words: str) -> None:
        code = run_ranks([module, *words], world_size, threads=1, logs=tmp_path / "logs")
        assert code == 0, f"{module} on {world_size} ranks ended with {code}; its output is captured above"

    return run


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`disk(size)`: a folder on a disk of its own that holds so many bytes; called again, the same disk with more room."""
    folder = tmp_path / "disk"

    def holds(size: int) -> Path:
        again = "remount," if folder.is_dir() else ""
        folder.mkdir(exist_ok=True)
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"{again}size={size}", "none", folder], capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"no disk of {size} bytes can be mounted here: {mounted.stderr.strip()}")
        return folder

    yield holds
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", folder], check=True)
