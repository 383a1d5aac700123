"""Score one model: task -> prompts -> generations -> scores -> scores.json, for a checkpoint, a folder or an endpoint.

    python -m evaluation.run eval.checkpoint=runs/demo/sft
    python -m evaluation.run eval.checkpoint=runs/demo/sft parallel=tp2
    python -m evaluation.run -m eval.checkpoint=runs/demo/cpt,runs/demo/sft
    python -m evaluation.run eval.generator=endpoint eval.endpoint.url=http://host:8000/v1 eval.endpoint.model=name

The checkpoint is a run directory's phase, one checkpoint of it, or a Hugging Face folder. Results go to <checkpoint>/evaluation unless
eval.output says otherwise:

    answers.jsonl      what the model has said, by digest of model, prompt and decoding: it is never asked twice
    generations.jsonl  each task's rows with their answers and what was measured of each
    metrics.jsonl      scores of neural metrics, by digest of metric and texts
    scores.json        the table

Does nothing when the same model was scored on the same data with the same settings. eval.stage=generate leaves neural metrics to a
job with eval.stage=score, which needs no model.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation import neural
from evaluation.generators import Decoding, Generator
from evaluation.held_out import Row, read
from evaluation.metrics.bootstrap import Resampling
from evaluation.metrics.neural import PRECISIONS, Checkpoint
from evaluation.store import Store, digest
from evaluation.tasks import TASKS
from evaluation.tasks.task import Answer, Score, Verdict, Verify
from megatron_tower.command import entry_point
from megatron_tower.config import GENERATORS, STAGES, Config, InputError
from megatron_tower.data.sources import fingerprint
from megatron_tower.runtime.job import EVALUATE, supervised
from megatron_tower.runtime.run_dir import RECORD, check_writable, recorded, write_text

if TYPE_CHECKING:
    from evaluation.answers import Asker

VERSION = 4  # of tasks and metrics; raised when the same answers would score otherwise
PROCESSES = 8  # at most, that compute rewards
COUNTS = ("limit", "text_per_locale", "translations_per_locale", "general", "preference", "verifiable")  # of rows to ask
HOW = (
    "stage",
    "checkpoint",
    "output",
    "batch_size",
    "assets",
    "sources",
    "metrics",
    "metric_precision",
    "metric_tokens",
    "metric_processes",
    "endpoint",
    "run_code",
)  # settings that change no answer and no score


@dataclass(frozen=True)
class Subject:
    """What is scored. sha256: of a checkpoint's manifest, of a Hugging Face folder's weights and JSON files, of an endpoint's address
    and model. phase, step: of a checkpoint that was trained here."""

    path: str
    sha256: str
    phase: str | None
    step: int | None


@dataclass(frozen=True)
class Plan:
    """A checked evaluation. asked: task -> chosen rows; metrics: neural ones; key: tells model, data and settings from any other."""

    subject: Subject
    asked: dict[str, list[Row]]
    settings: dict[str, Any]
    data_sha256: str
    output: Path
    metrics: Sequence[Checkpoint]

    @property
    def key(self) -> str:
        return digest(self.subject.sha256, self.data_sha256, self.settings)

    def result(self) -> dict[str, Any] | None:
        """What scores.json holds, where it is of this plan."""
        path = self.output / "scores.json"
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error}): remove it") from error
        return found if found.get("key") == self.key else None


@entry_point
def main(cfg: Config) -> None:
    if supervised(cfg, EVALUATE):
        return
    from megatron_tower.runtime import cpu, distributed
    from megatron_tower.runtime.local import relaunch_if_needed

    cpu.install()
    plan = check(cfg)
    if not plan.result():
        check_writable(plan.output, f"eval.output={plan.output}")
    if cfg.eval.stage != "score":
        if plan.result():
            print(f"{plan.output / 'scores.json'} already holds this model's scores on this data")
            if distributed.place().world_size > 1:  # rank 0 may have metrics to compute, and ranks of a job end together
                distributed.join(cfg.cluster)
                distributed.shutdown()
        elif relaunch_if_needed(cfg, EVALUATE, plan.output / "logs"):
            return
        else:
            evaluate(cfg, plan)
    if cfg.eval.stage != "generate" and cfg.eval.metrics and distributed.is_rank_zero():
        neural.measure(cfg, plan)


def check(cfg: Config) -> Plan:
    """Read all that is needed but the weights. Raises InputError for anything missing, malformed or empty."""
    from megatron_tower.data import manifest

    asked = cfg.eval
    for name, known in (("stage", STAGES), ("generator", GENERATORS), ("metric_precision", PRECISIONS)):
        value = getattr(asked, name)
        if value not in known:
            raise InputError(f"eval.{name}={value} is unknown: use one of {', '.join(known)}")
    if asked.bootstrap_samples < 1 or not 0 < asked.confidence < 1:
        raise InputError(
            f"eval.bootstrap_samples={asked.bootstrap_samples} and eval.confidence={asked.confidence} make no interval: "
            "give 1 or more, and a share below 1 such as 0.95"
        )
    sizes = {"batch_size": 1, "max_new_tokens": 1} | dict.fromkeys(COUNTS, 0)
    for name, least in sizes.items():
        if getattr(asked, name) < least:
            raise InputError(f"eval.{name}={getattr(asked, name)} must be {least} or more{'' if least else '; 0 takes all'}")
    if not asked.tasks:
        raise InputError(f"eval.tasks is empty: name some of {', '.join(TASKS)}")
    for name in asked.tasks:
        if name not in TASKS:
            close = get_close_matches(name, TASKS, n=3) or list(TASKS)
            raise InputError(f"eval.tasks names {name}, which is no task: did you mean {' or '.join(close)}?")
    subject = identify(cfg)
    tasks = [task for task in TASKS.values() if task.name in asked.tasks]
    data, held_out = Path(cfg.data.folder), any(task.load is None for task in tasks)
    if held_out:
        manifest.verify(data)
    rows = {
        task.name: task.choose(task.load(asked) if task.load else read(data / "held_out" / f"{task.name}.jsonl", task.fields), asked)
        for task in tasks
    }
    loaded = {task.name: rows[task.name] for task in tasks if task.load}
    if cfg.evaluation_dir.exists() and not cfg.evaluation_dir.is_dir():
        raise InputError(f"eval.output={cfg.evaluation_dir} is a file: name a folder")
    metrics = neural.check(cfg, rows)  # last, since it may fetch weights
    return Plan(
        subject,
        rows,
        {key: value for key, value in asdict(asked).items() if key not in HOW}
        | {"seed": cfg.seed, "version": VERSION}
        | ({"rows_sha256": digest(loaded)} if loaded else {}),
        fingerprint([data / "manifest.json"]) if held_out else digest(loaded),
        cfg.evaluation_dir,
        metrics,
    )


def evaluate(cfg: Config, plan: Plan) -> None:
    """Ask the model as one of the layout's ranks; rank 0 writes."""
    from evaluation.answers import Asker
    from megatron_tower.runtime import distributed

    began = time.monotonic()
    generator, model = open_generator(cfg, plan.subject)
    seconds = {"open": time.monotonic() - began}
    how = Resampling(cfg.eval.bootstrap_samples, cfg.eval.confidence, cfg.seed)
    usual = Decoding(cfg.eval.max_new_tokens)
    with rewards(cfg) as verify, Store(plan.output / "answers.jsonl") if distributed.is_rank_zero() else nullcontext() as store:
        scores, prompts, lines = score_tasks(Asker(generator, store), plan.asked, usual, how, seconds, verify)
    result = {
        "key": plan.key,
        "checkpoint": asdict(plan.subject),
        "model": model,
        "data": {"folder": cfg.data.folder, "manifest_sha256": plan.data_sha256},
        "settings": plan.settings,
        "decoding": {"method": "greedy", "max_new_tokens": cfg.eval.max_new_tokens, "prompts": "chat" if generator.chat else "plain text"},
        "layout": asdict(cfg.parallel),
        "prompts": {name: _described(generator, text) for name, text in prompts.items()},
        "items": {name: len(rows) for name, rows in plan.asked.items()},
        "failed": dict(Counter(line["task"] for line in lines if line.get("finish") == "error")),
        "seconds": {name: round(spent, 2) for name, spent in seconds.items()},
        "scores": [flat(score) for score in scores],
    }
    if cfg.eval.generator == "endpoint":
        result["requests"] = generator.summary()
    if distributed.is_rank_zero():
        write(plan.output, result, lines)
        print(f"{plan.output / 'scores.json'} ({sum(seconds.values()):.0f} s)")
    distributed.shutdown()


