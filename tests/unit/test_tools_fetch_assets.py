"""Fetching on a login node with stand-ins for the hub; then found offline by the same words."""

import json
import shutil
from pathlib import Path

import pytest

from evaluation.metrics import neural
from evaluation.tasks import TASKS
from megatron_tower.command import load
from megatron_tower.config import InputError
from tests.unit.comet_folders import comet_folder, encoder_folder
from tests.unit.test_score_files import gated
from tools import fetch_assets


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was fetched. Repositories lie in tmp_path/hub; WMT24++ has one row a pair."""
    encoder = encoder_folder(tmp_path / "hub" / "FacebookAI--xlm-roberta", ["a b c"])
    metric = comet_folder("regression_metric", encoder, tmp_path / "hub" / "Unbabel--comet")
    hparams = (metric / "hparams.yaml").read_text()
    (metric / "hparams.yaml").write_text(hparams.replace(str(encoder), "FacebookAI/xlm-roberta"))
    asked: list[str] = []

    def snapshot(place: str, local_dir: Path, allow_patterns: list[str]) -> None:
        asked.append(place)
        source = tmp_path / "hub" / place.replace("/", "--")
        if not source.is_dir():
            raise OSError("401 Client Error. Access to this model is restricted")
        shutil.copytree(source, local_dir, dirs_exist_ok=True)

    def rows(part: fetch_assets.Published) -> list[dict]:
        asked.append(f"{part.hub} {part.config}")
        return [{"domain": "news", "document_id": "a", "segment_id": 1, "is_bad_source": False, "source": "Hi.", "target": "Tag."}]

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr(fetch_assets, "fetched", rows)
    return asked


def config(tmp_path: Path, *words: str):
    return load([f"eval.assets={tmp_path / 'assets'}", "eval.tasks=[wmt24pp]", "eval.pairs=[en-de_DE]", *words])


def test_what_was_fetched_is_verified_and_found_offline(hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cfg = config(tmp_path, "+eval.metrics.comet22=Unbabel/comet")
    fetch_assets.fetch(cfg)
    assert hub == ["google/wmt24pp en-de_DE", "Unbabel/comet", "FacebookAI/xlm-roberta"]
    assert TASKS["wmt24pp"].load(cfg.eval)[0]["reference"] == "Tag."
    found = neural.find("comet22", "Unbabel/comet", cfg.eval.assets)
    assert neural.open_scorer(found, "cpu", 4096).model is not None  # its encoder is inside
    fetch_assets.fetch(cfg)
    assert len(hub) == 3, "verified files are not fetched again"
    rows = tmp_path / "assets" / "wmt24pp" / "en-de_DE.jsonl"
    rows.write_text(rows.read_text().replace("Tag", "Nacht"))
    fetch_assets.fetch(cfg)
    assert hub[3:] == ["google/wmt24pp en-de_DE"] and "Tag" in rows.read_text()
    assert set(json.loads((tmp_path / "assets" / "manifest.json").read_text())) >= {"wmt24pp/en-de_DE.jsonl", "Unbabel--comet/hparams.yaml"}


def test_what_is_gated_or_unknown_is_one_sentence_and_the_rest_stays(hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=r"Unbabel/XCOMET-XL could not be fetched \(401.*huggingface-cli login"):
        fetch_assets.fetch(config(tmp_path, "+eval.metrics.xcomet=Unbabel/XCOMET-XL"))
    assert (tmp_path / "assets" / "wmt24pp" / "en-de_DE.jsonl").is_file()
    with pytest.raises(InputError, match="names wmt25, which is no task"):
        fetch_assets.fetch(config(tmp_path, "eval.tasks=[wmt25]"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    with pytest.raises(InputError, match=r"^Unbabel/XCOMET-XL is gated .* accept its terms on https://huggingface.co/Unbabel/XCOMET-XL"):
        fetch_assets.fetch(config(tmp_path, "+eval.metrics.xcomet=Unbabel/XCOMET-XL"))


@pytest.mark.parametrize("word", ["eval.metrics.comet", "eval.checkpoint"])
def test_what_is_neither_here_nor_on_the_hub_is_met_before_anything_is_fetched(hub: list[str], tmp_path: Path, word: str):
    with pytest.raises(InputError, match=rf"{word}=nowhere is neither here nor a model of the hub"):
        fetch_assets.fetch(config(tmp_path, f"++{word}=nowhere"))
    assert not hub and not (tmp_path / "assets").exists()


def test_ter_needs_nothing_fetched(hub: list[str], tmp_path: Path):
    fetch_assets.fetch(config(tmp_path, "+eval.metrics.ter=sacrebleu"))
    assert hub == ["google/wmt24pp en-de_DE"]
