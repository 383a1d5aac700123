"""What scores answers for preference pairs: verifiable rewards, a COMET checkpoint or a reward model, from local files only.

    rewards       the reward that each item names, in killable processes                       [0, 1]
    comet         unbabel-comet, with the item's reference where all items have one             the checkpoint's scale
    reward_model  a Hugging Face sequence classifier with one output, on the chat of both      the model's logit

Nothing but tensors is read from a checkpoint: COMET's is loaded with weights_only and its class built from hparams.yaml.
Leaves out: several devices (the first rank scores alone), pairwise judges.  Run:  python -m tools.build_pairs pairs.scorer=comet
"""

import inspect
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from megatron_tower.config import InputError, PairsConfig
from megatron_tower.data import sources
from megatron_tower.data.prompts import Item
from megatron_tower.rewards.pool import Verdict, VerifierPool

if TYPE_CHECKING:
    from comet.models.base import CometModel
    from torch import Tensor

Asked = Sequence[tuple[Item, str]]  # an item and an answer to it
SCORERS = ("rewards", "comet", "reward_model")
FILES = {
    "rewards": (),
    "comet": ("hparams.yaml", "checkpoints/model.ckpt"),
    "reward_model": ("config.json", "tokenizer_config.json"),
}
NEEDS_REFERENCE = ("regression_metric", "ranking_metric")
BYTES = 4  # of UTF-8 text a token, about, in any script
CPU_TOKENS = 1024  # of a batch keep a CPU's cores busy; a larger one outgrows its caches and holds more padding
Key = TypeVar("Key", int, str)


def check(cfg: PairsConfig, items: Sequence[Item]) -> None:
    """Raise InputError where `cfg.scorer` lacks a file, a package, or something about an item."""
    if cfg.scorer not in SCORERS:
        raise InputError(f"pairs.scorer={cfg.scorer} is unknown: use one of {', '.join(SCORERS)}")
    if cfg.scorer != "rewards" and not cfg.scorer_path:
        raise InputError(f"pairs.scorer={cfg.scorer} needs pairs.scorer_path: the folder of its checkpoint")
    check_folder(cfg.scorer, cfg.scorer_path, "pairs.scorer_path")
    if cfg.scorer == "rewards" and any("reward" not in item for item in items):
        raise InputError("pairs.items are chats, which have no reward: set pairs.scorer=reward_model, or name prompts with their rewards")
    if cfg.scorer == "comet":
        needed = ["source", "reference"] if hparams(Path(cfg.scorer_path))["class_identifier"] in NEEDS_REFERENCE else ["source"]
        for row, item in enumerate(items):
            if lacking := [name for name in needed if not _part(item, name)]:
                raise InputError(f"item {row} has no {lacking[0]} in its check, which pairs.scorer=comet needs: drop it from pairs.items")


def check_folder(scorer: str, folder: str | None, key: str) -> None:
    """Raise InputError, which names the folder by its config key, where it is none of such a scorer."""
    for name in FILES[scorer]:
        if not (Path(folder) / name).is_file():
            raise InputError(f"{key}={folder} has no {name}: name the folder of a downloaded {scorer} checkpoint")
    if scorer == "reward_model" and not list(Path(folder).glob("*.safetensors")):
        raise InputError(f"{key}={folder} has no safetensors, and pickled weights are not loaded: convert them first")


def fingerprint(cfg: PairsConfig) -> str | None:
    """sha256 that tells one checkpoint of a scorer from another; None for the rewards."""
    if cfg.scorer == "rewards":
        return None
    folder = Path(cfg.scorer_path)
    return sources.fingerprint([*(folder / name for name in FILES[cfg.scorer]), *sorted(folder.glob("*.safetensors"))])


def score(cfg: PairsConfig, asked: Asked) -> list[Verdict]:
    """The verdict on each answer, in order; `check` has passed."""
    return {"rewards": _rewards, "comet": _comet, "reward_model": _reward_model}[cfg.scorer](cfg, asked)


def _rewards(cfg: PairsConfig, asked: Asked) -> list[Verdict]:
    with VerifierPool(cfg.processes, cfg.timeout) as pool:
        return pool.score(asked)


def _comet(cfg: PairsConfig, asked: Asked) -> list[Verdict]:
    from megatron_tower.runtime.distributed import device

    model = load_comet(Path(cfg.scorer_path)).to(device())
    with_reference = all(_part(item, "reference") for item, _ in asked)

    def scores(batch: Asked) -> "Tensor":
        samples = [{"src": _part(item, "source"), "mt": answer} for item, answer in batch]
        if with_reference:
            samples = [sample | {"ref": _part(item, "reference")} for sample, (item, _) in zip(samples, batch, strict=True)]
        return model.predict_step(moved(model.prepare_for_inference(samples), device()))["scores"]

    return _in_batches(scores, asked, cfg.batch_size)


