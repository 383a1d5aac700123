"""The languages of the recipe: one row a locale, keyed as WMT24++ writes them (`de_DE`, `pt_BR`, `no_NO`; English is `en`).

Leaves out: how a locale formats dates and numbers (Babel knows, see cldr.py).
"""

from dataclasses import dataclass

from megatron_tower.config import InputError


@dataclass(frozen=True)
class Locale:
    """english: its name in prompts. cldr: Babel's id. language: the label that lid.176 gives its text.
    folders: what message catalogues call it, best first. translation: the word "translation" in it."""

    code: str
    english: str
    cldr: str
    language: str
    folders: tuple[str, ...]
    translation: str

    @property
    def spaced(self) -> bool:
        """Whether spaces divide words (Chinese and Japanese write none)."""
        return self.language not in ("zh", "ja")


# fmt: off
_ROWS = (
    Locale("en", "English", "en", "en", ("en",), "Translation"),
    Locale("de_DE", "German", "de_DE", "de", ("de",), "Übersetzung"),
    Locale("nl_NL", "Dutch", "nl_NL", "nl", ("nl",), "Vertaling"),
    Locale("is_IS", "Icelandic", "is_IS", "is", ("is_IS", "is"), "Þýðing"),
    Locale("es_ES", "Spanish (Spain)", "es_ES", "es", ("es_ES", "es"), "Traducción"),
    Locale("es_MX", "Spanish (Latin America)", "es_MX", "es", ("es_MX", "es_419"), "Traducción"),
    Locale("fr_FR", "French", "fr_FR", "fr", ("fr_FR", "fr"), "Traduction"),
    Locale("fr_CA", "French (Canada)", "fr_CA", "fr", ("fr_CA",), "Traduction"),
    Locale("pt_PT", "Portuguese (Portugal)", "pt_PT", "pt", ("pt_PT", "pt"), "Tradução"),
    Locale("pt_BR", "Portuguese (Brazil)", "pt_BR", "pt", ("pt_BR",), "Tradução"),
    Locale("uk_UA", "Ukrainian", "uk_UA", "uk", ("uk",), "Переклад"),
    Locale("hi_IN", "Hindi", "hi_IN", "hi", ("hi_IN", "hi"), "अनुवाद"),
    Locale("zh_CN", "Chinese (Simplified)", "zh_Hans_CN", "zh", ("zh_Hans",), "翻译"),
    Locale("zh_TW", "Chinese (Traditional)", "zh_Hant_TW", "zh", ("zh_Hant",), "翻譯"),
    Locale("ru_RU", "Russian", "ru_RU", "ru", ("ru",), "Перевод"),
    Locale("cs_CZ", "Czech", "cs_CZ", "cs", ("cs",), "Překlad"),
    Locale("ko_KR", "Korean", "ko_KR", "ko", ("ko",), "번역"),
    Locale("ja_JP", "Japanese", "ja_JP", "ja", ("ja",), "翻訳"),
    Locale("it_IT", "Italian", "it_IT", "it", ("it",), "Traduzione"),
    Locale("da_DK", "Danish", "da_DK", "da", ("da",), "Oversættelse"),
    Locale("pl_PL", "Polish", "pl_PL", "pl", ("pl",), "Tłumaczenie"),
    Locale("hu_HU", "Hungarian", "hu_HU", "hu", ("hu",), "Fordítás"),
    Locale("sv_SE", "Swedish", "sv_SE", "sv", ("sv",), "Översättning"),
    Locale("no_NO", "Norwegian (Bokmål)", "nb_NO", "no", ("nb",), "Oversettelse"),
    Locale("nn_NO", "Norwegian (Nynorsk)", "nn_NO", "nn", ("nn",), "Omsetjing"),
    Locale("ro_RO", "Romanian", "ro_RO", "ro", ("ro",), "Traducere"),
    Locale("fi_FI", "Finnish", "fi_FI", "fi", ("fi",), "Käännös"),
)
# fmt: on

LOCALES = {row.code: row for row in _ROWS}


def locale(code: str) -> Locale:
    """The row of a locale; raises InputError for one that the recipe does not have."""
    if code not in LOCALES:
        raise InputError(f"locale {code} is unknown: use one of {', '.join(LOCALES)}")
    return LOCALES[code]


def find(word: str) -> Locale:
    """The locale a person means by `de`, `de_DE`, `de-DE` or `German`: the exact code first, else the first row that fits."""
    wanted = word.replace("-", "_").casefold()
    for names in (
        lambda r: (r.code,),
        lambda r: (r.english,),
        lambda r: (r.code.split("_")[0], r.cldr, r.cldr.split("_")[0], r.english.split(" (")[0]),
    ):
        for row in _ROWS:
            if wanted in (name.casefold() for name in names(row)):
                return row
    raise InputError(f"language {word} is unknown: use one of {', '.join(LOCALES)}")
