"""The CPU bridge changes what its table says, and nothing where CUDA exists."""

import inspect
import linecache
import os
import subprocess
import sys
from itertools import chain
from types import CodeType

import pytest
import torch

from megatron_tower.runtime import cpu

SITES = {**cpu.SITES, **cpu.RANDOM_SITES}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the bridge is for machines without CUDA")
@pytest.mark.parametrize("site", SITES)
def test_bridged_function_names_no_cuda(site: str) -> None:
    code = cpu.find(site).__code__
    parts = [code, *(c for c in code.co_consts if inspect.iscode(c))]
    assert not [name for part in parts for name in part.co_names if name in ("cuda", "is_cuda")]
    assert not [c for part in parts for c in _strings(part.co_consts) if c == "cuda" or c.startswith("torch.cuda.")]


@pytest.mark.parametrize("site", SITES)
def test_table_gives_the_upstream_lines(site: str) -> None:
    function = cpu.find(site)
    file = inspect.getsourcefile(function)
    first, last = function.__code__.co_firstlineno, max(_lines(function.__code__))
    for line in SITES[site]:
        assert first <= line <= last and "cuda" in linecache.getline(file, line), f"{file}:{line}"


def test_torch_itself_is_left_alone() -> None:
    assert inspect.isbuiltin(torch.zeros) and inspect.isbuiltin(torch.tensor) and torch.Tensor.type.__objclass__
    assert torch.cuda.current_device.__module__ == "torch.cuda" and torch.cuda.synchronize.__module__ == "torch.cuda"


def test_does_nothing_where_cuda_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel import random

    before = random._get_cuda_rng_state, {site: cpu.find(site).__code__ for site in SITES}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "_renamed", lambda *_: pytest.fail("the bridge touched megatron-core"))
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    cpu.install()
    assert before == (random._get_cuda_rng_state, {site: cpu.find(site).__code__ for site in SITES})
    assert "TORCHDYNAMO_DISABLE" not in os.environ


@pytest.mark.skipif(torch.cuda.is_available(), reason="the bridge is for machines without CUDA")
def test_it_costs_no_compiler() -> None:
    """Half a second of each start; PyTorch's own torch.compile stays."""
    says = "import sys, torch; mine = torch.compile; cpu.install(); assert torch.compile is mine and 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", f"from megatron_tower.runtime import cpu; {says}"], check=True)


def _strings(constants: tuple) -> list[str]:
    return [c for c in chain.from_iterable(c if isinstance(c, tuple) else (c,) for c in constants) if isinstance(c, str)]


def _lines(code: CodeType) -> list[int]:
    own = [line for _, _, line in code.co_lines() if line]
    return own + [line for c in code.co_consts if inspect.iscode(c) for line in _lines(c)]
