"""One page to look at data by: what each stage saw and removed, samples of each language, lengths, packed rows as training sees them.

    python -m tools.inspect_data data=debian model=tiny_gemma2 phase=sft            # writes <data.folder>.html

Shows what is there: the stages of a pipeline that have run, and, once the data folder is made, its plan, its sets and two packed rows
of CPT and SFT in which tokens without loss are grey and documents take turns in colour. Leaves out: judging any of it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_tower.command import entry_point
from megatron_tower.config import Config, InputError
from megatron_tower.curation import shards
from megatron_tower.curation.engine import Stage, total
from megatron_tower.curation.pipeline import KEPT, ROWS, Pipeline
from megatron_tower.curation.rows import REMOVED, locale_of, sides
from megatron_tower.data import jsonl, manifest
from megatron_tower.runtime import cpu
from megatron_tower.runtime.run_dir import write_text

SAMPLES = 3  # of a locale, from each file
MOST = 12  # of a locale
CLIP = 1500  # characters of a text
BINS = [2**i for i in range(1, 16)]  # characters
PACKED = 2  # rows


@dataclass
class Locale:
    """Rows of a language, or of a pair of languages. lengths: rows below each of BINS, the last for longer ones."""

    rows: int = 0
    bytes: int = 0
    lengths: list[int] = field(default_factory=lambda: [0] * (len(BINS) + 1))
    samples: list[dict] = field(default_factory=list)

    def add(self, row: dict, show: bool) -> None:
        longest = max(len(text) for text in sides(row))
        self.rows += 1
        self.bytes += sum(len(text.encode()) for text in sides(row))
        self.lengths[next((i for i, bound in enumerate(BINS) if longest < bound), len(BINS))] += 1
        if show and len(self.samples) < MOST:
            self.samples.append(row)


@entry_point
def main(cfg: Config) -> None:
    cpu.install()
    print(f"data: {write(cfg)}")


def write(cfg: Config) -> Path:
    """The page, <data.folder>.html. Raises InputError where there is nothing to show."""
    page = Path(f"{cfg.data.folder}.html")
    facts = {"cfg": cfg, "stages": [], "locales": {}, "folder": None, "bins": BINS}
    if cfg.data.curation:
        facts |= _stages(Pipeline(cfg))
    if Path(cfg.data.folder).is_dir():
        facts["folder"] = _folder(cfg)
    if not facts["stages"] and not facts["folder"]:
        raise InputError(f"data={cfg.data.name} has neither stages nor {cfg.data.folder}: run python -m tools.prepare_data first")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True
    )
    environment.filters["clip"] = lambda text: text if len(text) <= CLIP else f"{text[:CLIP]} …"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, environment.get_template("inspect_data.html.j2").render(facts))
    return page


def _stages(pipeline: Pipeline) -> dict[str, Any]:
    """Yields of the stages that are done, and samples of the rows that the last of them left."""
    done = [stage for stage in pipeline.stages if not stage.missing()]
    told = [_yields(stage) for stage in done if stage in (pipeline.filter, pipeline.select)]
    left = (pipeline.select, ROWS) if pipeline.select in done else (pipeline.filter, KEPT)
    return {"stages": told, "locales": _locales(*left) if told else {}, "left": left[0].name}


def _yields(stage: Stage) -> dict[str, Any]:
    facts = total(stage.facts())
    removed = [row for task in range(len(stage.tasks)) for row in shards.read(stage.folder(task) / REMOVED)]
    examples: dict[str, dict[str, list]] = {}
    for row in removed:
        of = examples.setdefault(row["reason"], {}).setdefault(locale_of(row), [])
        if len(of) < SAMPLES:
            of.append(row)
    reasons = sorted(facts["removed"], key=lambda reason: -sum(facts["removed"][reason].values()))
    return {"name": stage.name, "facts": facts, "reasons": reasons, "examples": examples}


def _locales(stage: Stage, name: str) -> dict[str, Locale]:
    found: dict[str, Locale] = {}
    for task in range(len(stage.tasks)):
        shown = Counter()
        for row in shards.read(stage.folder(task) / name):
            code = locale_of(row)
            shown[code] += 1
            found.setdefault(code, Locale()).add(row, shown[code] <= SAMPLES)
    return dict(sorted(found.items()))


def _folder(cfg: Config) -> dict[str, Any]:
    folder = Path(cfg.data.folder)
    facts = manifest.verify(folder)
    sets = {name: folder / path for name, path in (("SFT", "sft"), ("GRPO", "rl"), ("WPO", "preferences"))}
    samples = {
        name: [row for _, row in islice(jsonl.read(path / "train.jsonl", "prepare the data again"), MOST)] for name, path in sets.items()
    }
    return {"facts": facts, "samples": samples, "packed": {name: list(_packed(cfg, name)) for name in ("documents", "chats")}}


def _packed(cfg: Config, dataset: str) -> Iterator[list[dict[str, Any]]]:
    """Rows as training reads them: runs of tokens that are of one document and alike in their loss."""
    from megatron_tower.data import build, tokenizer

    words = tokenizer.load(Path(cfg.data.folder) / "tokenizer")
    asked = replace(cfg, phase=replace(cfg.phase, dataset=dataset))
    for batch in islice(_rows(build.training_dataset(asked, words, PACKED)), PACKED):
        cuts = batch.cu_seqlens.tolist() if batch.cu_seqlens is not None else [0, batch.tokens.shape[1]]
        yield [
            {"document": index, "loss": loss, "text": words.decode(ids)}
            for index, (start, end) in enumerate(pairwise(cuts))
            for loss, ids in _runs(batch.labels[0, start:end].tolist(), batch.loss_mask[0, start:end].tolist())
        ]


def _rows(dataset: Any) -> Iterator[Any]:
    return (dataset[i] for i in range(len(dataset)))


def _runs(tokens: Iterable[int], mask: Iterable[float]) -> Iterator[tuple[bool, list[int]]]:
    run: list[int] = []
    before = None
    for token, loss in zip(tokens, mask, strict=True):
        if run and bool(loss) is not before:
            yield bool(before), run
            run = []
        run.append(token)
        before = bool(loss)
    if run:
        yield bool(before), run


if __name__ == "__main__":
    main()
