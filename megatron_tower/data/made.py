"""A file that a tool made once from settings: beside it <file>.manifest.json says which, so that it is neither made twice nor overwritten.

Leaves out: folders (manifest.py).
"""

import json
import os
from pathlib import Path
from typing import Any

from megatron_tower.config import InputError
from megatron_tower.data.sources import sha256
from megatron_tower.runtime.run_dir import write_text


def is_made(output: Path, settings: dict[str, Any], key: str) -> bool:
    """Whether it is there, which is told; InputError when it was made otherwise, or changed since. `key`: the setting that names it."""
    if not output.exists():
        return False
    manifest, mend = _manifest(output), f"choose another {key} or remove it"
    if not manifest.is_file():
        raise InputError(f"{output} is there without {manifest.name}: {mend}")
    try:
        made = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{manifest} is damaged ({error}): {mend}") from error
    if differing := [name for name in settings if made["settings"].get(name) != settings[name]]:
        raise InputError(f"{output} was made with another {', '.join(differing)}: {mend}")
    if made["sha256"] != sha256(output):
        raise InputError(f"{output} was changed since it was made: {mend}")
    print(f"{output} is there already, made with the same settings")
    return True


def publish(part: Path, output: Path, facts: dict[str, Any], settings: dict[str, Any]) -> None:
    """Give a finished file its name. The manifest first: an output that is there always has one that speaks of it."""
    told = {**facts, "sha256": sha256(part), "settings": settings}
    write_text(_manifest(output), json.dumps(told, ensure_ascii=False, indent=1) + "\n")
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(output)


def _manifest(output: Path) -> Path:
    return output.with_name(f"{output.name}.manifest.json")
