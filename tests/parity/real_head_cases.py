# ruff: noqa: E402 (the bridge comes before megatron-core)
"""Ranks of test_parity_real_heads.py: python -m tests.parity.real_head_cases FOLDER LAYOUT..."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from megatron_tower.runtime import cpu

cpu.install()

from megatron_tower.models.hf import model_config
from megatron_tower.rollout.generate import generate
from megatron_tower.runtime import distributed
from tests.parity import model_cases

NEW = 12  # tokens
CASES = {"greedy": {}, "sampled": {"temperature": 1.0, "top_p": 0.9, "seed": 3}}


def prompts(vocab_size: int) -> list[list[int]]:
    """Below and above the window, the last token of the vocabulary among theirs."""
    return [[vocab_size - 1 - (7 * i) % vocab_size for i in range(length)] for length in (5, 30)]


def check(folder: Path, layout: str) -> dict[str, list[list[int]]]:
    """The parity of model_cases.py; returns what the model generates."""
    model, parallel = replace(model_config(folder / "model"), name=folder.name), model_cases.start(layout)
    if model.num_query_groups % parallel.tensor:  # Qwen 2.5 0.5B has two
        return {}
    chunks = model_cases.loaded(folder, model, parallel)
    words = {"max_new_tokens": NEW, "stop_ids": []}
    answers = {name: generate(chunks[0], prompts(model.vocab_size), **words, **case) for name, case in CASES.items()}
    model_cases.same_as_transformers(chunks, folder, model, "packed", folder / layout)
    return answers


def main() -> None:
    folder, *layouts = sys.argv[1:]
    for layout in layouts:
        for model in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
            expected = json.loads((model / "answers.json").read_text())
            for name, answers in check(model, layout).items():
                assert answers == expected[name], f"{model.name} {layout}: {name} answers differ"
    distributed.shutdown()


if __name__ == "__main__":
    main()