def score_tasks(
    asker: "Asker", asked: dict[str, list[Row]], usual: Decoding, how: Resampling, seconds: dict[str, float], verify: Verify
) -> tuple[list[Score], dict[str, str], list[Answer]]:
    """(scores, an example prompt a task with its text as `{field}`, lines of generations.jsonl); adds each task's seconds."""
    scores: list[Score] = []
    prompts: dict[str, str] = {}
    lines: list[Answer] = []
    for name, rows in asked.items():
        began, task = time.monotonic(), TASKS[name]
        answers = task.ask(asker, rows, usual)
        if task.verify:
            answers = task.verify(rows, answers, verify)
        scores += task.score(rows, answers, how)
        if task.instruction:
            prompts[name] = task.prompts([rows[0] | {task.text: f"{{{task.text}}}"}, *rows[1:]], asker.chat)[0]
        lines += [{"task": name, **row, **answer} for row, answer in zip(rows, answers, strict=True)]
        seconds[name] = time.monotonic() - began
    return scores, prompts, lines


@contextmanager
def rewards(cfg: Config) -> Iterator[Verify]:
    """The rewards' verdicts on (item, answer), from processes of rank 0, which tells the other ranks."""
    from megatron_tower.rewards.pool import VerifierPool
    from megatron_tower.runtime.distributed import broadcast, is_rank_zero

    with VerifierPool(min(PROCESSES, os.cpu_count() or 1), cfg.eval.reward_timeout) as pool:

        def verify(answered: list[tuple[Row, str]]) -> Sequence[Verdict]:
            return broadcast(pool.score(answered) if is_rank_zero() else None)

        yield verify


