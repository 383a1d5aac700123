"""transformers' answer, written to a folder that every rank reads: random weights, one batch in three forms, logits, loss, gradients."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_tower.config import ModelConfig, RopeScaling
from megatron_tower.data.batch import Batch
from megatron_tower.models.families import FAMILIES

SHAPE = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 12,  # not hidden / heads
    "vocab_size": 97,  # no number of ranks divides it
    "max_position_embeddings": 64,
}
WINDOW = 16
MODELS = {
    "gemma2": ModelConfig(
        name="gemma2",
        family="gemma2",
        **SHAPE,
        attention_softcap=2.0,  # both low enough to bend scores
        final_softcap=4.0,
        query_scale=7.0,
        sliding_window=WINDOW,
        window_layers=[0, 2],
    ),
    "qwen2": ModelConfig(name="qwen2", family="qwen2", **SHAPE, qkv_bias=True, tie_embeddings=False, rotary_base=1e6),
    "qwen2_tied": ModelConfig(name="qwen2_tied", family="qwen2", **SHAPE, qkv_bias=True),
    "llama": ModelConfig(
        name="llama",
        family="llama",
        **SHAPE,
        tie_embeddings=False,
        rope_scaling=RopeScaling("llama3", factor=4.0, original_max_position_embeddings=32),  # keeps, blends and slows
    ),
}
FORMS = ("short", "long", "packed")
SHORT, LONG = WINDOW - 4, 3 * WINDOW  # tokens a row, below and above the window
SEGMENTS = [1, 3, 30, 14, 40, 8]  # lengths in two packed rows of LONG, the last of each row ending it


def write(folder: Path, ours: ModelConfig, forms: tuple[str, ...] = FORMS) -> None:
    """Fill `folder`/model (HF) and `folder`/expected.safetensors for one model."""
    import transformers

    torch.manual_seed(len(ours.name))
    config = transformers.AutoConfig.for_model(**FAMILIES[ours.family].to_hf(ours), pad_token_id=None)  # else token 0 gets no gradient
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():  # norms and biases too: a term that is left out must show
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "model")
    expected = {}
    for form in forms:
        batch = batches(ours.vocab_size)[form]
        rows = batch.tokens.reshape(-1).split(lengths(batch))
        logits = torch.cat([model(row[None]).logits[0] for row in rows])
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="none") * batch.loss_mask.flatten()
        (loss.sum() / batch.loss_mask.sum()).backward()
        expected |= {f"{form}.logits": logits.detach().unflatten(0, batch.tokens.shape), f"{form}.loss": loss.sum().detach()}
        expected |= {f"{form}.grad.{key}": parameter.grad.clone() for key, parameter in model.named_parameters()}
    save_file(expected, folder / "expected.safetensors")


def read(folder: Path, form: str) -> dict[str, Tensor]:
    """What `write` expects of one form of the batch: logits, loss, grad.<HF name>."""
    return {k.removeprefix(f"{form}."): v for k, v in load_file(folder / "expected.safetensors").items() if k.startswith(f"{form}.")}


def batches(vocab_size: int) -> dict[str, Batch]:
    """Two rows each: shorter than the window, longer, and packed."""
    cuts = torch.tensor([0, *SEGMENTS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return dict(zip(FORMS, (_batch(vocab_size, SHORT, None), _batch(vocab_size, LONG, None), _batch(vocab_size, LONG, cuts)), strict=True))


def _batch(vocab_size: int, length: int, cu_seqlens: Tensor | None) -> Batch:
    generator = torch.Generator().manual_seed(length)
    tokens, labels = torch.randint(vocab_size, (2, 2, length), generator=generator)
    mask = (torch.rand(2, length, generator=generator) < 0.7).float()
    return Batch(tokens, labels, mask, torch.arange(length).expand(2, -1), cu_seqlens)


def lengths(batch: Batch) -> list[int]:
    """Tokens of each independent sequence of a batch, in order."""
    return [batch.tokens.shape[1]] * len(batch.tokens) if batch.cu_seqlens is None else batch.cu_seqlens.diff().tolist()
