"""Fetch what evaluation needs from the hub into `eval.assets`, for compute nodes that have no network.

    python -m tools.fetch_assets eval=tower_plus eval.checkpoint=Unbabel/Tower-Plus-9B      # on a login node
    python -m evaluation.run     eval=tower_plus eval.checkpoint=Unbabel/Tower-Plus-9B      # in a job: reads the same folder

    <assets>/<task>/*.jsonl       the rows of each benchmark in eval.tasks
    <assets>/<org>--<name>/       each metric of eval.metrics (its encoder's config and tokenizer inside), and eval.checkpoint
    <assets>/nltk_data/           punkt_tab, for ifeval
    <assets>/manifest.json        sha256 of every file

Run again, it verifies every file and fetches what is missing or was changed. Only data files, safetensors and COMET's own checkpoints
(read as tensors alone) are fetched; no code.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from evaluation.metrics.neural import on_hub, snapshot
from evaluation.neural import SACREBLEU
from evaluation.tasks import TASKS
from evaluation.tasks.sources import Published, fetched
from megatron_tower.command import entry_point
from megatron_tower.config import Config, InputError
from megatron_tower.data.sources import sha256
from megatron_tower.runtime.run_dir import write_text

TEXT = ["*.json", "*.model", "*.txt", "*.jinja", "*.yaml"]  # configs and tokenizers
COMET = [*TEXT, "checkpoints/model.ckpt"]
SAFE = [*TEXT, "*.safetensors"]
METRICX_TOKENIZER = "google/mt5-xl"  # MetricX's repositories hold weights only


@entry_point
def main(cfg: Config) -> None:
    fetch(cfg)


def fetch(cfg: Config) -> None:
    """Raises InputError for the first thing that can't be fetched; what came before stays and is not fetched again."""
    assets = Path(cfg.eval.assets)
    known = _manifest(assets)
    for name, make in _wanted(cfg).items():
        folder = assets / name
        listed = {path: digest for path, digest in known.items() if path.startswith(f"{name}/")}
        if listed and all((assets / path).is_file() and sha256(assets / path) == digest for path, digest in listed.items()):
            print(f"{folder}: {len(listed)} files verified", flush=True)
            continue
        if listed:
            print(f"{folder}: files are missing or were changed; fetched again", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
        make(folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
        if not files:
            raise InputError(f"{name}: nothing of it is data or safetensors, so nothing was fetched")
        known = {path: digest for path, digest in known.items() if path not in listed}
        known |= {path.relative_to(assets).as_posix(): sha256(path) for path in files}
        write_text(assets / "manifest.json", json.dumps(known, indent=1, sort_keys=True) + "\n")
        print(f"{folder}: {len(files)} files", flush=True)


def _wanted(cfg: Config) -> dict[str, Callable[[Path], None]]:
    """Folder's name -> what fills it."""
    wanted: dict[str, Callable[[Path], None]] = {}
    for name in cfg.eval.tasks:
        if name not in TASKS:
            raise InputError(f"eval.tasks names {name}, which is no task: use some of {', '.join(TASKS)}")
        if TASKS[name].published and name not in cfg.eval.sources:
            wanted[name] = lambda folder, parts=TASKS[name].published(cfg.eval): _rows(folder, parts)
    if "ifeval" in cfg.eval.tasks:
        wanted["nltk_data"] = _punkt
    for name, place in cfg.eval.metrics.items():
        if place != SACREBLEU and _to_fetch(f"eval.metrics.{name}", place):
            wanted[place.replace("/", "--")] = lambda folder, place=place: _metric(folder, place)
    if cfg.eval.checkpoint and _to_fetch("eval.checkpoint", cfg.eval.checkpoint):
        wanted[cfg.eval.checkpoint.replace("/", "--")] = lambda folder: _snapshot(cfg.eval.checkpoint, folder, SAFE)
    return wanted


def _to_fetch(name: str, place: str) -> bool:
    """Whether it is on the hub. Raises InputError for what is neither there nor here."""
    here = Path(place).exists()
    if not here and not on_hub(place):
        raise InputError(f"{name}={place} is neither here nor a model of the hub: name a folder, org/name, or leave {name} out")
    return not here


def _rows(folder: Path, parts: list[Published]) -> None:
    for part in parts:
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in fetched(part))
        write_text(folder / f"{part.file}.jsonl", lines)


def _punkt(folder: Path) -> None:
    from megatron_tower.rewards.instructions import fetch_punkt

    fetch_punkt(folder.parent)


def _metric(folder: Path, place: str) -> None:
    import yaml

    _snapshot(place, folder, [*COMET, "*.safetensors"])
    if (folder / "hparams.yaml").is_file():
        encoder = yaml.safe_load((folder / "hparams.yaml").read_text(encoding="utf-8"))["pretrained_model"]
        _snapshot(encoder, folder / "encoder", TEXT)
    elif not list(folder.glob("*.model")) and not (folder / "tokenizer.json").is_file():
        _snapshot(METRICX_TOKENIZER, folder, ["spiece.model", "tokenizer*", "special_tokens_map.json"])


def _snapshot(place: str, folder: Path, patterns: list[str]) -> None:
    snapshot(place, place, local_dir=folder, allow_patterns=patterns)


def _manifest(assets: Path) -> dict[str, str]:
    path = assets / "manifest.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): remove it, and all is fetched again") from error


if __name__ == "__main__":
    main()
