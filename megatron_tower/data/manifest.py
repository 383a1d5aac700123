"""`manifest.json`: what a data folder holds, where it came from, and a checksum of every file.

`verify` reads the folder against it before anything is trained: sizes always, sha256 of files up to 256 MiB
(beyond that a checksum costs minutes).
"""

import hashlib
import json
from pathlib import Path

from megatron_tower.config import InputError
from megatron_tower.data.sources import sha256

NAME = "manifest.json"
HASHED_UP_TO = 256 << 20


def write(folder: Path, facts: dict) -> None:
    """Write the manifest of a finished folder: `facts` and {file: {bytes, sha256}} of all it holds."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != NAME)
    listed = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    content = {**facts, "files": listed}
    (folder / NAME).write_text(json.dumps({**content, "sha256": digest(content)}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> dict:
    """The manifest; raises InputError when the folder has none or it can't be read."""
    path = Path(folder) / NAME
    if not path.is_file():
        raise InputError(f"{folder} holds no {NAME}: run python -m tools.prepare_data with the same data= and model=")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        stated = facts.pop("sha256")
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}): delete {folder} and run python -m tools.prepare_data again") from error
    if stated != digest(facts):
        raise InputError(f"{path} was changed after it was written: delete {folder} and run python -m tools.prepare_data again")
    return facts


def digest(content: dict) -> str:
    """sha256 of all that a manifest says, so that no line of it can be changed unnoticed."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify(folder: Path) -> dict:
    """The manifest of a folder whose files are all as they were written; raises InputError naming the first that isn't."""
    facts = read(folder)
    for name, expected in facts["files"].items():
        path = Path(folder) / name
        mend = f"delete {folder} and run python -m tools.prepare_data again"
        if not path.is_file():
            raise InputError(f"{path} is missing: {mend}")
        if path.stat().st_size != expected["bytes"]:
            raise InputError(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']} (truncated or changed): {mend}")
        if expected["bytes"] <= HASHED_UP_TO and sha256(path) != expected["sha256"]:
            raise InputError(f"{path} was changed (sha256 differs from {NAME}): {mend}")
    return facts