def load_comet(folder: Path) -> "CometModel":
    """A COMET model in evaluation mode from `folder`/{hparams.yaml, checkpoints/model.ckpt}. Config and tokenizer of its encoder
    are in `folder`/encoder, or in the hub's cache."""
    import torch
    from comet.models import str2model
    from transformers import AutoConfig
    from transformers.modeling_utils import no_init_weights

    settings = hparams(folder)
    if settings["class_identifier"] not in str2model:
        raise InputError(f"{folder}/hparams.yaml: class_identifier {settings['class_identifier']} is none of {', '.join(str2model)}")
    made_of = str2model[settings["class_identifier"]]
    if (folder / "encoder").is_dir():
        settings["pretrained_model"] = str(folder / "encoder")
    words = {name: settings[name] for name in inspect.signature(made_of.__init__).parameters if name in settings}
    path = folder / "checkpoints" / "model.ckpt"
    try:
        weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
    except (pickle.UnpicklingError, RuntimeError, KeyError) as error:
        raise InputError(
            f"{path} is damaged or holds more than tensors: only a state_dict is loaded, save it again with nothing else"
        ) from error
    try:
        AutoConfig.from_pretrained(settings.get("pretrained_model"), local_files_only=True, trust_remote_code=False)
        with no_init_weights():  # each of them is loaded
            model = made_of(**words | {"load_pretrained_weights": False, "local_files_only": True})
    except OSError as error:
        raise InputError(f"{folder}: the tokenizer and config of {settings.get('pretrained_model')} are not on this machine") from error
    if missing := model.load_state_dict(weights, strict=False).missing_keys:
        raise InputError(f"{path} lacks {missing[0]} and {len(missing) - 1} more weights of {settings['class_identifier']}")
    return model.eval()


def _reward_model(cfg: PairsConfig, asked: Asked) -> list[Verdict]:
    return reward_model(Path(cfg.scorer_path))(asked, cfg.batch_size)


def reward_model(folder: Path) -> Callable[[Asked, int], list[Verdict]]:
    """(items with answers, size of a batch) -> verdicts, by a model that is loaded once; an item's prompt may be a chat."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from megatron_tower.runtime.distributed import device

    local = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True, torch_dtype="auto", **local)
    if model.config.num_labels != 1 or tokenizer.chat_template is None:
        raise InputError(
            f"{folder}: a reward model has one output and a chat template, this one has "
            f"{model.config.num_labels} and {'none' if tokenizer.chat_template is None else 'one'}"
        )
    model = model.to(device()).eval()

    def scores(batch: Asked) -> "Tensor":
        chats = [[*_turns(item["prompt"]), {"role": "assistant", "content": answer}] for item, answer in batch]
        texts = tokenizer.apply_chat_template(chats, tokenize=False)
        encoded = tokenizer(texts, add_special_tokens=False, padding=len(texts) > 1, return_tensors="pt").to(device())
        return model(**encoded).logits[:, 0]

    # Without a padding token the model can't tell where a shorter row ends.
    return lambda asked, size: _in_batches(scores, asked, size if model.config.pad_token_id is not None else 1)


def _turns(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _in_batches(scores: Callable[[Asked], "Tensor"], asked: Asked, size: int) -> list[Verdict]:
    """`scores` [batch] of neighbours in length together."""
    import torch

    verdicts: list[Verdict | None] = [None] * len(asked)
    order = sorted(range(len(asked)), key=lambda row: -len(asked[row][1]))
    with torch.inference_mode():
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            for row, value in zip(rows, scores([asked[row] for row in rows]).float().tolist(), strict=True):
                verdicts[row] = Verdict(value) if math.isfinite(value) else Verdict(None, "nan")
    return verdicts


def by_length(sizes: Mapping[Key, int], tokens: int) -> Iterator[list[Key]]:
    """Keys of texts of so many bytes in batches of about `tokens`, padding included, and without a GPU of CPU_TOKENS at most:
    neighbours in length, the longest first, so that what fits memory once fits to the end."""
    import torch

    tokens = tokens if torch.cuda.is_available() else min(tokens, CPU_TOKENS)
    batch: list[Key] = []
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        if batch and (len(batch) + 1) * sizes[batch[0]] > tokens * BYTES:
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


def hparams(folder: Path) -> dict:
    import yaml

    try:
        settings = yaml.safe_load((folder / "hparams.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{folder}/hparams.yaml is damaged ({' '.join(str(error).split())}): fetch the metric again") from error
    if not isinstance(settings, dict) or "class_identifier" not in settings:
        raise InputError(f"{folder}/hparams.yaml names no class_identifier: it is no COMET checkpoint")
    return settings


def _part(item: Item, name: str) -> str | None:
    """The source or the reference of a translation item."""
    return item["check"].get(name) or (item.get("answer") if name == "reference" else None)


def moved(batch: object, device: object) -> object:
    """COMET's inputs on a device: a dictionary of tensors and lists, or several of them."""
    if isinstance(batch, dict):
        return {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
    return tuple(moved(part, device) for part in batch)
