"""Build the prompts of GRPO: maths and instructions as published, human judgements, translations to be checked, each by its share.

    python -m tools.build_prompts prompts=mine                                # conf/prompts/mine.yaml, or --config-dir DIR
    python -m tools.build_prompts prompts=mine prompts.count=1000000 prompts.output=prompts.jsonl

Writes <output> and, beside it, <output>.manifest.json: by source its licence, origin, files and what was left out for what reason. Does
nothing when the output was made with the same settings from the same files. Leaves out: going on with half an output.
Next: python -m tools.filter_prompts.
"""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tower.command import entry_point
from megatron_tower.config import Config, InputError
from megatron_tower.curation import pools, prompts
from megatron_tower.data import sources
from megatron_tower.data.made import is_made, publish
from megatron_tower.runtime.job import supervised

VERSION = 1  # raised when the same sources would give other prompts
FREE = ("name", "output", "processes", "difficulty")  # settings that change no prompt


@entry_point
def main(cfg: Config) -> None:
    if not supervised(cfg, "tools.build_prompts"):
        build(cfg)


def build(cfg: Config) -> None:
    """Raises InputError for bad input; an output is there as a whole or not at all."""
    wanted, output = cfg.prompts, output_of(cfg)
    prompts.check(wanted)
    for source in wanted.sources.values():
        source.files = pools.fetched(source.files, Path(cfg.data.cache))
    settings = _settings(cfg)
    if is_made(output, settings, "prompts.output"):
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.part")
    counts: dict[str, Counter] = {}
    kinds: dict[str, Counter] = {name: Counter() for name in ("reward", "family", "locale")}
    try:
        with part.open("w", encoding="utf-8") as file:
            for item in prompts.items(wanted, cfg.seed, counts):
                file.write(json.dumps(item, ensure_ascii=False) + "\n")
                for name, of in kinds.items():
                    of[item[name]] += 1
    except InputError:
        part.unlink()
        raise
    told = {name: {"licence": source.licence, "origin": source.origin, "counts": counts[name]} for name, source in wanted.sources.items()}
    publish(part, output, {"prompts": sum(kinds["reward"].values()), "sources": told, **kinds}, settings)
    for name, of in counts.items():
        print(f"{name}: {', '.join(f'{count:,} {what}' for what, count in of.items() if count)}")
    print(f"{output}: {sum(kinds['reward'].values()):,} prompts")


def output_of(cfg: Config) -> Path:
    return Path(cfg.prompts.output or f"{cfg.run_dir}/prompts.jsonl")


def _settings(cfg: Config) -> dict[str, Any]:
    """What tells this build from any other: of files what they hold, not where they lie."""
    wanted = {f"prompts.{key}": value for key, value in asdict(cfg.prompts).items() if key not in FREE}
    for name, source in wanted.pop("prompts.sources").items():
        files = pools.files(cfg.prompts.sources[name], f"prompts.sources.{name}")
        wanted |= {f"prompts.sources.{name}.{key}": value for key, value in source.items()}
        wanted |= {f"prompts.sources.{name}.files": sources.fingerprint(files)}
    wanted["prompts.decontaminate"] = sources.fingerprint([Path(path) for path in cfg.prompts.decontaminate])
    if cfg.prompts.tokenizer:
        wanted["prompts.tokenizer"] = sources.fingerprint(sorted(Path(cfg.prompts.tokenizer).glob("tokenizer*")))
    return wanted | {"seed": cfg.seed, "version": VERSION}


if __name__ == "__main__":
    main()
