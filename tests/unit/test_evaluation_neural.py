"""Neural metrics and TER as a step after generation: what it adds to scores.json and to each line, and what it asks to be there first."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation import neural, run, systems
from evaluation.metrics.bootstrap import Resampling
from evaluation.metrics.neural import Checkpoint, Comet
from evaluation.metrics.segment import Segment
from megatron_tower.command import load
from megatron_tower.config import Config, InputError
from tests.unit.comet_folders import comet_folder, encoder_folder
from tests.unit.test_evaluation_run import PAIRS, StandIn, asked, score  # noqa: F401  asked: a fixture
from tests.unit.test_score_files import texts, write


@pytest.fixture
def with_metrics(asked: tuple[Config, list[StandIn]], tmp_path: Path) -> Config:  # noqa: F811
    encoder = encoder_folder(tmp_path / "encoder", [" ".join(word for _, _, *words in PAIRS for word in words) + " 0 1 2"])
    kinds = {"comet22": "regression_metric", "xcomet": "xcomet_metric"}
    metrics = {name: str(comet_folder(kind, encoder, tmp_path / name)) for name, kind in kinds.items()}
    return replace(asked[0], eval=replace(asked[0].eval, metrics=metrics))


def test_scores_by_group_and_of_each_segment(with_metrics: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cfg, folder = with_metrics, tmp_path / "base" / "evaluation"
    with pytest.raises(InputError, match=r"has no answers of this model on this data: run it with eval\.stage=generate first"):
        neural.measure(cfg, run.check(cfg))
    score(cfg)
    before = json.loads((folder / "scores.json").read_text())
    neural.measure(cfg, run.check(cfg))
    after = json.loads((folder / "scores.json").read_text())
    lines = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    translated = [line for line in lines if line["task"] == "translation"]
    assert all(set(line["scores"]) == {"comet22", "xcomet"} and "xcomet" in line["spans"] for line in translated)
    assert not any("scores" in line for line in lines if line["task"] != "translation")
    found = {(s["metric"], s["by"], s["group"]): s for s in after["scores"] if s["metric"] in after["metrics"]}
    pairs = {}
    for line in translated:
        pairs.setdefault(f"{line['source_locale']}->{line['target_locale']}", []).append(line["scores"]["comet22"])
    means = {pair: sum(of) / len(of) for pair, of in pairs.items()}
    assert found["comet22", "pair", "en->de_DE"]["value"] == pytest.approx(means["en->de_DE"], abs=1e-3)
    assert found["comet22", "all", "all"]["value"] == pytest.approx(sum(means.values()) / len(means), abs=1e-3)
    assert found["xcomet", "kind", "day"]["count"] == sum(line["kind"] == "day" for line in translated)
    assert found["xcomet", "all", "all"]["signature"].startswith("xcomet_metric|weights:")
    assert [s for s in after["scores"] if s["metric"] not in after["metrics"]] == before["scores"]
    monkeypatch.setattr(Comet, "__call__", lambda *_: pytest.fail("scored again"))
    neural.measure(cfg, run.check(cfg))
    assert json.loads((folder / "scores.json").read_text()) == after
    assert run.check(cfg).result(), "the metrics do not make it another evaluation"


def test_precision_is_the_metrics_own_and_part_of_its_signature(with_metrics: Config, tmp_path: Path):
    """Another one scores anew, in place of what was there; it makes no other evaluation, and an unknown one is refused."""
    score(with_metrics)
    signatures = []
    for precision in ("fp32", "bf16"):
        cfg = replace(with_metrics, eval=replace(with_metrics.eval, metric_precision=precision))
        neural.measure(cfg, run.check(cfg))
        found = json.loads((tmp_path / "base" / "evaluation" / "scores.json").read_text())["scores"]
        signatures.append({row["signature"] for row in found if row["metric"] == "comet22"})
    assert [[one.rpartition("|")[2] for one in of] for of in signatures] == [["fp32"], ["bf16"]]
    with pytest.raises(InputError, match=r"eval\.metric_precision=fp8 is unknown: use one of fp32, fp16, bf16"):
        run.check(replace(cfg, eval=replace(cfg.eval, metric_precision="fp8")))


def test_metrics_need_a_task_that_translates(with_metrics: Config):
    with pytest.raises(InputError, match=r"none of eval\.tasks translates"):
        run.check(replace(with_metrics, eval=replace(with_metrics.eval, tasks=["general"])))


def test_a_metric_that_compares_needs_references(with_metrics: Config, tmp_path: Path):
    """if_mt's own rows may have none; xCOMET can do without."""
    row = {"prompt": "Translate.", "source": "house", "source_locale": "en", "target_locale": "de_DE", "requirements": ["It is polite."]}
    (tmp_path / "if_mt.jsonl").write_text(json.dumps(row) + "\n")
    evaluated = replace(with_metrics.eval, tasks=["if_mt"], sources={"if_mt": str(tmp_path / "if_mt.jsonl")})
    for metrics in (evaluated.metrics, {"ter": "sacrebleu"}):
        with pytest.raises(InputError, match=rf"eval\.metrics\.{next(iter(metrics))} compares with references, and eval\.tasks have none"):
            run.check(replace(with_metrics, eval=replace(evaluated, metrics=metrics)))
    assert run.check(replace(with_metrics, eval=replace(evaluated, metrics={"xcomet": evaluated.metrics["xcomet"]})))


