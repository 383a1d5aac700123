"""Which back end attends: the config's word, or for `auto` the fastest that is installed and serves the model on this card.

Without a soft-cap: te, flash4, flash2, sdpa. With one: flash4, flash2, flex, eager. Its grounds, on one H100, 8,192 tokens, 8 heads of
256 channels, bf16, forward and backward, each alone: with a soft-cap flash-attn-4 2.9 ms, FlexAttention 8.8, eager 25.9; without one
flash-attn-4 2.8, sdpa 4.0. Where flash2 stands, and te beside flash4, was not measured: `python -m tools.bench attention` does it.
"""

import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch

from megatron_tower.checks import lacking_package
from megatron_tower.config import InputError
from megatron_tower.runtime.distributed import is_rank_zero

ORDER = {False: ("te", "flash4", "flash2", "sdpa"), True: ("flash4", "flash2", "flex", "eager")}  # by: has the model a soft-cap
MODULES = {  # what must import for a back end to be there
    "flash2": "flash_attn",
    "flash4": "flash_attn.cute.interface",
    "flex": "torch.nn.attention.flex_attention",
    "te": "transformer_engine.pytorch",
}


@dataclass(frozen=True)
class Wanted:
    """What a model asks of a back end. dim: of a head; capability: of the CUDA device, (9, 0) for an H100, or None on a CPU."""

    softcap: bool
    dim: int
    dtype: torch.dtype
    capability: tuple[int, int] | None


@lru_cache
def choose(word: str, wanted: Wanted) -> str:
    """The back end for `model.attention_backend=word`; said once on a GPU. InputError when the one asked for is missing or can't serve."""
    if word != "auto":
        if why := obstacle(word, wanted):
            raise InputError(f"model.attention_backend={word} {why}, or use auto")
        _say(f"attention: {word}, as asked", wanted)
        return word
    passed = []
    for name in ORDER[wanted.softcap]:
        why = obstacle(name, wanted)
        if why is None:
            _say(f"attention: {name}, the fastest that serves{''.join(f'; {reason}' for reason in passed)}", wanted)
            return name
        passed.append(f"{name} {why}")
    raise AssertionError("eager and sdpa serve everywhere")


def obstacle(name: str, wanted: Wanted) -> str | None:
    """Why `name` can't serve, and what to do then; None when it can."""
    if wanted.softcap and name in ("sdpa", "te"):
        return "has no soft-cap, which this model needs: use eager, flex, flash2 or flash4"
    if name in ("eager", "sdpa"):
        return None
    if wanted.capability is None:
        return "needs a GPU: use eager" + ("" if wanted.softcap else " or sdpa")
    if wanted.dtype not in (torch.bfloat16, torch.float16):
        return f"does not compute in {str(wanted.dtype).removeprefix('torch.')}: use precision=bf16"
    if why := _limits(name, wanted):
        return why
    if lacking := lacking_package(name):
        return lacking
    if name == "flex":
        for variable in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
            if os.environ.get(variable) == "1":
                return f"is compiled, and {variable}=1 forbids it: unset that variable"
        if not find_spec("triton"):
            return "needs triton: pip install triton"
    try:
        import_module(MODULES[name])
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # of packages built for another torch or CUDA
        return f"does not import ({type(error).__name__}: {error}): install it again for this torch and CUDA"
    return None


def _limits(name: str, wanted: Wanted) -> str | None:
    """Cards and head sizes that a kernel's own source refuses."""
    major, dim = wanted.capability[0], wanted.dim
    here = (
        f"does not serve heads of {dim} channels{' with a soft-cap' * wanted.softcap} on a GPU of capability {major}.{wanted.capability[1]}"
    )
    if name == "flash4":  # interface.py: _validate_head_dims; no backward below 9; on 10 none with 256 channels and a soft-cap
        wide = major == 9 or (dim == 256 and not wanted.softcap) or dim <= 128
        return None if major in (9, 10) and wide and dim <= 256 and dim % 8 == 0 else f"{here}: use flash2 or flex"
    if name == "flash2":
        return None if major >= 8 and dim <= 256 and dim % 8 == 0 else f"{here}: use flex"
    if name == "te":  # above 128 channels cuDNN's backward pass depends on card and version
        return None if major >= 8 and dim <= 128 and dim % 8 == 0 else f"{here}: use flash4, flash2 or sdpa"
    return None if major >= 8 else f"{here}: use eager"


def _say(words: str, wanted: Wanted) -> None:
    if wanted.capability is not None and is_rank_zero():
        print(words, file=sys.stderr, flush=True)