def identify(cfg: Config) -> Subject:
    """What is to be scored; raises InputError when there is no such thing."""
    from megatron_tower.training import checkpoint

    if cfg.eval.generator == "endpoint":
        endpoint = cfg.eval.endpoint
        for name, value in (("endpoint.url", endpoint.url), ("endpoint.model", endpoint.model), ("output", cfg.eval.output)):
            if not value:
                raise InputError(f"eval.generator=endpoint needs eval.{name}: name the address, the model and a folder for its results")
        return Subject(f"{endpoint.model} at {endpoint.url}", digest(endpoint.url, endpoint.model), None, None)
    if not cfg.eval.checkpoint:
        raise InputError("eval.checkpoint is not set: name a run directory, one of its checkpoints or a Hugging Face folder")
    path = cfg.evaluated
    found = checkpoint.resolve(path, "eval.checkpoint")
    if isinstance(found, Path):
        files = sorted([*found.glob("*.safetensors"), *found.glob("*.json")])
        return Subject(str(path), fingerprint(files), None, None)
    if cfg.eval.generator != "megatron":
        raise InputError(
            f"eval.checkpoint={path} is a Megatron checkpoint, and eval.generator={cfg.eval.generator} reads Hugging Face folders"
        )
    trained = found.path.parent.parent  # by a phase that left its record there; a converted checkpoint has none
    phase = recorded(trained).phase.name if (trained / RECORD).is_file() else None
    return Subject(str(path), fingerprint([found.path / "manifest.json"]), phase, found.step)


def open_generator(cfg: Config, subject: Subject) -> tuple[Generator, dict[str, Any]]:
    """(what answers, what scores.json says of the model). A CPT phase has seen no chats, whatever template its tokenizer carries."""
    if cfg.eval.generator == "endpoint":
        from evaluation.generators.endpoint import EndpointGenerator

        return EndpointGenerator(cfg.eval.endpoint), {"name": cfg.eval.endpoint.model, "family": None, "parameters": None}
    if cfg.eval.generator in ("transformers", "vllm"):
        from evaluation.generators import folder

        return folder.open_folder(cfg, subject.sha256)
    from evaluation.generators.megatron import MegatronGenerator
    from megatron_tower.plan import parameters
    from megatron_tower.runtime import distributed
    from megatron_tower.training.loading import open_for_inference

    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    model, tokenizer, shape = open_for_inference(Path(subject.path), cfg.parallel, cfg.precision)
    chat = cfg.eval.chat if cfg.eval.chat is not None else subject.phase != "cpt" and tokenizer.chat_template is not None
    identity = digest(subject.sha256, chat)
    told = {"name": shape.name, "family": shape.family, "parameters": parameters(shape)}
    return MegatronGenerator(model, tokenizer, chat, cfg.eval, shape.name, identity), told


def _described(generator: Generator, example: str) -> dict[str, str]:
    text = generator.written(example)
    return {"example": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def flat(score: Score) -> dict[str, Any]:
    row = asdict(score)
    return row | row.pop("estimate")


def write(folder: Path, result: dict[str, Any], lines: Sequence[Answer]) -> None:
    """scores.json goes first and comes last, so that it never speaks of other generations."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").unlink(missing_ok=True)
    write_text(folder / "generations.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_text(folder / "scores.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
