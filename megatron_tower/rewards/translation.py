"""Reward of a verifiable translation: how much of the instruction is kept, times how near the translation is.

    score = gates * (share of constraints kept) * adequacy,   in [0, 1]; the reference answer has 1

    adequacy   clamp((chrF - floor) / (ceiling - floor), 0, 1) by sentence-level chrF (sacrebleu, 0-1) to the reference, on the
               translation inside JSON. Constraints alone are kept by a constant output ("Answer in capitals": "OK"), hence
               this factor. floor = max(0.2, chrF of the source): what unrelated text or an untranslated copy has by chance is
               worth nothing. ceiling = 0.7, where other good translations lie, or half way from the floor to 1 if that is
               more, since chrF cannot ask for the one wording. 1 where the item has no reference (users' own data).
    gates      0 for an empty answer, for the source again, for another script or language than the target's, and for an
               answer that runs on (longer than 3 references + 20 characters).
    constraints  each item has `bare` among them: talk before or after, a code fence, the source or the translation once
               more lower the share. All constraints weigh the same.

Leaves out: learned metrics (COMET), which would be the headline metric of the same run.
"""

from functools import lru_cache

from sacrebleu.metrics import CHRF

from megatron_tower.data.language import MIN_DETECTABLE, confusable, identify
from megatron_tower.data.locales import locale
from megatron_tower.data.pair import key, plain
from megatron_tower.data.split import words
from megatron_tower.data.verifiable import case_of, kept
from megatron_tower.data.verifiable.shape import undressed
from megatron_tower.data.verifiable.writing import script, share_in_script

FLOOR, CEILING = 0.2, 0.7  # chrF of unrelated text in the same language, and of other good translations   ours
HIGHEST_FLOOR = 0.95  # where source and reference are all but the same
SURE = 0.5  # how sure the detector must be of another language


def score(item: dict, answer: str) -> float:
    """In [0, 1]: 0 for what is no translation, 1 for one that keeps every constraint. Raises InputError for a malformed check."""
    case = case_of(item)
    text = undressed(case, answer)
    if not plain(text) or _is_copy(text, case) or _runs_on(answer, item):
        return 0.0
    near = _adequacy(text, case)
    if near == 0 or _is_foreign(text, case):
        return 0.0
    keeps = kept(case, answer)
    return near * sum(keeps) / len(keeps)


def warm_up() -> None:
    """Load the language detector, so that the first answer does not wait for it."""
    identify("warm")


def _is_copy(text: str, case: dict) -> bool:
    """The source again, but for case and spaces or but for punctuation, where the reference is not."""
    return any(form(text) == form(case["source"]) != form(case["reference"] or "") for form in (key, words))


def _runs_on(answer: str, item: dict) -> bool:
    model = item.get("answer") or item["check"]["reference"]
    return model is not None and len(answer) > 3 * len(model) + 20


def _adequacy(text: str, case: dict) -> float:
    if case["reference"] is None:
        return 1.0
    floor = min(max(FLOOR, _chrf(case["source"], case["reference"])), HIGHEST_FLOOR)
    ceiling = max(CEILING, (1 + floor) / 2)
    return min(1.0, max(0.0, (_chrf(text, case["reference"]) - floor) / (ceiling - floor)))


@lru_cache(maxsize=4096)
def _chrf(text: str, reference: str) -> float:
    return _metric().sentence_score(plain(text), [plain(reference)]).score / 100


@lru_cache(maxsize=1)
def _metric() -> CHRF:
    return CHRF()


def _is_foreign(text: str, case: dict) -> bool:
    """Mostly in letters of another script than the target's and the reference's; or surely in another language.

    The language is that of the words which the reference does not have (a date or a name asked for tells nothing), judged
    where there are enough of them and the detector is right about the reference.
    """
    reference, code = case["reference"] or "", case["target_locale"]
    own, expected = share_in_script(text, script(code)), share_in_script(reference, script(code))
    if own is not None and own < 0.5 and (expected is None or expected >= 0.5):
        return True
    known = set(key(reference).split())
    rest = " ".join(word for word in key(text).split() if word not in known)
    wanted = locale(code).language
    if len(rest) < MIN_DETECTABLE or (reference and not confusable(identify(key(reference))[0], wanted)):
        return False
    label, sure = identify(rest)
    return sure >= SURE and not confusable(label, wanted)
