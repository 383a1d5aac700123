"""Several models behind addresses, asked side by side: each reply is in the store as it comes, with what it cost.

A reply's key is the digest of model, chat and decoding, so a run that was killed asks for what is missing and nothing else, and what
replies have cost is known from the store, whichever run paid. A chat that got no answer is noted beside them, and asked again.
"""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from typing import Any

from evaluation.generators import Chat, Decoding, Generator
from evaluation.store import Record, Store, digest
from megatron_tower.config import EndpointConfig

FAILED = "/failed"  # of the key under which a failure is noted


class Replies:
    """`samples` answers of each model to a chat, which differ in their seeds alone."""

    def __init__(self, models: Mapping[str, Generator], store: Store, decoding: Decoding, samples: int):
        self.models, self.store = models, store
        self.decodings = [replace(decoding, seed=decoding.seed + i) for i in range(samples)]

    def key(self, model: str, chat: Chat, decoding: Decoding) -> str:
        return digest(self.models[model].identity, chat, asdict(decoding))

    def missing(self, model: str, chats: Sequence[Chat], decoding: Decoding) -> list[Chat]:
        return [chat for chat in chats if self.key(model, chat, decoding) not in self.store]

    def ask(self, chats: Sequence[Chat]) -> None:
        """All models at once. Raises InputError where one of them can't be asked on, after which the others end, too."""
        stop, writing = threading.Event(), threading.Lock()

        def one(model: str) -> None:
            for decoding in self.decodings:
                missing = self.missing(model, chats, decoding)
                for number, said in self.models[model].generate(missing, decoding):
                    key = self.key(model, missing[number], decoding)
                    with writing:
                        self.store.append([{"key": key + FAILED * (said.finish == "error"), "model": model} | asdict(said)])
                    if stop.is_set():
                        return

        with ThreadPoolExecutor(len(self.models)) as threads:
            try:
                for done in as_completed([threads.submit(one, model) for model in self.models]):
                    done.result()
            except BaseException:
                stop.set()
                raise

    def of(self, chat: Chat) -> list[Record]:
        """What the store has, models in their order, each with its samples."""
        keys = [self.key(model, chat, decoding) for model in self.models for decoding in self.decodings]
        return [self.store[key] for key in keys if key in self.store]

    def failures(self, chats: Sequence[Chat]) -> dict[str, dict[str, int]]:
        """Of chats without an answer, by model and reason."""
        found: dict[str, Counter] = {model: Counter() for model in self.models}
        for model in self.models:
            for decoding in self.decodings:
                for key in (self.key(model, chat, decoding) for chat in chats):
                    if key not in self.store and key + FAILED in self.store:
                        found[model][self.store[key + FAILED]["problem"].partition(" at the last of")[0]] += 1
        return {model: dict(sorted(counts.items())) for model, counts in found.items() if counts}


def spent(store: Store, prices: Mapping[str, EndpointConfig], by: str) -> dict[str, dict[str, Any]]:
    """By model (the field `by` of records): replies, tokens, and their price, of all runs that wrote into the store."""
    counts: dict[str, Counter] = {}
    for record in (store[key] for key in store):
        of = counts.setdefault(record[by], Counter(replies=0, prompt_tokens=0, tokens=0))
        answered = record["finish"] != "error"
        of.update(replies=answered, prompt_tokens=record["prompt_tokens"] or 0, tokens=record["tokens"] or 0)
        of["without a count of tokens"] += answered and record["tokens"] is None
    return {
        model: {**of, "price": price(prices[model], of["prompt_tokens"], of["tokens"]) if model in prices else None}
        for model, of in sorted(counts.items())
    }


def price(endpoint: EndpointConfig, reads: float, says: float) -> float:
    return round((reads * endpoint.input_price + says * endpoint.output_price) / 1e6, 6)
