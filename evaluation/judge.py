"""Win rates of one evaluation's answers over another's, and requirements obeyed, by a judge model behind an endpoint.

    python -m evaluation.judge --folder runs/demo/sft/evaluation --baseline runs/other/evaluation --url http://host:8000/v1 --model judge
    python -m evaluation.judge --folder runs/demo/sft/evaluation --url http://host:8000/v1 --model judge

With --baseline: both answers to each prompt of the task (m_arenahard) are compared, in both orders. Without: each answer whose row has
"requirements" (instructions in translation that no rule can check) is held to them. --dry-run says what it would cost.
Reads generations.jsonl of the folders; writes into --folder, or --output: judgements.jsonl, every reply with its verdict (a run that was
cut off asks what is missing), and win_rates.json or requirements.json; and puts the scores into scores.json where there is one.

A prompt counts where both orders have a verdict: 1, a half or 0 for each order, so that a judge who likes what comes first moves nothing.
Intervals resample questions, each with all its languages. Beside the win rate stand the one that answers of equal length would have
(evaluation/metrics/length.py) and those where the model's answer is the longer and the shorter one: the further apart these are, the
more the judge may go by length.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.generators.endpoint import EndpointGenerator
from evaluation.judging import JUDGE_VERSION, Judge, Question, Reply, comparison, requirements
from evaluation.metrics.bootstrap import Estimate, Resampling, estimate, mean, percent, percentage
from evaluation.metrics.length import length_controlled, relative_lengths
from evaluation.store import Store
from evaluation.systems import Line, asked, item, lines, pair
from evaluation.tasks.task import Score, groups_by
from megatron_tower.command import refuse
from megatron_tower.config import EndpointConfig, InputError
from megatron_tower.runtime.run_dir import write_text


@dataclass(frozen=True)
class Compared:
    """A prompt's row, both answers to it, and the verdicts, from 2 (the model's is much better) to -2, with the model's answer first and
    second."""

    line: Line
    model: str
    baseline: str
    verdicts: tuple[Reply, Reply]

    @property
    def wins(self) -> float | None:
        """From 0 to 1, the mean of both orders; None unless both have a verdict."""
        known = [reply.verdict for reply in self.verdicts if reply.verdict is not None]
        return sum((np.sign(one) + 1) / 2 for one in known) / 2 if len(known) == 2 else None

    @property
    def consistent(self) -> bool:
        return np.sign(self.verdicts[0].verdict) == np.sign(self.verdicts[1].verdict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the evaluation whose answers are judged")
    parser.add_argument("--baseline", type=Path, help="of the evaluation that they are compared with")
    parser.add_argument("--task", default="m_arenahard", help="whose answers are compared")
    parser.add_argument("--output", type=Path, help="another folder for the results")
    parser.add_argument("--dry-run", action="store_true")
    for field in fields(EndpointConfig):
        kind = str if field.default is None else type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, required=field.default is None)
    options = parser.parse_args()
    try:
        judge_folders(options, EndpointConfig(**{field.name: getattr(options, field.name) for field in fields(EndpointConfig)}))
    except InputError as error:
        refuse(error)


def judge_folders(options: argparse.Namespace, endpoint: EndpointConfig) -> None:
    """Raises InputError for folders without answers to judge, and for an endpoint that won't answer."""
    output, generator = options.output or options.folder, EndpointGenerator(endpoint)
    with Store(output / "judgements.jsonl") as store:
        judge = Judge(generator, store)
        if options.baseline:
            both, left_out = common(options.folder, options.baseline, options.task)
            questions = [question for line, mine, theirs in both for question in orders(line, mine, theirs)]
        else:
            held, left_out = requiring(options.folder), {}
            questions = [requirements(asked(line), line["output"], line["requirements"], id=item(line)) for line in held]
        if options.dry_run:
            count, reads, says = judge.estimate(questions)
            price = (reads * endpoint.input_price + says * endpoint.output_price) / 1e6
            print(f"{count} requests, about {reads} tokens to read and {says} to write: {price:.2f} at the prices given")
            return
        replies = judge.ask(questions)
    if options.baseline:
        pairs = zip(both, replies[::2], replies[1::2], strict=True)
        compared = [Compared(*texts, (first, turned(second))) for texts, first, second in pairs]
        scores = win_rates(compared, options.task, f"judge:{generator.name}|version:{JUDGE_VERSION}|baseline:{options.baseline}")
    else:
        scores = obedience(held, replies, f"judge:{generator.name}|version:{JUDGE_VERSION}")
    told = {"judge": generator.name, "version": JUDGE_VERSION, "baseline": str(options.baseline or ""), "left_out": left_out}
    told |= {"requests": generator.summary(), "scores": [asdict(score) | asdict(score.estimate) for score in scores]}
    for score in told["scores"]:
        del score["estimate"]
    path = output / ("win_rates.json" if options.baseline else "requirements.json")
    write_text(path, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    into_scores(output / "scores.json", told["scores"])
    for score in scores:
        one = score.estimate
        print(f"{score.metric:20} {score.by:9} {score.group:12} {one.value:8.2f} [{one.low:.2f}, {one.high:.2f}] of {one.count}")
    print(f"{path}: {json.dumps(told['requests'])}")


def common(folder: Path, baseline: Path, task: str) -> tuple[list[tuple[Line, str, str]], dict[str, int]]:
    """([(row, the model's answer, the baseline's)] of prompts that both were asked, what was left out)."""
    mine, theirs = ({item(line): line for line in lines(of) if line["task"] == task} for of in (folder, baseline))
    for of, found in ((folder, mine), (baseline, theirs)):
        if not found:
            raise InputError(f"{of} has no answers of {task}: evaluate it with eval.tasks=[{task}] first")
    both = [(mine[name], theirs[name]) for name in mine if name in theirs]
    if not both:
        raise InputError(f"{folder} and {baseline} have no prompt of {task} in common: evaluate both on the same rows")
    for one, other in both:
        if asked(one) != asked(other):
            raise InputError(f"{folder} and {baseline} have other words for {task} {one.get('id')}: evaluate both on the same data")
    answered = [(one, one["output"], other["output"]) for one, other in both if "error" not in (one.get("finish"), other.get("finish"))]
    if not answered:
        raise InputError(f"{folder} and {baseline} have no prompt of {task} that both answered: evaluate them again")
    return answered, {"asked of one only": len(mine.keys() ^ theirs.keys()), "not answered by both": len(both) - len(answered)}


def orders(line: Line, mine: str, theirs: str) -> tuple[Question, Question]:
    told = {"id": item(line), "language": pair(line)}
    return comparison(asked(line), mine, theirs, **told, first="model"), comparison(asked(line), theirs, mine, **told, first="baseline")


def turned(reply: Reply) -> Reply:
    """As if the answers had come the other way round."""
    return reply if reply.verdict is None else replace(reply, verdict=-reply.verdict)


def win_rates(compared: Sequence[Compared], task: str, signature: str, how: Resampling = Resampling()) -> list[Score]:
    """In %, ties a half: of all, by language, and where the model's answer is longer or shorter; what they rest on beside them.

    lc_win_rate is the length-controlled one, where both verdicts and lengths differ from prompt to prompt."""
    replies = [reply for one in compared for reply in one.verdicts]
    scores = [
        Score(task, problem, "all", "all", percentage([reply.problem == problem for reply in replies], how), signature)
        for problem in ("unparsable", "failed")
    ]
    judged = [one for one in compared if one.wins is not None]
    if not judged:
        return scores
    rows = [{"language": pair(one.line) or "all", "length": longer(one)} for one in judged]
    lengths = relative_lengths([len(one.model) - len(one.baseline) for one in judged], [row["language"] for row in rows])
    for by, group, of in groups_by(rows, "language", "length"):
        chosen = [judged[i] for i in of]
        questions = [str(one.line.get("question_id") or item(one.line)) for one in chosen]
        wins = [one.wins for one in chosen]
        measured = {"win_rate": wins}
        if by != "length":
            measured |= {"wins": [w > 0.5 for w in wins], "ties": [w == 0.5 for w in wins], "losses": [w < 0.5 for w in wins]}
            measured |= {"consistent": [one.consistent for one in chosen]}
            if np.ptp(wins) and np.ptp(lengths[of]):
                scores.append(Score(task, "lc_win_rate", by, group, length_controlled(wins, lengths[of], questions, how), signature))
        scores += [Score(task, name, by, group, clustered(values, questions, how), signature) for name, values in measured.items()]
    for side in ("model", "baseline"):
        scores.append(Score(task, "characters", "side", side, mean([len(getattr(one, side)) for one in judged], how), signature))
    return scores


def longer(one: Compared) -> str:
    difference = len(one.model) - len(one.baseline)
    return "longer" if difference > 0 else "shorter" if difference < 0 else "as long"


def clustered(values: Sequence[float], clusters: Sequence[str], how: Resampling) -> Estimate:
    """Mean in % of values from 0 to 1, its interval by resampling clusters: one question's languages rise and fall together."""
    sums: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        total = sums.setdefault(cluster, [0.0, 0.0])
        total[0] += value
        total[1] += 1
    got = estimate([np.array(list(sums.values()))], percent, how)
    alone = percentage([total / count for total, count in sums.values()], how)  # has an interval where all agree
    return replace(got if got.low < got.high else alone, count=len(values))


def requiring(folder: Path) -> list[Line]:
    held = [line for line in lines(folder) if line.get("requirements") and line.get("finish") != "error"]
    if not held:
        raise InputError(f'{folder} has no answers with "requirements" to check: give --baseline to compare answers')
    return held


def obedience(held: Sequence[Line], replies: Sequence[Reply], signature: str, how: Resampling = Resampling()) -> list[Score]:
    """judge_instructions: % of requirements obeyed; judge_prompts: of answers that obey all; judge_score: mean from 0 to 10."""
    scores = []
    for task in sorted({line["task"] for line in held}):
        of_task = [(line, reply) for line, reply in zip(held, replies, strict=True) if line["task"] == task]
        for problem in ("unparsable", "failed"):
            found = percentage([reply.problem == problem for _, reply in of_task], how)
            scores.append(Score(task, f"judge_{problem}", "all", "all", found, signature))
        known = [(pair(line), reply.verdict) for line, reply in of_task if reply.verdict is not None]
        for by, group, of in groups_by([{"pair": name} for name, _ in known], "pair") if known else ():
            verdicts = [known[i][1] for i in of]
            each = [(yes, str(i)) for i, verdict in zip(of, verdicts, strict=True) for yes in verdict["obeyed"]]
            measured = {
                "judge_instructions": clustered(*zip(*each, strict=True), how),
                "judge_prompts": percentage([all(verdict["obeyed"]) for verdict in verdicts], how),
                "judge_score": mean([verdict["score"] for verdict in verdicts], how),
            }
            scores += [Score(task, name, by, group, found, signature) for name, found in measured.items()]
    return scores


def into_scores(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Into the table that reports read, in place of what a judge said before of the same tasks and metrics."""
    if not path.is_file():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    ours = {(row["task"], row["metric"]) for row in rows}
    found["scores"] = [
        row for row in found["scores"] if (row["task"], row["metric"]) not in ours or not row.get("signature", "").startswith("judge:")
    ] + list(rows)
    write_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
