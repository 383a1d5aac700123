"""General instructions with a checkable answer: operations on short lists of words and on small numbers, in English.

A stand-in for the recipe's 78 % of general chat, code and maths, which come from licensed corpora and large models' answers.
Every instruction is drawn from a fixed vocabulary, so that a small model can learn the operation; what is held out is the
combination of words or numbers, never the words. Leaves out: other languages, several turns.
"""

import random
from collections.abc import Callable, Iterator

from megatron_tower.config import InputError
from megatron_tower.data.examples import Example
from megatron_tower.data.split import is_held_out

# fmt: off
_WORDS = [  # common, of different lengths
    "ant", "apple", "bear", "bird", "blue", "boat", "bread", "bridge", "candle", "castle", "chair", "cloud", "cow", "desert",
    "dog", "door", "elephant", "engine", "fish", "flower", "forest", "garden", "glass", "green", "hat", "honey", "horse", "house",
    "island", "key", "lamp", "lemon", "lion", "milk", "mirror", "monkey", "moon", "mountain", "night", "ocean", "orange", "paper",
    "pencil", "piano", "queen", "rain", "red", "river", "rose", "salt", "sea", "shadow", "silver", "snow", "star", "stone",
    "summer", "sun", "table", "tiger", "tree", "umbrella", "village", "water", "window", "winter", "wolf", "yellow",
]
# fmt: on

Task = tuple[str, str, str]  # what it is asked about, the instruction, the answer


def some_words(rng: random.Random) -> list[str]:
    """One to three words of the vocabulary."""
    return _list(rng, 1, 3)


def _list(rng: random.Random, fewest: int = 2, most: int = 5) -> list[str]:
    return rng.sample(_WORDS, rng.randint(fewest, most))


def _about(words: list[str], instruction: str, answer: str) -> Task:
    return " ".join(words), f"{instruction}: {' '.join(words)}", answer


def _upper_case(rng: random.Random) -> Task:
    words = _list(rng, 1, 3)
    return _about(words, "Write in capital letters", " ".join(words).upper())


def _first_word(rng: random.Random) -> Task:
    words = _list(rng)
    return _about(words, "Copy the first word", words[0])


def _last_word(rng: random.Random) -> Task:
    words = _list(rng)
    return _about(words, "Copy the last word", words[-1])


def _reverse(rng: random.Random) -> Task:
    words = _list(rng, 2, 4)
    return _about(words, "Reverse the order of the words", " ".join(reversed(words)))


def _sort(rng: random.Random) -> Task:
    words = _list(rng, 2, 3)
    return _about(words, "Sort the words from A to Z", " ".join(sorted(words)))


def _count(rng: random.Random) -> Task:
    words = _list(rng, 1, 7)
    return _about(words, "Count the words", str(len(words)))


def _longest(rng: random.Random) -> Task:
    words = _list(rng, 2, 3)
    while [len(w) for w in words].count(max(map(len, words))) > 1:
        words = _list(rng, 2, 3)
    return _about(words, "Copy the longest word", max(words, key=len))


def _commas(rng: random.Random) -> Task:
    words = _list(rng)
    return _about(words, "Put commas between the words", ", ".join(words))


def _initials(rng: random.Random) -> Task:
    words = _list(rng, 2, 4)
    return _about(words, "Give the first letter of each word", " ".join(w[0] for w in words))


def _spell(rng: random.Random) -> Task:
    words = _list(rng, 2, 2)
    return _about(words, "Spell the words", " / ".join("-".join(w) for w in words))


def _repeat(rng: random.Random) -> Task:
    word, times = " ".join(_list(rng, 1, 2)), rng.randint(2, 5)
    return f"{word} {times}", f"Repeat {times} times: {word}", " ".join([word] * times)


def _without(rng: random.Random) -> Task:
    words = _list(rng, 3, 4)
    gone = rng.choice(words)
    return f"{gone} {' '.join(words)}", f"Leave out {gone}: {' '.join(words)}", " ".join(w for w in words if w != gone)


def _contains(rng: random.Random) -> Task:
    words = _list(rng, 3, 4)
    asked = rng.choice((rng.choice(words), rng.choice(_WORDS)))
    return f"{asked} {' '.join(words)}", f"Is {asked} in this list? {' '.join(words)}", "yes" if asked in words else "no"


def _larger(rng: random.Random) -> Task:
    a, b = rng.sample(range(10, 1000), 2)
    return f"{a} {b}", f"Which number is larger, {a} or {b}?", str(max(a, b))


def _add(rng: random.Random) -> Task:
    a, b = rng.randint(1, 20), rng.randint(1, 20)
    return f"{a} {b}", f"What is {a} plus {b}?", str(a + b)


def _subtract(rng: random.Random) -> Task:
    b, rest = rng.randint(1, 20), rng.randint(0, 20)
    return f"{b + rest} {b}", f"What is {b + rest} minus {b}?", str(rest)


_KINDS: dict[str, Callable[[random.Random], Task]] = {
    "upper_case": _upper_case,
    "first_word": _first_word,
    "last_word": _last_word,
    "reverse": _reverse,
    "sort": _sort,
    "count": _count,
    "longest": _longest,
    "commas": _commas,
    "initials": _initials,
    "spell": _spell,
    "repeat": _repeat,
    "without": _without,
    "contains": _contains,
    "larger": _larger,
    "add": _add,
    "subtract": _subtract,
}
KINDS = tuple(_KINDS)


def generate(kinds: list[str], count: int, seed: int, held_out: bool, share: float) -> list[Example]:
    """`count` distinct instructions of the held-out or the training side, kinds in turn; the same for the same seed.

    Fewer when the kinds run dry. Raises InputError for an unknown kind.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(f"data.instruction_kinds={unknown[0]} is unknown: use some of {', '.join(KINDS)}")
    streams = [_stream(kind, random.Random(f"{seed}/{kind}/{held_out}"), held_out, share) for kind in kinds]
    examples: list[Example] = []
    while streams and len(examples) < count:
        for stream in list(streams):
            if (example := next(stream, None)) is None:
                streams.remove(stream)
            elif len(examples) < count:
                examples.append(example)
    return examples


def _stream(kind: str, rng: random.Random, held_out: bool, share: float) -> Iterator[Example]:
    """Distinct instructions of one kind on one side, until a thousand draws bring nothing new."""
    seen: set[str] = set()
    misses = 0
    while misses < 1000:
        about, prompt, answer = _KINDS[kind](rng)
        if is_held_out(f"{kind}: {about}", share) == held_out and prompt not in seen:
            seen.add(prompt)
            misses = 0
            yield Example(prompt, answer, "general", kind, "en")
        else:
            misses += 1
