"""`fetch`: what a source's `fetch` words name, downloaded once into the cache, on a machine with a network.

    debian:PACKAGE[=VERSION]            a package's files: apt-get download, dpkg-deb -x; nothing is installed and none of its scripts run
    pypi:NAME==VERSION                  a wheel, as a zip (data/sources.py)
    hub:ORG/NAME@REVISION:PATTERN       files of a Hugging Face dataset; no code of its is run

    <cache>/<kind>/<word>/{files, fetched.json}

A folder appears under its name when all of it is there, with `fetched.json`: version, licence, bytes and sha256 of each file. An
interrupted hub download goes on where it was.
Leaves out: files that you have already, which a source names by path; keeping a newer version beside an older one without naming it.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_tower.config import InputError
from megatron_tower.config_data import SourceConfig
from megatron_tower.curation.source import targets, words
from megatron_tower.data import sources

RECORD = "fetched.json"
FORMS = "debian:package, pypi:package==version or hub:org/name@revision:pattern"
CODE = ("*.py", "*.sh", "*.pkl", "*.pickle", "*.pt", "*.bin")  # of a hub repository, never downloaded


@dataclass(frozen=True)
class Fetched:
    """sha256: of the archive, or of the names and hashes of all `files` ({name: [bytes, sha256]})."""

    word: str
    version: str
    licence: str
    sha256: str
    files: dict[str, list]


def fetch(source: SourceConfig, cache: Path) -> list[Fetched]:
    """Download what the cache lacks. Raises InputError for what can't be had, or was changed since."""
    codes = dict.fromkeys([source.locale, *targets(source)])
    every = dict.fromkeys(word for code in codes for word in words(source, code))
    return [_fetch(word, cache) for word in every]


def root(word: str, cache: Path) -> Path:
    """Where the files of a word are: a folder, or a wheel. Raises InputError where it was not fetched."""
    kind, rest = _split(word)
    if kind == "pypi":
        return sources.fetch(*_pypi(word, rest), cache)
    folder = _folder(kind, rest, cache)
    if not (folder / RECORD).is_file():
        raise InputError(f"{word} is not in the cache {cache}: run python -m tools.prepare_data on a machine with a network")
    return folder


def _fetch(word: str, cache: Path) -> Fetched:
    kind, rest = _split(word)
    if kind == "pypi":
        name, version = _pypi(word, rest)
        wheel = sources.fetch(name, version, cache)
        found = sources.describe(name, version, wheel)
        return Fetched(word, version, found.licence, found.sha256, {wheel.name: [wheel.stat().st_size, found.sha256]})
    folder = _folder(kind, rest, cache)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        {"debian": _debian, "hub": _hub}[kind](word, rest, folder)
    return _verified(folder)


def _verified(folder: Path) -> Fetched:
    mend = f"delete {folder} and run again"
    try:
        record = Fetched(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder / RECORD} can't be read ({error}): {mend}") from error
    for name, (size, _) in record.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise InputError(f"{path} is not what was downloaded (its size differs, or it is gone): {mend}")
    return record


def _debian(word: str, package: str, folder: Path) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise InputError(f"{word} needs apt-get and dpkg-deb, which this machine lacks: fetch on Debian or Ubuntu and copy {folder.parent}")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as temporary:
        result = _run("apt-get", "download", "--quiet", package, cwd=temporary)
        archives = list(Path(temporary).glob("*.deb"))
        if result.returncode or len(archives) != 1:
            raise InputError(
                f"{word} could not be downloaded ({_last(result.stderr)}): run once with a network after `apt-get update`, "
                f"or copy {folder.parent} from a machine that has it"
            )
        (archive,) = archives
        content = Path(temporary) / "content"
        for options in (("-x", str(archive), str(content)), ("-f", str(archive), "Version")):
            result = _run("dpkg-deb", *options)
            if result.returncode:
                raise InputError(f"the download of {word} is damaged ({_last(result.stderr)}): run again")
        licence = _debian_licence(content, package.split("=")[0])
        for path in content.rglob("*"):
            if path.is_symlink():  # it might lead out of the package
                path.unlink()
        _publish(content, folder, Fetched(word, result.stdout.strip(), licence, sources.sha256(archive), _files(content)))


def _debian_licence(content: Path, package: str) -> str:
    """As the copyright file states it of most files, or where to read it."""
    copyright = content / "usr/share/doc" / package / "copyright"
    if copyright.is_symlink() or not copyright.is_file():
        return f"unknown: {package} has no copyright file of its own"
    stated = re.search(r"^Files: *\*\s*$.*?^License: *(\S.*?)\s*$", copyright.read_text("utf-8", "replace"), re.MULTILINE | re.DOTALL)
    return stated[1] if stated else f"see {copyright.relative_to(content)}"


def _hub(word: str, rest: str, folder: Path) -> None:
    import huggingface_hub

    parts = re.fullmatch(r"([^/@:]+/[^/@:]+)@([^:]+):(.+)", rest)
    if not parts:
        raise InputError(f"{word} can't be understood: write hub:org/name@revision:pattern")
    repository, revision, pattern = parts.groups()
    partial = folder.with_name(f".{folder.name}")  # stays when interrupted
    try:
        info = huggingface_hub.HfApi().dataset_info(repository, revision=revision)
        huggingface_hub.snapshot_download(
            repository, repo_type="dataset", revision=info.sha, allow_patterns=[pattern], ignore_patterns=list(CODE), local_dir=partial
        )
    except OSError as error:  # all that the library raises of networks and names
        if error.errno is not None:
            raise
        raise InputError(
            f"{word} could not be downloaded ({_last(str(error))}): run once with a network, and HF_TOKEN for gated data, "
            f"or copy {folder.parent} from a machine that has it"
        ) from error
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # the library's notes
    files = _files(partial) if partial.is_dir() else {}
    if not files:
        raise InputError(f"{word}: no file of {repository} at {revision} matches {pattern}: correct the pattern")
    licence = (info.card_data or {}).get("license") or "unknown"
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    _publish(partial, folder, Fetched(word, info.sha, str(licence), digest, files))


def _publish(content: Path, folder: Path, record: Fetched) -> None:
    (content / RECORD).write_text(json.dumps(asdict(record), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    try:
        content.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process was first
            raise


def _files(content: Path) -> dict[str, list]:
    paths = sorted(path for path in content.rglob("*") if path.is_file())
    return {path.relative_to(content).as_posix(): [path.stat().st_size, sources.sha256(path)] for path in paths}


def _folder(kind: str, rest: str, cache: Path) -> Path:
    return cache / kind / re.sub(r"[^\w.=@+~-]+", "_", rest)


def _split(word: str) -> tuple[str, str]:
    kind, _, rest = word.partition(":")
    if kind not in ("debian", "pypi", "hub") or not rest:
        raise InputError(f"fetch: {word} can't be understood: write {FORMS}")
    return kind, rest


def _pypi(word: str, rest: str) -> tuple[str, str]:
    name, _, version = rest.partition("==")
    if not version:
        raise InputError(f"{word} names no version: write pypi:name==version")
    return name, version


def _run(*command: str, cwd: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C.UTF-8"})


def _last(said: str) -> str:
    return ([line for line in said.strip().splitlines() if line] or ["it said nothing"])[-1].strip()
