"""What a model was asked and said, remembered: answers.jsonl of an evaluation's folder, through which every task asks.

An answer's key is the digest of model, prompt and decoding, so whatever was answered before is not asked again: after an interruption,
in a second run, by another task with the same prompt. Answers are written as they come. An answer that failed is asked again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from evaluation.generators import Decoding, Generation, Generator, Likelihood
from evaluation.store import Store, digest


class Asker:
    """`generator`, asked only what `store` doesn't know. store: None on all ranks but the first, which tells them what it knows; None
    there, too: nothing is remembered."""

    def __init__(self, generator: Generator, store: Store | None):
        self.generator, self.store = generator, store

    @property
    def chat(self) -> bool:
        return self.generator.chat

    def generate(self, prompts: Sequence[str], decoding: Decoding) -> list[Generation]:
        """Answers to single user turns, in their order."""
        keys = [digest(self.generator.identity, prompt, asdict(decoding)) for prompt in prompts]
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]

        def ask(missing: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
            for number, found in self.generator.generate([chats[i] for i in missing], decoding):
                yield missing[number], asdict(found)

        return [Generation(**record) for record in self._remembered(keys, ask)]

    def likelihood(self, texts: Sequence[str]) -> list[Likelihood]:
        """Of whole texts."""
        return self._likelihoods([("likelihood", text) for text in texts], lambda rows: self.generator.likelihood([texts[i] for i in rows]))

    def answer_likelihood(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Likelihood]:
        """Of given answers to prompts."""
        return self._likelihoods(
            list(zip(prompts, answers, strict=True)),
            lambda rows: self.generator.answer_likelihood([prompts[i] for i in rows], [answers[i] for i in rows]),
        )

    def _likelihoods(self, asked: Sequence[tuple[str, str]], measure: Any) -> list[Likelihood]:
        keys = [digest(self.generator.identity, *texts) for texts in asked]

        def ask(missing: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
            yield from zip(missing, map(asdict, measure(missing)), strict=True)

        return [Likelihood(**record) for record in self._remembered(keys, ask)]

    def _remembered(self, keys: Sequence[str], ask: Any) -> list[dict[str, Any]]:
        """Records in the order of `keys`; each key that is not known is asked for once."""
        from megatron_tower.runtime.distributed import broadcast

        wanted = set(keys)
        stored = {key: self.store[key] for key in wanted if key in self.store} if self.store is not None else {}
        known = {key: _bare(record) for key, record in broadcast(stored).items() if record.get("finish") != "error"}
        first = {key: row for row, key in reversed(list(enumerate(keys))) if key not in known}
        for row, record in ask(sorted(first.values())) if first else ():
            known[keys[row]] = record
            if self.store is not None:
                self.store.append([{"key": keys[row], **record}])
        return [known[key] for key in keys]


def _bare(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "key"}
