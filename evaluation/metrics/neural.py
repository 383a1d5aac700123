"""Neural metrics of translation: COMET-22, CometKiwi and xCOMET by unbabel-comet, MetricX-24 by transformers' mT5.

    segments -> those that the store doesn't know, each once -> windows sorted by length -> batches -> {"score", "spans"}

Translations of one source come in one window. COMET-22 embeds each side of a segment alone: there a text is read once a window.

A checkpoint's folder says what it is: hparams.yaml with checkpoints/model.ckpt (COMET; `encoder` beside them may hold the encoder's
config and tokenizer), or an mT5's config.json with safetensors (MetricX). Weights are read as tensors only. In fp32, the default, another
batch, order or number of processes moves a score by rounding, less than 1e-5 in the tests, and stored scores have six decimals. fp16
(as in `comet-score`) and bf16 are the encoder's alone, what follows stays in fp32. A score's signature names its precision.
An empty translation is scored like any other. MetricX-24 was written from its paper and published code's description (regression on the
logit of token 250089 at the first position of the decoder, 0 is best, 25 worst); it has not been compared with the real weights.
"""

import json
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.metrics.segment import Segment
from evaluation.store import Store, digest
from megatron_tower.config import InputError
from megatron_tower.data.sources import fingerprint
from megatron_tower.rollout.scorers import BYTES, NEEDS_REFERENCE, by_length, hparams, load_comet, moved

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WINDOW = 4096  # segments that are sorted by length at once, and written when they are scored
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # as torch calls them
METRICX = "metricx"
METRICX_TOKEN, METRICX_LONGEST, METRICX_WORST = 250089, 1536, 25.0  # as google-research/metricx has them
Found = dict[str, Any]  # {"score": float}, and of xCOMET {"spans": [{"text", "start", "end", "severity", "confidence"}]}


@dataclass(frozen=True)
class Checkpoint:
    """name: what tables call it; kind: COMET's class identifier, or METRICX; precision: one of PRECISIONS."""

    name: str
    folder: Path
    kind: str
    precision: str = "fp32"

    @property
    def needs_reference(self) -> bool:
        return self.kind in NEEDS_REFERENCE

    @property
    def scale(self) -> float:
        """Of the scores in tables: COMET's are printed times 100."""
        return 1.0 if self.kind == METRICX else 100.0

    @cached_property  # a checksum of gigabytes
    def signature(self) -> str:
        """Metric, weights, program and precision: another signature may be another score."""
        if self.kind == METRICX:
            files, program = sorted(self.folder.glob("*.safetensors")), f"transformers:{version('transformers')}"
        else:
            files, program = [self.folder / "hparams.yaml", self.folder / "checkpoints" / "model.ckpt"], f"comet:{version('unbabel-comet')}"
        return f"{self.kind}|weights:{fingerprint(files)[:16]}|{program}|{self.precision}"


def find(name: str, place: str, assets: str, word: str = "", precision: str = "fp32") -> Checkpoint:
    """The checkpoint in the folder `place`, in `<assets>/<org>--<name>`, or on the hub as `place`. word: what errors call the option
    before the place, by default "eval.metrics.<name>=". Raises InputError."""
    word = word or f"eval.metrics.{name}="
    kept = Path(assets) / place.replace("/", "--")
    folder = next((path for path in (Path(place), kept) if path.is_dir()), None) or _fetched(word, place)
    if (folder / "hparams.yaml").is_file():
        if not (folder / "checkpoints" / "model.ckpt").is_file():
            raise InputError(f"{word}{folder} has no checkpoints/model.ckpt: fetch it again")
        return Checkpoint(name, folder, hparams(folder)["class_identifier"], precision)
    if _model_type(folder / "config.json") != "mt5":
        raise InputError(f"{word}{folder} is no metric: it holds neither COMET's hparams.yaml nor the config.json of an mT5")
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"{word}{folder} has no safetensors, and pickled weights are not loaded: convert them first")
    return Checkpoint(name, folder, METRICX, precision)


def _model_type(config: Path) -> str | None:
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
    except (ValueError, AttributeError) as error:
        raise InputError(f"{config} is damaged ({error}): fetch the metric again") from error


def _fetched(word: str, place: str) -> Path:
    if not on_hub(place):
        raise InputError(f"{word}{place} is no folder: name a metric's folder, or a model of the hub such as Unbabel/wmt22-comet-da")
    return Path(snapshot(place, f"{word}{place}"))


def on_hub(place: str) -> bool:
    """Whether it can be a model's name, org/name."""
    return place.count("/") == 1 and not place.startswith((".", "/"))


