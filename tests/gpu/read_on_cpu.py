# ruff: noqa: E402 (the bridge comes before megatron-core)
"""What a checkpoint says on a CPU in float32. Run by test_gpu_precision.py, with no card in sight.

python -m tests.gpu.read_on_cpu CHECKPOINT FOLDER
"""

import json
import sys
from pathlib import Path

from megatron_tower.runtime import cpu

cpu.install()

import torch

from megatron_tower.config import ClusterConfig, ParallelConfig, PrecisionConfig
from megatron_tower.models.build import build_chunks
from megatron_tower.runtime import distributed
from megatron_tower.training import checkpoint, loading
from megatron_tower.training.state import TrainingState
from tests.gpu.test_gpu_precision import answers


def main(path: Path, folder: Path) -> None:
    """FOLDER/tokens.pt [batch, seq] -> logits.pt [batch, seq, vocabulary] and answers.json."""
    parallel = ParallelConfig(name="single")
    distributed.initialize(parallel, 1234, ClusterConfig(name="local"))
    found = checkpoint.resolve(path)
    (decoder,) = build_chunks(found.model, parallel, PrecisionConfig(name="fp32"))
    loading.load(found, TrainingState([decoder.eval()]))
    with torch.no_grad():
        logits = decoder(torch.load(folder / "tokens.pt", weights_only=True), None, None)
    torch.save(logits[..., : found.model.vocab_size].float(), folder / "logits.pt")
    (folder / "answers.json").write_text(json.dumps(answers(decoder)))
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
