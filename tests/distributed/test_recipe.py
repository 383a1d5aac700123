"""The whole recipe by its one command, at a size of seconds: data to report, run again, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORDS = [
    *("data.locales=[de_DE]", "data.cldr_per_locale=300", "data.sft_examples=600", "data.vocab_size=1024"),
    *("data.rl_prompts=80", "data.preference_pairs=40", "pairs.prompts=20", "pairs.samples=2", "pairs.max_new_tokens=8"),
    *("model.num_layers=2", "model.window_layers=[0]", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.kv_channels=16"),
    *("phase.seq_length=128", "phase.global_batch_size=4", "phase.micro_batch_size=2", "phase.train_steps=4"),
    *("eval.text_per_locale=4", "eval.translations_per_locale=4", "eval.general=8", "eval.preference=8", "eval.verifiable=8"),
    *("eval.bootstrap_samples=50", "eval.max_new_tokens=8"),
]


def recipe(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_tower.recipe", "recipe=demo", f"run_dir={folder / 'run'}", f"data.folder={folder / 'data'}"]
    return subprocess.run([*command, *WORDS, *words], capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("recipe")
    done = recipe(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


def written(folder: Path) -> dict[str, int]:
    return {
        str(p): p.stat().st_mtime_ns
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith("report") and "figures" not in str(p)
    }


def test_every_stage_left_what_it_is_to_leave(finished):
    folder, said = finished
    run = folder / "run"
    for stage in ("base", "cpt", "sft", "wpo", "grpo"):
        scores = json.loads((run / stage / "evaluation" / "scores.json").read_text())["scores"]
        assert {s["task"] for s in scores} == {"text", "translation", "general", "preference", "verifiable"}
    for phase in ("cpt", "sft", "wpo", "grpo"):
        steps = [json.loads(line)["step"] for line in (run / phase / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 4]
        assert json.loads((run / phase / "finished.json").read_text())["step"] == 4
    page = (run / "report.html").read_text()
    assert all(stage in page for stage in ("Base", "CPT", "SFT", "WPO", "GRPO")) and "trigram" in page
    assert str((run / "report.html").resolve()) in said.replace("\n", "")


def test_the_export_answers_in_transformers_as_the_run_answers_here(finished):
    """One greedy translation by the exported folder in transformers is what the recipe printed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_tower.data.chat import prompt_ids, stop_ids
    from megatron_tower.data.templates import translation_prompt

    folder, said = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "hf", attn_implementation="eager").float()
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "hf")
    prompt = torch.tensor([prompt_ids(tokenizer, translation_prompt("en", "de_DE", "in 5 hours"))])
    out = model.generate(prompt, max_new_tokens=256, do_sample=False, eos_token_id=stop_ids(tokenizer))
    text = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip()
    assert text in said


def test_a_second_run_finds_everything_done(finished):
    folder, _ = finished
    before = written(folder)
    again = recipe(folder)
    assert again.returncode == 0, again.stderr
    assert written(folder) == before


def test_another_configuration_is_refused_and_nothing_is_touched(finished):
    folder, _ = finished
    before = written(folder)
    other = recipe(folder, "phase.optimizer.lr=0.5")
    assert other.returncode == 2
    assert "was made with another configuration (phase.optimizer.lr: " in other.stderr
    assert written(folder) == before
