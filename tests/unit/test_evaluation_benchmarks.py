"""Benchmarks from their files to scores.json, by a stand-in and by an endpoint that fails now and then; no data folder is needed."""

import json
from functools import partial
from pathlib import Path

import pytest

from evaluation import run
from evaluation.generators import endpoint
from megatron_tower.command import load
from megatron_tower.config import InputError
from tests.unit.misbehaving_server import Server
from tests.unit.test_evaluation_run import Pool, StandIn, score
from tests.unit.test_score_files import gated

PAIRS = {"house": "Haus", "Monday": "Montag"}


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    rows = [
        {"lp": "en-de_DE", "domain": "news", "document_id": f"d{i}", "segment_id": i, "is_bad_source": False, "source": f"{s} {i}",
         "target": f"{PAIRS[s]} {i}", "original_target": ""}
        for i in range(4) for s in PAIRS
    ]  # fmt: skip
    (tmp_path / "wmt24pp").mkdir()
    (tmp_path / "wmt24pp" / "en-de_DE.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr("megatron_tower.rewards.pool.VerifierPool", partial(Pool, []))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint, "BACK_OFF", 0.01)
    sources = ["eval.tasks=[wmt24pp]", "eval.pairs=[en-de_DE]", f"+eval.sources.wmt24pp={tmp_path / 'wmt24pp'}", "data.folder=nowhere"]
    return [*sources, f"eval.output={tmp_path / 'out'}"]


def test_a_base_model_is_shown_examples_and_a_chat_is_not(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    for chat, examples in ((True, 0), (False, 3)):
        stand_in = StandIn(chat)
        monkeypatch.setattr(stand_in, "_answers", lambda prompts: ["Haus 0"] * len(prompts))
        monkeypatch.setattr(run, "open_generator", lambda cfg, subject, of=stand_in: (of, {"name": "stand-in"}))
        score(load([*words, f"eval.checkpoint={tmp_path}", f"eval.chat={chat}"]))
        assert {prompt.count("\nGerman: ") for prompt in stand_in.asked} == {examples + chat}
        told = json.loads((tmp_path / "out" / "scores.json").read_text())["prompts"]["wmt24pp"]["example"]
        assert told.count("{source}") == 1 and told.count("Haus") + told.count("Montag") == examples


def test_an_endpoint_is_evaluated_and_its_failures_are_counted(words: list[str], tmp_path: Path):
    def script(prompt: str, attempt: int) -> str:
        source = prompt.split("\n")[1].removeprefix("English: ")
        if source == "house 3" or (attempt == 1 and source == "Monday 0"):
            return "!500"
        return f"{PAIRS[source.split()[0]]} {source.split()[1]}"

    with Server(script) as server:
        on = [*words, "eval.generator=endpoint", f"eval.endpoint.url={server.url}", "eval.endpoint.model=m", "eval.endpoint.attempts=2"]
        score(load(on))
        asked = server.asked.total()
    result = json.loads((tmp_path / "out" / "scores.json").read_text())
    found = {(s["metric"], s["by"], s["group"]): s["value"] for s in result["scores"]}
    assert result["failed"] == {"wmt24pp": 1} and result["requests"]["failures"] == {"500": 3} and asked == 8 + 2
    assert found["exact_match", "pair", "en->de_DE"] == 87.5 == 100 - found["empty", "all", "all"]
    assert result["checkpoint"]["path"] == f"m at {server.url}" and result["model"]["name"] == "m"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["eval.pairs=[en-xx_XX]"], r"eval\.pairs: en-xx_XX is no pair of WMT24\+\+: did you mean"),
        (["eval.pairs=[de-en]"], r"de-en is no pair of WMT24\+\+: all are from English, as en-de_DE"),
        (["eval.pairs=[en-fr_FR]"], r"wmt24pp holds neither en-fr_FR\.jsonl nor en-fr_FR\.parquet"),
        (["eval.checkpoint=nowhere"], r"eval\.checkpoint=nowhere"),
        (["eval.checkpoint=nowhere", "eval.generator=transformers"], r"eval\.checkpoint=nowhere"),
        (["+eval.metrics.xcomet=Unbabel/XCOMET-XL"], r"eval\.metrics\.xcomet=Unbabel/XCOMET-XL is gated and you have no access"),
        (["+eval.metrics.xcomet=some/where/else"], r"eval\.metrics\.xcomet=some/where/else is no folder"),
        (["eval.tasks=[]"], r"eval\.tasks is empty: name some of text, "),
        ([f"eval.output={__file__}"], r"eval\.output=.*\.py is a file: name a folder"),
        (["eval.bootstrap_samples=0"], r"eval\.bootstrap_samples=0 and eval\.confidence=0\.95 make no interval"),
        (["eval.batch_size=0"], r"eval\.batch_size=0 must be 1 or more$"),
        (["eval.general=-5"], r"eval\.general=-5 must be 0 or more; 0 takes all"),
        (["eval.confidence=95"], r"eval\.confidence=95\.0 make no interval"),
    ],
)
def test_bad_input_is_met_before_anything_is_written(words: list[str], more: list[str], said: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", gated)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    given = {word.partition("=")[0]: word for word in [*words, f"eval.checkpoint={tmp_path / 'model'}", *more]}
    with pytest.raises(InputError, match=said):
        run.check(load(list(given.values())))
    assert not (tmp_path / "out").exists()


def test_an_endpoint_needs_its_address(words: list[str]):
    with pytest.raises(InputError, match=r"eval\.generator=endpoint needs eval\.endpoint\.url"):
        run.check(load([*words, "eval.generator=endpoint"]))


def test_a_folder_called_latest_is_no_checkpoint(words: list[str], tmp_path: Path):
    (tmp_path / "sft" / "checkpoints" / "latest").mkdir(parents=True)
    for named in ("", "sft"):
        with pytest.raises(InputError, match=r"is neither a Hugging Face folder nor a run with a checkpoint"):
            run.check(load([*words, f"eval.checkpoint={tmp_path / named}"]))
