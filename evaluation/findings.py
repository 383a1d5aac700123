"""What the scores say, in sentences: better or worse from stage to stage, which intervals overlap, trades, what wasn't learnt.

Every sentence follows from the numbers by the rules here; a difference is only called one where the intervals are apart.
"""

from dataclasses import dataclass

from evaluation.metrics.bootstrap import Estimate
from evaluation.story import Stage, Story


@dataclass(frozen=True)
class Headline:
    """A figure that stages are compared by."""

    task: str
    metric: str
    title: str
    unit: str
    digits: int
    higher_is_better: bool = True

    def of(self, stage: Stage) -> Estimate | None:
        return stage.get(self.task, self.metric)

    def show(self, value: float) -> str:
        return f"{value:.{self.digits}f}{self.unit}"


HEADLINES = (
    Headline("text", "bits_per_byte", "Held-out bits per byte", "", 2, higher_is_better=False),
    Headline("translation", "chrf", "Translation chrF++", "", 1),
    Headline("translation", "exact_match", "Translation exact match", " %", 1),
    Headline("general", "accuracy", "General accuracy", " %", 1),
)


VERDICTS = {
    "better": "better, and the intervals do not overlap",
    "worse": "worse, and the intervals do not overlap",
    "overlap": "the intervals overlap, so no difference is claimed",
}


@dataclass(frozen=True)
class Change:
    """One headline figure from one stage to the next. verdict: better | worse | overlap."""

    headline: Headline
    before: Stage
    after: Stage
    verdict: str

    @property
    def was(self) -> str:
        return self._figures(self.before)

    @property
    def now(self) -> str:
        return self._figures(self.after)

    def _figures(self, stage: Stage) -> str:
        show, found = self.headline.show, self.headline.of(stage)
        return f"{show(found.value)} [{show(found.low)}, {show(found.high)}]"

    @property
    def said(self) -> str:
        return VERDICTS[self.verdict]


def changes(before: Stage, after: Stage) -> list[Change]:
    found = []
    for headline in HEADLINES:
        a, b = headline.of(before), headline.of(after)
        if a and b:
            rose = (b.value > a.value) == headline.higher_is_better
            found.append(Change(headline, before, after, "overlap" if a.overlaps(b) else "better" if rose else "worse"))
    return found


def trade(between: list[Change]) -> str | None:
    """Said where a stage gained one thing and lost another."""
    gained = [c.headline.title for c in between if c.verdict == "better"]
    lost = [c.headline.title for c in between if c.verdict == "worse"]
    if not gained or not lost:
        return None
    return f"A trade: {between[0].after.title} gains in {_listed(gained)} and loses in {_listed(lost)}."


def beside_ngrams(story: Story, ngrams: dict[str, float]) -> list[str]:
    """Each stage's bits per byte against the n-gram models; both are means over the same locales' same texts."""
    sentences = []
    for stage in story.stages:
        if found := stage.get("text", "bits_per_byte"):
            against = [_against(found, ngrams[name], name) for name in ("unigram", "trigram")]
            sentences.append(f"{stage.title} needs {found.value:.2f} bits per byte: {against[0]}, {against[1]}.")
    return sentences


def _against(found: Estimate, yardstick: float, name: str) -> str:
    percent = 100 * (1 - found.value / yardstick)
    said = f"{abs(percent):.0f} % {'fewer' if percent > 0 else 'more'} than the {name} model's {yardstick:.2f}"
    return f"{said} (which lies inside its interval)" if found.low <= yardstick <= found.high else said


def not_learnt(story: Story, ngrams: dict[str, dict[str, float]]) -> list[str]:
    """Pairs whose last translation isn't above the untranslated source, locales whose text isn't better predicted than by frequencies."""
    last = story.stages[-1]
    pairs, locales = [], []
    for pair in story.groups("translation", "chrf", "pair"):
        found, copied = last.get("translation", "chrf", "pair", pair), last.get("translation", "copy_chrf", "pair", pair)
        if found and copied and found.low <= copied.value:
            pairs.append(f"{pair} ({found.value:.1f} [{found.low:.1f}, {found.high:.1f}] beside {copied.value:.1f})")
    for locale, yardstick in ngrams["unigram"].items():
        found = last.get("text", "bits_per_byte", "locale", locale)
        if found and found.high >= yardstick:
            locales.append(f"{locale} ({found.value:.2f} [{found.low:.2f}, {found.high:.2f}] beside {yardstick:.2f})")
    sentences = []
    if pairs:
        sentences.append(
            f"Translation not learnt, chrF++ after {last.title} not above that of the untranslated source: {', '.join(pairs)}."
        )
    if locales:
        sentences.append(f"Text not learnt, bits per byte after {last.title} not below the unigram model's: {', '.join(locales)}.")
    return sentences


def _listed(names: list[str]) -> str:
    lowered = [name[0].lower() + name[1:] for name in names]
    return lowered[0] if len(lowered) == 1 else f"{', '.join(lowered[:-1])} and {lowered[-1]}"
