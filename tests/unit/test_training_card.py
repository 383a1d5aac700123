"""The model card says what the run's files say: where each figure comes from, which data under which licence, and no other's scores."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from megatron_tower.command import load
from megatron_tower.config import CONF
from megatron_tower.data.manifest import digest
from megatron_tower.data.sources import fingerprint
from megatron_tower.training import card, checkpoint

SOURCE = {"name": "Django", "version": "5.2", "licence": "BSD-3-Clause", "sha256": None}


def phase(run: Path, name: str, start_from: str, *words: str) -> checkpoint.Checkpoint:
    """A phase's directory as training leaves it, but for the tensors, which no card needs."""
    cfg = load([f"phase={name}", f"run_dir={run}", f"phase.start_from={start_from}", *words])
    folder = cfg.phase_dir / "checkpoints/step_00000007"
    folder.mkdir(parents=True)
    told = {"step": 7, "samples": 56, "tokens": 14336, "model": asdict(cfg.model), "layout": asdict(cfg.parallel), "files": {}}
    (folder / "manifest.json").write_text(json.dumps(told | {"sha256": digest(told)}))
    (folder.parent / "latest").write_text("step_00000007\n")
    (cfg.phase_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg)))
    start = {"git": {"commit": "0123456789abcdef"}, "packages": {"torch": "2.9.0", "megatron-core": "0.16.1"}}
    (cfg.phase_dir / "environment.json").write_text(json.dumps([start]))
    data = {"sources": [SOURCE], "cpt_tokens": {"monolingual": 5000}, "sft": {"examples": 22000}, "sha256": "d" * 64}
    (cfg.phase_dir / "data_manifest.json").write_text(json.dumps(data))
    return checkpoint.latest(cfg.phase_dir)


@pytest.fixture
def last(tmp_path: Path) -> checkpoint.Checkpoint:
    base = tmp_path / "gemma"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "README.md").write_text("---\nlicense: gemma\nlibrary_name: transformers\n---\n# Gemma\n")
    words = ["model=gemma2_2b", f"model.hf_folder={base}"]
    phase(tmp_path / "run", "cpt", str(base), *words)
    return phase(tmp_path / "run", "sft", str(tmp_path / "run/cpt"), *words, "parallel=tp2", "phase.optimizer.lr=1e-5")


def written(last: checkpoint.Checkpoint, output: Path) -> str:
    output.mkdir(exist_ok=True)
    card.write(last, output)
    return (output / "README.md").read_text()


def test_tells_the_story(last: checkpoint.Checkpoint, tmp_path: Path) -> None:
    text = written(last, tmp_path / "hf")
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["base_model"] == "google/gemma-2-2b" and header["language"][:3] == ["de", "en", "es"]
    assert "gemma2_2b after CPT → SFT" in text and "google/gemma-2-2b. Licence: gemma." in text
    assert "| sft | 7 | 56 | 14,336 | tensor 2 | fp32 | 0123456789ab | torch 2.9.0, megatron-core 0.16.1 |" in text
    assert "| optimizer.warmup | 0.03 | proxy: TowerInstruct; it warms up for 500 steps |" in text
    assert "| optimizer.lr | 1e-05 | this run's own (7e-06: proxy: TowerInstruct) |" in text
    assert "| Django | 5.2 | BSD-3-Clause |" in text and "22,000 chats" in text
    assert 'from_pretrained("hf"' in text and "vllm serve hf" in text
    assert str(tmp_path) not in text


def test_scores_only_of_this_checkpoint(last: checkpoint.Checkpoint, tmp_path: Path) -> None:
    assert "has not been evaluated" in written(last, tmp_path / "hf")
    score = {"task": "translation", "metric": "chrf", "by": "all", "value": 25.502, "low": 23.6, "high": 27.8, "count": 900}
    told = {"checkpoint": {"sha256": fingerprint([last.path / "manifest.json"])}, "scores": [score, score | {"by": "pair", "value": 1.0}]}
    folder = tmp_path / "run/sft/evaluation"
    folder.mkdir()
    (folder / "scores.json").write_text(json.dumps(told))
    text = written(last, tmp_path / "hf")
    assert "| translation | chrf | 25.50 | 23.60 – 27.80 | 900 |" in text and "| 1.00 |" not in text
    told["checkpoint"]["sha256"] = "of another"
    (folder / "scores.json").write_text(json.dumps(told))
    assert "has not been evaluated" in written(last, tmp_path / "hf")


def test_a_run_that_was_moved_keeps_its_story(last: checkpoint.Checkpoint, tmp_path: Path) -> None:
    """Also where another run has taken its old place."""
    before = written(last, tmp_path / "hf")
    (tmp_path / "run").rename(tmp_path / "moved")
    phase(tmp_path / "run", "cpt", str(tmp_path / "run/base"))
    assert written(checkpoint.latest(tmp_path / "moved/sft"), tmp_path / "hf") == before


def test_the_story_begins_where_files_are_left(last: checkpoint.Checkpoint, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run/cpt/checkpoints/step_00000007")
    text = written(last, tmp_path / "hf")
    assert "gemma2_2b after SFT" in text and "### cpt" not in text


def test_random_base_and_no_card_without_a_phase(tmp_path: Path) -> None:
    last = phase(tmp_path / "run", "cpt", str(tmp_path / "run/base"))
    text = written(last, tmp_path / "hf")
    assert "Random weights in the shape of tiny_gemma2" in text and "base_model" not in text
    shutil.rmtree(tmp_path / "hf")
    (tmp_path / "run/cpt/config.yaml").unlink()
    card.write(last, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["cpt", "sft", "wpo", "grpo"])
def test_provenance_of_every_figure_is_read(name: str) -> None:
    """Every comment of a phase's YAML but the first line's, with its source in place of `same`."""
    text = (CONF / "phase" / f"{name}.yaml").read_text()
    found = card.provenance(text)
    assert len(found) == sum(" # " in line for line in text.splitlines()) and not any("same" in comment for _, comment in found.values())
    if name == "wpo":
        assert found["objective.clamp"] == (1.0, "proxy: WPO authors, Llama 3 8B") and found["epochs"][1] == found["objective.clamp"][1]
    if name == "grpo":
        assert found["rollout.top_p"] == (0.95, "proxy: MiLMMT-46") and found["global_batch_size"][1].endswith("; prompts")


# CONF
