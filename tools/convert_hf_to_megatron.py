"""Turn a Hugging Face folder into a Megatron checkpoint, tensor by tensor: on a login node, in little memory, whatever the model's size.

    python -m tools.convert_hf_to_megatron --hf models/Qwen2.5-72B --output runs/qwen72b/base --tp 8 --pp 4
    python -m tools.convert_hf_to_megatron --hf models/gemma-2-9b --output runs/gemma9b/base --dry-run

The output is a directory like a phase's: `phase.start_from=<output>` trains from it, at any layout of ranks. Run again after a kill:
finished files are kept. Leaves out: pickled and quantised weights.
"""

import argparse
from pathlib import Path

from megatron_tower.command import refuse
from megatron_tower.config import InputError
from megatron_tower.runtime.resumable import describe, produce
from megatron_tower.training.convert import megatron_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="folder of safetensors with config.json")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size that the files are cut for; any other can read them")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages that the files are cut for; any other number can read them")
    parser.add_argument("--dry-run", action="store_true", help="print files, sizes and the room needed, and write nothing")
    arguments = parser.parse_args()
    try:
        plan = megatron_plan(arguments.hf, arguments.output, arguments.tp, arguments.pp)
        if arguments.dry_run:
            describe(plan)
            return
        produce(plan)
    except InputError as error:
        refuse(error)
    print(f"{arguments.hf} -> {arguments.output}")


if __name__ == "__main__":
    main()
