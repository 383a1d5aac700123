"""Pools of prompts: instruction sets of several origins as chats that end with the user's turn, each once, none of an evaluation set.

    {"messages": [..., {"role": "user", "content": "..."}]}    answers after the last user turn don't matter
    {"prompt": "..."}                                          one user turn

Two prompts are the same where case, width and spacing alone tell them apart (data/pair.py); the first pool named keeps it.
Leaves out: near-duplicates.  Run:  python -m tools.build_sft
"""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tower.config import InputError
from megatron_tower.config_data import SourceConfig
from megatron_tower.config_sft import PoolConfig, TextConfig
from megatron_tower.curation import fetch, shards
from megatron_tower.curation.contamination import Contamination, texts_of
from megatron_tower.data import chat, jsonl
from megatron_tower.data.jsonl import Row
from megatron_tower.data.pair import key

FORM = '{"messages": [{"role": "user", "content": "..."}]} or {"prompt": "..."}'


@dataclass(frozen=True)
class Prompt:
    """messages: a chat that ends with the user's turn; id: <pool>/<file>:<row>."""

    id: str
    pool: str
    messages: list[dict[str, str]]
    locale: str | None = None

    @property
    def text(self) -> str:
        """All turns, as a judge and a search for duplicates see them."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in self.messages)


def read(pools: dict[str, PoolConfig], contaminated: Callable[[str], bool], seed: int) -> tuple[list[Prompt], dict[str, dict[str, int]]]:
    """The prompts of all pools, and by pool how many were read, were left out for what reason, and are kept.

    Raises InputError for the first row that is no prompt, and for files that are not there.
    """
    seen: set[bytes] = set()
    prompts: list[Prompt] = []
    counts = {}
    for name, pool in pools.items():
        found, of = [], Counter()
        inside = os.path.commonpath([path.parent for path in files(pool, f"sft.pools.{name}")])
        for place, row in rows(pool, f"sft.pools.{name}"):
            prompt = _prompt(f"{name}/{os.path.relpath(place, inside)}", name, place, row)
            of["read"] += 1
            digest = hashlib.sha256(key(prompt.text).encode()).digest()
            if digest in seen:
                of["duplicate"] += 1
            elif contaminated("\n".join(turn["content"] for turn in prompt.messages)):
                of["contaminated"] += 1
            else:
                found.append(prompt)
            seen.add(digest)
        if pool.limit and len(found) > pool.limit:
            of["beyond the limit"] = len(found) - pool.limit
            found = drawn(found, pool.limit, seed)
        counts[name] = {**of, "kept": len(found)}
        prompts += found
    return prompts, counts


def contamination(paths: Sequence[str], n: int) -> Callable[[str], bool]:
    """Whether a text repeats one of evaluation sets; raises InputError for a file that is not there, or no JSON Lines."""
    if missing := [path for path in paths if not Path(path).is_file()]:
        raise InputError(f"sft.decontaminate: {missing[0]} is missing: name JSONL files of evaluation sets")
    known = Contamination([text for path in paths for text in texts_of(Path(path), "sft.decontaminate")], n)
    return lambda text: bool(known.among(text))


def drawn(prompts: list[Prompt], count: int, seed: int) -> list[Prompt]:
    """`count` of them in their order, chosen by a hash of seed and id."""
    ranked = sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed}/{prompt.id}".encode()).digest())
    chosen = {prompt.id for prompt in ranked[:count]}
    return [prompt for prompt in prompts if prompt.id in chosen]


def rows(text: TextConfig, name: str) -> Iterator[tuple[str, Row]]:
    """(`file:row`, row) of each row of its files, in the order of their names; `name` is the config key that errors tell."""
    for path in files(text, name):
        if path.suffix == ".jsonl":
            yield from jsonl.read(path, f"mend {name}.files", FORM)
        else:
            yield from ((f"{path}:{number}", row) for number, row in enumerate(_binary(path, name), 1))


def fetched(files: Sequence[str], cache: Path) -> list[str]:
    """With the files of each `hub:` word in its place; downloads what the cache lacks (fetch.py)."""
    found = []
    for word in files:
        parts = fetch.fetch(SourceConfig(fetch=[word]), cache) if word.startswith("hub:") else ()
        found += [glob.escape(str(fetch.root(word, cache) / name)) for part in parts for name in part.files] or [word]
    return found


def files(text: TextConfig, name: str) -> list[Path]:
    """Raises InputError where none is named, or a pattern finds nothing."""
    if not text.files:
        raise InputError(f"{name}.files is empty: name its files")
    found = []
    for pattern in text.files:
        if not (matching := sorted(glob.glob(pattern, recursive=True))):
            raise InputError(f"{name}.files: there is no {pattern}: fetch it first, or mend the path")
        found += [Path(path) for path in matching]
    return found


def _binary(path: Path, name: str) -> Iterator[Row]:
    if path.suffix == ".zst":
        yield from shards.read(path)
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    else:
        raise InputError(f"{name}.files: {path} is neither .jsonl, .jsonl.zst nor .parquet: convert it")


def _prompt(name: str, pool: str, place: str, row: Row) -> Prompt:
    if "messages" in row:
        messages = _asked(row, place)
    else:
        jsonl.require_texts(row, ("prompt",), place, FORM)
        messages = [{"role": "user", "content": row["prompt"]}]
    locale = row.get("locale")
    return Prompt(name, pool, messages, locale if isinstance(locale, str) else None)


def _asked(row: Row, place: str) -> list[dict[str, str]]:
    """Up to the last user turn, checked as training will (data/chat.py) with the answer that it is to get."""
    messages = row["messages"]
    users = (
        [i for i, turn in enumerate(messages) if isinstance(turn, dict) and turn.get("role") == "user"]
        if isinstance(messages, list)
        else []
    )
    if not users:
        raise InputError(f"{place}: no user turn in messages; each line must be one object like {FORM}")
    turns = chat.conversation({"messages": [*messages[: users[-1] + 1], {"role": "assistant", "content": "..."}]}, place)
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns[:-1]]
