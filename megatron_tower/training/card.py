"""The model card of an export, from what the run's directories say: base model, licences, data, recipe with provenance, scores.

    card.write(checkpoint, folder)      <folder>/README.md, with the header that the Hugging Face hub reads

The story goes back through `phase.start_from` to the weights that the first phase began with. Each figure of the recipe comes with the
word that `conf/phase/<phase>.yaml` has beside it (paper, second-hand, proxy, ours), or as this run's own where it was changed.
Leaves out: what no file says, such as intended use and risks; scores of another checkpoint than the one that is exported.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from megatron_tower.config import CONF, InputError
from megatron_tower.data.sources import fingerprint
from megatron_tower.runtime import run_dir
from megatron_tower.training import checkpoint
from megatron_tower.training.checkpoint import MANIFEST, Checkpoint

PACKAGES = ("torch", "megatron-core", "transformers")
USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}", torch_dtype="auto", device_map="auto")
prompt = "Translate the following English source text to German:\\nEnglish: Good morning.\\nGerman: "
ids = {ids}
print(tokenizer.decode(model.generate(ids.to(model.device), max_new_tokens=256)[0, ids.shape[1] :], skip_special_tokens=True))
```

```bash
vllm serve {folder}
```"""
CHAT = 'tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt")'
PLAIN = 'tokenizer(prompt.rstrip(), return_tensors="pt").input_ids'


@dataclass(frozen=True)
class Stage:
    """One phase of the story: its configuration as it was run, and the checkpoint that the next one, or the export, begins with."""

    config: DictConfig
    checkpoint: Checkpoint

    @property
    def name(self) -> str:
        return self.config.phase.name

    @property
    def folder(self) -> Path:
        return self.checkpoint.path.parent.parent


def write(exported: Checkpoint, folder: Path) -> None:
    """Write the card of a checkpoint's export beside its weights, or bring it up to date (scores may have come since).

    A checkpoint that no phase has trained, as a converted one, gets none.
    """
    story, file = stages(exported), folder / "README.md"
    if not story:
        return
    text = card(story, folder.name)
    if not file.is_file() or file.read_text() != text:
        run_dir.write_text(file, text)


def stages(last: Checkpoint) -> list[Stage]:
    """The phases that led to a checkpoint, first to last; those whose checkpoints are still there."""
    story: list[Stage] = []
    found: Checkpoint | Path | None = last
    while isinstance(found, Checkpoint) and (found.path.parent.parent / run_dir.RECORD).is_file():
        folder = found.path.parent.parent
        story.insert(0, Stage(run_dir.recorded(folder), found))
        found = _started_from(story[0])
    return story


def card(story: list[Stage], folder: str) -> str:
    last = story[-1]
    data = _json(last.folder / run_dir.DATA)
    model, run = last.config.model, Path(last.config.run_dir).name
    base = _base(story[0])
    names = " → ".join(stage.name.upper() for stage in story)
    chat = (last.folder / "tokenizer" / "chat_template.jinja").is_file() and last.name != "cpt"
    sections = [
        _header(story, base),
        f"# {run}: {model.name} after {names}",
        f"Step {last.checkpoint.step:,} of phase `{last.name}`, trained with megatron_tower (the Tower+ recipe on Megatron-Core).",
        "## Use",
        USE.format(folder=folder, ids=CHAT if chat else PLAIN),
        "## Base model",
        f"{base['name']}. Licence: {base['licence'] or 'not stated beside the weights; state it before publishing'}.",
        "## Training",
        _table(("phase", "steps", "samples", "tokens", "ranks", "precision", "code", "versions"), [_training(stage) for stage in story]),
        *(text for stage in story for text in (f"### {stage.name}", _description(stage.name), _recipe(stage))),
        "## Data",
        _data(story, data),
        "## Scores",
        _scores(last),
        "## Licences",
        "These weights come from the base model and from the data: the licence of the base and those of the sources above apply to them.",
    ]
    return "\n\n".join(sections) + "\n"


def provenance(text: str) -> dict[str, tuple[object, str]]:
    """Dotted key -> (value, what the comment beside it says) of a YAML file's commented lines; `same` is put in words."""
    found: dict[str, tuple[object, str]] = {}
    above: list[tuple[int, str]] = []  # the sections that the line is in: indentation and key
    source = ""
    for line in text.splitlines():
        read = re.match(r"( *)(\w+):(?: +([^#]*?))?(?: +#\s*(.*))?$", line)
        if not read:
            continue
        indent, key, value, comment = len(read[1]), read[2], read[3], read[4]
        above = [section for section in above if section[0] < indent]
        if comment:
            comment = re.sub(r"\bsame\b", source, comment)
            word, _, named = comment.partition(": ")
            source = named.partition(";")[0] if word == "proxy" else source
            found[".".join([*(name for _, name in above), key])] = (yaml.safe_load(value or ""), comment)
        above.append((indent, key))
    return found


