# ruff: noqa: E402 (the bridge comes before megatron-core)
"""Ranks of test_parity_vocabulary.py: python -m tests.parity.vocabulary_cases FOLDER

Writes FOLDER/<family>.<layout>.json: the losses after a run at TP2 was saved half-way and went on in another layout. And the parity of
model_cases.py for a vocabulary so small that the last rank has none of it.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from megatron_tower.runtime import cpu

cpu.install()

from megatron_tower.command import load
from megatron_tower.config import Config
from megatron_tower.runtime import distributed
from tests.distributed import curves, room
from tests.parity import model_cases, reference

VOCABULARY = 401  # a prime; the tokenizer's 400 and a row that nothing uses
FEW = replace(reference.MODELS["gemma2"], name="few", num_query_groups=4, vocab_size=5)  # at TP4: 2, 2, 1 and no token a rank
STEPS, HALF = 6, 3
SAVED = {  # family -> how the first half ran: with its own moments on each rank, or with shared ones; its embeddings are tied, or not
    "gemma2": ["parallel=tp2", "parallel.data=2"],
    "qwen2": ["parallel=tp2", "parallel.data=2", "parallel.distributed_optimizer=true"],
}
RESUMED = {
    "tp4_sp": ["parallel.tensor=4", "parallel.sequence_parallel=true"],
    "tp1": ["parallel.data=4"],
    "tp1_distributed": ["parallel.data=4", "parallel.distributed_optimizer=true"],
    "tp4": ["parallel.tensor=4"],
}
CASES = {"gemma2": ("tp4_sp", "tp1_distributed"), "qwen2": ("tp1", "tp4")}


def config(folder: Path, family: str, *more: str) -> Config:
    shape = [f"model.vocab_size={VOCABULARY}", "model.num_query_groups=4", f"phase.start_from={folder}/{family}_odd"]
    steps = [f"phase.train_steps={STEPS}", f"run_dir={folder}/run_{family}"]
    return load(room.words(folder, family, *curves.PHASE[family], *shape, *steps, *more))


def main() -> None:
    folder = Path(sys.argv[1])
    model_cases.check(folder / "few", FEW, "tp4")
    for family, layout in SAVED.items():
        curves.saved(config(folder, family, *layout), HALF)
        for name in CASES[family]:
            losses = curves.resumed(config(folder, family, *RESUMED[name]))
            if distributed.is_rank_zero():
                (folder / f"{family}.{name}.json").write_text(json.dumps(losses))
    distributed.shutdown()


if __name__ == "__main__":
    main()
