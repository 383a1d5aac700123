"""`parallel.tensor_overlap` on two cards of one machine: the same course as without.

    python -m pytest tests/gpu/test_gpu_tensor_overlap.py

Not run yet on cards; over Transformer Engine's own code on a CPU the two are equal bit for bit (tests/te).
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_tower.runtime.local import run_ranks
from tests.distributed import room

HERE = find_spec("transformer_engine") is not None and torch.cuda.device_count() >= 2
pytestmark = pytest.mark.skipif(not HERE, reason="needs two CUDA devices and Transformer Engine (requirements-gpu.txt)")


def test_collectives_beside_products_keep_the_course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as entry points do
    room.prepare(tmp_path, "gemma2")
    precisions = ("bf16", "fp8_tensorwise")
    cases = [f"gemma2:{layout}:{precision}" for precision in precisions for layout in ("tp2_sp", "tp2_sp_beside")]
    assert run_ranks(["tests.distributed.curves", str(tmp_path), *cases], 2, threads=1, logs=tmp_path / "logs") == 0
    curves = [json.loads((tmp_path / "curves" / f"{case}.json").read_text()) for case in cases]
    assert curves[1] == pytest.approx(curves[0], rel=1e-3) and curves[3] == pytest.approx(curves[2], rel=1e-3)
