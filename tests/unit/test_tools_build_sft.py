"""The SFT set: which prompts are asked, which answer is kept, the shares; bad prompts and settings are one sentence."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from omegaconf import OmegaConf

from evaluation.selection import Best, best, candidates
from evaluation.tasks import taught
from megatron_tower.config import InputError
from megatron_tower.data.pair import key
from tests.unit.misbehaving_server import Server
from tests.unit.sft_setting import GOOD, TASKS, Setting, filled, lone_setting, quick, rows, write  # noqa: F401  fixtures: alone, quick


def graded(prompt: str) -> str:
    """The message that a judge's prompt holds."""
    return prompt.split("<message ")[1].split(">\n", 1)[1].split("\n</message ")[0]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    from tests.unit.comet_folders import encoder_folder

    words = ["Question one two three answer of alpha beta Be brief ? 0 1 2 3 4 5 6 7 8 9"]
    folder = encoder_folder(tmp_path_factory.mktemp("reward"), words)
    torch.manual_seed(2)
    model = XLMRobertaForSequenceClassification(XLMRobertaConfig.from_pretrained(folder))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return folder


def test_from_pools_to_a_set_that_training_reads(tmp_path: Path, reward_model: Path) -> None:
    setting = Setting(tmp_path, prompts=60)
    write(
        tmp_path / "pools" / "b" / "more.jsonl",
        {"prompt": "question  2?"},  # a's, but for case and space
        {"prompt": "Tell me: Natalia sold clips to forty eight of her friends in April and then half as many in May, how many?"},
        {
            "messages": [
                {"role": "system", "content": "Be brief"},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "One"},
                {"role": "assistant", "content": "Two"},
                {"role": "user", "content": "Three"},
                {"role": "assistant", "content": "theirs"},
            ],
            "locale": "en",
        },
    )
    gsm = write(tmp_path / "gsm.jsonl", {"q": "Natalia sold clips to forty-eight of her friends in April, and then half as many in May."})
    setting.sft["pools"]["b"] = setting.text("pools/b/*.jsonl", "ODC-BY-1.0")
    setting.sft |= {"decontaminate": [str(gsm)], "reward_model": str(reward_model), "samples": 2}

    def judge(prompt: str, attempt: int) -> str:
        kinds = {"Question 3?": "Reasoning: 1\nReadability: 5", "Question 4?": "Reasoning: 4\nReadability: 2", "Question 5?": "Good: 5"}
        if graded(prompt) == "Question 6?" and attempt == 1:
            return "Reasoning: four\nReadability: 5"
        return kinds.get(graded(prompt), GOOD)

    def alpha(prompt: str, attempt: int) -> str:
        return {"Question 7?": "!long on and on", "Question 8?": "!empty"}.get(prompt, f"alpha {attempt % 2} of {prompt}")

    with Server(judge) as first, Server(alpha) as second, Server(lambda p, n: "!long no end" if p == "Question 7?" else "beta") as third:
        setting.judge(first, input_price=1.0)
        setting.model("alpha", second, input_price=10.0, output_price=100.0)
        setting.model("beta", third)
        told = setting.run()
        asked = [server.asked.total() for server in (first, second, third)]
        made, text = rows(setting.output / "train.jsonl"), (setting.output / "train.jsonl").read_bytes()
        assert setting.run()["cost"] == told["cost"] and (setting.output / "train.jsonl").read_bytes() == text
        assert [server.asked.total() for server in (first, second, third)] == asked
    good = 60 - 4 + 2
    assert asked[0] == 62 + 2 and asked[1] == asked[2] == 2 * (good + 1)  # a second try at 5 and 6; 7 is asked, and has no answer
    assert told["pools"] == {
        "a": {"read": 60, "kept": 56, "low reasoning": 1, "low readability": 1, "grade: unparsable": 1, "no answer": 1},
        "b": {"read": 4, "duplicate": 1, "contaminated": 1, "kept": 2},
    }
    assert told["answers_left_out"] == {"alpha": {"cut at its length": 2, "empty": 2}, "beta": {"cut at its length": 2, "repeated": good}}
    assert told["cost"]["judge"]["j"]["price"] == pytest.approx(asked[0] * 10 / 1e6)
    assert told["cost"]["answers"]["alpha"] == {
        "replies": 118,
        "prompt_tokens": 1180,
        "tokens": 590,
        "without a count of tokens": 0,
        "price": pytest.approx((1180 * 10 + 590 * 100) / 1e6),
    }
    general, around = ([row for row in made if row["task"] == task] for task in ("general", "translation"))
    assert (len(general), len(around)) == (good, round(good * 0.22 / 0.78))
    assert told["translation_share"] == pytest.approx(0.22, abs=0.5 / len(made)) and all(told["stages"].values())
    assert sum(told["stages"].values()) == len(around) and Counter(row["kind"] for row in around) == told["tasks"]
    chosen_by_hand(reward_model, general)
    by = {row["id"]: row for row in general}
    assert by["b/more.jsonl:3"]["messages"][:2] == [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    assert [turn["content"] for turn in by["b/more.jsonl:4"]["messages"][:3]] == ["One", "Two", "Three"]
    assert (by["b/more.jsonl:4"]["licence"], by["b/more.jsonl:4"]["locale"], by["a/a.jsonl:1"]["licence"]) == (
        "ODC-BY-1.0",
        "en",
        "CC0-1.0",
    )
    assert len({row["id"] for row in made}) == len(made) == len({key(row["messages"][-2]["content"]) for row in made})
    assert "Question 7?" not in text.decode() and "Natalia" not in text.decode()


def chosen_by_hand(folder: Path, general: list[dict]) -> None:
    """Each answer has the highest of the rewards that a plain forward pass gives, and leads by its margin."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    won = Counter()
    for row in general:
        *chat, said = row["messages"]
        offered = [f"alpha {n} of {chat[-1]['content']}" for n in (1, 0)] * (chat[-1]["content"] != "Question 8?") + ["beta"]
        with torch.inference_mode():
            texts = ["".join(f"<s>{turn['content']}</s>" for turn in chat) + f"<s>{answer}</s>" for answer in offered]
            rewards = [model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item() for text in texts]
        assert said["content"] == offered[rewards.index(max(rewards))] and row["reward"] == pytest.approx(max(rewards), abs=1e-4)
        ranked = sorted(rewards, reverse=True)
        assert row["margin"] == (pytest.approx(ranked[0] - ranked[1], abs=1e-4) if len(ranked) > 1 else None)
        assert row["model"] == said["content"].split()[0]
        won[said["content"][:7]] += 1
    assert len(won) == 3 and min(won.values()) > 3, "one answer always wins: the test shows little"


def test_the_best_answer_and_ties_by_order() -> None:
    left_out: Counter = Counter()
    said = [
        ("a", "one", "stop"),
        ("a", " one ", "stop"),
        ("a", "cut", "length"),
        ("b", " ", "stop"),
        ("b", "two", "stop"),
        ("c", "3", "stop"),
    ]
    found = candidates([{"model": model, "text": text, "finish": finish} for model, text, finish in said], left_out)
    assert found == {"one": "a", "two": "b", "3": "c"}
    assert left_out == {("a", "repeated"): 1, ("a", "cut at its length"): 1, ("b", "empty"): 1}
    assert best(found, {"one": 1.0, "two": 2.0, "3": 2.0}, left_out) == Best("two", "b", 2.0, 0.0)
    assert best(found, {"one": -1.0, "two": None, "3": -4.0}, left_out) == Best("one", "a", -1.0, 3.0)
    assert left_out["b", "without a reward"] == 1
    assert best({"one": "a"}, {"one": None}, left_out) is None and best({}, None, left_out) is None
    assert best({"one": "a"}, None, left_out) == Best("one", "a", None, None)


def test_a_number_of_examples_is_kept_to_or_refused(alone: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    alone.sft |= {"translation_share": 0.5, "examples": 20}
    with Server(lambda prompt, attempt: "!empty" if prompt == "Question 0?" else "fine") as server:
        alone.model("m", server)
        told = alone.run()
        assert (told["examples"], told["translation_share"], told["pools"]["a"]["kept"]) == (20, 0.5, 10)
        assert told["pools"]["a"]["beyond sft.examples"] == 1
        for examples, said in (
            (24, "11 of 12 prompts have a good answer, 12 are needed"),
            (26, "12 prompts of 13"),
        ):
            alone.sft["examples"] = examples
            with pytest.raises(InputError, match=said):
                alone.run()
        alone.sft["examples"] = 20
        write(alone.folder / "tasks" / "gec.jsonl", filled(TASKS["gec"], 1))
        alone.sft["tasks"]["gec"]["share"] = 0.5
        before = server.asked.total()
        with pytest.raises(InputError, match=r"sft\.tasks\.gec lacks \d of the \d"):
            alone.run()
        assert server.asked.total() == before and told["sha256"] == json.loads((alone.output / "manifest.json").read_text())["sha256"]


def test_a_pool_of_the_hub_is_fetched_once(alone: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(repository: str, *, allow_patterns: list[str], local_dir: Path, **options: object) -> None:
        asked.append((repository, options["revision"], allow_patterns))
        write(Path(local_dir) / "data" / "part [1].jsonl", {"prompt": "Of the hub?"})

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, revision: SimpleNamespace(sha="c0ffee", card_data=None))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    alone.sft["pools"]["a"]["files"].append("hub:org/set@v1:data/*.jsonl")
    with Server(lambda prompt, attempt: "fine") as server:
        alone.model("m", server)
        for _ in range(2):
            told = alone.run()
    assert asked == [("org/set", "c0ffee", ["data/*.jsonl"])] and told["pools"]["a"]["kept"] == 13
    assert any(name.endswith("data/part [1].jsonl") for name in told["sources"]["sft.pools.a"]["files"])
    assert any(row["id"].endswith("data/part [1].jsonl:1") for row in rows(alone.output / "train.jsonl"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": " "}', r'a\.jsonl:1: "prompt" must be a text'),
        ("{", r"a\.jsonl:1: not JSON"),
        ("[1]", r"a\.jsonl:1: a JSON list"),
        ('{"messages": "x"}', r"a\.jsonl:1: no user turn"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', r"a\.jsonl:1: no user turn"),
        ('{"messages": [{"role": "user", "content": ""}]}', r"a\.jsonl:1: the user turn has no text"),
        ('{"messages": [{"role": "tool", "content": "x"}, {"role": "user", "content": "y"}]}', r"a\.jsonl:1: roles are"),
        ('{"messages": [{"role": "user"}]}', r"a\.jsonl:1: no messages with role and content"),
    ],
)
def test_a_bad_prompt_is_one_sentence_and_nothing_is_asked(row: str, said: str, alone: Setting) -> None:
    (alone.folder / "pools" / "a.jsonl").write_text(row + "\n")
    with Server(lambda prompt, attempt: "fine") as server:
        alone.model("m", server)
        with pytest.raises(InputError, match=said) as told:
            alone.run()
        assert server.asked.total() == 0 and "\n" not in str(told.value) and not alone.output.exists()


@pytest.mark.parametrize(
    ("sft", "said"),
    [
        ({"samples": 2}, "sft.reward_model is not set"),
        ({"samples": 2, "temperature": 0}, "are all the same"),
        ({"reward_model": "nowhere"}, r"sft\.reward_model=nowhere has no config\.json"),
        ({"judge": {"model": "j", "url": "http://host/v1"}, "minimum": {"readability": 6}}, "a grade from 1 to 5"),
        ({"translation_share": 0.2, "tasks": {"taste": {"share": 1}}}, r"sft\.tasks\.taste is unknown"),
        ({"translation_share": 0.2, "tasks": {"gec": {"text": None}}}, r"sft\.tasks\.gec\.text is not set"),
        ({"translation_share": 0.2, "pairs": None}, r"sft\.tasks\.translation is made from pairs"),
        ({"translation_share": 1}, "below 1"),
        ({"decontaminate": ["nowhere.jsonl"]}, r"nowhere\.jsonl is missing"),
        ({"pools": {"a": {"files": ["nowhere/*.jsonl"]}}}, r"there is no nowhere/\*\.jsonl"),
        ({"answers": {"m": {"url": "nowhere.url"}}}, "slurm/serve.sbatch"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(sft: dict, said: str, alone: Setting) -> None:
    alone.sft["answers"] = {"m": {"model": "m", "url": "http://host/v1"}}
    alone.sft = OmegaConf.to_container(OmegaConf.merge(alone.sft, sft))
    with pytest.raises(InputError, match=said):
        alone.run()
    assert not alone.output.exists()


def test_answers_of_the_tasks_around_translation(tmp_path: Path) -> None:
    cfg = Setting(tmp_path).config.sft
    made = {name: next(iter(taught.from_files(name, cfg.tasks[name].text))) for name in TASKS}
    assert made["gec"].answer.startswith("He goes home") and made["gec"].prompt.endswith("Corrected:")
    assert json.loads(made["ner"].answer) == [{"text": "Rome", "type": "LOC"}]
    assert "@" not in made["pii"].answer and made["pii"].answer.count("[NAME]") == 2 and "at [EMAIL], [NAME]." in made["pii"].answer
    assert made["ape"].answer.startswith("Meer ") and made["ape"].locale == "de_DE"
    assert made["mt_evaluation"].answer == ("0" if "schlecht" in made["mt_evaluation"].prompt else "100")
    shown = dict(line.split(": ", 1) for line in made["mt_ranking"].prompt.splitlines()[2:])
    assert "schlecht" not in shown[made["mt_ranking"].answer]
    pairs = taught.read_pairs(cfg.pairs)
    assert pairs[0].origin == "pairs.jsonl:1" and {pair.locale for pair in pairs} == {"de_DE"}
    assert next(taught.from_pairs("translation", pairs, "MIT", 1, 7)).id.startswith("translation/pairs.jsonl:")
    assert taught._shared(7, {"a": 1, "b": 5, "c": 0.9}) == {"a": 1, "b": 5, "c": 1}
    for row, said in (
        ({"source": "a", "target": "b", "source_locale": "fr_FR", "target_locale": "de_DE"}, "must be en"),
        ({"source": "a", "target": "b", "target_locale": "zz"}, r"pairs\.jsonl:1: language zz"),
        ({"source": "a", "target_locale": "de_DE"}, '"target" must be'),
    ):
        write(tmp_path / "pairs.jsonl", row)
        with pytest.raises(InputError, match=said):
            taught.read_pairs(cfg.pairs)
    write(tmp_path / "tasks" / "gec.jsonl", {"sentence": "x"})
    with pytest.raises(InputError, match=r"sft\.tasks\.gec\.text: .*gec\.jsonl: gec, row 1"):
        list(taught.from_files("gec", cfg.tasks["gec"].text))
