"""Plain text files: sacrebleu's own figures and signatures, systems in clusters, neural metrics that go on, bad input."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation import score
from tests.unit.comet_folders import comet_folder, encoder_folder

WORDS = {
    "de_DE": ["das", "Haus", "steht", "auf", "einem", "Hügel", "und", "der", "Hund", "läuft", "durch", "Garten", "."],
    "zh_CN": ["我们", "今天", "去", "城里", "看", "朋友", "，", "天气", "很", "好", "。"],
    "ja_JP": ["私は", "今日", "友達に", "会いに", "行きます", "。", "天気が", "いい", "です"],
}
SEPARATOR = {"de_DE": " ", "zh_CN": "", "ja_JP": ""}


def texts(target: str, seed: int, damage: float, count: int = 80) -> list[str]:
    """The same segments for every seed, each word replaced with the probability `damage`."""
    rng, noise = random.Random(1), random.Random(seed)
    made = []
    for _ in range(count):
        words = rng.choices(WORDS[target], k=rng.randrange(3, 14))
        made.append(SEPARATOR[target].join(noise.choice(WORDS[target]) if noise.random() < damage else word for word in words))
    return made


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path):
    def made(target: str) -> dict[str, Path]:
        damage = {"ref": 0.0, "good": 0.1, "bad": 0.5, "bad2": 0.5}
        return {name: write(tmp_path / f"{name}.txt", texts(target, i, share)) for i, (name, share) in enumerate(damage.items())}

    return made


def run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["score", *map(str, words)])
    code = 0
    try:
        score.main()
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("target", WORDS)
def test_figures_and_signatures_are_those_of_sacrebleus_command(target: str, files, tmp_path: Path, capsys, monkeypatch):
    of, tokenizer = files(target), {"de_DE": "13a", "zh_CN": "zh", "ja_JP": "ja-mecab"}[target]
    asian = ["--ter-asian-support", "--ter-normalized"] if target != "de_DE" else []
    words = ["-m", "chrf", "bleu", "ter", "--chrf-word-order", "2", "--tokenize", tokenizer, *asian, "-w", "6"]
    command = [sys.executable, "-m", "sacrebleu", str(of["ref"]), "-i", str(of["bad"]), *words]
    theirs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    named = {their["name"].lower()[:4]: their for their in theirs}
    for name in ("chrf", "bleu", "ter"):
        their = named[name]
        common = ["--metric", name, "--target", target, "--references", of["ref"], "--samples", 20, "--output", tmp_path / name]
        code, _, said = run(capsys, monkeypatch, *common, "--hypotheses", of["bad"])
        assert code == 0, said
        found = json.loads((tmp_path / name / "scores.json").read_text())
        assert found["systems"][0]["value"] == pytest.approx(their["score"], abs=1e-5), name
        assert found["signature"] == their["signature"]


def test_systems_are_ranked_in_clusters(files, capsys, monkeypatch):
    of = files("de_DE")
    words = ("--metric", "chrf", "--references", of["ref"], "--hypotheses", of["bad"], of["good"], of["bad2"])
    code, out, _ = run(capsys, monkeypatch, *words)
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in out.splitlines()[2:5]]
    assert code == 0 and rows[0] == ["1", "1", str(of["good"])] and [row[:2] for row in rows[1:]] == [["2", "2-3"]] * 2
    assert "good.txt against the first: paired bootstrap p = 0.0010" in out


def test_a_neural_metric_scores_files_and_goes_on(files, tmp_path: Path, capsys, monkeypatch):
    of = files("de_DE")
    folder = comet_folder("unified_metric", encoder_folder(tmp_path / "encoder", [" ".join(WORDS["de_DE"])]), tmp_path / "kiwi")
    words = ("--metric", folder, "--sources", of["ref"], "--hypotheses", of["good"], of["bad"], "--output", tmp_path / "out")
    code, out, said = run(capsys, monkeypatch, *words)
    assert code == 0 and "unified_metric|weights:" in out, said
    before = (tmp_path / "out" / "segments.jsonl").read_bytes()
    assert run(capsys, monkeypatch, *words)[1] == out and (tmp_path / "out" / "segments.jsonl").read_bytes() == before


def gated(place: str, **_: object) -> None:
    """The hub, to an account that has not accepted a model's terms."""
    from huggingface_hub.errors import GatedRepoError
    from requests import Response

    response = Response()
    response.status_code = 403
    raise GatedRepoError(f"403 Client Error.\n\nCannot access gated repo for url https://huggingface.co/{place}.", response)


def test_bad_input_is_one_sentence(files, tmp_path: Path, capsys, monkeypatch):
    of = files("de_DE")
    short = write(tmp_path / "short.txt", ["one line"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    regression = comet_folder("regression_metric", encoder_folder(tmp_path / "encoder", ["a b"]), tmp_path / "comet22")
    for words, why in (
        (("--metric", "chrf", "--references", of["ref"], "--hypotheses", short), "short.txt has 1 lines and"),
        (("--metric", "bleu", "--references", of["ref"], "--hypotheses", of["bad"]), "give --target"),
        (("--metric", "bleu", "--target", "xx_YY", "--references", of["ref"], "--hypotheses", of["bad"]), "locale xx_YY is unknown"),
        (("--metric", "chrf", "--hypotheses", of["bad"]), "give --references"),
        (("--metric", regression, "--sources", of["ref"], "--hypotheses", of["bad"]), "or use a metric that needs none"),
        (("--metric", "no/such/folder", "--sources", of["ref"], "--hypotheses", of["bad"]), "--metric no/such/folder is no folder"),
        (("--metric", "chrf", "--references", of["ref"], "--hypotheses", of["bad"], "--samples", 0), "--samples 0 makes no interval"),
        (("--metric", "chrf", "--references", of["ref"], "--hypotheses", tmp_path / "none.txt"), "none.txt can't be read"),
        (("--metric", "chrf", "--target", "xx_YY", "--references", of["ref"], "--hypotheses", of["bad"]), "locale xx_YY is unknown"),
        (("--metric", regression, "--sources", of["ref"], "--references", of["ref"], "--hypotheses", short), "short.txt has 1 lines and"),
        (("--metric", regression, "--sources", of["ref"], "--references", short, "--hypotheses", of["bad"]), "short.txt has 1 lines and"),
        (
            ("--metric", "Unbabel/XCOMET-XL", "--sources", of["ref"], "--hypotheses", of["bad"]),
            "accept its terms on https://huggingface.co/U",
        ),
    ):
        code, out, said = run(capsys, monkeypatch, *words, "--output", tmp_path / "out")
        assert code == 2 and why in said and len(said.strip().splitlines()) == 1 and not out, said
        assert not (tmp_path / "out").exists()
    words = ("--metric", "chrf", "--references", of["ref"], "--hypotheses", of["bad"], "--output", short)
    code, out, said = run(capsys, monkeypatch, *words)
    assert code == 2 and "short.txt is a file: name a folder" in said and not out
