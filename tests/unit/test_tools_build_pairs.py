"""From items to a file of pairs: what is sampled and scored, what is left out and told, when nothing is done."""

import json
from pathlib import Path

import pytest

from megatron_tower.command import load
from megatron_tower.config import Config, InputError
from megatron_tower.data import preferences
from megatron_tower.data.preferences import Preference
from megatron_tower.rewards.pool import Verdict
from megatron_tower.rollout import scorers
from tests.unit.hf_folders import answering
from tools import build_pairs

EDIT = {"source": "Hi", "mt": "Halo", "post_edit": "Hallo", "source_locale": "en", "target_locale": "de_DE"}
PROMPTS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return answering(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def words(checkpoint: Path, tmp_path: Path) -> list[str]:
    """A command line over items of the maths reward, the last of them longer than the model's context."""
    prompts = [f"What is {n} plus {n}?" for n in range(PROMPTS)] + ["What is " + "1 plus " * 100 + "1?"]
    write(tmp_path / "items.jsonl", *(item(prompt, str(2 * n)) for n, prompt in enumerate(prompts)))
    settings = {"samples": 6, "max_new_tokens": 48, "temperature": 1.5, "top_p": 1.0, "items": tmp_path / "items.jsonl"}
    settings |= {"checkpoint": checkpoint, "output": tmp_path / "pairs.jsonl"}
    return ["model=tiny_gemma2", *(f"pairs.{name}={value}" for name, value in settings.items())]


def item(prompt: str, answer: str | None) -> dict:
    return {"prompt": prompt, "reward": "maths", "family": "sum", "locale": "en", "answer": answer, "check": {"answer": answer}}


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def is_made(plan: build_pairs.Plan) -> bool:
    return build_pairs.is_made(plan.output, plan.settings, "pairs.output")


def build(cfg: Config) -> list[Preference]:
    """`python -m tools.build_pairs` on one rank, without Hydra."""
    plan = build_pairs.check(cfg)
    assert not is_made(plan)
    build_pairs.build(cfg, plan)
    return preferences.read(plan.output)


def by_length(cfg: object, asked: scorers.Asked) -> list[Verdict]:
    """The longer the better; no answer of odd length can be scored."""
    kinds = {1: Verdict(None, "timeout"), 3: Verdict(None, "error: no\nreason")}
    return [kinds.get(len(answer) % 4) or Verdict(float(len(answer))) for _, answer in asked]


def test_replicas_build_what_one_rank_builds(words: list[str], tmp_path: Path, launch, capsys):
    """The whole way, with the verifiers' processes: two data-parallel ranks, and one with another batch size."""
    launch("tools.build_pairs", 2, *words, "parallel=dp2", f"pairs.output={tmp_path}/replicas.jsonl")
    pairs = build(load([*words, "pairs.batch_size=4"]))
    assert preferences.read(tmp_path / "replicas.jsonl") == pairs
    assert 3 <= len(pairs) <= PROMPTS and {pair.origin for pair in pairs} == {"off_policy"}
    assert all((pair.chosen_score, pair.rejected_score) == (1.0, 0.0) and pair.chosen.isdigit() for pair in pairs)
    assert "1 prompts without room for an answer" in capsys.readouterr().out


def test_answers_that_no_prompt_leaves_room_for_are_refused(words: list[str]):
    with pytest.raises(InputError, match="max_new_tokens=100000 leaves room for no prompt"):
        build(load([*words, "pairs.max_new_tokens=100000"]))


def test_what_has_no_score_is_left_out_and_told(words: list[str], tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(scorers, "score", by_length)
    answers = write(tmp_path / "answers.jsonl", {"prompt": "What is 1 plus 1?", "answers": ["four" * 100, "odd" * 101, "ten  "]})
    given = write(tmp_path / "given.jsonl", EDIT, EDIT | {"mt": "Hallo"})
    pairs = build(load([*words, f"pairs.answers={answers}", f"pairs.given={given}"]))
    facts = json.loads((tmp_path / "pairs.jsonl.manifest.json").read_text())
    assert facts["pairs"] == len(pairs) and pairs[-1].origin == "post_edit"
    (best,) = [pair for pair in pairs if pair.chosen == "four" * 100]
    assert best.prompt == "What is 1 plus 1?" and best.origin == "off_policy" and best.chosen_score == 400
    assert any(pair.origin == "on_policy" for pair in pairs)
    assert all(len(text) % 2 == 0 for pair in pairs[:-1] for text in (pair.chosen, pair.rejected))
    told = capsys.readouterr().out
    left_out = facts["left_out"]
    assert left_out["unchanged post-edits"] == left_out["prompts without room for an answer"] == 1
    assert 0 < left_out["empty or unfinished answers"] < 6 * PROMPTS
    assert left_out["answers without a score (timeout)"] and left_out["answers without a score (error)"]
    assert all(f"{count} {what}" in told for what, count in left_out.items()) and "error: no" in told


def test_nothing_is_done_twice_and_nothing_overwritten(words: list[str], tmp_path: Path, monkeypatch):
    monkeypatch.setattr(scorers, "score", by_length)
    build(load(words))
    moved = tmp_path / "moved.jsonl"
    (tmp_path / "items.jsonl").rename(moved)
    again = [*words, f"pairs.items={moved}", "pairs.batch_size=2", "pairs.processes=3"]
    assert is_made(build_pairs.check(load(again)))
    before = (tmp_path / "pairs.jsonl").read_bytes()
    for change in ("pairs.samples=2", "pairs.minimum_gap=1.5", "seed=1"):
        with pytest.raises(InputError, match=f"made with another {change.split('=')[0]}: choose another pairs.output"):
            is_made(build_pairs.check(load([*again, change])))
    write(moved, item("What is 1 plus 1?", "2"))
    with pytest.raises(InputError, match=r"made with another pairs\.items"):
        is_made(build_pairs.check(load(again)))
    assert (tmp_path / "pairs.jsonl").read_bytes() == before


def test_a_changed_output_is_not_taken_for_made(words: list[str], tmp_path: Path):
    given = write(tmp_path / "given.jsonl", EDIT)
    cfg = load([*words, "pairs.samples=0", f"pairs.given={given}"])
    assert [pair.chosen for pair in build(cfg)] == ["Hallo"]
    output = tmp_path / "pairs.jsonl"
    whole = output.read_text()
    output.write_text(whole[:-10])
    with pytest.raises(InputError, match="was changed"):
        is_made(build_pairs.check(cfg))
    output.unlink()
    assert not is_made(build_pairs.check(cfg))  # the manifest alone promises nothing
    output.write_text(whole)
    (tmp_path / "pairs.jsonl.manifest.json").unlink()
    with pytest.raises(InputError, match=r"without pairs\.jsonl\.manifest\.json"):
        is_made(build_pairs.check(cfg))


def test_no_pair_at_all_is_an_error(words: list[str], tmp_path: Path, monkeypatch):
    monkeypatch.setattr(scorers, "score", lambda cfg, asked: [Verdict(0.5)] * len(asked))
    with pytest.raises(InputError, match="no pair came of 7 prompts"):
        build(load(words))
    assert not (tmp_path / "pairs.jsonl").exists() and not (tmp_path / "pairs.jsonl.manifest.json").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("pairs.checkpoint=nowhere", "checkpoint=nowhere is neither"),
        ("pairs.checkpoint=null", "checkpoint is not set"),
        ("pairs.samples=-1", "samples=-1"),
        ("pairs.samples=0", "nothing to build pairs from"),
        ("pairs.items=nowhere.jsonl", r"nowhere\.jsonl is missing"),
        ("pairs.given=nowhere.jsonl", r"nowhere\.jsonl is missing"),
        ("pairs.scorer=taste", "scorer=taste is unknown"),
        ("pairs.scorer=comet", "needs pairs.scorer_path"),
    ],
)
def test_bad_input_is_refused(words: list[str], change: str, told: str):
    with pytest.raises(InputError, match=told):
        build_pairs.check(load([*words, change]))


def test_prompts_are_taken_at_even_distances():
    items = [item(f"prompt {n}", None) for n in range(10)]
    assert list(build_pairs._chosen(items, 0)) == list(range(10)) == list(build_pairs._chosen(items, 99))
    assert list(build_pairs._chosen(items, 3)) == [0, 3, 6]
    assert build_pairs._chosen(items, 3)[6] is items[6]
