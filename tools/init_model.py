"""The base model of a recipe at run_dir/base: a link to model.hf_folder, or random weights in the tiny model's shape.

python -m tools.init_model model=tiny_gemma2
"""

from pathlib import Path

from megatron_tower.command import entry_point
from megatron_tower.config import Config, InputError


@entry_point
def main(cfg: Config) -> None:
    base, tokenizer = Path(cfg.run_dir) / "base", Path(cfg.data.folder) / "tokenizer"
    if (base / "config.json").is_file():
        print(f"{base} is there already")
        return
    if cfg.model.hf_folder:
        base.parent.mkdir(parents=True, exist_ok=True)
        base.symlink_to(Path(cfg.model.hf_folder).resolve())
        print(f"{base} -> {cfg.model.hf_folder}")
        return
    if not tokenizer.is_dir():
        raise InputError(f"{tokenizer} is missing: run python -m tools.prepare_data model={cfg.model.name} first")
    from megatron_tower.models.hf import random_hf

    random_hf(cfg.model, base, tokenizer, cfg.seed)
    print(f"random weights in the shape of {cfg.model.name}: {base}")


if __name__ == "__main__":
    main()
