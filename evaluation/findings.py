"""What the scores say, in sentences: better or worse from stage to stage, trades, what a stage was for, what wasn't learnt.

Every sentence follows from the numbers by the rules here. Two stages are compared on the same items: a difference is only called
one where the paired bootstrap's interval of it leaves out 0.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from numpy.typing import NDArray

from evaluation.held_out import Row
from evaluation.metrics.bootstrap import Estimate, Resampling, Value, counted, difference, percent, ratio
from evaluation.metrics.translation import chrf
from evaluation.story import Stage, Story
from evaluation.tasks.general import right_answers
from evaluation.tasks.preference import wins
from evaluation.tasks.task import Answer
from evaluation.tasks.text import locale_sums
from evaluation.tasks.translation import exact_matches, pair_counts
from evaluation.tasks.verifiable import problems, rewards

Items = Callable[[Sequence[Row], Sequence[Answer]], Sequence]


@dataclass(frozen=True)
class Headline:
    """A figure that stages are compared by: `value` of the sums of `strata`, what each item contributes to it."""

    task: str
    metric: str
    title: str
    unit: str
    digits: int
    strata: Callable[[Sequence[Row], Sequence[Answer]], list[NDArray]]
    value: Value = percent
    higher_is_better: bool = True

    def of(self, stage: Stage) -> Estimate | None:
        return stage.get(self.task, self.metric)

    def show(self, value: float) -> str:
        return f"{value:.{self.digits}f}{self.unit}"


def _one(items: Items) -> Callable[[Sequence[Row], Sequence[Answer]], list[NDArray]]:
    """All items as one stratum, each counting its value."""
    return lambda rows, answers: [counted(items(rows, answers))]


HEADLINES = (
    Headline(
        "text",
        "bits_per_byte",
        "Held-out bits per byte",
        "",
        2,
        lambda rows, answers: list(locale_sums(rows, answers).values()),
        ratio,
        higher_is_better=False,
    ),
    Headline("translation", "chrf", "Translation chrF++", "", 1, pair_counts, chrf),
    Headline("translation", "exact_match", "Translation exact match", " %", 1, _one(exact_matches)),
    Headline("general", "accuracy", "General accuracy", " %", 1, _one(right_answers)),
    Headline("preference", "accuracy", "Preference accuracy", " %", 1, _one(wins)),
    Headline("verifiable", "reward", "Mean verifiable reward", " %", 1, _one(rewards)),
)
AIMS = {"wpo": "preference", "grpo": "verifiable"}  # phase -> the task that it is trained for


@dataclass(frozen=True)
class Change:
    """One headline figure from one stage to the next, and by how much it changed on the items that both answered."""

    headline: Headline
    before: Stage
    after: Stage
    by: Estimate

    @property
    def verdict(self) -> str:
        """better | worse | same: by the interval as it is shown, so that none that reads 0.00 is called a difference."""
        if round(self.by.low, self.headline.digits) <= 0 <= round(self.by.high, self.headline.digits):
            return "same"
        return "better" if (self.by.value > 0) == self.headline.higher_is_better else "worse"

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
        value, low, high = self._signed
        claim = "no difference is claimed" if self.verdict == "same" else self.verdict
        return f"difference {value} [{low}, {high}], {claim}"

    @property
    def claim(self) -> str:
        """The same as a sentence of its own."""
        value, low, high = self._signed
        rose = "did not change" if self.verdict == "same" else "raised" if self.by.value > 0 else "lowered"
        show, was, now = self.headline.show, self.headline.of(self.before), self.headline.of(self.after)
        return (
            f"{self.after.title} {rose} {_lowered(self.headline.title)}{' measurably' if self.verdict == 'same' else ''}: "
            f"from {show(was.value)} to {show(now.value)} "
            f"(difference {value}, {100 * self.after.scores['settings']['confidence']:g} % interval [{low}, {high}])."
        )

    @property
    def _signed(self) -> list[str]:
        digits = self.headline.digits
        rounded = [round(x, digits) + 0.0 for x in (self.by.value, self.by.low, self.by.high)]  # + 0.0: no negative zero
        return [f"{x:+.{digits}f}".replace("-", "−") for x in rounded]


def changes(story: Story) -> list[list[Change]]:
    """For each two stages that follow one another, every headline figure that both have."""
    between: list[list[Change]] = [[] for _ in story.stages[1:]]
    settings = story.stages[0].scores["settings"]
    how = Resampling(settings["bootstrap_samples"], settings["confidence"], settings["seed"])
    for headline in HEADLINES:
        strata = [headline.strata(s.lines(headline.task), s.lines(headline.task)) if headline.of(s) else None for s in story.stages]
        for i, found in enumerate(between):
            if strata[i] is None or strata[i + 1] is None:
                continue
            if by := difference(strata[i], strata[i + 1], headline.value, how):
                found.append(Change(headline, story.stages[i], story.stages[i + 1], by))
    return between


def aims(between: list[list[Change]]) -> list[str]:
    """Whether each stage did what it is for."""
    return [change.claim for found in between for change in found if AIMS.get(change.after.name) == change.headline.task]


def trade(found: list[Change]) -> str:
    """What a stage gained and what it lost."""
    gained, lost = ([c.headline.title for c in found if c.verdict == verdict] for verdict in ("better", "worse"))
    after = found[0].after.title
    if gained and lost:
        return f"A trade: {after} gains in {_listed(gained)} and loses in {_listed(lost)}."
    if gained:
        return f"{after} gains in {_listed(gained)}; no loss is measured."
    if lost:
        return f"{after} loses in {_listed(lost)}; no gain is measured."
    return f"{after} changes none of these figures measurably."


def unjudged(story: Story) -> list[str]:
    """Answers to verifiable items that got no verdict, by stage and problem."""
    sentences = []
    for stage in story.stages:
        met = Counter(problem for problem in problems(stage.lines("verifiable")) if problem)
        if met:
            named = ", ".join(f"{problem} {count}" for problem, count in sorted(met.items()))
            sentences.append(
                f"{met.total()} of {stage.scores['items']['verifiable']} verifiable answers of {stage.title} have no verdict "
                f"({named}): they are left out of its mean reward."
            )
    return sentences


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
    lowered = [_lowered(name) for name in names]
    return lowered[0] if len(lowered) == 1 else f"{', '.join(lowered[:-1])} and {lowered[-1]}"


def _lowered(name: str) -> str:
    return name[0].lower() + name[1:]
