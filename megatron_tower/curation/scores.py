"""What a model says of documents or pairs: a Hugging Face sequence classifier on texts (EuroFilter), a COMET without references on pairs.

    rows -> sorted by length -> batches of about TOKENS, smaller ones on a CPU -> scores in the order of the rows

A classifier with one output scores by that output (0 to 5 of an educational score), with two by the probability of the second. A text
longer than the model reads is cut. float32 on a CPU; on a GPU a classifier runs in bfloat16, COMET stays in float32.
Only local files, safetensors or a state_dict, and no code of the checkpoint. Leaves out: which row stays (pipeline.py).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tower.config import InputError
from megatron_tower.config_data import ScoreConfig
from megatron_tower.curation.shards import Row
from megatron_tower.data import sources
from megatron_tower.rollout.scorers import BYTES, NEEDS_REFERENCE, by_length, hparams, load_comet, moved

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 16384  # of a batch, padding included
TEXTS = ("text", "source", "target")
COMET = ("hparams.yaml", "checkpoints/model.ckpt")
CLASSIFIER = ("config.json", "tokenizer_config.json")
Score = Callable[[Sequence[Row]], "Tensor"]  # [batch]


def check(name: str, cfg: ScoreConfig) -> None:
    """Raise InputError where the folder of a score is no model that can give it."""
    folder = Path(cfg.model)
    files = _files(folder)
    if lacking := next((file for file in files if not (folder / file).is_file()), None):
        raise InputError(f"{name}.model={folder} has no {lacking}: name the folder of a sequence classifier or of a COMET checkpoint")
    if files is COMET:
        if (kind := hparams(folder)["class_identifier"]) in NEEDS_REFERENCE:
            raise InputError(f"{name}.model={folder} is a {kind}, which needs references: use one without, such as wmt22-cometkiwi-da")
    elif not list(folder.glob("*.safetensors")):
        raise InputError(f"{name}.model={folder} has no safetensors, and pickled weights are not loaded: convert them first")


def fingerprint(cfg: ScoreConfig) -> str:
    """sha256 that tells one model from another."""
    folder = Path(cfg.model)
    return sources.fingerprint([*(folder / name for name in _files(folder)), *sorted(folder.glob("*.safetensors"))])


def score(rows: Sequence[Row], cfg: ScoreConfig) -> list[float]:
    """The score of each row, in order; `check` has passed. The model stays open for the next call."""
    import torch

    (scores, longest), values = _opened(cfg.model), [0.0] * len(rows)
    with torch.inference_mode():
        for batch in _batches(rows, longest):
            for row, value in zip(batch, scores([rows[row] for row in batch]).float().tolist(), strict=True):
                values[row] = value
    return values


def _files(folder: Path) -> tuple[str, ...]:
    return COMET if (folder / COMET[0]).is_file() else CLASSIFIER


def _batches(rows: Sequence[Row], longest: int) -> Iterator[list[int]]:
    """Places of rows that are neighbours in length; longest: tokens that the model reads of a text."""
    sizes = [sum(min(longest * BYTES, len(row[name].encode())) for name in TEXTS if name in row) for row in rows]
    return by_length(dict(enumerate(sizes)), TOKENS)


@lru_cache(maxsize=1)
def _opened(model: str) -> tuple[Score, int]:
    """The model, and how many tokens of a text it reads."""
    folder = Path(model)
    return _comet(folder) if _files(folder) is COMET else _classifier(folder)


def _comet(folder: Path) -> tuple[Score, int]:
    from megatron_tower.runtime.distributed import device

    model = load_comet(folder).to(device())

    def scores(rows: Sequence[Row]) -> "Tensor":
        samples = [{"src": row["source"], "mt": row["target"]} for row in rows]
        return model.predict_step(moved(model.prepare_for_inference(samples), device()))["scores"]

    return scores, model.encoder.max_positions


def _classifier(folder: Path) -> tuple[Score, int]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from megatron_tower.runtime.distributed import device

    local = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True, **local)
    if (outputs := model.config.num_labels) not in (1, 2):
        raise InputError(f"{folder} has {outputs} outputs: a score needs one, or two of which the second says that a text is good")
    model = model.to(device(), torch.bfloat16 if device().type == "cuda" else torch.float32).eval()
    longest = min(tokenizer.model_max_length, model.config.max_position_embeddings - 2)  # RoBERTa counts from its padding's number on

    def scores(rows: Sequence[Row]) -> "Tensor":
        texts = [row["text"] for row in rows]
        encoded = tokenizer(texts, truncation=True, max_length=longest, padding=True, return_tensors="pt").to(device())
        logits = model(**encoded).logits.float()
        return logits[:, 0] if outputs == 1 else logits.softmax(-1)[:, 1]

    return scores, longest
