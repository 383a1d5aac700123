"""The prompts of GRPO and the pairs of preference optimisation, from the same text that SFT learns from.

    translation    translate while obeying an instruction       (data/verifiable)
    preference     which of two translations is better           (data/judgements, a reference against a damaged copy)
    maths          a number as answer                            (data/instructions)
    instructions   IFEval's checkers on simple requests          (data/instructions), and on two that SFT has never seen

A stand-in for the recipe's GSM8K, MATH, IFEval prompts and human judgements. Leaves out: reading those; scoring (`rewards/`).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from megatron_tower.config import DataConfig, InputError
from megatron_tower.data import instructions, judgements, verifiable
from megatron_tower.data.damage import damage
from megatron_tower.data.examples import Example
from megatron_tower.data.pair import Pair
from megatron_tower.data.prompts import REWARDS, Item
from megatron_tower.data.split import is_held_out
from megatron_tower.data.templates import translation_prompt

MATHS = ("add", "subtract", "count", "larger")
INSTRUCTIONS = ("repeat", "without")
UNSEEN = 0.6  # of the instructions: those without a reference answer, which only trying teaches   ours


def prompts(data: DataConfig, pairs: Sequence[Pair], count: int, held_out: bool) -> list[Item]:
    """`count` items by `data.rl_shares`, in random order, the same for the same seed.

    Fewer on the held-out side when the pairs run dry; InputError for training prompts, and for shares that make no whole.
    """
    if set(data.rl_shares) != set(REWARDS) or abs(sum(data.rl_shares.values()) - 1) > 1e-6 or min(data.rl_shares.values()) < 0:
        raise InputError(f"data.rl_shares={data.rl_shares} must give each of {', '.join(REWARDS)} a share, 1 in all")
    seed = f"{data.seed}/{held_out}"
    makers: dict[str, Callable[[int], list[Item]]] = {
        "translation": lambda n: translation(data, pairs, n, data.seed + held_out),
        "preference": lambda n: _preference(pairs, n, random.Random(f"{seed}/preference")),
        "maths": lambda n: _general(MATHS, _maths, data, n, held_out),
        "instructions": lambda n: [
            *_general(INSTRUCTIONS, _instructions, data, n - round(n * UNSEEN), held_out),
            *_unseen(data, round(n * UNSEEN), held_out),
        ],
    }
    found = []
    for name, make in makers.items():
        wanted = round(count * data.rl_shares[name])
        items = make(wanted) if wanted else []
        if len(items) < wanted and not held_out:
            raise InputError(f"only {len(items)} of {wanted} {name} prompts can be made: lower data.rl_prompts, or add locales and kinds")
        found += items
    random.Random(f"{seed}/order").shuffle(found)
    return found


def translation(data: DataConfig, pairs: Sequence[Pair], count: int, seed: int) -> list[Item]:
    """Verifiable translation items of `data.verifiable_families`, from pairs of `data.verifiable_kinds` (of all, where none is named)."""
    families, kinds = data.verifiable_families or None, data.verifiable_kinds
    chosen = [pair for pair in pairs if not kinds or pair.kind in kinds]
    shares = {"composed": data.verifiable_composed, "own_language": data.verifiable_own_language}
    return verifiable.generate(chosen, count, seed, families=families, **shares)


def preferences(data: DataConfig, pairs: Sequence[Pair], count: int, seed: int) -> list[dict]:
    """`count` pairs, half of them a translation against a damaged copy, both ways, half an answer that keeps its instruction against one
    that breaks it; fewer when the pairs run dry. What human judgements and post-edits of a weak system look like.
    """
    rng = random.Random(f"{seed}/preferences")
    rows = list(islice(_against_damage(pairs, rng), count - count // 2))
    for item in translation(data, pairs, count // 2, seed + 3):
        broken = {name: text for name, text in verifiable.damaged(item, rng).items() if name.split(".")[0] in item["family"].split("+")}
        if broken:
            rejected = broken[rng.choice(sorted(broken))]
            rows.append(_pair("instructed", item["locale"], item["prompt"], item["answer"], rejected))
    rng.shuffle(rows)
    return rows


def _against_damage(pairs: Sequence[Pair], rng: random.Random) -> Iterator[dict]:
    for pair in _endless(pairs, rng):
        sides = [("en", pair.source), (pair.locale, pair.target)]
        (source, text), (target, chosen) = sides if rng.random() < 0.5 else reversed(sides)
        if rejected := damage(chosen, rng):
            yield _pair(pair.kind, pair.locale, translation_prompt(source, target, text), chosen, rejected)


def _pair(kind: str, locale: str, prompt: str, chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "kind": kind, "locale": locale, "origin": "off_policy"}


def _preference(pairs: Sequence[Pair], count: int, rng: random.Random) -> list[Item]:
    found: dict[str, Item] = {}
    for pair in _endless(pairs, rng):
        if len(found) == count:
            break
        if judgement := judgements.against_damaged(pair, rng):
            found |= {item["prompt"]: item for item in judgements.items(judgement)}
    return list(found.values())


def _endless(pairs: Sequence[Pair], rng: random.Random) -> Iterator[Pair]:
    """Four times over the pairs, each time in another order."""
    return (pair for _ in range(4) for pair in rng.sample(pairs, len(pairs)))


def _general(kinds: Sequence[str], item: Callable[[Example], Item], data: DataConfig, count: int, held_out: bool) -> list[Item]:
    examples = instructions.generate(list(kinds), count, data.seed, held_out, data.held_out)
    return [item(example) for example in examples]


def _maths(example: Example) -> Item:
    return _item(example, "maths", {"answer": example.answer})


def _instructions(example: Example) -> Item:
    """What must be there, what must not, and how many words at most, in IFEval's terms."""
    words = example.answer.split()
    found: list[tuple[str, dict]] = [("length_constraints:number_words", {"relation": "less than", "num_words": len(words) + 1})]
    if example.kind == "repeat":
        times = len(words) // len(dict.fromkeys(words))
        found += [("keywords:frequency", {"relation": "at least", "keyword": word, "frequency": times}) for word in dict.fromkeys(words)]
    else:
        asked, _, listed = example.prompt.removeprefix("Leave out ").partition(": ")
        found.append(("keywords:existence", {"keywords": [word for word in listed.split() if word != asked]}))
        found.append(("keywords:forbidden_words", {"forbidden_words": [asked]}))
    names, arguments = zip(*found, strict=True)
    return _item(example, "instructions", {"instruction_ids": list(names), "kwargs": list(arguments)})