def snapshot(place: str, said: str, **how: Any) -> str:
    """The folder into which huggingface_hub fetches `place`. Raises InputError, in which the place is called as it was said."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        return snapshot_download(place, **how)
    except GatedRepoError as error:
        raise InputError(
            f"{said} is gated and you have no access: accept its terms on https://huggingface.co/{place}, then huggingface-cli login"
        ) from error
    except (OSError, ValueError) as error:  # no network, no such repository
        raise InputError(
            f"{said} could not be fetched ({' '.join(str(error).split())[:200]}): see to the name, the network and access "
            "(huggingface-cli login), or fetch it where there is a network: python -m tools.fetch_assets"
        ) from error


def score_segments(checkpoint: Checkpoint, segments: Sequence[Segment], store: Store, tokens: int, processes: int = 0) -> list[Found]:
    """What the metric finds of each segment, in order; written to `store` batch by batch.

    tokens: of a batch, as `by_length` takes them; processes: 0 for one a GPU, or one where there is none.
    Raises InputError where a reference is lacking, or a score is no number.
    """
    if checkpoint.needs_reference and (lacking := next((s for s in segments if s.reference is None), None)):
        raise InputError(f'{checkpoint.name} compares with references, and "{lacking.source[:60]}" has none: use a metric that needs none')
    keys = [digest(checkpoint.signature, s.source, s.hypothesis, s.reference) for s in segments]
    missing = {key: segment for key, segment in zip(keys, segments, strict=True) if key not in store}
    for batch, found in _scored(checkpoint, missing, tokens, processes):
        if not all(math.isfinite(one["score"]) for one in found):
            raise InputError(f"{checkpoint.name} found no number in {checkpoint.precision}: use fp32, or fetch its weights again")
        store.append({"key": key, "metric": checkpoint.name, **one} for key, one in zip(batch, found, strict=True))
    return [{name: value for name, value in store[key].items() if name not in ("key", "metric")} for key in keys]


def _batches(missing: dict[str, Segment], tokens: int) -> Iterator[tuple[list[str], list[Segment]]]:
    """(keys, segments) of neighbours in length within a window, the longest first."""
    first: dict[str, int] = {}
    for segment in missing.values():
        first.setdefault(segment.source, len(first))
    keys = sorted(missing, key=lambda key: first[missing[key].source])
    for start in range(0, len(keys), WINDOW):
        for batch in by_length({key: _size(missing[key]) for key in keys[start : start + WINDOW]}, tokens):
            yield batch, [missing[key] for key in batch]


def _size(segment: Segment) -> int:
    """Bytes of text, and some for the special tokens."""
    return sum(map(_bytes, (segment.source, segment.hypothesis, segment.reference or "")))


def _bytes(text: str) -> int:
    return len(text.encode()) + 2 * BYTES


def _scored(checkpoint: Checkpoint, missing: dict[str, Segment], tokens: int, processes: int) -> Iterator[tuple[list[str], list[Found]]]:
    import torch

    gpus = torch.cuda.device_count()
    processes = processes or max(1, gpus)
    batches = _batches(missing, tokens)
    if processes == 1:
        scorer = None
        for keys, segments in batches:  # a model is opened only if there is something to score
            scorer = scorer or open_scorer(checkpoint, "cuda" if gpus else "cpu", tokens)
            yield keys, scorer(segments)
        return
    context = multiprocessing.get_context("spawn")
    devices = context.Queue()
    for number in range(processes):
        devices.put(f"cuda:{number % gpus}" if gpus else "cpu")
    with ProcessPoolExecutor(processes, context, initializer=_start, initargs=(checkpoint, devices, tokens)) as pool:
        asked = {pool.submit(_score, segments): keys for keys, segments in batches}
        for done in as_completed(asked):
            yield asked[done], done.result()


_worker: Any = None  # the scorer of this process


def _start(checkpoint: Checkpoint, devices: Any, tokens: int) -> None:
    global _worker
    _worker = open_scorer(checkpoint, devices.get(), tokens)


def _score(segments: list[Segment]) -> list[Found]:
    return _worker(segments)


def open_scorer(checkpoint: Checkpoint, device: str, tokens: int) -> Any:
    """segments -> [Found], on one device."""
    if checkpoint.kind == METRICX:
        return MetricX(checkpoint, device)
    return Comet22(checkpoint, device, tokens) if checkpoint.kind == "regression_metric" else Comet(checkpoint, device)


def _dtype(checkpoint: Checkpoint) -> "torch.dtype":
    import torch

    return getattr(torch, PRECISIONS[checkpoint.precision])


class Comet:
    """Any class of unbabel-comet; one that can do without a reference gets it where there is one."""

    def __init__(self, checkpoint: Checkpoint, device: str):
        self.device, self.model = device, load_comet(checkpoint.folder).to(device)
        if checkpoint.precision != "fp32":
            self.model.encoder.model.to(_dtype(checkpoint)).register_forward_hook(lambda _module, _inputs, found: _float(found))
        self.takes_reference = checkpoint.kind != "referenceless_regression_metric"

    def __call__(self, segments: Sequence[Segment]) -> list[Found]:
        import torch

        known = self.takes_reference and all(segment.reference is not None for segment in segments)
        samples = [{"src": s.source, "mt": s.hypothesis} | ({"ref": s.reference} if known else {}) for s in segments]
        with torch.inference_mode():
            found = self.model.predict_step(moved(self.model.prepare_for_inference(samples), self.device))
        rows = [{"score": round(score, 6)} for score in found["scores"].double().tolist()]
        spans = found["metadata"]["error_spans"] if "metadata" in found and "error_spans" in found["metadata"] else None
        return [row | {"spans": _plain(of)} for row, of in zip(rows, spans, strict=True)] if spans is not None else rows


def _float(found: Any) -> Any:
    """Tensors, or tuples of them, in float32."""
    if isinstance(found, tuple):
        return tuple(map(_float, found))
    return None if found is None else found.float()


class Comet22(Comet):
    """Embeddings of source, translation and reference, made apart, and an estimate from the three. `known`: those of a window's texts,
    emptied where it would hold more, so that a text is embedded again at most where a window begins anew."""

    def __init__(self, checkpoint: Checkpoint, device: str, tokens: int):
        super().__init__(checkpoint, device)
        self.tokens, self.known = tokens, {}

    def __call__(self, segments: Sequence[Segment]) -> list[Found]:
        import torch

        sides = [[s.source for s in segments], [s.hypothesis for s in segments], [s.reference for s in segments]]
        new = {text: _bytes(text) for side in sides for text in side if text not in self.known}
        if len(self.known) + len(new) > 3 * WINDOW:
            new, self.known = {text: _bytes(text) for side in sides for text in side}, {}
        with torch.inference_mode():
            for texts in by_length(new, self.tokens):
                inputs = {name: value.to(self.device) for name, value in self.model.encoder.prepare_sample(texts).items()}
                self.known.update(zip(texts, self.model.get_sentence_embedding(**inputs), strict=True))
            found = self.model.estimate(*(torch.stack([self.known[text] for text in side]) for side in sides))
        return [{"score": round(score, 6)} for score in found.score.double().tolist()]


def _plain(spans: list[dict]) -> list[dict]:
    return [span | {"confidence": round(float(span["confidence"]), 3)} for span in spans]


class MetricX:
    def __init__(self, checkpoint: Checkpoint, device: str):
        from transformers import AutoTokenizer, MT5ForConditionalGeneration

        local = {"local_files_only": True, "trust_remote_code": False}
        self.device, self.tokenizer = device, AutoTokenizer.from_pretrained(checkpoint.folder, **local)
        model = MT5ForConditionalGeneration.from_pretrained(checkpoint.folder, use_safetensors=True, dtype=_dtype(checkpoint), **local)
        self.model = model.to(device).eval()

    def __call__(self, segments: Sequence[Segment]) -> list[Found]:
        import torch

        texts = [
            f"source: {s.source} candidate: {s.hypothesis}" + (f" reference: {s.reference}" if s.reference is not None else "")
            for s in segments
        ]
        ids = self.tokenizer(texts, truncation=True, max_length=METRICX_LONGEST + 1)["input_ids"]
        ids = [one[:-1] if one[-1] == self.tokenizer.eos_token_id else one[:METRICX_LONGEST] for one in ids]  # trained without the end
        width = max(map(len, ids))
        padded = torch.tensor([one + [self.tokenizer.pad_token_id] * (width - len(one)) for one in ids], device=self.device)
        mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in ids], device=self.device)
        start = torch.zeros(len(ids), 1, dtype=torch.long, device=self.device)
        with torch.inference_mode():
            logits: Tensor = self.model(input_ids=padded, attention_mask=mask, decoder_input_ids=start).logits
        scores = logits[:, 0, METRICX_TOKEN].clamp(0, METRICX_WORST).double().tolist()
        return [{"score": round(score, 6)} for score in scores]
