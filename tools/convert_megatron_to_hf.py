"""Export a training checkpoint as a Hugging Face folder, which transformers and vLLM load.

    python -m tools.convert_megatron_to_hf --checkpoint runs/demo-tiny_gemma2-single/sft --output exported

Leaves out: models larger than this machine's memory.
"""

import argparse
from pathlib import Path

from megatron_tower.config import ClusterConfig, InputError, ParallelConfig, PrecisionConfig, refuse
from megatron_tower.runtime import cpu, distributed


def convert(checkpoint: Path, output: Path) -> None:
    """Write `checkpoint` (a run directory or one of its checkpoints) to `output`, whole or not at all."""
    if (output / "config.json").is_file():
        print(f"{output} is there already")
        return
    cpu.install()
    from megatron_tower.models.hf import save_hf
    from megatron_tower.training.checkpoint import open_for_inference

    parallel = ParallelConfig(name="single")
    distributed.initialize(parallel, seed=0, cluster=ClusterConfig(name="local"))
    model, tokenizer, shape = open_for_inference(checkpoint, parallel, PrecisionConfig(name="fp32"))
    save_hf([model], shape, output, tokenizer)
    distributed.shutdown()
    print(f"{checkpoint} -> {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        convert(arguments.checkpoint, arguments.output)
    except InputError as error:
        refuse(error)


if __name__ == "__main__":
    main()
