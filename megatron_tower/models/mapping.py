"""What a model family is: how its Hugging Face config and tensors become ours, both as data that reads both ways.

A `Weight` names one Megatron parameter and the HF tensors it is made of. Megatron fuses some: the rows of q, k and v are interleaved by
query group (q q k v | q q k v | ...), gate lies above up. Each tensor-parallel rank fuses its own slices, so no rank needs the whole.
A vocabulary that the ranks do not divide is filled up with rows of zeros (`padded`), which only the Megatron side has.
Leaves out: mixtures of experts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_tower.config import InputError, ModelConfig
from megatron_tower.models import rope


@dataclass(frozen=True)
class Weight:
    """`hf`: HF name -> shape in the words of `sizes`; `{}` in a name stands for the layer, counted from 0.

    shard: the dimension that tensor-parallel ranks divide, None where each holds a copy.
    per_group: the HF tensors are interleaved by query group.
    """

    megatron: str
    hf: dict[str, tuple[str, ...]]
    shard: int | None = None
    per_group: bool = False

    def at(self, layer: int) -> "Weight":
        """This weight in one layer."""
        names = {name.format(layer): shape for name, shape in self.hf.items()}
        return Weight(self.megatron.format(layer), names, self.shard, self.per_group)

    def shapes(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        """HF name -> full shape."""
        return {name: tuple(sizes(model)[word] for word in shape) for name, shape in self.hf.items()}

    def fuse(self, parts: list[Tensor], groups: int) -> Tensor:
        """One rank's slices of the HF tensors, in the order of `hf` -> its Megatron parameter. `groups`: query groups on this rank."""
        if len(parts) == 1:
            return parts[0]
        blocks = groups if self.per_group else 1
        return torch.cat([part.unflatten(0, (blocks, -1)) for part in parts], dim=1).flatten(0, 1)

    def split(self, fused: Tensor, model: ModelConfig, ranks: int) -> list[Tensor]:
        """The reverse of `fuse`; `ranks` is the tensor-parallel size."""
        if len(self.hf) == 1:
            return [fused]
        blocks = model.num_query_groups // ranks if self.per_group else 1
        rows = [shape[0] // ranks // blocks for shape in self.shapes(model).values()]
        return [part.flatten(0, 1) for part in fused.unflatten(0, (blocks, -1)).split(rows, dim=1)]


@dataclass(frozen=True)
class Family:
    """A line of open-weight models: what its architecture adds to a plain decoder, and how it reads and writes as HF.

    renamed: HF config key -> ModelConfig field.   defaults: values of `renamed` keys that config.json may leave out.
    constants: HF config keys that can have no other value.   derive, recover: HF keys that need computing, and back to our fields.
    """

    activation: Callable[[Tensor], Tensor]
    renamed: dict[str, str]
    defaults: dict[str, object]
    constants: dict[str, object]
    derive: Callable[[ModelConfig], dict[str, object]]
    recover: Callable[[dict], dict[str, object]]
    weights: tuple[Weight, ...]
    zero_centered_norms: bool = False  # norms multiply by 1 + weight
    sandwich_norms: bool = False  # norms after attention and MLP too
    scaled_embedding: bool = False  # embeddings are multiplied by sqrt(hidden_size)

    def to_hf(self, model: ModelConfig) -> dict[str, object]:
        """The part of config.json that states the architecture. InputError when the family has no such model."""
        hf = self.constants | {key: getattr(model, ours) for key, ours in self.renamed.items()} | self.derive(model)
        hf |= {"rope_scaling": rope.to_hf(model.rope_scaling)}
        problems = differences(model, self.from_hf(hf))
        if problems:
            raise InputError(f"family={model.family} has no model with {problems[0]}: change it or the family")
        return hf

    def from_hf(self, hf: dict) -> ModelConfig:
        """ModelConfig of a parsed config.json. InputError for what is missing or not built here."""
        base = {key: value for key, value in rope.stated(hf).items() if key == "rope_theta"}  # where transformers 5 has it
        hf = self.defaults | base | {key: value for key, value in hf.items() if value is not None or key not in self.defaults}
        fixed = self.constants | {key: value for key, value in NEUTRAL.items() if hf.get(key) is not None}
        odd = [f"{key}={hf[key]}" for key, value in fixed.items() if hf.get(key, value) != value]
        if odd:
            raise InputError(f"config.json says {odd[0]}, which this family's model does not have: use another model")
        missing = [key for key in self.renamed if key not in hf]
        if missing:
            raise InputError(f"config.json lacks {missing[0]}: download the model folder again")
        ours = {ours: hf[key] for key, ours in self.renamed.items()} | {"rope_scaling": rope.from_hf(hf)} | self.recover(hf)
        return ModelConfig(name=hf["model_type"], family=hf["model_type"], **ours)

    def shapes(self, model: ModelConfig) -> dict[str, tuple[int, ...]]:
        """HF name -> full shape of every tensor of `model`."""
        return {name: shape for weight in self.all_weights(model) for name, shape in weight.shapes(model).items()}

    def all_weights(self, model: ModelConfig) -> Iterator[Weight]:
        """Every Megatron parameter of `model` with the HF tensors behind it, layers in order; a tied head is the embedding's."""
        for weight in self.weights:
            layers = range(model.num_layers) if "{}" in weight.megatron else [0]
            yield from (weight.at(layer) for layer in layers)
        yield Weight(HEAD.megatron, EMBEDDING.hf, EMBEDDING.shard) if model.tie_embeddings else HEAD


def differences(ours: ModelConfig, theirs: ModelConfig) -> list[str]:
    """Fields of the architecture in which two configs differ, as `num_layers=4 (config.json: 6)`."""
    return [f"{name}={a} (config.json: {b})" for name, (a, b) in apart(ours, theirs).items()]


def apart(one: ModelConfig, other: ModelConfig) -> dict[str, tuple[object, object]]:
    """Field of the architecture -> its two values, where they differ."""
    names = [f.name for f in fields(ModelConfig) if f.name not in ("name", "hf_folder", "attention_backend", "init_std")]
    values = {name: (_effective(one, name), _effective(other, name)) for name in names}
    return {name: (a, b) for name, (a, b) in values.items() if a != b}


def _effective(model: ModelConfig, name: str) -> object:
    value = getattr(model, name)
    return model.kv_channels if name == "query_scale" and value is None else value


def padded(vocabulary: int, ranks: int) -> int:
    """Rows of an embedding or a head that `ranks` tensor-parallel ranks share evenly; those above `vocabulary` are zero."""
    return -(-vocabulary // ranks) * ranks


def sizes(model: ModelConfig) -> dict[str, int]:
    """The words that shapes are written in."""
    return {
        "vocabulary": model.vocab_size,
        "hidden": model.hidden_size,
        "ffn": model.ffn_hidden_size,
        "queries": model.num_attention_heads * model.kv_channels,
        "keys": model.num_query_groups * model.kv_channels,
    }


# Keys of config.json that any family may state, and the one value that changes nothing.
NEUTRAL = {"quantization_config": None, "partial_rotary_factor": 1.0, "use_bidirectional_attention": False, "use_mrope": False}

# What decoders of this kind have in common.
CONFIG = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rope_theta": "rotary_base",
    "rms_norm_eps": "layernorm_epsilon",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
EMBEDDING = Weight("embedding.word_embeddings.weight", {"model.embed_tokens.weight": ("vocabulary", "hidden")}, shard=0)
HEAD = Weight("output_layer.weight", {"lm_head.weight": ("vocabulary", "hidden")}, shard=0)
DECODER = (
    EMBEDDING,
    Weight("decoder.layers.{}.input_layernorm.weight", {"model.layers.{}.input_layernorm.weight": ("hidden",)}),
    Weight(
        "decoder.layers.{}.self_attention.linear_qkv.weight",
        {
            "model.layers.{}.self_attn.q_proj.weight": ("queries", "hidden"),
            "model.layers.{}.self_attn.k_proj.weight": ("keys", "hidden"),
            "model.layers.{}.self_attn.v_proj.weight": ("keys", "hidden"),
        },
        shard=0,
        per_group=True,
    ),
    Weight(
        "decoder.layers.{}.self_attention.linear_proj.weight", {"model.layers.{}.self_attn.o_proj.weight": ("hidden", "queries")}, shard=1
    ),
    Weight(
        "decoder.layers.{}.mlp.linear_fc1.weight",
        {
            "model.layers.{}.mlp.gate_proj.weight": ("ffn", "hidden"),
            "model.layers.{}.mlp.up_proj.weight": ("ffn", "hidden"),
        },
        shard=0,
    ),
    Weight("decoder.layers.{}.mlp.linear_fc2.weight", {"model.layers.{}.mlp.down_proj.weight": ("hidden", "ffn")}, shard=1),
    Weight("decoder.final_layernorm.weight", {"model.norm.weight": ("hidden",)}),
)
PRE_MLP_NORM = Weight("decoder.layers.{}.pre_mlp_layernorm.weight", {"model.layers.{}.post_attention_layernorm.weight": ("hidden",)})