def test_over_several_pairs_it_is_the_mean_of_their_means(monkeypatch: pytest.MonkeyPatch):
    """Three segments of one pair weigh as much as one of another."""
    monkeypatch.setattr(Checkpoint, "signature", "")
    segments = [Segment("s", "h", None, (("pair", pair),)) for pair in ("en->de_DE",) * 3 + ("en->zh_CN",)]
    scores = neural._table(Checkpoint("m", Path(), "unified_metric"), "t", segments, [10.0, 20.0, 30.0, 80.0], Resampling(20))
    found = {(s.by, s.group): s.estimate.value for s in scores}
    assert found == {("all", "all"): 50, ("pair", "en->de_DE"): 20, ("pair", "en->zh_CN"): 80}


def test_ter_is_that_of_sacrebleus_command_and_the_lower_is_the_better(
    asked: tuple[Config, list[StandIn]],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Of a language with spaces and one without, by a task whose own scores have no TER."""
    words = [f"eval.checkpoint={asked[0].eval.checkpoint}", "eval.tasks=[wmt24pp]", "eval.pairs=[en-de_DE,en-zh_CN]"]
    words += ["+eval.metrics.ter=sacrebleu", f"+eval.sources.wmt24pp={tmp_path}", "data.folder=nowhere"]
    references = {target: texts(target, 0, 0.0, 12) for target in ("de_DE", "zh_CN")}
    for target, of in references.items():
        rows = [{"domain": "news", "document_id": "d", "segment_id": i, "source": f"{target} {i}", "target": t} for i, t in enumerate(of)]
        write(tmp_path / f"en-{target}.jsonl", [json.dumps(row) for row in rows])
    for name, damage in (("good", 0.2), ("bad", 0.6)):
        found = {target: texts(target, 1, damage, 12) for target in references}
        stand_in = StandIn()
        said = {f"{target} {i}": text for target, of in found.items() for i, text in enumerate(of)}
        monkeypatch.setattr(stand_in, "_answers", lambda prompts, said=said: [said[p.split("\n")[1].split(": ")[1]] for p in prompts])
        monkeypatch.setattr(run, "open_generator", lambda cfg, subject, of=stand_in: (of, {"name": "stand-in"}))
        cfg = load([*words, f"eval.output={tmp_path / name}"])
        score(cfg)
        neural.measure(cfg, run.check(cfg))
    result = json.loads((tmp_path / "bad" / "scores.json").read_text())
    scores = {(s["by"], s["group"]): s for s in result["scores"] if s["metric"] == "ter"}
    values = []
    for target, more in (("de_DE", []), ("zh_CN", ["--ter-normalized", "--ter-asian-support"])):
        files = [str(write(tmp_path / f"{target}.{side}", of[target])) for side, of in (("ref", references), ("out", found))]
        command = [sys.executable, "-m", "sacrebleu", files[0], "-i", files[1], "-m", "ter", *more, "-w", "6"]
        their = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        mine = scores["pair", f"en->{target}"]
        assert mine["value"] == pytest.approx(their["score"], abs=1e-5) and mine["signature"] == their["signature"]
        values.append(their["score"])
    assert scores["all", "all"]["value"] == pytest.approx(sum(values) / 2, abs=1e-5) and scores["domain", "news"]["count"] == 24
    read = systems.read([f"{tmp_path / 'bad'}", f"{tmp_path / 'good'}=good"])
    assert systems.compare(read, ("wmt24pp", "ter", "all", "all"), Resampling(50)).best == 1
    assert "asian:yes" in read[0].signatures["wmt24pp", "ter"]
    monkeypatch.setattr(neural, "ter_statistics", lambda *_: pytest.fail("computed again"))
    neural.measure(cfg, run.check(cfg))
    assert json.loads((tmp_path / "bad" / "scores.json").read_text()) == result


@pytest.mark.parametrize(("name", "place"), [("ter", "Unbabel/wmt22-comet-da"), ("bleu", "sacrebleu")])
def test_only_ter_is_asked_of_sacrebleu(asked: tuple[Config, list[StandIn]], name: str, place: str):  # noqa: F811
    with pytest.raises(InputError, match=rf"eval\.metrics\.{name}={place}: .* \+eval\.metrics\.ter=sacrebleu"):
        run.check(replace(asked[0], eval=replace(asked[0].eval, metrics={name: place})))
