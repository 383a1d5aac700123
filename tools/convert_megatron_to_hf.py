"""Export a training checkpoint as a Hugging Face folder, which transformers and vLLM load.

    python -m tools.convert_megatron_to_hf --checkpoint runs/demo-tiny_gemma2-single/sft --output exported

Leaves out: models larger than this machine's memory.
"""

import argparse
from pathlib import Path

from megatron_tower.config import InputError, ParallelConfig, PrecisionConfig, refuse


def convert(checkpoint: Path, output: Path) -> None:
    """Write `checkpoint` (a run directory or one of its checkpoints) to `output`, whole or not at all."""
    from megatron_tower.models.hf import save_hf
    from megatron_tower.training.checkpoint import open_for_inference

    if (output / "config.json").is_file():
        print(f"{output} is there already")
        return
    model, tokenizer, shape = open_for_inference(checkpoint, ParallelConfig(name="single"), PrecisionConfig(name="fp32"))
    save_hf([model], shape, output, tokenizer)
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
