# ruff: noqa: E402 (the bridge comes before megatron-core)
"""Ranks of test_evaluation_generator.py: python -m tests.distributed.evaluation_cases FOLDER LAYOUT...

Each layout must give, on every rank, the answers and likelihoods that one rank gave (FOLDER/expected.json), and the verdicts of rank 0.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_tower.runtime import cpu

cpu.install()

from evaluation import run
from evaluation.answers import Asker
from evaluation.generators import Decoding
from evaluation.generators.megatron import MegatronGenerator
from megatron_tower.config import ClusterConfig, Config, EvalConfig, ParallelConfig, PrecisionConfig
from megatron_tower.data import tokenizer
from megatron_tower.models.build import build_chunks
from megatron_tower.models.hf import load_hf, model_config
from megatron_tower.rewards import pool
from megatron_tower.rewards.pool import Verdict
from megatron_tower.rollout.answers import answers as drawn
from megatron_tower.runtime import distributed

LAYOUTS = {
    "single": {},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "dp2": {"data": 2},
    "tp2_sp": {"tensor": 2, "sequence_parallel": True},
}
TEXTS = ["a red house", "12 March 2024", "die Tür und der Fluss", "x", "one two three four five six seven eight nine ten " * 8]
GIVEN = [("a red house", "ein rotes Haus"), ("a red house", "x"), ("12 March 2024", "12. März 2024"), ("x", "die Tür und der Fluss")]


def opened(folder: Path, layout: str, chat: bool) -> MegatronGenerator:
    """The model of `folder` at this layout."""
    parallel = ParallelConfig(name=layout, **LAYOUTS[layout])
    distributed.initialize(parallel, 1234, ClusterConfig(name="local"))
    model = model_config(folder)
    chunks = build_chunks(model, parallel, PrecisionConfig(name="fp32"))
    load_hf(chunks, model, folder)
    cfg = EvalConfig(name="test", batch_size=2, max_new_tokens=6)
    return MegatronGenerator(chunks[0], tokenizer.load(folder), chat, cfg)


def answers(folder: Path, layout: str, chat: bool) -> dict[str, list]:
    """What it says: every rank gets the whole."""
    generator = opened(folder, layout, chat)
    found = generator.likelihood(TEXTS)
    given = generator.answer_likelihood(*zip(*GIVEN, strict=True))
    return {
        "sampled": sampled(generator),
        "bits": [f.bits for f in found + given],
        "tokens": [f.tokens for f in found + given],
        "outputs": [
            asdict(found) for found in Asker(generator, None).generate([t[:20] for t in TEXTS], Decoding(6, stop=() if chat else ("\n",)))
        ],
    }


def sampled(generator: MegatronGenerator) -> list[list[list[int]]]:
    """Answers drawn for builders of pairs and prompts: by a prompt's number, so that more prompts beside it change nothing."""
    ids = {7 * n + 3: generator.tokenizer.encode(text) for n, text in enumerate(TEXTS[:4])}
    how = {"samples": 3, "max_new_tokens": 5, "stop_ids": [1], "temperature": 1.0, "top_p": 0.9, "seed": 5, "batch_size": 4}
    found = drawn(generator.model, ids, **how)
    assert drawn(generator.model, dict(list(ids.items())[:3]), **how) == {number: found[number] for number in list(ids)[:3]}
    return [found[number] for number in ids]


class RankZerosPool:
    """A verifier that only rank 0 may ask."""

    def __init__(self, processes: int, timeout: float) -> None: ...

    def __enter__(self) -> "RankZerosPool":
        return self

    def __exit__(self, *error: object) -> None: ...

    def score(self, answers: list[tuple[dict, str]]) -> list[Verdict]:
        assert distributed.is_rank_zero()
        return [Verdict(len(answer) / 10, None) if answer else Verdict(None, "timeout") for _, answer in answers]


def check_verdicts() -> None:
    pool.VerifierPool = RankZerosPool
    with run.rewards(Config()) as verify:
        assert verify([({}, "three"), ({}, "")]) == [Verdict(0.5, None), Verdict(None, "timeout")]


def main() -> None:
    folder = Path(sys.argv[1])
    expected = json.loads((folder / "expected.json").read_text())
    for layout in sys.argv[2:]:
        found = answers(folder, layout, chat=True)
        assert found["outputs"] == expected["outputs"], (layout, found["outputs"], expected["outputs"])
        assert found["tokens"] == expected["tokens"], layout
        assert found["sampled"] == expected["sampled"], (layout, found["sampled"], expected["sampled"])
        apart = max(abs(a - b) for a, b in zip(found["bits"], expected["bits"], strict=True))
        assert apart < 1e-2, (layout, apart)
        check_verdicts()
    distributed.shutdown()


if __name__ == "__main__":
    main()
