"""The whole recipe by its one command, at a size of seconds: data to report, run again, and what it refuses."""

import json
from pathlib import Path

import pytest

from tests.distributed import tiny_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return tiny_recipe.finished(tmp_path_factory)


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
    assert "$ python -m tools.prepare_data recipe=demo 'data.locales=[de_DE]'" in said  # a shell takes it as it stands


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
    again = tiny_recipe.run(folder)
    assert again.returncode == 0, again.stderr
    assert written(folder) == before


def test_another_configuration_is_refused_and_nothing_is_touched(finished):
    folder, _ = finished
    before = written(folder)
    other = tiny_recipe.run(folder, "phase.optimizer.lr=0.5")
    assert other.returncode == 2
    assert "was made with another configuration (phase.optimizer.lr: " in other.stderr
    assert written(folder) == before


def test_where_ranks_are_jobs_the_recipe_says_who_submits_them(tmp_path):
    done = tiny_recipe.run(tmp_path, "cluster=local_slurm")
    assert done.returncode == 2
    assert "cluster=local_slurm runs in jobs: python -m megatron_tower.launch submits them; cluster=local runs here" in done.stderr
    assert not list(tmp_path.iterdir())
