"""Transformer Engine's own Python code on a machine without CUDA: its release from the package index, read as if `cuda` said `cpu`.

    python tests/te/package.py install      # into .venv/transformer_engine; nothing is compiled
    package.use()                           # in a process of its own, before megatron-core is imported

So a CPU shows that our layers, megatron-core's wrappers and TE's modules, FP8 recipes and fused Adam fit together and compute the right
thing; kernels.py stands for its kernels. Leaves out: whatever only a card can show.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from unittest.mock import MagicMock

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv" / "transformer_engine"
INSTALL = "python tests/te/package.py install"
NEEDS = ("pydantic", "einops")  # of Transformer Engine; its others are CUDA's, or not imported here
TRITON = ("mhc", "pad", "permutation", "grouped_dbias_dscales", "cross_entropy")
ABSENT = ("onnx_extensions", "triton", *(f"triton.{name}" for name in TRITON))
CUDA = re.compile(
    rb"""(?<=torch\.)cuda(?=\.(?:current_device|is_available|synchronize)\()  # what torch.cpu has, too
    | (?<=["'])cuda(?=["']) | (?<=\.is_)cuda\b | (?<=\.)cuda(?=\(\))""",
    re.VERBOSE,
)


class OnCpu(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        return compile(CUDA.sub(b"cpu", self.get_data(self.path)), self.path, "exec", dont_inherit=True)


class Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] != "transformer_engine":
            return None
        spec = PathFinder.find_spec(name, path)
        if spec and isinstance(spec.loader, SourceFileLoader):
            spec.loader = OnCpu(name, spec.origin)
        return spec


def use() -> None:
    """Make `import transformer_engine.pytorch` work in this process."""
    import torch

    from tests.te import kernels

    os.environ |= {"NVTE_PROJECT_BUILDING": "1", "NVTE_UNFUSED_FP8_UPDATE": "1"}  # load no library; scales from amaxes in Python
    sys.path.append(str(FOLDER))
    sys.meta_path.insert(0, Finder())
    sys.modules["transformer_engine_torch"] = kernels.extension()
    sys.modules |= {f"transformer_engine.pytorch.{name}": MagicMock() for name in ABSENT}
    card = type("H100", (), {"major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 80 << 30})
    for name, answer in {"get_device_capability": (9, 0), "get_device_properties": card, "is_current_stream_capturing": False}.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    torch.version.cuda = "13.0"
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: None
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    from transformer_engine.pytorch import distributed
    from transformer_engine.pytorch.cpp_extensions import gemm

    gemm.get_cublas_workspace = lambda *_: torch.empty(1)
    distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def install() -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--upgrade", "--target", FOLDER]
    version = re.search(r"^transformer-engine\S*==(\S+)", (ROOT / "requirements-gpu.txt").read_text(), re.MULTILINE)[1]
    for words in (["--no-deps", f"transformer-engine=={version}"], NEEDS):
        subprocess.run([*pip, *words], check=True)


if __name__ == "__main__":
    if sys.argv[1:] != ["install"]:
        sys.exit(__doc__)
    install()
