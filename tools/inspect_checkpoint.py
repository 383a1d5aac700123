"""What is in a checkpoint or a Hugging Face folder, and whether it is what was written: needs neither a GPU nor ranks.

    python -m tools.inspect_checkpoint runs/demo-tiny_gemma2-single/sft
    python -m tools.inspect_checkpoint runs/demo-tiny_gemma2-single/sft/checkpoints/step_00000700 --tensors
    python -m tools.inspect_checkpoint downloaded/gemma-2-9b --json

Reads every byte of a checkpoint for its checksums; of a Hugging Face folder, those files whose checksum the download recorded.
Exit code 0: whole; 1: damaged, and it says where; 2: neither of the two. Leaves out: values of tensors.
"""

import argparse
import json
import math
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_tower.command import refuse
from megatron_tower.config import InputError, ModelConfig
from megatron_tower.data import manifest as data_manifest
from megatron_tower.data.sources import sha256
from megatron_tower.models.folder import Folder, Form, word
from megatron_tower.models.hf import model_config
from megatron_tower.runtime import run_dir
from megatron_tower.training import checkpoint
from megatron_tower.training.checkpoint import Checkpoint
from megatron_tower.training.torch_dist import METADATA, Reader

OPTIMIZER = "optimizer."


@dataclass
class Findings:
    """`facts` in the order in which they are told; `checksums`: of how many files one was compared; `problems`: what is wrong."""

    path: Path
    kind: str
    model: ModelConfig
    facts: dict = field(default_factory=dict)
    tensors: dict[str, Form] = field(default_factory=dict)
    checksums: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        if self.problems:
            return "damaged: " + "; ".join(self.problems)
        return f"verified ({self.checksums} files)" if self.checksums else "no checksums were recorded; headers and sizes agree"


def inspect(path: Path) -> Findings:
    """All there is to know of what `path` means. InputError when that is nothing."""
    found = checkpoint.resolve(path)
    return _checkpoint(found) if isinstance(found, Checkpoint) else _hf_folder(found)


def _checkpoint(found: Checkpoint) -> Findings:
    told = checkpoint.manifest(found.path)
    findings = Findings(found.path, "torch_dist checkpoint", found.model, checksums=len(told["files"]))
    findings.problems = checkpoint.problems(found.path)
    if not any(METADATA in problem for problem in findings.problems):
        findings.tensors = Reader(found.path).tensors
    findings.facts = {
        "step": found.step,
        "samples": found.samples,
        "tokens seen": found.tokens or None,
        "layout": told.get("layout"),
        "precision": told.get("precision"),
        "optimizer": any(name.startswith(OPTIMIZER) for name in findings.tensors),
        "data": _data(found.path.parent.parent / run_dir.DATA, told.get("data")),
    }
    return findings


def _data(copied: Path, sha: str | None) -> dict | None:
    """The data's manifest that a checkpoint names: its sha256, and its sources, when the phase's directory holds that very manifest."""
    if sha is None or not copied.is_file():
        return sha and {"sha256": sha}
    facts = json.loads(copied.read_text())
    stated = facts.pop("sha256")
    same = stated == sha == data_manifest.digest(facts)
    return {"sha256": sha, "sources": facts.get("sources", [])} if same else {"sha256": sha, "changed": f"{copied} is another"}


def _hf_folder(path: Path) -> Findings:
    folder = Folder.open(path)
    recorded = folder.recorded()
    findings = Findings(path, "Hugging Face folder", model_config(path), tensors=folder.tensors, checksums=len(recorded))
    changed = [file.name for file, stated in recorded.items() if sha256(file) != stated]
    findings.problems = [f"{name} is not what was downloaded (its sha256 differs)" for name in changed]
    findings.facts = {"files": len(folder.files)}
    return findings


def groups(tensors: dict[str, Form]) -> list[dict]:
    """Tensors summed up by what they are (weights, a moment of the optimizer) and dtype."""
    counts: Counter = Counter()
    numbers: Counter = Counter()
    sizes: Counter = Counter()
    for name, form in tensors.items():
        kind = ".".join(name.split(".")[:2]) if name.startswith(OPTIMIZER) else "weights"
        key = (kind, word(form.dtype))
        counts[key] += 1
        numbers[key] += math.prod(form.shape)
        sizes[key] += form.nbytes
    return [{"what": k[0], "dtype": k[1], "tensors": counts[k], "parameters": numbers[k], "bytes": sizes[k]} for k in sorted(counts)]


def as_json(findings: Findings, tensors: bool) -> str:
    told = {"path": str(findings.path), "kind": findings.kind, "model": asdict(findings.model), **findings.facts}
    told |= {"contents": groups(findings.tensors), "whole": not findings.problems, "checksums": findings.state}
    if tensors:
        told["tensors"] = {n: {"shape": list(f.shape), "dtype": word(f.dtype)} for n, f in findings.tensors.items()}
    return json.dumps(told, indent=1)


def show(findings: Findings, tensors: bool) -> None:
    console = Console(width=max(Console().width, 140), highlight=False)
    model = findings.model
    console.print(f"[bold]{findings.path}[/]: {findings.kind}")
    facts = Table(show_header=False, box=None)
    heads = f"heads {model.num_attention_heads}/{model.num_query_groups} x {model.kv_channels}"
    shape = f"{model.num_layers} layers, hidden {model.hidden_size}, ffn {model.ffn_hidden_size}, {heads}, vocabulary {model.vocab_size:,}"
    facts.add_row("model", f"{model.name} ({model.family}): {shape}, {'tied' if model.tie_embeddings else 'untied'}")
    for name, value in findings.facts.items():
        facts.add_row(name, _said(value))
    facts.add_row("checksums", findings.state, style="red" if findings.problems else "green")
    console.print(facts)
    table = Table("contents", "dtype", *(f"{name:>10}" for name in ("tensors", "parameters", "bytes")))
    for column in table.columns[2:]:
        column.justify = "right"
    for group in groups(findings.tensors):
        table.add_row(group["what"], group["dtype"], *(f"{group[name]:,}" for name in ("tensors", "parameters", "bytes")))
    console.print(table)
    if tensors:
        listed = Table("tensor", "dtype", "shape")
        for name, form in findings.tensors.items():
            listed.add_row(name, word(form.dtype), " x ".join(map(str, form.shape)))
        console.print(listed)


def _said(value: object) -> str:
    """A fact in words."""
    if isinstance(value, dict) and "sha256" in value:
        sources = ", ".join(f"{s['name']} {s['version']} ({s['licence']})" for s in value.get("sources", []))
        return "; ".join(filter(None, (value["sha256"][:16], sources, value.get("changed"))))
    if isinstance(value, dict):  # a layout
        return checkpoint.degrees(value) or "one rank"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "not recorded" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a checkpoint, a phase's or a run's directory, or a Hugging Face folder")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        findings = inspect(arguments.path)
    except InputError as error:
        refuse(error)
    if arguments.json:
        print(as_json(findings, arguments.tensors))
    else:
        show(findings, arguments.tensors)
    sys.exit(1 if findings.problems else 0)


if __name__ == "__main__":
    main()
