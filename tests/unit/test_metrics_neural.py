"""COMET, CometKiwi and xCOMET of tiny real checkpoints, MetricX of a tiny mT5: whatever the batches, nothing is computed twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from evaluation.metrics import neural
from evaluation.metrics.segment import Segment
from evaluation.store import Store
from megatron_tower.config import InputError
from tests.unit.comet_folders import COMET, comet_folder, encoder_folder

WORDS = ["the", "cat", "is", "on", "mat", "and", "a", "dog", "die", "katze", "auf", "der", "matte", "сегодня", "хорошая", "погода"]
NEAR = 1e-5


def segments(count: int, reference: bool = True) -> list[Segment]:
    rng = random.Random(3)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.choice((1, 2, 5, 9, 30))))

    return [Segment(text(), text() if i % 7 else "", text() if reference else None) for i in range(count)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_folder(tmp_path_factory.mktemp("encoder"), [" ".join(WORDS)])


@pytest.fixture(scope="module")
def folders(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: comet_folder(kind, encoder, tmp_path_factory.mktemp("comet") / kind) for kind in COMET}


def scored(folder: Path, asked: list[Segment], store: Path, tokens: int = 16384, processes: int = 1, precision: str = "fp32") -> list[dict]:
    with Store(store) as kept:
        return neural.score_segments(neural.find("metric", str(folder), "assets", precision=precision), asked, kept, tokens, processes)


def predicted(folder: Path, asked: list[Segment], precision: torch.dtype = torch.float32) -> dict:
    """What unbabel-comet itself finds, one segment at a time."""
    import comet

    theirs = comet.load_from_checkpoint(str(folder / "checkpoints" / "model.ckpt"), local_files_only=True).eval().to(precision)
    samples = [{"src": s.source, "mt": s.hypothesis, "ref": s.reference} for s in asked]
    return theirs.predict(samples, batch_size=1, gpus=0, num_workers=0, progress_bar=False)


@pytest.mark.parametrize("kind", COMET)
def test_scores_are_comets_own_whatever_the_batches_and_order(kind: str, folders: dict[str, Path], tmp_path: Path):
    asked = segments(60)
    found = scored(folders[kind], asked, tmp_path / "a.jsonl")
    wanted = predicted(folders[kind], asked)
    assert [one["score"] for one in found] == pytest.approx(wanted["scores"], abs=NEAR)
    if kind == "xcomet_metric":
        assert [len(one["spans"]) for one in found] == [len(of) for of in wanted["metadata"]["error_spans"]]
        spans = [span for one in found for span in one["spans"]]
        assert spans and {span["severity"] for span in spans} <= {"minor", "major", "critical"}
    turned = scored(folders[kind], asked[::-1], tmp_path / "b.jsonl", tokens=40)[::-1]
    assert [one["score"] for one in turned] == pytest.approx([one["score"] for one in found], abs=NEAR)
    assert len({round(one["score"], 3) for one in found}) > 20, "the scores hardly differ: the test shows nothing"


@pytest.mark.parametrize("kind", COMET)
def test_less_precision_moves_scores_a_little(kind: str, folders: dict[str, Path], tmp_path: Path):
    """fp16 is what comet-score computes; one store keeps them apart."""
    asked = segments(20)
    fp32, fp16, bf16 = (
        [one["score"] for one in scored(folders[kind], asked, tmp_path / "s.jsonl", precision=name)] for name in ("fp32", "fp16", "bf16")
    )
    wanted = predicted(folders[kind], asked, torch.float16)["scores"]
    steps = 0.22 * 0.2 if kind == "xcomet_metric" else 0  # a word's label may turn, and with it the part that counts spans
    assert fp16 == pytest.approx(wanted, abs=0.005 + steps) and fp16 == pytest.approx(fp32, abs=0.002 + steps)
    assert bf16 == pytest.approx(fp32, abs=0.015 + steps) and fp32 != fp16 != bf16
    assert scored(folders[kind], asked, tmp_path / "s.jsonl")[0]["score"] == fp32[0]


def test_a_score_that_is_no_number_is_an_error(folders: dict[str, Path], encoder: Path, tmp_path: Path):
    """fp16 overflows where fp32 does not."""
    large = comet_folder("unified_metric", encoder, tmp_path / "large")
    path = large / "checkpoints" / "model.ckpt"
    saved = torch.load(path, weights_only=True)
    saved["state_dict"]["encoder.model.encoder.layer.0.output.dense.weight"] *= 1e6
    torch.save(saved, path)
    assert len(scored(large, segments(4), tmp_path / "s.jsonl")) == 4
    with pytest.raises(InputError, match="metric found no number in fp16: use fp32"):
        scored(large, segments(4), tmp_path / "s.jsonl", precision="fp16")
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 4


def test_two_processes_find_what_one_finds(folders: dict[str, Path], tmp_path: Path):
    asked = segments(40)
    one, two = (scored(folders["xcomet_metric"], asked, tmp_path / f"{n}.jsonl", 200, n) for n in (1, 2))
    assert [x["score"] for x in two] == pytest.approx([x["score"] for x in one], abs=NEAR)
    assert [x["spans"] for x in two] == [x["spans"] for x in one]


def test_nothing_is_scored_twice(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked, seen = segments(30), []
    called = neural.Comet.__call__
    monkeypatch.setattr(neural.Comet, "__call__", lambda self, of: seen.extend(of) or called(self, of))
    first = scored(folders["unified_metric"], asked + asked[:10], tmp_path / "s.jsonl")
    assert len(seen) == len(set(asked)) and first[30:] == first[:10]
    monkeypatch.setattr(neural, "open_scorer", lambda *_: pytest.fail("opened for nothing"))
    assert scored(folders["unified_metric"], asked, tmp_path / "s.jsonl") == first[:30]


def test_a_text_is_embedded_once(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of three systems with the same sources and references; a window that is too small for that costs time and no score."""
    from comet.models import RegressionMetric

    asked = [Segment(s.source, f"{s.hypothesis} {word}", s.reference) for word in WORDS[:3] for s in segments(30)]
    texts, embedded = {text for s in asked for text in (s.source, s.hypothesis, s.reference)}, []
    whole = RegressionMetric.get_sentence_embedding
    told = lambda self, input_ids, **more: embedded.append(len(input_ids)) or whole(self, input_ids, **more)  # noqa: E731
    monkeypatch.setattr(RegressionMetric, "get_sentence_embedding", told)
    found = scored(folders["regression_metric"], asked, tmp_path / "a.jsonl", tokens=100)
    assert sum(embedded) == len(texts)
    monkeypatch.setattr(neural, "WINDOW", 4)
    again = scored(folders["regression_metric"], asked, tmp_path / "b.jsonl", tokens=100)
    assert sum(embedded) > 2 * len(texts) and [x["score"] for x in again] == pytest.approx([x["score"] for x in found], abs=NEAR)


