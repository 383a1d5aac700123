"""A Megatron checkpoint beside transformers one layer at a time: for models that memory can't hold twice, or once.

    for part in parts(Folder.open(hf), checkpoint.read(path), prompts): ...          embedding, layer 0, 1, ..., head

Both sides get the same hidden states (transformers' of the layer before), so errors don't add up and the layer that is wrong is the one
that stands out. transformers' own forward chooses its masks and positions; Megatron's weights are read under Megatron's names: no weight
map of ours lies between. In memory, in float32, are a layer of each side, a second of Megatron's where some have a sliding window, or the
embedding twice. One rank, in this process. Leaves out: layouts (`training/verify.py`).
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron_tower.config import ParallelConfig
from megatron_tower.models.build import Decoder, build_model
from megatron_tower.models.folder import Folder
from megatron_tower.runtime.distributed import device
from megatron_tower.training.checkpoint import Checkpoint
from megatron_tower.training.torch_dist import Reader
from megatron_tower.training.verify import FP32, Part, compare

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Prompts = dict[str, Tensor]  # name -> token ids [1, seq], hidden states [1, seq, hidden] or logits [1, seq, vocabulary]


@torch.no_grad()
def parts(folder: Folder, start: Checkpoint, prompts: dict[str, list[int]]) -> Iterator[Part]:
    """Compare embedding, layers and head in turn. Needs a single rank with megatron-core's groups."""
    theirs, ours = Transformers(folder), Megatron(start)
    tokens = {name: torch.tensor([ids], device=device()) for name, ids in prompts.items()}
    hidden = theirs.embedding(tokens)
    yield _apart("embedding", ours.embedding(tokens), hidden)
    for layer in range(start.model.num_layers):
        output = theirs.layer(layer, hidden)
        yield _apart(f"layer {layer}", ours.layer(layer, hidden), output)
        hidden = output
    logits, expected = ours.head(hidden), theirs.head(hidden)
    yield replace(_apart("head", logits, expected), logits={name: compare(logits[name][0], expected[name][0]) for name in prompts})


def _apart(name: str, ours: Prompts, theirs: Prompts) -> Part:
    maximum = torch.stack([(ours[key] - theirs[key]).abs().max() for key in theirs])
    smallest = torch.finfo(torch.float32).tiny  # an embedding may be all zeros
    relative = torch.stack(
        [((ours[key] - theirs[key]).norm(dim=-1) / theirs[key].norm(dim=-1).clamp_min(smallest)).max() for key in theirs]
    )
    return Part(name, maximum.max().item(), relative.max().item())


class Transformers:
    """Parts of the model of a Hugging Face folder. Each is the family's own class with one layer or none; what a part does not need
    stays without memory (on PyTorch's meta device)."""

    def __init__(self, folder: Folder):
        from transformers import AutoConfig

        self.folder = folder
        self.config = AutoConfig.from_pretrained(folder.path, local_files_only=True)

    def embedding(self, tokens: Prompts) -> Prompts:
        """As the first layer gets it: scaled, where the family does that."""
        model = self._model(layers=[])
        self._fill(model, {"model.embed_tokens.weight": "model.embed_tokens.weight"})
        model.model.norm = nn.Identity()
        return {name: model.model(input_ids=ids, use_cache=False).last_hidden_state for name, ids in tokens.items()}

    def layer(self, layer: int, hidden: Prompts) -> Prompts:
        model = self._model(layers=[layer])
        first = "model.layers.0."
        self._fill(model, {key: key.replace(first, f"model.layers.{layer}.") for key in model.state_dict() if key.startswith(first)})
        model.model.norm = nn.Identity()
        return {name: _entering(model.model.layers[0], x, model.model).last_hidden_state for name, x in hidden.items()}

    def head(self, hidden: Prompts) -> Prompts:
        """Final norm and logits."""
        model = self._model(layers=[])
        tied = self.config.tie_word_embeddings
        names = {"lm_head.weight": "model.embed_tokens.weight" if tied else "lm_head.weight", "model.norm.weight": "model.norm.weight"}
        self._fill(model, names)
        return {name: _entering(model.model.norm, x, model).logits for name, x in hidden.items()}

    def _model(self, layers: list[int]) -> "PreTrainedModel":
        """The causal model with these of its layers, its weights on no device yet."""
        from transformers import AutoModelForCausalLM

        config = copy.deepcopy(self.config)
        config.num_hidden_layers = len(layers)
        if getattr(config, "layer_types", None):
            config.layer_types = [self.config.layer_types[layer] for layer in layers]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config, device=device())  # computed, not stored
        return model.eval()

    def _fill(self, model: "PreTrainedModel", names: dict[str, str]) -> None:
        """Give the model the folder's tensors; names: its own -> the folder's."""
        tensors = {own: self.folder.read(stored).to(device(), torch.float32) for own, stored in names.items()}
        model.load_state_dict(tensors, strict=False, assign=True)


def _entering(module: nn.Module, hidden: Tensor, model: "PreTrainedModel") -> object:
    """The output of `model`, in which `module` gets `hidden` as its input, whatever an embedding's scale made of it before."""
    hook = module.register_forward_pre_hook(lambda _, inputs: (hidden, *inputs[1:]))
    output = model(inputs_embeds=hidden, use_cache=False)
    hook.remove()
    return output


class Megatron:
    """Parts of the model of a checkpoint, as pipeline stages of one layer or none."""

    def __init__(self, start: Checkpoint):
        self.model, self.reader = start.model, Reader(start.path)
        self.one_layer = cache(self._one_layer)  # built once a kind: random initialisation takes longer than the forward pass

    def embedding(self, tokens: Prompts) -> Prompts:
        stage = self._without_layers(pre_process=True, post_process=False)
        return {name: stage.embedding(input_ids=ids, position_ids=None).transpose(0, 1) for name, ids in tokens.items()}

    def layer(self, layer: int, hidden: Prompts) -> Prompts:
        stage = self.one_layer(windowed=layer in self.model.window_layers)
        self._fill(stage, layer)
        return {name: _forward(stage, x).transpose(0, 1) for name, x in hidden.items()}

    def head(self, hidden: Prompts) -> Prompts:
        """Final norm and logits, a padded vocabulary's cut."""
        self.one_layer.cache_clear()
        stage = self._without_layers(pre_process=False, post_process=True)
        return {name: _forward(stage, x)[..., : self.model.vocab_size] for name, x in hidden.items()}

    def _one_layer(self, windowed: bool, pre_process: bool = False, post_process: bool = False) -> Decoder:
        shape = replace(self.model, num_layers=1, window_layers=[0] if windowed else [])
        return build_model(shape, ParallelConfig(name="single"), FP32, pre_process=pre_process, post_process=post_process).eval()

    def _without_layers(self, pre_process: bool, post_process: bool) -> Decoder:
        stage = self._one_layer(False, pre_process, post_process)
        stage.decoder.layers = nn.ModuleList()
        self._fill(stage, layer=None)
        return stage

    def _fill(self, stage: Decoder, layer: int | None) -> None:
        for name, parameter in stage.named_parameters():
            stored = name.replace("decoder.layers.0.", "decoder.layers.")
            if name == "output_layer.weight" and self.model.tie_embeddings:
                stored = "embedding.word_embeddings.weight"
            parameter.copy_(self.reader.read(stored, layer, slice(0, len(parameter))))


def _forward(stage: Decoder, hidden: Tensor) -> Tensor:
    """[1, seq, hidden] through a stage that has no embedding."""
    stage.set_input_tensor(hidden.transpose(0, 1).contiguous())
    return stage(None, None, None)
