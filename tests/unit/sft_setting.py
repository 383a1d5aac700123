"""A folder of pools and of text for an SFT set, and the config that builds it."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from evaluation.generators import endpoint
from megatron_tower.config import CONF, Config
from megatron_tower.config_data import DataConfig
from megatron_tower.config_sft import SftConfig
from tests.unit.misbehaving_server import Server
from tools import build_sft

TASKS = {
    "gec": {"sentence": "He go home {}.", "corrections": ["He goes home {}.", "He went home {}."], "language": "en"},
    "ner": {"text": "Ada {} lives in Rome.", "entities": [{"text": "Rome", "type": "LOC"}], "language": "en"},
    "pii": {
        "text": "Write to Ann {0} at Ann{0}@example.org, Ann.",
        "entities": [{"text": "Ann", "type": "NAME"}, {"text": "Ann{0}@example.org", "type": "EMAIL"}],
        "language": "en",
    },
    "ape": {"source": "Sea {}", "mt": "Meere {}", "post_edit": "Meer {}", "source_locale": "en", "target_locale": "de_DE"},
    "mt_evaluation": {"source": "House {}", "target": "Haus {}", "score": 1, "lp": "en-de"},
    "mt_ranking": {"source": "Dog {}", "target": "Hund {}", "score": 1, "lp": "en-de"},
}
PAIR = {"source": "The river number {} is long.", "target": "Der Fluss Nummer {} ist lang.", "target_locale": "de_DE"}
GOOD = "Some thought.\nReasoning: 4\nReadability: 5"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "BACK_OFF", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def filled(value: object, number: int) -> object:
    if isinstance(value, str):
        return value.format(number)
    if isinstance(value, dict):
        return {name: filled(one, number) for name, one in value.items()}
    return [filled(one, number) for one in value] if isinstance(value, list) else value


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Setting:
    """A folder of pools and of text for all tasks; `sft` is what a file of conf/sft says over them, beside conf/sft/tower_plus.yaml."""

    def __init__(self, folder: Path, prompts: int = 12) -> None:
        self.folder, self.output = folder, folder / "set"
        write(folder / "pools" / "a.jsonl", *({"prompt": f"Question {n}?"} for n in range(prompts)))
        for name, row in TASKS.items():
            made = [filled(row, number) for number in range(30)]
            if name.startswith("mt_"):
                made += [one | {"target": f"{one['target']} schlecht", "score": 0} for one in made]
            write(folder / "tasks" / f"{name}.jsonl", *made)
        write(folder / "pairs.jsonl", *(filled(PAIR, number) for number in range(60)))
        self.sft = {
            "output": str(self.output),
            "pools": {"a": self.text("pools/a.jsonl", "CC0-1.0")},
            "pairs": self.text("pairs.jsonl", "MIT"),
            "tasks": {name: {"text": self.text(f"tasks/{name}.jsonl", "BSD-3-Clause")} for name in TASKS},
            "answers": {},
        }

    def text(self, path: str, licence: str) -> dict:
        return {"files": [str(self.folder / path)], "licence": licence, "origin": "here"}

    def model(self, name: str, server: Server, **options: object) -> None:
        self.sft["answers"][name] = {"url": server.url, "model": name, "attempts": 3, "timeout": 2.0} | options

    def judge(self, server: Server, **options: object) -> None:
        self.sft["judge"] = {"url": server.url, "model": "j", "attempts": 3, "timeout": 2.0} | options

    @property
    def config(self) -> Config:
        found = OmegaConf.merge(OmegaConf.structured(SftConfig), OmegaConf.load(CONF / "sft" / "tower_plus.yaml"), self.sft)
        return Config(sft=OmegaConf.to_object(found), data=DataConfig(cache=str(self.folder / "cache")), run_dir=str(self.folder))

    @property
    def line(self) -> list[str]:
        """The same as a command line."""
        (self.folder / "sft").mkdir(exist_ok=True)
        (self.folder / "sft" / "mine.yaml").write_text(json.dumps({"defaults": ["tower_plus"]} | self.sft))
        return ["--config-dir", str(self.folder), "sft=mine"]

    def run(self) -> dict:
        build_sft.build(self.config)
        return json.loads((self.output / "manifest.json").read_text())


@pytest.fixture(name="alone")
def lone_setting(tmp_path: Path) -> Setting:
    """One model, no judge, no tasks around translation."""
    setting = Setting(tmp_path)
    setting.sft |= {"translation_share": 0, "judge": None}
    return setting