def test_a_killed_run_goes_on_where_it_was(folders: dict[str, Path], tmp_path: Path):
    """SIGKILL between batches, and a line that was cut off in writing."""
    store = tmp_path / "s.jsonl"
    program = (
        "import sys, time; from pathlib import Path; from tests.unit import test_metrics_neural as t\n"
        "from evaluation.metrics import neural\n"
        "called = neural.Comet.__call__; neural.Comet.__call__ = lambda self, of: time.sleep(0.2) or called(self, of)\n"
        "t.scored(Path(sys.argv[1]), t.segments(60), Path(sys.argv[2]), tokens=100)"
    )
    words = [sys.executable, "-c", program, str(folders["referenceless_regression_metric"]), str(store)]
    running = subprocess.Popen(words, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while (not store.is_file() or store.read_bytes().count(b"\n") < 5) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    with store.open("ab") as file:
        file.write(b'{"key": "cut o')
    before = store.read_bytes().count(b"\n")
    assert 5 <= before < 60
    scored(folders["referenceless_regression_metric"], segments(60), store)
    keys = [json.loads(line)["key"] for line in store.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == len(set(segments(60)))


def test_a_moved_checkpoint_has_its_encoder_beside_it(folders: dict[str, Path], encoder: Path, tmp_path: Path):
    import shutil

    moved = shutil.copytree(folders["regression_metric"], tmp_path / "moved")
    hparams = (moved / "hparams.yaml").read_text().replace(str(encoder), "xlm-roberta-none")
    (moved / "hparams.yaml").write_text(hparams)
    with pytest.raises(InputError, match="tokenizer and config of xlm-roberta-none are not on this machine"):
        scored(moved, segments(3), tmp_path / "a.jsonl")
    shutil.copytree(encoder, moved / "encoder")
    found, wanted = (scored(folder, segments(3), tmp_path / f"{folder.name}.jsonl") for folder in (moved, folders["regression_metric"]))
    assert found == wanted


def test_metricx_regresses_on_its_token_without_the_end(tmp_path: Path, encoder: Path):
    from transformers import AutoTokenizer, MT5Config, MT5ForConditionalGeneration

    torch.manual_seed(0)
    shape = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    model = MT5ForConditionalGeneration(MT5Config(vocab_size=250112, decoder_start_token_id=0, **shape)).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.save_pretrained(tmp_path / "metricx")
    asked = [s for s in segments(12) if s.hypothesis][:8]

    def first(s: Segment) -> object:
        ids = tokenizer(f"source: {s.source} candidate: {s.hypothesis} reference: {s.reference}", return_tensors="pt")["input_ids"]
        start = torch.zeros(1, 1, dtype=torch.long)
        return model(input_ids=ids[:, :-1], decoder_input_ids=start, output_hidden_states=True)

    with torch.no_grad():  # a head for which these texts score from -3 to 28
        hidden = torch.cat([first(s).decoder_hidden_states[-1][:, 0] for s in asked]).double()
        model.lm_head.weight.data[250089] = (torch.linalg.pinv(hidden) @ torch.linspace(-3, 28, 8).double()).float()
        wanted = [first(s).logits[0, 0, 250089].item() for s in asked]
    model.save_pretrained(tmp_path / "metricx")
    found = [one["score"] for one in scored(tmp_path / "metricx", asked, tmp_path / "s.jsonl", tokens=90)]
    assert found == pytest.approx([min(25, max(0, value)) for value in wanted], abs=0.02)
    fp16 = [one["score"] for one in scored(tmp_path / "metricx", asked, tmp_path / "s.jsonl", precision="fp16")]
    assert fp16 == pytest.approx(found, abs=4) and fp16 != found  # this head multiplies what rounding does
    assert 0 in found and 25 in found and len(set(found)) > 5
    assert (
        neural.find("m", str(tmp_path / "metricx"), "assets").scale == 1
        and not neural.find("m", str(tmp_path / "metricx"), "a").needs_reference
    )


def test_what_cannot_be_scored_is_one_sentence(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=r'compares with references, and ".*" has none'):
        scored(folders["regression_metric"], segments(3, reference=False), tmp_path / "s.jsonl")
    assert scored(folders["xcomet_metric"], segments(3, reference=False), tmp_path / "s.jsonl")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text('{"model_type": "mt5"}')
    for place, why in (
        ("no/such/folder", "is no folder: name a metric's folder"),
        ("Unbabel/XCOMET-XL", "could not be fetched .*tools.fetch_assets"),
        (str(tmp_path / "empty"), "is no metric"),
        (str(tmp_path / "pickled"), "has no safetensors"),
    ):
        with pytest.raises(InputError, match=rf"eval\.metrics\.kiwi={place}.*{why}"):
            neural.find("kiwi", place, "assets")
    for file, text in (("config.json", '{"model_type'), ("hparams.yaml", "class_identifier: [")):
        (tmp_path / file / "checkpoints").mkdir(parents=True)
        (tmp_path / file / "checkpoints" / "model.ckpt").touch()
        (tmp_path / file / file).write_text(text)
        with pytest.raises(InputError, match=rf"{file} is damaged \([^\n]*\): fetch the metric again"):
            neural.find("m", str(tmp_path / file), "assets")


def test_assets_are_found_by_their_name_on_the_hub(folders: dict[str, Path], tmp_path: Path):
    (tmp_path / "Unbabel--wmt22-comet-da").symlink_to(folders["regression_metric"])
    found = neural.find("comet22", "Unbabel/wmt22-comet-da", str(tmp_path))
    assert found.kind == "regression_metric" and found.signature.startswith("regression_metric|weights:")
