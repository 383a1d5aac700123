"""The base model of a recipe at run_dir/base: links to the files of model.hf_folder, or random weights in the tiny model's shape.

python -m tools.init_model model=tiny_gemma2
"""

from pathlib import Path

from megatron_tower.command import entry_point
from megatron_tower.config import Config, InputError
from megatron_tower.runtime.run_dir import check_writable


def link(folder: Path, base: Path) -> None:
    """Make `base` a folder of links to the files of `folder`: what is written beside them, as scores are, stays out of it."""
    if base.is_symlink():  # to a folder that is gone
        base.unlink()
    base.mkdir(parents=True, exist_ok=True)
    files = [path for path in folder.iterdir() if path.is_file() or path.name == ".cache"]  # where the hub notes checksums
    for path in sorted(files, key=lambda path: path.name == "config.json"):  # last, since it says that `base` is there
        place = base / path.name
        if place.is_symlink():
            place.unlink()
        place.symlink_to(path.resolve())


@entry_point
def main(cfg: Config) -> None:
    base, tokenizer = Path(cfg.run_dir) / "base", Path(cfg.data.folder) / "tokenizer"
    if (base / "config.json").is_file():
        print(f"{base} is there already")
        return
    check_writable(base, f"run_dir={cfg.run_dir}")
    if cfg.model.hf_folder:
        link(Path(cfg.model.hf_folder), base)
        print(f"{base} -> {cfg.model.hf_folder}")
        return
    if not tokenizer.is_dir():
        raise InputError(f"{tokenizer} is missing: run python -m tools.prepare_data model={cfg.model.name} first")
    from megatron_tower.models.hf import random_hf

    random_hf(cfg.model, base, tokenizer, cfg.seed)
    print(f"random weights in the shape of {cfg.model.name}: {base}")


if __name__ == "__main__":
    main()
