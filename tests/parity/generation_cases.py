"""Cases of generation that the parity test runs on one rank and on four, and what they are made of.

As ranks: python -m tests.parity.generation_cases FOLDER, with FOLDER/<family> from `write_folders`; writes FOLDER/<layout>.json.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_tower.config import ClusterConfig, ModelConfig, ParallelConfig, PrecisionConfig

NEW = 24
FP32 = PrecisionConfig(name="fp32")
RANKS = 4
LAYOUTS = (
    ParallelConfig(name="tp2", tensor=2, data=2),
    ParallelConfig(name="tp2_sp", tensor=2, sequence_parallel=True, data=2),
    ParallelConfig(name="pp2", pipeline=2, data=2),
    ParallelConfig(name="tp2pp2", tensor=2, pipeline=2),
)
PROMPT_LENGTHS = (3, 30, 11, 1, 30, 19, 2, 45)  # the window is 16 tokens
GREEDY = {"max_new_tokens": NEW, "stop_ids": []}
CASES = {
    "greedy": GREEDY,
    "stopping": GREEDY | {"stop_ids": list(range(0, 96, 6))},
    "sampled": GREEDY | {"temperature": 0.8, "top_p": 0.9, "seed": 3},
    "small batches": GREEDY | {"temperature": 0.8, "top_p": 0.9, "seed": 3, "batch_size": 3},
}
SAMPLES = 3
KEYS = [40, 7, 1, 5, 3, 2, 1000, 9]
HOT = GREEDY | {"temperature": 0.7, "top_p": 0.9, "seed": 11, "samples": SAMPLES, "stop_ids": list(range(0, 96, 12))}
SAMPLED = {"hot": HOT, "one prompt at once": HOT | {"batch_size": 2}, "cold": HOT | {"temperature": 0.0}}
IN_LAYOUTS = ("greedy", "hot")


def shape(family: str) -> ModelConfig:
    """Four layers with every feature of the family."""
    gemma = family == "gemma2"
    return ModelConfig(
        name=f"small_{family}",
        family=family,
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=96,
        max_position_embeddings=128,
        tie_embeddings=gemma,
        qkv_bias=not gemma,
        attention_softcap=20.0 if gemma else None,
        final_softcap=30.0 if gemma else None,
        query_scale=24 if gemma else None,
        sliding_window=16 if gemma else None,
        window_layers=[0, 2] if gemma else [],
    )


def prompts() -> list[list[int]]:
    """Rows of unequal length, some above the sliding window."""
    return [[(row * 31 + token * 17 + token * token * row) % 96 for token in range(length)] for row, length in enumerate(PROMPT_LENGTHS)]


def write_folder(family: str, folder: Path) -> Path:
    """An HF folder whose every weight, biases and norms included, is random; small embeddings, so that the layers have a say."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_tower.models.families import family_of

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**family_of(family).to_hf(shape(family))))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if "embed" in name else 0.3))
    model.save_pretrained(folder)
    return folder


def load(family: str, folder: Path, parallel: ParallelConfig):
    """The family's model with the weights of `folder` in this layout."""
    from megatron_tower.models.build import build_chunks
    from megatron_tower.models.hf import load_hf

    chunks = build_chunks(shape(family), parallel, FP32)
    load_hf(chunks, shape(family), folder)
    return chunks[0]


def run(family: str, folder: Path, parallel: ParallelConfig, names: Sequence[str] = (*CASES, *SAMPLED)) -> dict[str, list]:
    """The answers of some cases, by name; those of SAMPLED as [{tokens, logprobs}, ...] a prompt."""
    from megatron_tower.rollout.generate import generate, sample

    model = load(family, folder, parallel)
    answers: dict[str, list] = {name: generate(model, prompts(), **CASES[name]) for name in names if name in CASES}
    for name in (name for name in names if name in SAMPLED):
        answers[name] = [[asdict(answer) for answer in row] for row in sample(model, prompts(), keys=KEYS, **SAMPLED[name])]
    assert model.config.sequence_parallel == parallel.sequence_parallel  # put back
    return answers


def check_ties() -> None:
    """Greedy takes the lowest id of equal logits, on whichever rank it lies."""
    import torch
    from megatron.core import parallel_state

    from megatron_tower.rollout.sampling import next_tokens

    group = parallel_state.get_tensor_model_parallel_group()
    whole = torch.zeros(4, 20)
    for row, best in enumerate(([], [3, 15], [12, 19], [9, 10])):
        whole[row, best] = 1.0
    share = whole.chunk(group.size(), dim=-1)[group.rank()]
    assert next_tokens(share, torch.zeros(4), 0.0, 1.0, group).tolist() == [0, 3, 12, 9]


def main() -> None:
    from megatron_tower.runtime import cpu, distributed

    cpu.install()
    folder = Path(sys.argv[1])
    for parallel in LAYOUTS:
        distributed.initialize(parallel, seed=0, cluster=ClusterConfig(name="local"))
        check_ties()
        answers = {family: run(family, folder / family, parallel, IN_LAYOUTS) for family in ("gemma2", "qwen2")}
        (folder / f"{parallel.name}.{distributed.place().rank}.json").write_text(json.dumps(answers))
    distributed.shutdown()


if __name__ == "__main__":
    main()
