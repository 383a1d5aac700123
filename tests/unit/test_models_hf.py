"""HF folders: what is refused and in which words, the families' configs, RoPE, fused weights, random base models."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tower.command import load
from megatron_tower.config import CONF, InputError, ModelConfig, ParallelConfig, PrecisionConfig, RopeScaling
from megatron_tower.models import rope
from megatron_tower.models.build import build_chunks
from megatron_tower.models.families import FAMILIES, family_of
from megatron_tower.models.hf import load_hf, model_config, random_hf, save_hf
from megatron_tower.models.mapping import Weight, differences
from megatron_tower.plan import parameters

SHAPE = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 8,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 6,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}
QWEN2 = ModelConfig(name="q", family="qwen2", qkv_bias=True, tie_embeddings=False, **SHAPE)
GEMMA2 = ModelConfig(name="g", family="gemma2", attention_softcap=50.0, final_softcap=30.0, sliding_window=8, window_layers=[0], **SHAPE)
LLAMA = ModelConfig(name="l", family="llama", rope_scaling=RopeScaling("llama3", 8.0), tie_embeddings=False, **SHAPE)
SHIPPED = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "a"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("model", [QWEN2, GEMMA2, LLAMA], ids=["qwen2", "gemma2", "llama"])
def test_random_folder_loads_in_transformers_and_comes_back(single_rank, tmp_path: Path, tokenizer_folder: Path, model: ModelConfig):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for seed, folder in ((1, "a"), (1, "same"), (2, "other")):
        random_hf(model, tmp_path / folder, tokenizer_folder, seed)
    first, same, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("a", "same", "other"))
    embedding = "model.embed_tokens.weight"
    assert torch.equal(first[embedding], same[embedding]) and not torch.equal(first[embedding], other[embedding])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert theirs.config.eos_token_id == 1 and theirs.config.pad_token_id == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "a").bos_token_id == 2
    assert not differences(model, model_config(tmp_path / "a"))

    chunks = build_chunks(model, ParallelConfig(name="single"), PrecisionConfig(name="bf16", params="bfloat16"))
    load_hf(chunks, model, tmp_path / "a")
    save_hf(chunks, model, tmp_path / "out", AutoTokenizer.from_pretrained(tokenizer_folder))
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(back[key], tensor.bfloat16()) for key, tensor in first.items()) and back.keys() == first.keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(InputError, match="holds files already"):
        save_hf(chunks, model, tmp_path / "out", None)


def edit(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def on_config(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return on_config


def tensors(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def on_weights(folder: Path) -> None:
        file = folder / "model.safetensors"
        loaded = load_file(file)
        change(loaded)
        save_file(loaded, file)

    return on_weights


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


V_PROJ = "model.layers.1.self_attn.v_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (edit(lambda c: c.update(num_hidden_layers=3)), r"num_layers=2 \(config.json: 3\)"),
        (edit(lambda c: c.update(rope_theta=5.0)), r"rotary_base=10000.0 \(config.json: 5.0\)"),
        (edit(lambda c: c.pop("hidden_size")), "config.json lacks hidden_size"),
        (edit(lambda c: c.update(rope_scaling={"rope_type": "yarn"})), "rope_scaling="),
        (edit(lambda c: c.update(use_sliding_window=True)), "use_sliding_window=True"),
        (edit(lambda c: c.update(model_type="gpt2")), "family gpt2 is unknown"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
        (tensors(lambda t: t.pop(V_PROJ)), f"tensor {V_PROJ} is missing"),
        (tensors(lambda t: t.update(extra=torch.zeros(1))), "tensor extra is not part of this model"),
        (tensors(lambda t: t.update({V_PROJ: torch.zeros(16, 12)})), rf"{V_PROJ} has shape \(16, 12\), the config asks for \(12, 16\)"),
        (truncate, "it was cut off or changed"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"holds no \*\.safetensors"),
    ],
)
def test_spoilt_folder_is_refused_and_nothing_is_filled(single_rank, tmp_path: Path, tokenizer_folder: Path, spoil, words: str):
    random_hf(QWEN2, tmp_path / "model", tokenizer_folder, 1)
    spoil(tmp_path / "model")
    chunks = build_chunks(QWEN2, ParallelConfig(name="single"), PrecisionConfig(name="fp32"))
    before = {name: parameter.clone() for name, parameter in chunks[0].named_parameters()}
    with pytest.raises(InputError, match=words):
        load_hf(chunks, QWEN2, tmp_path / "model")
    assert all(torch.equal(before[name], parameter) for name, parameter in chunks[0].named_parameters())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (replace(QWEN2, attention_softcap=50.0), "qwen2 has no model with attention_softcap=50.0"),
        (replace(QWEN2, qkv_bias=False), "qwen2 has no model with qkv_bias=False"),
        (replace(GEMMA2, qkv_bias=True), "gemma2 has no model with qkv_bias=True"),
        (replace(GEMMA2, attention_backend="sdpa"), "sdpa has no soft-cap"),
        (replace(QWEN2, family="llama"), "llama has no model with qkv_bias=True"),
        (replace(LLAMA, query_scale=7.0), "llama has no model with query_scale=7.0"),
        (replace(QWEN2, family="gpt2"), "family gpt2 is unknown"),
    ],
)
def test_what_no_family_has_is_refused(single_rank, model: ModelConfig, words: str):
    with pytest.raises(InputError, match=words):
        build_chunks(model, ParallelConfig(name="single"), PrecisionConfig(name="fp32"))


@pytest.mark.parametrize(
    ("model", "said", "words"),
    [
        (LLAMA, {"attention_bias": True}, "attention_bias=True"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias=True"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act=gelu"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config="),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling=.*dynamic"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}}, "rope_scaling=.*mscale"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "config.json lacks rope_scaling.low_freq_factor"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "config.json lacks rope_scaling.factor"),
        (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        (QWEN2, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "rope_scaling=.*yarn"),
        (GEMMA2, {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types="),
        (GEMMA2, {"layer_types": ["full_attention"]}, "layer_types=.* for 2 layers"),
        (GEMMA2, {"attention_bias": True}, "attention_bias=True"),
    ],
)
def test_config_of_another_architecture_is_refused_by_name(model: ModelConfig, said: dict, words: str):
    family = family_of(model.family)
    with pytest.raises(InputError, match=words):
        family.from_hf(family.to_hf(model) | said)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_are_what_transformers_assumes(name: str):
    """conf/model -> HF config -> transformers' own defaults filled in -> conf/model."""
    from transformers import AutoConfig

    model = load([f"model={name}"]).model
    hf = AutoConfig.for_model(**family_of(model.family).to_hf(model)).to_dict()
    assert not differences(model, family_of(model.family).from_hf(hf | {"architectures": hf["architectures"]}))


