"""What a source of `data.curation.sources` means for each of its locales.

`locales` maps a locale to what this source calls it, which `{locale}` in `files` and `fetch` stands for: of documents each in turn,
of pairs each but `locale` as the target side.
"""

from megatron_tower.config import InputError
from megatron_tower.config_data import SourceConfig
from megatron_tower.data.locales import locale

PAIRS = ("moses", "tmx", "paragraphs", "catalogue")  # readers of pairs alone
TABLES = ("jsonl", "parquet", "tsv")  # of pairs where `fields` has a target


def is_parallel(source: SourceConfig) -> bool:
    return source.reader in PAIRS or (source.reader in TABLES and "target" in source.fields)


def targets(source: SourceConfig) -> list[str]:
    """Locales to read, one after the other: of documents, or of the target side of pairs. Raises InputError for an unknown one."""
    codes = list(source.locales)
    if is_parallel(source):
        codes = [source.target_locale] if source.target_locale else [code for code in codes if code != source.locale]
        if not codes:
            raise InputError(f"{source.origin}: {source.reader} reads pairs: name target_locale, or locales")
    for code in (source.locale, *codes):
        locale(code)
    return codes or [source.locale]


def called(source: SourceConfig, code: str) -> str:
    """What the source calls a locale: by its language, unless `locales` says otherwise."""
    return source.locales.get(code, code.split("_")[0])


def words(source: SourceConfig, code: str) -> list[str]:
    """What to fetch for a locale."""
    return [word.replace("{locale}", called(source, code)) for word in source.fetch]
