"""Imports point one way through the rooms of the package, and what only submits or scores answers imports no torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_tower.config import REPOSITORY

ROOMS = (
    "plan",
    "step_time",
    "checks",
    "config_data",
    "config_sft",
    "config_prompts",
    "config",
    "command",
    "runtime",
    "data",
    "models",
    "objectives",
    "rewards",
    "rollout",
    "curation",
    "training",
    "train",
    "translate",
    "recipe",
    "launch",
)
PACKAGE = REPOSITORY / "megatron_tower"


def imported(path: Path) -> Iterator[str]:
    """Modules of this repository that a file imports anywhere, but for types only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if node in typing:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "megatron_tower" and len(parts) > 1 and parts[1] in ROOMS else None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for module in imported(path):
        assert module.split(".")[0] not in ("tools", "evaluation", "tests"), f"{path.name} imports {module}"
        if own in ROOMS and (other := room(module)):
            assert ROOMS.index(other) <= ROOMS.index(own), f"{own} is before {other}, and {path.name} imports {module}"


@pytest.mark.parametrize(
    "module",
    [
        "command",
        "recipe",
        "launch",
        "job",
        "train",
        "runtime.sweep",
        "data.prepare",
        "rewards.worker",
        "rewards.maths",
        "rewards.translation",
        "step_time",
    ],
)
def test_imports_no_torch(module: str) -> None:
    code = f"import sys, megatron_tower.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
