"""As if this machine had a card: Transformer Engine's layers and FP8 are taken where they are asked for, its kernels computed here.

    python -m pytest -p tests.te.plugin -s tests/gpu/test_gpu_precision.py      # minutes; bounds and distances, before a card is at hand

For processes of their own, as `package.use`.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from tests.te import package


class Host(torch.Tensor):
    """What optimizer offload keeps in the host's memory, where that and a card's are one."""


OFFLOAD = {  # in megatron-core's hybrid optimizer
    "param.is_cuda": "not isinstance(param, Host)",
    ".cpu().pin_memory()": ".as_subclass(Host)",
    "pin_memory=self.pin_cpu_grads, ": "",
    "torch.cuda.stream(": "contextlib.nullcontext(",
    "torch.cuda.current_stream()": "MagicMock()",
    "torch.cuda.Stream()": "MagicMock()",
    '.to("cuda")': '.to("cpu")',
}


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    install()


def install() -> None:
    package.use()
    from megatron_tower.runtime import cpu, distributed

    cpu.install()
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from megatron_tower import checks
    from megatron_tower.config import PrecisionConfig
    from megatron_tower.models import kernels

    def on_a_card(precision: PrecisionConfig) -> bool:
        return precision.layers == "te" or (precision.layers == "auto" and precision.params == "bfloat16")

    checks.find_spec = lambda name: True
    kernels.transformer_engine = on_a_card
    initialize = distributed.initialize

    def anew(*options: object, **named: object) -> None:
        FP8GlobalStateManager.reset()  # its state is the process's, and groups of the layout before would be waited for
        initialize(*options, **named)

    distributed.initialize = anew
    _one_by_one()
    _two_memories()


def _one_by_one() -> None:
    """Collectives of the gradient buffer one after another: gloo, which would join them, takes FP8 and bf16 weights for one type."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    def alone(collective: Callable) -> Callable:
        return lambda *tensors, async_op, **options: collective(*tensors, **options)

    done = SimpleNamespace(wait=lambda: None)
    buffers._coalescing_manager = lambda *_, **__: contextlib.nullcontext(done)
    buffers.dist_all_gather_func = alone(torch.distributed.all_gather_into_tensor)
    buffers.dist_reduce_scatter_func = alone(torch.distributed.reduce_scatter_tensor)


def _two_memories() -> None:
    """megatron-core's optimizer offload, telling tensors of the host by their class."""
    from megatron.core import optimizer
    from megatron.core.optimizer import cpu_offloading, distrib_optimizer
    from megatron.core.optimizer.cpu_offloading import hybrid_optimizer

    from megatron_tower.training import optimizer as ours
    from megatron_tower.training import state

    source = Path(hybrid_optimizer.__file__).read_text()
    for said, here in OFFLOAD.items():
        assert said in source, said
        source = source.replace(said, here)
    vars(hybrid_optimizer).update(Host=Host, MagicMock=MagicMock, contextlib=contextlib)
    exec(compile(source, hybrid_optimizer.__file__, "exec"), vars(hybrid_optimizer))
    for module in (optimizer, cpu_offloading, distrib_optimizer, state):
        module.HybridDeviceOptimizer = hybrid_optimizer.HybridDeviceOptimizer
    ours.device = lambda: torch.device("cuda")
