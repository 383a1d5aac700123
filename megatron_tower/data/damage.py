"""A translation with one fault, for tasks that need a worse one. Leaves out: the errors that systems really make."""

import random


def damage(text: str, rng: random.Random) -> str | None:
    """The text with one fault: a digit changed, a word lost, or two neighbours swapped; None for one that is too short."""
    digits = [i for i, c in enumerate(text) if c in "0123456789"]
    if digits and rng.random() < 0.5:
        i = rng.choice(digits)
        return text[:i] + str((int(text[i]) + rng.randint(1, 9)) % 10) + text[i + 1 :]
    parts = text.split(" ") if text.count(" ") > 1 else list(text)
    if len(parts) < 3:
        return None
    i = rng.randrange(len(parts) - 1)
    swapped = [*parts[:i], parts[i + 1], parts[i], *parts[i + 2 :]]
    lost = parts[:i] + parts[i + 1 :]
    damaged = (" " if " " in text and text.count(" ") > 1 else "").join(rng.choice((swapped, lost)))
    return damaged if damaged != text else None
