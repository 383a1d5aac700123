"""Instruction following: the share of an item's instructions that lm-eval's IFEval checkers find followed (strict).

    {"reward": "instructions", "check": {"instruction_ids": ["punctuation:no_comma"], "kwargs": [{}]}}

IFEval's `instruction_id_list` and open-instruct's `instruction_id` are accepted for `instruction_ids`; null kwargs don't count.
Checkers replace what is missing or impossible by random values: such items are refused. Two checkers count with NLTK's punkt_tab:

    python -c "from pathlib import Path; from megatron_tower.rewards.instructions import fetch_punkt; fetch_punkt(Path('CACHE'))"

puts it into a cache folder, found through `NLTK_DATA=CACHE/nltk_data` or in the default cache.
Ids that begin with `es:` or `ca:` are lm-eval's Spanish and Catalan checkers, which need spaCy; it has none for other languages, and
`validate` says which of IFEval's own do not serve them.
Leaves out: IFEval's prompts. Its own strict and loose judgements are `followed`, for the benchmark.
"""

import contextlib
import os
import random
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from pathlib import Path, PurePosixPath
from types import ModuleType

from megatron_tower.config import InputError

# IFEval's checkers count English sentences. This wheel carries NLTK's own data, which its package does not.
PUNKT = ("llama-index-core", "0.14.25", "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab")
_NEED_PUNKT = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
OWN = ("es", "ca")  # languages with checkers of their own
_ENGLISH = (*_NEED_PUNKT, "detectable_format:constrained_response", "change_case:english_capital", "change_case:english_lowercase")
# These know words between spaces, of letters without marks, and the comma ",": not all scripts have such.
_SPACED = (
    "length_constraints:number_words",
    "length_constraints:nth_paragraph_first_word",
    "keywords:forbidden_words",
    "punctuation:no_comma",
)
_SCRIPTS = ("Latn", "Cyrl", "Grek", "Hebr", "Kore")  # that have
_LISTS = ("keywords", "forbidden_words")  # of words; lm-eval would take a text for its letters
_NAMES = ("instruction_ids", "instruction_id_list", "instruction_id")
_LETTER = re.compile(r"[^\W\d_]")


def fetch_punkt(cache: Path) -> Path:
    """`cache/nltk_data` with punkt_tab's English in it, its wheel downloaded once; raises InputError where that can't be done."""
    from megatron_tower.data.sources import fetch

    data = cache / "nltk_data"
    final = data / "tokenizers" / "punkt_tab"
    if not final.is_dir():
        name, version, inside = PUNKT
        wheel = fetch(name, version, cache)
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data, prefix=".extract-") as folder, zipfile.ZipFile(wheel) as archive:
            whole = Path(folder) / "punkt_tab"
            for member in archive.namelist():
                path = PurePosixPath(member)
                if member.startswith(f"{inside}/english/") or member == f"{inside}/README":
                    target = whole / path.relative_to(inside)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as source, target.open("wb") as file:
                        shutil.copyfileobj(source, file)
            whole.rename(final)
    return data


def warm_up() -> None:
    """Import lm-eval's checkers (seconds) and load langdetect's profiles."""
    _registry()
    import langdetect

    langdetect.detect("A sentence in some language.")


def score(item: dict, answer: str) -> float:
    """Instructions followed / instructions, in [0, 1]; 0 for an empty answer. Raises InputError for an item it can't check."""
    checkers = _checkers(item.get("check"))
    if not answer.strip():
        return 0.0
    return sum(_follows(name, checker, answer) for name, checker in checkers) / len(checkers)


def validate(item: dict, language: str = "en") -> None:
    """Raises InputError for an item that `score` can't check, or not in answers of that language (en, pt_BR, ...)."""
    names = {name for name, _ in _checkers(item.get("check"))}
    base = re.split("[-_]", language)[0]
    other = base != "en" and names & {*_ENGLISH, *(() if _script(base) in _SCRIPTS else _SPACED)}
    if other:
        raise InputError(
            f"{', '.join(sorted(other))}: IFEval's checker does not serve {language}; lm-eval has others for {' and '.join(OWN)} alone "
            f"({OWN[0]}:...): drop the row"
        )


def followed(prompt: str, check: dict, answer: str) -> dict[str, list[bool]]:
    """{"strict", "loose"}: of each instruction whether lm-eval's IFEval finds it followed. `check` has passed `validate`."""
    utils = import_module(f"{_package(_own(check['instruction_ids'][0]))}.utils")
    asked = utils.InputExample(0, check["instruction_ids"], prompt, check["kwargs"])
    strict, loose = utils.test_instruction_following_strict(asked, answer), utils.test_instruction_following_loose(asked, answer)
    return {"strict": strict.follow_instruction_list, "loose": loose.follow_instruction_list}


def _follows(name: str, checker: object, answer: str) -> bool:
    """Whether one instruction is followed. A text without letters is in no language (langdetect gives up, lm-eval then says yes)."""
    if name.endswith("language:response_language") and not _LETTER.search(answer):
        return False
    try:
        return bool(checker.check_following(answer))
    except re.error as error:  # lm-eval takes keywords for regular expressions
        raise InputError(f"{name}: a keyword is no regular expression ({error}): escape it") from error


