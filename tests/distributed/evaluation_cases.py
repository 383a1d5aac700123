# ruff: noqa: E402 (the bridge comes before megatron-core)
"""Ranks of test_evaluation_generator.py: python -m tests.distributed.evaluation_cases FOLDER LAYOUT...

Each layout must give, on every rank, the answers and likelihoods that one rank gave (FOLDER/expected.json).
"""

import json
import sys
from pathlib import Path

from megatron_tower.runtime import cpu

cpu.install()

from evaluation.generator import MegatronGenerator
from megatron_tower.config import ClusterConfig, EvalConfig, ParallelConfig, PrecisionConfig
from megatron_tower.data import tokenizer
from megatron_tower.models.build import build_chunks
from megatron_tower.models.hf import load_hf, model_config
from megatron_tower.runtime import distributed

LAYOUTS = {
    "single": {},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "dp2": {"data": 2},
    "tp2_sp": {"tensor": 2, "sequence_parallel": True},
}
TEXTS = ["a red house", "12 March 2024", "die Tür und der Fluss", "x", "one two three four five six seven eight nine ten " * 8]


def answers(folder: Path, layout: str, chat: bool) -> dict[str, list]:
    """What the model of `folder` says at this layout: every rank gets the whole."""
    parallel = ParallelConfig(name=layout, **LAYOUTS[layout])
    distributed.initialize(parallel, 1234, ClusterConfig(name="local"))
    model = model_config(folder)
    chunks = build_chunks(model, parallel, PrecisionConfig(name="fp32"))
    load_hf(chunks, model, folder)
    cfg = EvalConfig(name="test", batch_size=2, max_new_tokens=6)
    generator = MegatronGenerator(chunks[0], tokenizer.load(folder), chat, cfg)
    found = generator.likelihood(TEXTS)
    return {"bits": [f.bits for f in found], "tokens": [f.tokens for f in found], "outputs": generator.generate([t[:20] for t in TEXTS])}


def main() -> None:
    folder = Path(sys.argv[1])
    expected = json.loads((folder / "expected.json").read_text())
    for layout in sys.argv[2:]:
        found = answers(folder, layout, chat=True)
        assert found["outputs"] == expected["outputs"], (layout, found["outputs"], expected["outputs"])
        assert found["tokens"] == expected["tokens"], layout
        apart = max(abs(a - b) for a, b in zip(found["bits"], expected["bits"], strict=True))
        assert apart < 1e-2, (layout, apart)
    distributed.shutdown()


if __name__ == "__main__":
    main()
