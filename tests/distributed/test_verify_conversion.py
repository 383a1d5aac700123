"""A conversion is proven: right ones agree at every layout and layer by layer, wrong ones don't, and the layer that is wrong is named."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_tower.config import InputError, ParallelConfig, PrecisionConfig
from megatron_tower.runtime import distributed
from megatron_tower.training.convert import to_hf, to_megatron
from megatron_tower.training.verify import Work, compare
from tests.distributed import verify_cases
from tests.distributed.verify_cases import FAMILIES, IN_CONFIG, LAYER, ONE_LAYER, SPOILS
from tools import verify_conversion
from tools.verify_conversion import verify


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<family>: HF folders; <family>.megatron: what they were converted to, cut for two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("made")
    for family in FAMILIES:
        to_megatron(verify_cases.write(family, folder / family), folder / f"{family}.megatron", 2, 1)
    return folder


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The single rank is this process: starting another takes ten seconds."""

    def run(words: list[str], ranks: int, threads: int, logs: Path) -> int:
        assert ranks == 1
        for layout in words[2:]:
            Work(Path(words[1])).measure(layout)
        distributed.shutdown()
        return 0

    monkeypatch.setattr(verify_conversion, "run_ranks", run)


def test_agrees_at_every_layout(made: Path) -> None:
    report = verify(made / "gemma2", made / "gemma2.megatron", ["tp2", "pp2", "tp2_sp"], 1e-4, by_layer=False)
    assert report.layouts.keys() == {"tp2", "pp2", "tp2_sp"}
    assert report.agrees, report.verdict
    assert max(report.prompts.values()) > verify_cases.WINDOW + 1 > min(report.prompts.values())
    told = json.loads((made / "gemma2.megatron" / "conversion.json").read_text())
    assert told["agrees"] and told["layouts"]["tp2"].keys() == report.prompts.keys()
    assert "the same model" in (made / "gemma2.megatron" / "conversion.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_on_one_rank_and_layer_by_layer(made: Path, family: str, in_process: None) -> None:
    whole = verify(made / family, made / f"{family}.megatron", ["single"], 1e-4, by_layer=False)
    assert whole.agrees, whole.verdict
    assert all(d.argmax == 1.0 and d.kl < 1e-6 and d.positions > 1 for d in whole.layouts["single"].values())
    layers = verify(made / family, made / f"{family}.megatron", ["single"], 1e-5, by_layer=True)
    assert layers.agrees, layers.verdict
    assert [part.name for part in layers.parts] == ["embedding", *(f"layer {i}" for i in range(4)), "head"]
    assert all(d.maximum < 1e-4 for d in layers.parts[-1].logits.values())


@pytest.mark.parametrize("how", SPOILS)
def test_a_wrong_conversion_is_caught(made: Path, tmp_path: Path, how: str, in_process: None) -> None:
    to_megatron(verify_cases.spoilt(made / "gemma2", tmp_path / "spoilt", how), tmp_path / "megatron", 1, 1)
    whole = verify(made / "gemma2", tmp_path / "megatron", ["single"], 1e-4, by_layer=False)
    layers = verify(made / "gemma2", tmp_path / "megatron", ["single"], 1e-4, by_layer=True)
    for report in (whole, layers):
        assert report.worst > 1e-3 and not report.agrees, report.verdict  # by the numbers, whatever the configs say
        assert bool(report.apart) == (how in IN_CONFIG)
    wrong = [part.name for part in layers.parts if part.relative > 1e-4]
    expected = [f"layer {LAYER}"] if how in ONE_LAYER else {"vocabulary rolled": ["embedding", "head"]}.get(how)
    assert expected is None or wrong == expected


def test_a_run_and_its_export(folder: Path, tmp_path: Path, in_process: None) -> None:
    """Trained weights: the export has their logits, and transformers says the same greedy text."""
    from transformers import AutoModelForCausalLM

    from megatron_tower.rollout.generate import generate
    from megatron_tower.training.loading import open_for_inference
    from tests.distributed import curves

    cfg = curves.config(folder, "gemma2", "single", f"run_dir={tmp_path}/run")
    curves.saved(cfg, steps=2)
    distributed.shutdown()
    shutil.copytree(folder / "gemma2" / "tokenizer", cfg.phase_dir / "tokenizer")
    to_hf(cfg.phase_dir, tmp_path / "hf")
    report = verify(tmp_path / "hf", tmp_path / "run", ["single"], 1e-4, by_layer=False)
    assert report.agrees and report.step == 2 and any(name.startswith("text") for name in report.prompts), report.verdict
    prompts = [[2, *range(10 + row, 40 + row)] for row in range(4)]
    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    model, _, _ = open_for_inference(cfg.phase_dir, ParallelConfig(name="single"), PrecisionConfig(name="fp32"))
    ours = generate(model, prompts, max_new_tokens=24, stop_ids=[])
    distributed.shutdown()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = exported.generate(torch.tensor(prompts), max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert ours == theirs[:, len(prompts[0]) :].tolist()


def test_command_line(made: Path, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    to_megatron(verify_cases.spoilt(made / "gemma2", tmp_path / "spoilt", "norm off by one"), tmp_path / "megatron", 1, 1)

    def said(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["verify_conversion", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            verify_conversion.main()
        output = capsys.readouterr()
        return ended.value.code, output.err if ended.value.code == 2 else output.out

    code, told = said("--hf", made / "gemma2", "--checkpoint", tmp_path / "megatron", "--by-layer")
    assert code == 1 and "NOT the same model: largest relative difference of a part" in told and f"(layer {LAYER})" in told
    monkeypatch.setattr(verify_conversion.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1e6}))
    code, told = said("--hf", made / "gemma2", "--checkpoint", made / "gemma2.megatron")
    assert code == 0 and "comparing layer by layer" in told
    for words, expected in (
        (("--hf", tmp_path, "--checkpoint", made / "gemma2.megatron"), "config.json"),
        (("--hf", made / "gemma2", "--checkpoint", tmp_path / "spoilt"), "holds no checkpoint"),
        (("--hf", made / "qwen2", "--checkpoint", made / "gemma2.megatron"), "are different models"),
        (("--hf", made / "gemma2", "--checkpoint", made / "gemma2.megatron", "--parallel", "tp3"), "use some of"),
    ):
        code, told = said(*words)
        assert code == 2 and len(told.splitlines()) == 1 and expected in told


def test_numbers_of_a_difference() -> None:
    theirs = torch.randn(150, 40, generator=torch.Generator().manual_seed(1))
    ours = theirs.clone()
    ours[7, 3] += 100.0
    found = compare(ours, theirs)
    assert (found.positions, found.argmax) == (150, 149 / 150) and found.maximum == pytest.approx(100, rel=1e-5)
    assert found.relative == pytest.approx(100 / theirs.std().item(), rel=1e-5)
    assert found.mean == pytest.approx(100 / ours.numel(), rel=1e-5)
    p, q = theirs[7].double().softmax(-1), ours[7].double().softmax(-1)
    assert found.kl == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-6)
    ours[0, 0] = math.nan
    assert math.isnan(compare(ours, theirs).maximum)


def test_layouts_are_checked_before_anything_runs(made: Path) -> None:
    with pytest.raises(InputError, match="key-value heads"):
        verify_conversion.layout("tp2", replace(verify_cases.shape("gemma2"), num_query_groups=1))