def _checkers(check: object) -> list[tuple[str, object]]:
    """Each instruction's name and its checker, set up as the item says."""
    ids = next((check[name] for name in _NAMES if name in check), None) if isinstance(check, dict) else None
    kwargs = check.get("kwargs") if isinstance(check, dict) else None
    if not ids or not isinstance(ids, list) or not isinstance(kwargs, list) or len(ids) != len(kwargs):
        raise InputError(f"an instructions item needs check: instruction_ids and kwargs, two lists of one length, not {check!r}")
    if len({_own(name) for name in ids}) > 1:
        raise InputError(
            f"instructions {', '.join(map(str, ids))} are for checkers of several languages: give each language an item of its own"
        )
    return [(name, _checker(name, given)) for name, given in zip(ids, kwargs, strict=True)]


def _own(name: object) -> str | None:
    """The language whose own checkers an instruction is for."""
    return next((language for language in OWN if str(name).startswith(f"{language}:")), None)


def _script(language: str) -> str | None:
    from babel.core import get_global

    return get_global("likely_subtags").get(language, "_").split("_")[1]


def _checker(name: str, given: dict | None) -> object:
    known = import_module(f"{_package(_own(name))}.instructions_registry").INSTRUCTION_DICT
    if name not in known:
        raise InputError(f"instruction {name!r} is unknown to IFEval: use one of {', '.join(sorted(known))}")
    if not isinstance(given, dict | None):
        raise InputError(f"{name}: kwargs must be an object, not {given!r}")
    if name in _NEED_PUNKT:
        _require_punkt(name)
    checker = known[name](name)
    needed = set(checker.get_instruction_args_keys())
    wanted = {key: value for key, value in (given or {}).items() if value is not None}
    if set(wanted) != needed:
        raise InputError(f"{name} needs kwargs {sorted(needed)}, not {sorted(wanted)}")
    refusal = f"{name}: kwargs {wanted} are out of range or of the wrong type"
    state = random.getstate()
    try:
        checker.build_description(**wanted)
        drew = random.getstate() != state
    except Exception as error:  # what lm-eval and its libraries raise for impossible values
        raise InputError(f"{refusal} ({error})") from error
    finally:
        random.setstate(state)
    if drew or not all(isinstance(wanted.get(key, []), list) for key in _LISTS):
        raise InputError(refusal)
    return checker


def _require_punkt(name: str) -> None:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError as error:
        raise InputError(
            f"{name} needs NLTK's punkt_tab, which is in none of {', '.join(nltk.data.path)}: run fetch_punkt(Path(CACHE)) of {__name__} "
            "once with a network and set NLTK_DATA=CACHE/nltk_data"
        ) from error


def _package(language: str | None) -> str:
    """The name of the package of IFEval's checkers, or of a language's own, ready to be imported. Raises InputError."""
    _registry()
    if language is None:
        return "lm_eval.tasks.ifeval"
    try:
        import_module("lm_eval.tasks.ifeval.multilingual.utils")
    except (ImportError, OSError) as error:  # spaCy raises OSError for a model
        raise InputError(
            f"{language}: lm-eval's checkers of {' and '.join(OWN)} need what is not installed ({' '.join(str(error).split())[:120]}): "
            "pip install 'spacy<3.8' iso639-lang, and python -m spacy download each of es_core_news_sm, ca_core_news_sm, xx_sent_ud_sm"
        ) from error
    return "lm_eval.tasks.ifeval.multilingual"


@lru_cache(maxsize=1)
def _registry() -> ModuleType:
    """lm-eval's checkers, kept from downloading anything, with langdetect made repeatable.

    They use neither the package around them, which imports `datasets`, nor what NLTK imports where it is installed: without those a worker
    starts in a sixth of the time.
    """
    import langdetect
    import lm_eval

    around = ModuleType("lm_eval.tasks")
    around.__path__ = [str(Path(path, "tasks")) for path in lm_eval.__path__]
    langdetect.DetectorFactory.seed = 0
    rank = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "1"  # on rank 0 lm-eval downloads punkt_tab while it is imported
    try:
        sys.modules.setdefault("lm_eval.tasks", around)  # stays: the checkers of other languages are looked for through it
        with _in_place_of({"scipy": None, "sklearn": None}):
            import nltk
            from lm_eval.tasks.ifeval import instructions_registry, utils  # noqa: F401  utils: of `followed`
    finally:
        if rank is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = rank
    home = os.environ.get("MEGATRON_TOWER_CACHE") or Path.home() / ".cache" / "megatron_tower"
    nltk.data.path.append(str(Path(home) / "nltk_data"))
    return instructions_registry


@contextlib.contextmanager
def _in_place_of(modules: dict[str, None]) -> Iterator[None]:
    """What imports find inside for modules that were not imported before: None, no such module."""
    own = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(own)
    try:
        yield
    finally:
        for name in own:
            del sys.modules[name]
