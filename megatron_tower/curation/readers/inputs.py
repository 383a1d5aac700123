"""`inputs`: what a source consists of, file by file, in an order that depends on names alone.

Leaves out: downloading (fetch.py); what the files hold.
"""

import fnmatch
import glob
import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_tower.config import InputError
from megatron_tower.config_data import SourceConfig
from megatron_tower.curation import fetch
from megatron_tower.curation.source import called, is_parallel, targets, words

TREES = ("pages", "paragraphs")


@dataclass(frozen=True)
class Input:
    """What one task reads: a file, or a tree of files in one language.

    name: the same on every machine and once in its source, for row ids. root: where the names of a tree's files begin.
    partners: beside `paths`, their source side where that is another file; None where there is none.
    """

    name: str
    locale: str
    target_locale: str | None
    root: Path
    paths: tuple[Path, ...]
    partners: tuple[Path | None, ...] = ()

    @property
    def identity(self) -> str:
        """Of what its rows depend on, as far as names and sizes tell: to read terabytes for it would take longer than the rest."""
        files = [(path.relative_to(self.root).as_posix(), path.stat().st_size) for path in self.paths]
        beside = [path and path.stat().st_size for path in self.partners]
        return hashlib.sha256(repr((self.name, self.locale, self.target_locale, files, beside)).encode()).hexdigest()


def inputs(source: SourceConfig, cache: Path) -> list[Input]:
    """Raises InputError where a pattern matches nothing, or nothing was fetched yet."""
    found: list[Input] = []
    for code in targets(source):
        for pattern in source.files or ["*"]:
            found += _inputs(source, code, pattern, cache)
    times = Counter(one.name for one in found)
    found = [replace(one, name=f"{one.name}#{one.target_locale}") if times[one.name] > 1 and one.target_locale else one for one in found]
    if twice := [name for name, count in Counter(one.name for one in found).items() if count > 1]:
        raise InputError(f"{source.origin}: two inputs would both be called {twice[0]}: write `files` so that each matches once")
    return found


def _inputs(source: SourceConfig, code: str, pattern: str, cache: Path) -> list[Input]:
    own = _matches(source, code, pattern, cache)
    sides = (source.locale, code) if is_parallel(source) else (code, None)
    if source.reader in TREES:
        partners = {}
        if source.reader == "paragraphs" or (code != source.locale and source.locale in source.locales):
            partners = {path.relative_to(root): path for root, path in _matches(source, source.locale, pattern, cache)}
        trees: dict[Path, list[Path]] = {}
        for root, path in own:
            trees.setdefault(root, []).append(path)
        return [
            Input(
                _name(root, cache, pattern),
                *sides,
                root,
                tuple(paths),
                tuple(partners.get(path.relative_to(root)) for path in paths) if partners else (),
            )
            for root, paths in trees.items()
        ]
    beside = _beside if source.reader == "moses" else lambda *_: ()
    return [Input(_name(path, cache, pattern), *sides, path.parent, (path,), beside(source, code, path)) for _, path in own]


def _matches(source: SourceConfig, code: str, pattern: str, cache: Path) -> list[tuple[Path, Path]]:
    """(root, path) of each file of a pattern. The root is the part before `**`, or the folder of the file."""
    pattern = os.path.expanduser(pattern.replace("{locale}", called(source, code)))
    found = []
    for top in [fetch.root(word, cache) for word in words(source, code)] or [Path()]:
        if top.is_file():  # a wheel
            found.append((top.parent, top))
            continue
        within = glob.escape(f"{top}/") if source.fetch else ""
        head, deep, tail = pattern.rpartition("**/")
        if deep:
            roots = [Path(root) for root in sorted(glob.glob(within + head or "."))]
            found += [(root, path) for root in roots for path in _below(root, tail)]
        else:
            found += [(Path(path).parent, Path(path)) for path in sorted(glob.glob(within + pattern)) if os.path.isfile(path)]
    if not found:
        raise InputError(f"{source.origin}: no file matches {pattern}: correct data.curation.sources")
    return found


def _below(root: Path, pattern: str) -> list[Path]:
    """Files whose names match, at any depth: by os.walk, which asks nothing of each file."""
    return sorted(Path(folder) / name for folder, _, names in os.walk(root) for name in fnmatch.filter(names, pattern))


def _beside(source: SourceConfig, code: str, path: Path) -> tuple[Path]:
    """The source side of a Moses file: the same name but for the last part that names the language."""
    parts = path.name.split(".")
    target = called(source, code)
    if target not in parts:
        raise InputError(f"{path}: no part of its name is {target}, as in corpus.{called(source, source.locale)}-{target}.{target}")
    at = len(parts) - 1 - parts[::-1].index(target)
    partner = path.with_name(".".join([*parts[:at], called(source, source.locale), *parts[at + 1 :]]))
    if not partner.is_file():
        raise InputError(f"{path} has no {partner.name} beside it: get both files of the corpus")
    return (partner,)


def _name(path: Path, cache: Path, pattern: str) -> str:
    """Below what was fetched; else below the part of the pattern that is no pattern."""
    if path.is_relative_to(cache):
        return path.relative_to(cache).as_posix()
    fixed = Path(os.path.expanduser(re.split(r"[*?\[{]", pattern)[0] + "_")).parent
    return path.relative_to(fixed).as_posix() if path.is_relative_to(fixed) and path != fixed else path.name
