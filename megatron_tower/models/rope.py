"""Rotary position embeddings (arXiv 2104.09864): by which angle a pair of channels turns with each token, and how config.json says so.

    default   f = base^(-2i / d)            radians a token of channel pair i of d / 2
    linear    f / factor                    arXiv 2306.15595
    llama3    f (k + (1 - k) / factor),     k = clamp((f * context / 2 pi - low) / (high - low), 0, 1)      arXiv 2407.21783
              pairs that turn often over the original context stay as they are, those that hardly turn are slowed down

Leaves out: yarn, longrope and dynamic, which also scale the scores or change with a sequence's length.
"""

import math
from dataclasses import asdict

import torch
from torch import Tensor

from megatron_tower.config import InputError, ModelConfig, RopeScaling

SCALED = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
NEEDED = {"default": (), "linear": SCALED[:1], "llama3": SCALED}  # rope_type -> what must be stated with it


def frequencies(model: ModelConfig) -> Tensor:
    """Radians a token of each pair of channels: [kv_channels / 2] float32, what transformers calls `inv_freq`."""
    plain = 1.0 / model.rotary_base ** (torch.arange(0, model.kv_channels, 2, dtype=torch.float32) / model.kv_channels)
    scaling = model.rope_scaling
    if scaling is None:
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    turns = plain * scaling.original_max_position_embeddings / (2 * math.pi)
    kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)
    return plain * (kept + (1.0 - kept) / scaling.factor)


def stated(hf: dict) -> dict[str, object]:
    """The rope entry of a parsed config.json: `rope_scaling`, or `rope_parameters` as transformers 5 writes it."""
    return hf.get("rope_parameters") or hf.get("rope_scaling") or {}


def from_hf(hf: dict) -> RopeScaling | None:
    """InputError for a kind of scaling that is not built here, and for one that is stated in part."""
    rope = {key: value for key, value in stated(hf).items() if key != "rope_theta" and value is not None}
    kind = rope.pop("type", None)  # older folders
    kind = rope.pop("rope_type", kind or "default")
    if kind not in NEEDED or rope.keys() - set(SCALED):
        raise InputError(f"config.json says rope_scaling={stated(hf)}, which no model here has: use another one")
    for key in NEEDED[kind]:
        if key not in rope:
            raise InputError(f"config.json lacks rope_scaling.{key}: download the model folder again")
    return RopeScaling(rope_type=kind, **{key: rope[key] for key in NEEDED[kind]}) if NEEDED[kind] else None


def to_hf(scaling: RopeScaling | None) -> dict[str, object] | None:
    """The reverse of `from_hf`: the value of `rope_scaling`."""
    if scaling is None:
        return None
    return {key: value for key, value in asdict(scaling).items() if key in ("rope_type", *NEEDED[scaling.rope_type])}