def _started_from(stage: Stage) -> Checkpoint | Path | None:
    """What a phase began with, where that is left."""
    try:
        return checkpoint.resolve(_moved(stage, stage.config.phase.start_from))
    except InputError:  # it was moved or removed since, which is no reason not to export
        return None


def _moved(stage: Stage, path: str) -> Path:
    """A path of the phase's configuration, from where the run is now: it may have moved, or been started in another directory."""
    run = Path(stage.config.run_dir)
    return stage.folder.parent / Path(path).relative_to(run) if Path(path).is_relative_to(run) else Path(path)


def _base(first: Stage) -> dict[str, str | None]:
    """Name, hub id and licence of the weights that the first phase began with."""
    start, model = _started_from(first), first.config.model
    if not model.hf_folder and Path(first.config.phase.start_from) == Path(first.config.run_dir) / "base":
        return {"name": f"Random weights in the shape of {model.name}", "hub": None, "licence": "none: nothing was learnt before"}
    described = CONF / "model" / f"{model.name}.yaml"
    hub = re.match(r"# ([\w.-]+/[\w.-]+),", described.read_text()) if described.is_file() else None
    told = {}
    readme = start / "README.md" if isinstance(start, Path) else None
    if readme and readme.is_file() and (front := re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8"), re.DOTALL)):
        told = yaml.safe_load(front[1])
    licence = told.get("license_name") or told.get("license")
    return {"name": hub[1] if hub else Path(first.config.phase.start_from).name, "hub": hub and hub[1], "licence": licence}


def _header(story: list[Stage], base: dict[str, str | None]) -> str:
    """The YAML that the hub reads."""
    locales = ["en", *story[-1].config.data.locales]
    header = {"library_name": "transformers", "pipeline_tag": "text-generation", "license": "other"}
    header |= {"base_model": base["hub"]} if base["hub"] else {}
    header |= {"language": sorted({code.partition("_")[0] for code in locales}), "tags": ["translation", "megatron_tower"]}
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---"


def _training(stage: Stage) -> tuple[str, ...]:
    told = checkpoint.manifest(stage.checkpoint.path)
    start = (_json(stage.folder / "environment.json") or [{}])[-1]
    ranks = checkpoint.degrees(told.get("layout", {})) or "one"
    versions = ", ".join(f"{name} {start['packages'][name]}" for name in PACKAGES if name in start.get("packages", {}))
    commit = (start.get("git", {}).get("commit") or "not recorded")[:12]
    counts = (f"{told['step']:,}", f"{told['samples']:,}", f"{told['tokens']:,}" if "tokens" in told else "not recorded")
    return (stage.name, *counts, ranks, stage.config.precision.name, commit, versions)


def _description(phase: str) -> str:
    """What the phase's YAML says of it in its first line."""
    file = CONF / "phase" / f"{phase}.yaml"
    return file.read_text().partition("\n")[0].removeprefix("# ") if file.is_file() else ""


def _recipe(stage: Stage) -> str:
    file = CONF / "phase" / f"{stage.name}.yaml"
    rows = []
    for key, (value, comment) in provenance(file.read_text()).items() if file.is_file() else ():
        used = OmegaConf.select(stage.config.phase, key)
        rows.append((key, str(used), comment if used == value else f"this run's own ({value}: {comment})"))
    return _table(("setting", "value", "where it comes from"), rows)


def _data(story: list[Stage], data: dict | None) -> str:
    """Sources with licences, and how much of each kind."""
    if data is None:
        return "The run's directory holds no manifest of the data."
    sources = _table(("source", "version", "licence"), [(s["name"], s["version"], s["licence"]) for s in data.get("sources", [])])
    counts = [f"{part} {count:,} tokens" for part, count in data.get("cpt_tokens", {}).items()]
    counts += [f"{data['sft']['examples']:,} chats"] if "sft" in data else []
    counts += [f"{data['rl']['prompts']:,} prompts with verifiable answers"] if "rl" in data else []
    for stage in story:
        described = _moved(stage, f"{stage.config.phase.file}.manifest.json")
        if stage.config.phase.dataset == "preferences" and (pairs := _json(described)):
            counts.append(f"{pairs['pairs']:,} preference pairs ({', '.join(f'{n:,} {o}' for o, n in pairs['origins'].items())})")
    return f"{sources}\n\n{', '.join(counts)}. sha256 of the manifest: {data['sha256']}"


def _scores(last: Stage) -> str:
    scores = _json(last.folder / "evaluation" / "scores.json")
    if scores is None or scores["checkpoint"]["sha256"] != fingerprint([last.checkpoint.path / MANIFEST]):
        return "This checkpoint has not been evaluated."
    rows = [
        (score["task"], score["metric"], f"{score['value']:.2f}", f"{score['low']:.2f} – {score['high']:.2f}", f"{score['count']:,}")
        for score in scores["scores"]
        if score["by"] == "all"
    ]
    return f"On data held out from training, greedy decoding.\n\n{_table(('task', 'metric', 'value', 'interval', 'items'), rows)}"


def _json(file: Path) -> dict | list | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows))