def test_older_and_newer_configs_are_read():
    hf = FAMILIES["gemma2"].to_hf(GEMMA2)
    del hf["layer_types"], hf["tie_word_embeddings"]  # as Google's folders are
    assert not differences(GEMMA2, FAMILIES["gemma2"].from_hf(hf))
    hf["rope_parameters"] = {"rope_theta": hf.pop("rope_theta"), "rope_type": "default"}  # as transformers 5 writes
    assert not differences(GEMMA2, FAMILIES["gemma2"].from_hf(hf))


def test_older_llama_folders_are_read():
    """Without what came later: the base of RoPE, grouped queries, the head's size, `rope_type`."""
    hf = FAMILIES["llama"].to_hf(LLAMA) | {"rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": None}
    for key in ("rope_theta", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"):
        del hf[key]
    old = replace(LLAMA, num_query_groups=4, kv_channels=4, rope_scaling=RopeScaling("linear", 2.0))
    assert not differences(old, FAMILIES["llama"].from_hf(hf))


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 2.5), RopeScaling("llama3", 3.0, 1.5, 5.0, 40)], ids=str)
@pytest.mark.parametrize("model", [QWEN2, GEMMA2, LLAMA], ids=["qwen2", "gemma2", "llama"])
def test_rope_turns_as_in_transformers(single_rank, model: ModelConfig, scaling: RopeScaling | None):
    """The config says the same to both, and the model that is built uses it."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = replace(model, rope_scaling=scaling)
    hf = AutoConfig.for_model(**family_of(model.family).to_hf(model))
    theirs, factor = ROPE_INIT_FUNCTIONS[scaling.rope_type if scaling else "default"](hf, "cpu")
    (chunk,) = build_chunks(model, ParallelConfig(name="single"), PrecisionConfig(name="fp32"))
    assert factor == 1.0
    torch.testing.assert_close(chunk.rotary_pos_emb.inv_freq, theirs, rtol=2e-7, atol=0)


def test_rope_of_llama_31_keeps_blends_and_slows():
    model = load(["model=llama31_8b"]).model
    slowed = rope.frequencies(replace(model, rope_scaling=None)) / rope.frequencies(model)
    assert slowed[0] == 1.0 and slowed[-1] == 8.0 and ((slowed > 1.1) & (slowed < 7.9)).any()


def test_rope_scaling_survives_yaml_and_manifest():
    model = load(["model=tiny_llama"]).model
    assert model.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 128)
    assert ModelConfig(**json.loads(json.dumps(asdict(model)))) == model
    with pytest.raises(InputError, match=r"model\.rope_scaling\.rope_type=yarn is unknown: use one of"):
        load(["model=tiny_llama", "model.rope_scaling.rope_type=yarn"])


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gemma2_27b", 27.227),
        ("qwen25_0_5b", 0.494),
        ("qwen25_7b", 7.616),
        ("llama31_8b", 8.030),
        ("tower_7b", 6.738),
        ("eurollm_9b", 9.152),
    ],
)
def test_shapes_have_the_published_parameter_counts(name: str, billions: float):
    """Counts of the released checkpoints, tied embeddings counted once."""
    assert parameters(load([f"model={name}"]).model) / 1e9 == pytest.approx(billions, abs=1e-3)


def test_any_vocabulary_fits_any_tensor_parallel_size_but_other_widths_do_not():
    load(["model=tower_7b", "model.vocab_size=32007", "parallel.tensor=4"])
    with pytest.raises(InputError, match=r"4864 MLP channels; parallel\.tensor=3 does not divide them"):
        load(["model=qwen25_0_5b", "parallel.tensor=3"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_fused_rows_are_interleaved_by_query_group(ranks: int):
    weight = Weight("qkv", {"q": ("queries", "hidden"), "k": ("keys", "hidden"), "v": ("keys", "hidden")}, shard=0, per_group=True)
    rows = {"q": 24 // ranks, "k": 12 // ranks, "v": 12 // ranks}  # of one rank: 4 heads, 2 groups, 6 channels in all
    parts = [torch.arange(n).add(100 * i).unsqueeze(1).expand(n, 16) for i, n in enumerate(rows.values())]
    fused = weight.fuse(parts, 2 // ranks)
    assert fused[:, 0].tolist()[:24] == [*range(12), *range(100, 106), *range(200, 206)]
    for part, again in zip(parts, weight.split(fused, QWEN2, ranks), strict=True):
        assert torch.equal(part, again)
