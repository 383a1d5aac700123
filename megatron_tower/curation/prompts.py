"""Prompts for GRPO from public sets, human judgements and pairs of sentences, by share: each once, not too long, of no evaluation set.

    gsm8k, math, ifeval, rlvr    rows as published; kept where the reward finds their own answer right, or can check one at all
    judgements                   which translation is better                                               data/judgements.py
    pairs                        translate while obeying an instruction, as many as are asked for          data/verifiable

Pairs are read in blocks, as often as it takes; each locale gets an equal part, and what one lacks the others give. What is held of them is
a block, and of every prompt eight bytes. An item also says its `source`, and its `id`: where its row stands. Leaves out: how hard
a prompt is (tools/filter_prompts.py).  Run:  python -m tools.build_prompts
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from math import ceil
from pathlib import Path
from typing import TypeVar

from megatron_tower.config import InputError
from megatron_tower.config_prompts import PromptsConfig, PromptSourceConfig
from megatron_tower.curation import pools
from megatron_tower.curation.contamination import Contamination, texts_of
from megatron_tower.data import chat, jsonl, judgements, published, verifiable
from megatron_tower.data.locales import find
from megatron_tower.data.pair import Pair, key, plain
from megatron_tower.data.prompts import Item
from megatron_tower.rewards.pool import VerifierPool

FORMS = (*published.FORMS, "judgements", "pairs")
BLOCK = 20_000  # pairs
ASKED = 256  # prompts that rewards look at together
TURNS = 8  # readings of the pairs, each with other draws

T = TypeVar("T")
Draft = tuple[Item, tuple[str, ...]]  # an item, and what of it no evaluation set may hold


class Sieve:
    """What every prompt has to pass; `passed` counts by reason what did not."""

    def __init__(self, cfg: PromptsConfig) -> None:
        self.cfg, self.seen, self.tokenizer = cfg, set(), None
        texts = [text for path in cfg.decontaminate for text in texts_of(Path(path), "prompts.decontaminate")]
        self.known = Contamination(texts, cfg.ngram) if texts else None
        if cfg.tokenizer:
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(cfg.tokenizer, local_files_only=True, trust_remote_code=False)

    def contaminated(self, texts: Sequence[str]) -> bool:
        return self.known is not None and bool(self.known.among(*texts))

    def passed(self, drafts: Sequence[Draft], counts: Counter) -> Iterator[Item]:
        for item, texts in drafts:
            digest = hashlib.blake2b(key(item["prompt"]).encode(), digest_size=8).digest()
            if digest in self.seen:
                counts["duplicate"] += 1
            elif self.contaminated(texts):
                counts["contaminated"] += 1
            elif self.tokenizer and len(chat.prompt_ids(self.tokenizer, item["prompt"])) > self.cfg.max_prompt_tokens:
                counts["too long"] += 1
            else:
                self.seen.add(digest)
                yield item


def check(cfg: PromptsConfig) -> None:
    """Raise InputError for shares that make no whole, an unknown form, and what is not there."""
    if cfg.count < 1 or not cfg.sources:
        raise InputError(f"prompts.count={cfg.count} of {len(cfg.sources)} prompts.sources: ask for some prompts of at least one source")
    shares = [source.share for source in cfg.sources.values()]
    if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise InputError(f"the shares of prompts.sources are {', '.join(map(str, shares))}: each must be above 0, and 1 their sum")
    if missing := [path for path in cfg.decontaminate if not Path(path).is_file()]:
        raise InputError(f"prompts.decontaminate: there is no {missing[0]}: name JSONL files of evaluation sets")
    if cfg.tokenizer and not (Path(cfg.tokenizer) / "tokenizer_config.json").is_file():
        raise InputError(f"prompts.tokenizer={cfg.tokenizer} holds no tokenizer_config.json: name a folder with a tokenizer")
    for name, source in cfg.sources.items():
        if source.form not in FORMS:
            raise InputError(f"prompts.sources.{name}.form={source.form} is unknown: use one of {', '.join(FORMS)}")


def items(cfg: PromptsConfig, seed: int, counts: dict[str, Counter]) -> Iterator[Item]:
    """`cfg.count` items, source by source; `counts` hears by source what was left out, and what is kept. Raises InputError for too few."""
    sieve = Sieve(cfg)
    for name, source in cfg.sources.items():
        wanted, of = round(cfg.count * source.share), counts.setdefault(name, Counter())
        made = _translation(name, cfg, wanted, sieve, of, seed) if source.form == "pairs" else _finite(name, cfg, wanted, sieve, of, seed)
        for item in made:
            of["kept"] += 1
            yield item
        if of["kept"] < wanted:
            told = ", ".join(f"{count} {what}" for what, count in of.items())
            raise InputError(f"prompts.sources.{name} has not the {wanted} prompts of its share ({told}): lower its share or prompts.count")


def _finite(name: str, cfg: PromptsConfig, wanted: int, sieve: Sieve, counts: Counter, seed: int) -> Iterator[Item]:
    """Those of a set whose ids have the least hashes."""
    source = cfg.sources[name]
    drafts = list(_judged(name, source, seed) if source.form == "judgements" else _published(name, source, counts))
    counts["read"] += len(drafts)
    drafts.sort(key=lambda draft: hashlib.sha256(f"{seed}/{draft[0]['id']}".encode()).digest())
    made = 0
    with VerifierPool(cfg.processes, cfg.timeout) as pool:
        for block in _blocks(drafts, ASKED):
            fresh = list(sieve.passed(block, counts))
            for item in _checkable(fresh, pool, counts) if source.form in published.FORMS else fresh:
                if made == wanted:
                    return
                made += 1
                yield item


def _published(name: str, source: PromptSourceConfig, counts: Counter) -> Iterator[Draft]:
    inside = os.path.commonpath([path.parent for path in pools.files(source, f"prompts.sources.{name}")])
    for place, row in pools.rows(source, f"prompts.sources.{name}"):
        item = published.FORMS[source.form](row, place)
        if item is None:
            counts["no checker for its instruction"] += 1
        else:
            yield _tagged(item, name, f"{name}/{os.path.relpath(place, inside)}"), (item["prompt"],)


def _judged(name: str, source: PromptSourceConfig, seed: int) -> Iterator[Draft]:
    for path in pools.files(source, f"prompts.sources.{name}"):
        for number, judgement in enumerate(judgements.read(path), 1):
            texts = (judgement.source, *(text for text, _ in judgement.translations))
            for nth, item in enumerate(judgements.items(judgement, seed=seed), 1):
                yield _tagged(item, name, f"{name}/{path.name}:segment {number}.{nth}"), texts


def _tagged(item: Item, name: str, place: str) -> Item:
    return {"id": place, "source": name, **item}


def _checkable(found: Sequence[Item], pool: VerifierPool, counts: Counter) -> Iterator[Item]:
    """Items whose reward gives their own answer 1, or any answer a score where they have none."""
    for item, verdict in zip(found, pool.score([(item, item["answer"] or "OK") for item in found]), strict=True):
        if verdict.score is None:
            if verdict.problem != "timeout" and not counts["its reward can't check it"]:
                print(f"the first prompt of {item['source']} that its reward can't check: {item['id']}: {verdict.problem}", flush=True)
            counts["its check timed out" if verdict.problem == "timeout" else "its reward can't check it"] += 1
        elif item["answer"] and verdict.score < 1:
            counts["its reward rejects its answer"] += 1
        else:
            yield item


def _translation(name: str, cfg: PromptsConfig, wanted: int, sieve: Sieve, counts: Counter, seed: int) -> Iterator[Item]:
    """Verifiable translations of as many pairs as there are, in equal parts from each locale."""
    source, shares = cfg.sources[name], {"composed": cfg.composed, "own_language": cfg.own_language}
    totals = Counter(pair.locale for pair in _pairs(name, source, counts))
    made = turn = 0
    while made < wanted and turn < TURNS:
        before, seen, of = made, Counter(), Counter()
        part = (wanted - made) / max(len(totals), 1)  # of a locale, in this turn
        for index, block in enumerate(_blocks(_pairs(name, source, Counter()), BLOCK)):
            for code, pairs in _by_locale(block).items():
                seen[code] += len(pairs)
                clean = [pair for pair in pairs if not sieve.contaminated((pair.source, pair.target))]
                counts["contaminated pair"] += (len(pairs) - len(clean)) if not turn else 0
                due = ceil(part * seen[code] / totals[code]) - of[code]
                drawn = int.from_bytes(hashlib.sha256(f"{seed}/{name}/{turn}/{index}/{code}".encode()).digest()[:8])
                found = verifiable.generate(clean, due, drawn, families=cfg.families or None, **shares)
                for item in sieve.passed([(_tagged(item, name, _made_of(item)), ()) for item in found], counts):
                    if made == wanted:
                        return
                    made += 1
                    of[code] += 1
                    yield item
        turn = turn + 1 if made > before else TURNS


def _pairs(name: str, source: PromptSourceConfig, counts: Counter) -> Iterator[Pair]:
    """Pairs with English of `{"source", "target", "source_locale", "target_locale"}`, as curation writes them; others are counted."""
    form = '{"source": "...", "target": "...", "source_locale": "en", "target_locale": "de_DE"}'
    for place, row in pools.rows(source, f"prompts.sources.{name}"):
        jsonl.require_texts(row, ("source", "target", "source_locale", "target_locale"), place, form)
        try:
            codes = [_code(row[side]) for side in ("source_locale", "target_locale")]
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
        texts = [plain(row["source"]), plain(row["target"])]
        counts["pairs"] += 1
        if codes.count("en") != 1:
            counts["pair without English"] += 1
            continue
        english = codes.index("en")
        yield Pair(codes[1 - english], texts[english], texts[1 - english], str(row.get("id") or place))


@lru_cache
def _code(word: str) -> str:
    return find(word).code


def _made_of(item: Item) -> str:
    """The pair's own id, and what tells its prompts apart."""
    return f"{item['origin']}#{hashlib.blake2b(item['prompt'].encode(), digest_size=4).hexdigest()}"


def _blocks(found: Iterable[T], size: int) -> Iterator[list[T]]:
    found = iter(found)
    while block := list(islice(found, size)):
        yield block


def _by_locale(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(pair.locale, []).append(pair)
    return dict(sorted(found.items()))
