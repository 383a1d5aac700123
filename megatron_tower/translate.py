"""Translate with what was trained, in the released models' prompt format, greedily.

Run:  python -m megatron_tower.translate --checkpoint runs/demo --to de "Good morning" "12 March 2024"
      python -m megatron_tower.translate --checkpoint runs/demo --to pt_BR < lines.txt
Under torchrun or srun the model is split over all ranks by tensor parallelism.
"""

import argparse
import sys
from pathlib import Path

from megatron_tower.command import refuse
from megatron_tower.config import ClusterConfig, InputError, ParallelConfig, PrecisionConfig
from megatron_tower.data.locales import find


def translate(checkpoint: Path, source: str, target: str, sentences: list[str], max_new_tokens: int) -> list[str]:
    """One translation a sentence (none for a blank one), from locale `source` to `target`; every rank gets the same.

    Raises InputError when the checkpoint can't be opened or a sentence exceeds the model's context.
    """
    from megatron_tower.runtime import cpu

    cpu.install()
    import torch

    from megatron_tower.data import chat
    from megatron_tower.data.templates import translation_prompt
    from megatron_tower.rollout.generate import generate
    from megatron_tower.runtime import distributed
    from megatron_tower.training.loading import open_for_inference

    ranks = distributed.place().world_size
    parallel = ParallelConfig(name=f"tp{ranks}", tensor=ranks)
    precision = PrecisionConfig(name="inference", params="bfloat16" if torch.cuda.is_available() else "float32")
    distributed.initialize(parallel, seed=0, cluster=ClusterConfig(name="local"))
    try:
        model, tokenizer, _ = open_for_inference(checkpoint, parallel, precision)
        filled = [i for i, sentence in enumerate(sentences) if sentence.strip()]
        prompts = [chat.prompt_ids(tokenizer, translation_prompt(source, target, sentences[i].strip())) for i in filled]
        answers = generate(model, prompts, max_new_tokens=max_new_tokens, stop_ids=chat.stop_ids(tokenizer))
        texts = {i: tokenizer.decode(answer, skip_special_tokens=True).strip() for i, answer in zip(filled, answers, strict=True)}
        return [texts.get(i, "") for i in range(len(sentences))]
    finally:
        distributed.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m megatron_tower.translate", description="Translate with a trained checkpoint.")
    parser.add_argument("sentences", nargs="*", help="text to translate; without any, each line of standard input")
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run directory, one of its checkpoints or a Hugging Face folder")
    parser.add_argument("--to", required=True, help="target language: de, pt_BR, German")
    parser.add_argument("--from", dest="source", default="en", help="source language (default: en)")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    options = parser.parse_args()
    try:
        source, target = find(options.source).code, find(options.to).code
        sentences = options.sentences or sys.stdin.read().splitlines()
        if not any(sentence.strip() for sentence in sentences):
            raise InputError("nothing to translate: give sentences as arguments or lines on standard input")
        translations = translate(options.checkpoint, source, target, sentences, options.max_new_tokens)
    except InputError as error:
        refuse(error)
    from megatron_tower.runtime.distributed import is_rank_zero

    if is_rank_zero():
        print(*translations, sep="\n")


if __name__ == "__main__":
    main()
