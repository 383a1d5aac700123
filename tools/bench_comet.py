"""Neural metrics beside the library they come from: `python -m evaluation.score` against `comet-score`, whole commands on the same files.

Texts are of mixed length, the hypotheses of --systems systems each; runs alternate. `comet-score` computes in fp16 (unbabel-comet 2.2.7)
and we in fp32 or, asked for it, in fp16 (a GPU) or bf16 (a CPU). The library's own `predict` in fp32 is timed too, inside one process and
without its start, and its scores are held to ours. Without --folder the model is of random weights, in COMET-22's shape (XLM-R large).
Run:  python -m tools.bench_comet          # --metric xcomet for one of the three; forty minutes on two cores
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from evaluation.metrics.neural import find, score_segments
from evaluation.metrics.segment import Segment
from evaluation.store import Store

HEAD = "| metric | what | segments | s | segments/s | ratio |\n|---|---|---:|---:|---:|---:|"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CLASSES = {"comet22": "regression_metric", "cometkiwi": "unified_metric", "xcomet": "xcomet_metric"}  # of unbabel-comet
WORDS = {
    "comet22": {"layer": "mix"},
    "cometkiwi": {"sent_layer": "mix", "word_layer": 4, "input_segments": ["mt", "src"]},
    "xcomet": {"sent_layer": "mix", "word_layer": 4, "word_level_training": True},
}


def vocabulary(rng: random.Random) -> list[str]:
    """Of `texts`, and so of the tokenizer, where rng has the seed 0."""
    return ["".join(rng.choices(LETTERS, k=rng.randint(1, 9))) for _ in range(2000)]


def texts(count: int, systems: int) -> list[list[str]]:
    """[sources, references, the systems' hypotheses], log-normal in length around 20 words, sides of a segment alike."""
    rng = random.Random(0)
    words = vocabulary(rng)
    sides: list[list[str]] = [[] for _ in range(2 + systems)]
    for _ in range(count):
        length = rng.lognormvariate(3.0, 0.7)
        for side in sides:
            side.append(" ".join(rng.choices(words, k=min(150, max(1, round(length * rng.lognormvariate(0, 0.2)))))))
    return sides


def synthetic(metric: str, folder: Path, hidden: int, layers: int) -> Path:
    """A COMET checkpoint of random weights; its tokenizer cuts words into pieces of four characters, about what XLM-R's are."""
    from comet.models import str2model
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import XLMRobertaConfig, XLMRobertaTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = [f"▁{word}" for word in vocabulary(random.Random(0))]
    pieces = ["▁", *LETTERS, *sorted({word[at : at + 4] for word in words for at in range(0, len(word), 4)} - {"▁", *LETTERS})]
    made = Tokenizer(models.Unigram([*((s, 0.0) for s in special), *((p, -10.0) for p in pieces)], unk_id=3))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    encoder = folder / "encoder"
    names = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    XLMRobertaTokenizerFast(tokenizer_object=made, **names, mask_token="<mask>", model_max_length=512).save_pretrained(encoder)
    XLMRobertaConfig(
        vocab_size=len(special) + len(pieces), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    ).save_pretrained(encoder)  # fmt: skip
    torch.manual_seed(0)
    shape = {"encoder_model": "XLM-RoBERTa", "pretrained_model": str(encoder), "hidden_sizes": [hidden, hidden // 2]}
    words = shape | {"layer_transformation": "softmax"} | WORDS[metric]
    kind = CLASSES[metric]
    model = str2model[kind](**words, local_files_only=True, load_pretrained_weights=False)
    (folder / "checkpoints").mkdir(parents=True)
    hparams = words | {"class_identifier": kind}
    saved = {"state_dict": model.state_dict(), "hyper_parameters": hparams, "pytorch-lightning_version": "2.0.0"}
    torch.save(saved, folder / "checkpoints" / "model.ckpt")
    (folder / "hparams.yaml").write_text(yaml.safe_dump(hparams))
    return folder


def timed(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def commands(metric: str, folder: Path, files: list[Path], turns: int) -> dict[str, float]:
    """Median seconds of whole commands, comet-score's first."""
    sources, references, *systems = map(str, files)
    given = [] if metric == "cometkiwi" else [references]
    ours = [sys.executable, "-m", "evaluation.score", "--metric", str(folder), "--sources", sources, "--hypotheses", *systems]
    ours += ["--references", *given] if given else []
    theirs = [str(Path(sys.executable).with_name("comet-score")), "--model", str(folder / "checkpoints" / "model.ckpt"), "-s", sources]
    theirs += ["-t", *systems, *(["-r", *given] if given else []), "--quiet", "--gpus", str(int(torch.cuda.is_available()))]
    asked = {"comet-score, fp16": theirs}
    for precision in ("fp32", "fp16" if torch.cuda.is_available() else "bf16"):
        asked[f"evaluation.score, {precision}"] = [*ours, "--precision", precision]
    spent = [{what: timed(command) for what, command in asked.items()} for _ in range(turns)]
    return {what: statistics.median(turn[what] for turn in spent) for what in asked}


def computed(metric: str, folder: Path, sides: list[list[str]], turns: int, scratch: Path) -> tuple[float, float, float]:
    """(median seconds of ours, of the library's predict in float32, the largest difference of two scores), in one process."""
    from comet.models import load_from_checkpoint

    sources, references, *systems = sides
    opened = find(metric, str(folder), "assets")
    library = load_from_checkpoint(str(folder / "checkpoints" / "model.ckpt"))
    known = references if metric != "cometkiwi" else [None] * len(sources)
    asked = [Segment(*texts) for system in systems for texts in zip(sources, system, known, strict=True)]
    library.set_embedding_cache()
    spent, difference = [], 0.0
    for turn in range(turns):
        began = time.perf_counter()
        with Store(scratch / f"{turn}.jsonl") as store:
            ours = [row["score"] for row in score_segments(opened, asked, store, tokens=16384)]
        between = time.perf_counter()
        library.retrieve_sentence_embedding.cache_clear()
        theirs = []
        for start in range(0, len(asked), len(sources)):  # a system at a time, as comet-score does
            samples = [{"src": s.source, "mt": s.hypothesis} | ({"ref": s.reference} if s.reference is not None else {})
                       for s in asked[start : start + len(sources)]]  # fmt: skip
            theirs += library.predict(samples, gpus=int(torch.cuda.is_available()), progress_bar=False).scores
        spent.append((between - began, time.perf_counter() - between))
        difference = max(difference, *(abs(a - b) for a, b in zip(ours, theirs, strict=True)))
    return statistics.median(a for a, _ in spent), statistics.median(b for _, b in spent), difference


def rows(metric: str, asked: argparse.Namespace, scratch: Path) -> float:
    """Time one metric and print its rows; returns the largest difference from the library's scores."""
    folder = asked.folder or synthetic(metric, scratch / "model", asked.hidden, asked.layers)
    sides = texts(asked.segments, asked.systems)
    files = [scratch / f"{number}.txt" for number in range(len(sides))]
    for file, side in zip(files, sides, strict=True):
        file.write_text("".join(f"{line}\n" for line in side))
    count = asked.systems * asked.segments
    whole = commands(metric, folder, files, asked.turns)
    inside, library, difference = computed(metric, folder, sides, asked.turns, scratch / "inside")
    told = [(what, seconds, whole["comet-score, fp16"]) for what, seconds in whole.items()]
    told += [("its predict alone, fp32", library, library), ("score_segments alone, fp32", inside, library)]
    for what, seconds, beside in told:
        print(f"| {metric} | {what} | {count} | {seconds:.1f} | {count / seconds:.1f} | {beside / seconds:.2f} |", flush=True)
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--metric", choices=list(CLASSES), nargs="+", default=list(CLASSES))
    parser.add_argument("--folder", type=Path, help="a downloaded checkpoint of the one --metric; else one of random weights")
    parser.add_argument("--segments", type=int, default=60)
    parser.add_argument("--systems", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--turns", type=int, default=2)
    asked = parser.parse_args()
    if asked.folder and len(asked.metric) > 1:
        parser.error("--folder is one metric's: name it with --metric")
    print(HEAD)
    apart = {}
    for metric in asked.metric:
        with tempfile.TemporaryDirectory() as scratch:
            apart[metric] = rows(metric, asked, Path(scratch))
    told = ", ".join(f"{metric} {difference:.1e}" for metric, difference in apart.items())
    print(f"\nLargest difference between our score and the library's in fp32 (ours have six decimals): {told}")


if __name__ == "__main__":
    main()