def _unseen(data: DataConfig, count: int, held_out: bool) -> list[Item]:
    """A number of words at least, or a word that must be there, about a list of words; the list says which side it is on."""
    rng = random.Random(f"{data.seed}/{held_out}/unseen")
    found: dict[str, Item] = {}
    while len(found) < count:
        about, words, number = instructions.some_words(rng), instructions.some_words(rng), rng.randint(5, 12)
        subject, asked = " ".join(about), words[0]
        if is_held_out(f"unseen: {subject}", data.held_out) != held_out or asked in about:
            continue
        if rng.random() < 0.5:
            family, prompt = "words", f"Describe {subject} in at least {number} words."
            check = ("length_constraints:number_words", {"relation": "at least", "num_words": number})
        else:
            family, prompt = "keyword", f"Describe {subject} with the word {asked}."
            check = ("keywords:existence", {"keywords": [asked]})
        spec = {"instruction_ids": [check[0]], "kwargs": [check[1]]}
        item = {"prompt": prompt, "reward": "instructions", "family": f"instructions_{family}", "locale": "en"}
        found.setdefault(prompt, item | {"answer": None, "check": spec})
    return list(found.values())


def _item(example: Example, reward: str, check: dict) -> Item:
    return {
        "prompt": example.prompt,
        "reward": reward,
        "family": f"{reward}_{example.kind}",
        "locale": example.locale,
        "answer": example.answer,
        "check": check,
    }
