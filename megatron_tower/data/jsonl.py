"""JSON Lines from outside: one object a line, UTF-8, blank lines left out; what is wrong is told with file and line.

Leaves out: what a row must hold beyond texts; the files of a run, which are ours.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_tower.config import InputError

Row = dict[str, Any]


def read(path: Path, missing: str, form: str = "") -> Iterator[tuple[str, Row]]:
    """(`file:line`, row) of each line.

    missing: what to do about a file that isn't there; form: a line as it should be. Raises InputError for the first bad line.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing: {missing}")
    mend = f"each line must be one object like {form}" if form else "mend or drop the line"
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                place = f"{path}:{number}"
                yield place, _row(line, place, mend)


def _row(line: bytes, place: str, mend: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # spreadsheets begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: byte {error.start} is not UTF-8: save the file as UTF-8") from error
    except ValueError as error:
        raise InputError(f"{place}: not JSON ({error}): {mend}") from error
    if not isinstance(row, dict):
        raise InputError(f"{place}: a JSON {type(row).__name__} where an object is expected: {mend}")
    return row


def require_texts(row: Row, names: Sequence[str], place: str, form: str = "") -> None:
    """Raise InputError for the first of `names` that is no text, or an empty one."""
    for name in names:
        if not is_text(row.get(name)):
            like = f"; each line must be one object like {form}" if form else ""
            raise InputError(f'{place}: "{name}" must be a text that is not empty{like}')


def is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
