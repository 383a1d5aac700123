"""The stages of a data config and what hands over to what; `folder.py` makes the training folder of what they leave.

    filter      a task a source file: read, normalise, ask the filters -> kept.jsonl.zst, held.jsonl.zst, columns.npy
    duplicates  one task: columns of all files -> why each row goes, why.npz
    score_*     a task a source file, on a GPU where there is one: what a model says of rows that are left -> scores.npy
    select      a task a source file: duplicates, scores, contamination -> rows.jsonl.zst, hits.npy
    plan        one task: sizes in tokens -> which fraction of each language to draw; the tokenizer
    tokenize    a task a source file: draw, put into words, tokenize -> <part>.bin and .idx

`filter` and `select` also leave removed.jsonl.zst (rows.py). Leaves out: running them (engine.py, tools/prepare_data.py).
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from megatron_tower.config import Config, InputError
from megatron_tower.config_data import ScoreConfig
from megatron_tower.curation import contamination, duplicates, mixture, scores, shards, tokens
from megatron_tower.curation.engine import Facts, Stage
from megatron_tower.curation.fetch import fetch
from megatron_tower.curation.filters import filters
from megatron_tower.curation.readers import READERS, inputs
from megatron_tower.curation.rows import Account, falls_to_held_out, normalise, sides
from megatron_tower.curation.shards import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VERSION = 1  # of what the stages write
KEPT, HELD, ROWS = "kept.jsonl.zst", "held.jsonl.zst", "rows.jsonl.zst"
SAMPLE = 200  # texts of a file that tell how many bytes a token has
ROOM = 1.2  # what a template and a language of more tokens than the mean may add to a document


class Pipeline:
    """The stages of `cfg.data.curation`. Raises InputError for sources, filters or files that can't be."""

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.data, self.curation = cfg, cfg.data, cfg.data.curation
        self.filters = {"text": filters("documents", self.curation.documents), "source": filters("pairs", self.curation.pairs)}
        self.scored = {name: ("text", score) for name, score in self.curation.document_scores.items()}
        self.scored |= {name: ("source", score) for name, score in self.curation.pair_scores.items()}
        for name, (_, score) in self.scored.items():
            scores.check(name, score)
        self.against = {path: _sha256(path) for path in self.curation.decontaminate}
        self.evaluation = {path: contamination.texts_of(Path(path), "data.curation.decontaminate") for path in self.against}
        for source in self.curation.sources.values():
            fetch(source, Path(self.data.cache))
        self.files = [
            (corpus, source, one) for corpus, source in self.curation.sources.items() for one in inputs(source, Path(self.data.cache))
        ]
        if not self.files:
            raise InputError(f"data={self.data.name} names no sources: give data.curation.sources some")
        self.names = [f"{corpus}/{one.name}" for corpus, _, one in self.files]
        self.filter = self._filter_stage()
        self.duplicates = self._stage("duplicates", self._duplicates, [self.filter], list(self.curation.unique_sides), ["all files"])
        self.scores = {name: self._score_stage(name, score) for name, (_, score) in self.scored.items()}
        self.select = self._select_stage()
        self.plan = self._plan_stage()
        settings = [self.curation.document_tokens]
        self.tokenize = self._stage("tokenize", self._tokenize, [self.select, self.plan], settings, prepare=_without_threads)

    @property
    def stages(self) -> list[Stage]:
        """In an order that can be run."""
        return [self.filter, self.duplicates, *self.scores.values(), self.select, self.plan, self.tokenize]

    def _stage(
        self,
        name: str,
        work: Callable[[int, Path], Facts],
        after: list[Stage],
        settings: object,
        tasks: list[str] | None = None,
        **more: Any,
    ) -> Stage:
        """A stage of one task a file, or of those given; its folder is called by all that its output depends on."""
        told = [name, VERSION, settings, [[stage.root.name, stage.called] for stage in after]]
        root = Path(self.curation.work) / f"{name}-{_digest(told)}"
        return Stage(name, root, self.names if tasks is None else tasks, work, after=tuple(after), **more)

    # filter

    def _filter_stage(self) -> Stage:
        """Its folders are called by their files alone, so that another source does not filter again what is there."""
        asked = [self.curation.documents, self.curation.pairs, self.data.held_out]
        called = [_digest([corpus, asdict(source), one.name, one.identity]) for corpus, source, one in self.files]
        columns = [self.curation.near_duplicates, list(self.curation.unique_sides)]
        return self._stage("filter", self._filter, [], [asked, columns], called=called)

    def _filter(self, task: int, folder: Path) -> Facts:
        corpus, source, one = self.files[task]
        account, anomalies, columns = Account(), Counter(), []
        with shards.Writer(folder / KEPT) as kept, shards.Writer(folder / HELD) as held:
            for place, read in READERS[source.reader](source, one, anomalies):
                row = {"id": f"{self.names[task]}:{place}", "corpus": corpus, **read}
                normalise(row)
                account.saw(row)
                if reason := next((name for name, drop in self.filters[_kind(row)].items() if drop(row)), None):
                    account.lost(row, reason)
                elif falls_to_held_out(row, self.data.held_out):
                    account.lost(row, "held_out")
                    held.write(row)
                else:
                    kept.write(row)
                    columns.append(self._columns(row))
        np.save(folder / "columns.npy", np.array(columns, dtype=np.uint64).T)
        return account.write(folder) | {"anomalies": dict(anomalies)}

    def _columns(self, row: Row) -> list[int]:
        if _kind(row) == "text":
            return duplicates.of_document(row, self.curation.near_duplicates)
        return duplicates.of_pair(row, self.curation.unique_sides)

    # duplicates

    def _duplicates(self, task: int, folder: Path) -> Facts:
        columns = [np.load(self.filter.folder(task) / "columns.npy", mmap_mode="r") for task in range(len(self.names))]
        why = [np.zeros(of.shape[-1], dtype=np.uint8) for of in columns]
        reasons = [""]
        for names, parallel in (
            (duplicates.document_columns(self.curation.near_duplicates), False),
            (duplicates.pair_columns(self.curation.unique_sides), True),
        ):
            mine = [i for i, (_, _, one) in enumerate(self.files) if bool(one.target_locale) is parallel and len(why[i])]
            if not mine:
                continue
            found, told = duplicates.alike([np.concatenate([columns[i][column] for i in mine]) for column in range(len(names))], names)
            found[found > 0] += len(reasons) - 1
            reasons += told
            ends = np.cumsum([len(why[i]) for i in mine])[:-1]
            for i, part in zip(mine, np.split(found, ends), strict=True):
                why[i] = part
        np.savez(folder / "why.npz", **{str(i): part for i, part in enumerate(why)})
        return {"reasons": reasons}

    def _why(self, task: int) -> np.ndarray:
        """[rows that the filters kept] 0, or the index of the reason for which duplicates go."""
        return np.load(self.duplicates.folder(0) / "why.npz")[str(task)]

    # scores

    def _score_stage(self, name: str, score: ScoreConfig) -> Stage:
        def work(task: int, folder: Path) -> Facts:
            of = zip(shards.read(self.filter.folder(task) / KEPT), self._why(task), strict=True)
            rows = [row for row, reason in of if not reason and _kind(row) == self.scored[name][0]]
            np.save(folder / "scores.npy", np.asarray(scores.score(rows, score), dtype=np.float32))
            return {"rows": len(rows)}

        return self._stage(f"score_{name}", work, [self.filter, self.duplicates], [scores.fingerprint(score)], gpus=1)

    def _low(self, task: int) -> Callable[[Row], str]:
        """The first score of a row that is too low; to be called with each row that repeats no other once, in order."""
        values = {name: iter(np.load(stage.folder(task) / "scores.npy")) for name, stage in self.scores.items()}

        def low(row: Row) -> str:
            failed = []
            for name, (kind, score) in self.scored.items():
                if kind == _kind(row):
                    least = score.minimum_of.get(row.get("target_locale") or row["locale"], score.minimum)
                    failed += [] if next(values[name]) >= least else [f"low_{name}"]
            return failed[0] if failed else ""

        return low

    # select

    def _select_stage(self) -> Stage:
        minima = {name: [score.minimum, dict(score.minimum_of)] for name, (_, score) in self.scored.items()}
        after = [self.filter, self.duplicates, *self.scores.values()]
        settings = [self.against, contamination.VERSION, self.curation.ngram, minima]
        return self._stage("select", self._select, after, settings, prepare=self._index)

    def _index(self) -> None:
        """Once, for all tasks: evaluation sets, whose repeats go from training; and held-out text, which goes where training repeats it."""
        self.set_of = [path for path, texts in self.evaluation.items() for _ in texts]
        self.published = contamination.Contamination([text for texts in self.evaluation.values() for text in texts], self.curation.ngram)
        self.held = contamination.Contamination(self.held_texts, self.curation.ngram)

    def _select(self, task: int, folder: Path) -> Facts:
        account, hits, low, leaks = Account(), set(), self._low(task), Counter()
        reasons = self.duplicates.facts()[0]["reasons"]
        with shards.Writer(folder / ROWS) as out:
            for row, code in zip(shards.read(self.filter.folder(task) / KEPT), self._why(task), strict=True):
                account.saw(row)
                if reason := reasons[code] or low(row):
                    account.lost(row, reason)
                elif repeated := sorted({self.set_of[index] for index in self.published.among(*sides(row))}):
                    leaks.update(repeated)
                    account.lost(row | {"repeats": repeated}, "contaminated")
                else:
                    out.write(row)
                    hits |= self.held.among(*sides(row))
        np.save(folder / "hits.npy", np.array(sorted(hits), dtype=np.int64))
        return account.write(folder) | {"leaks": dict(leaks)}

    @cached_property
    def held_rows(self) -> list[Row]:
        return [row for task in range(len(self.names)) for row in shards.read(self.filter.folder(task) / HELD)]

    @property
    def held_texts(self) -> list[str]:
        """Both sides of pairs; a hit is an index of these."""
        return [text for row in self.held_rows for text in sides(row)]

    def selected(self, task: int) -> Iterator[Row]:
        return shards.read(self.select.folder(task) / ROWS)

    # plan and tokenize

    def _plan_stage(self) -> Stage:
        own = self.cfg.model.hf_folder and _sha256(Path(self.cfg.model.hf_folder) / "tokenizer.json")
        mixture = [dict(self.data.shares), self.curation.tokens, self.curation.temperature]
        told = [self.cfg.model.family, self.data.vocab_size, self.data.seed, list(self.data.instruction_kinds), tokens.TEMPLATES]
        settings = [mixture, own, *told]
        return self._stage("plan", self._plan, [self.select], settings, ["all files"], prepare=_without_threads)

    def _plan(self, task: int, folder: Path) -> Facts:
        from megatron_tower.curation.folder import make_tokenizer

        words = make_tokenizer(self, folder / "tokenizer")
        available, size = Counter(), Counter()
        for index in range(len(self.names)):
            texts = tokens.texts(self.selected(index), 4000)
            sample = list(islice(texts, SAMPLE))
            if not sample:
                continue
            ids = words.backend_tokenizer.encode_batch_fast([text for _, text, _ in sample], add_special_tokens=False)
            per_byte = sum(len(one) + 1 for one in ids) / sum(len(text.encode()) for _, text, _ in sample)
            for group, text, _ in chain(sample, texts):
                available[group] += len(text.encode()) * per_byte
                size[group] += len(text.encode())
        fractions = mixture.plan(available, self.data.shares, self.curation.tokens, self.curation.temperature)
        planned = [
            {"part": part, "language": language, "tokens": round(count), "fraction": fractions.get((part, language), 0.0)}
            for (part, language), count in sorted(available.items())
        ]
        return {"planned": planned, "bytes_a_token": sum(size.values()) / max(1.0, sum(available.values()))}

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        from megatron_tower.data.tokenizer import load

        return load(self.plan.folder(0) / "tokenizer")

    def _tokenize(self, task: int, folder: Path) -> Facts:
        plan = self.plan.facts()[0]
        fraction = {(one["part"], one["language"]): one["fraction"] for one in plan["planned"]}
        drawn = (row for row in self.selected(task) if tokens.draw(row.get("document") or row["id"], fraction[tokens.group(row)]))
        longest = int(self.curation.document_tokens * plan["bytes_a_token"] / ROOM)
        return tokens.write(folder, tokens.texts(drawn, longest), self.tokenizer())


def _without_threads() -> None:
    """What the tasks would each import, imported once before they are forked; each of them has one core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from megatron.core.datasets import indexed_dataset  # noqa: F401


def _kind(row: Row) -> str:
    return "text" if "text" in row else "source"


def _digest(of: object) -> str:
    return hashlib.sha256(orjson.dumps(of, option=orjson.OPT_SORT_KEYS)).hexdigest()[:12]


def _sha256(path: str | Path) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(
            f"{path} can't be read ({error.strerror}): fetch it, or take it out of data.curation or model.hf_folder"
        ) from error
