"""Elementwise arithmetic of large tensors as one kernel on a GPU: PyTorch alone goes through the memory once an operation.

torch.compile, where triton is installed and TORCH_COMPILE_DISABLE=1 doesn't forbid it; the same function as it stands elsewhere.
Some seconds at the first call, and again for another shape. Not run yet on a card.
"""

import os
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec

import torch
from torch import Tensor

LARGE = 2**25  # numbers from which on the memory is what an operation waits for; one new token a row stays below


def fuses(x: Tensor) -> bool:
    """Whether functions of `x` are compiled."""
    return x.is_cuda and x.numel() >= LARGE and _allowed()


def one_kernel(function: Callable) -> Callable:
    """`function`, compiled where it `fuses` its first argument."""

    @wraps(function)
    def run(x: Tensor, *rest: object) -> object:
        return (_compiled(function) if fuses(x) else function)(x, *rest)

    return run


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function)


@cache
def _allowed() -> bool:
    forbidden = any(os.environ.get(variable) == "1" for variable in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"))
    return find_spec("triton") is not None and not forbidden
