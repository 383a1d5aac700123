"""Export a checkpoint as a Hugging Face folder, which transformers and vLLM load, tensor by tensor: on a login node, in little memory.

    python -m tools.convert_megatron_to_hf --checkpoint runs/demo-tiny_gemma2-single/sft --output exported
    python -m tools.convert_megatron_to_hf --checkpoint runs/qwen72b/sft --output exported --dtype bfloat16

What was trained here gets a model card too. Run again after a kill: finished files are kept. Leaves out: the optimizer's state.
"""

import argparse
from pathlib import Path

from megatron_tower.command import refuse
from megatron_tower.config import InputError
from megatron_tower.runtime.resumable import describe, produce
from megatron_tower.training import card, checkpoint
from megatron_tower.training.convert import hf_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run, one of its phases, or a step_ folder")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; as stored if not given")
    parser.add_argument("--dry-run", action="store_true", help="print files, sizes and the room needed, and write nothing")
    arguments = parser.parse_args()
    try:
        plan = hf_plan(arguments.checkpoint, arguments.output, arguments.dtype)
        if arguments.dry_run:
            describe(plan)
            return
        produce(plan)
        card.write(checkpoint.find(arguments.checkpoint), arguments.output)
    except InputError as error:
        refuse(error)
    print(f"{arguments.checkpoint} -> {arguments.output}")


if __name__ == "__main__":
    main()
