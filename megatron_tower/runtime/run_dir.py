"""The directory of one phase: it tells what ran, from what, on what, and how it went.

    config.yaml        the resolved configuration
    environment.json   one entry a start: git commit and diff, packages, versions, Slurm's variables, the command line
    metrics.jsonl      one line a logged step, each step once, also after a resume
    saves.jsonl        one line a checkpoint: how long it took
    data_manifest.json sources, licences, counts and checksums of the data
    logs/ tokenizer/ checkpoints/
    hf/                the last checkpoint as a Hugging Face folder, if `phase.export` asks for it
    finished.json      once the phase is done
    .lock              held by the process that trains

Leaves out: checkpoints (`training/saving.py`). Only rank 0 writes here.
"""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from megatron_tower.command import typed
from megatron_tower.config import REPOSITORY, Config, InputError, difference
from megatron_tower.runtime import slurm

MAY_CHANGE = (  # a run may move, go on with another layout, save in another way
    *("run_dir", "cache", "parallel", "cluster", "eval", "pairs", "sft", "prompts", "recipe"),
    *("phase.save_every", "phase.async_save", "phase.keep_last", "phase.keep_every", "phase.export"),
    *("phase.evaluate_every", "phase.evaluate_words"),
)
RECORD, DATA, LOCK = "config.yaml", "data_manifest.json", ".lock"
SECRET = ("JWT", "TOKEN", "KEY", "PASSWORD", "SECRET")


def check(cfg: Config) -> None:
    """Raise InputError when the phase directory can't be written, or belongs to another configuration: a sentence that names the keys."""
    if not is_finished(cfg.phase_dir):
        check_writable(cfg.phase_dir, f"run_dir={cfg.run_dir}")
    if not (cfg.phase_dir / RECORD).exists():
        return
    stored = recorded(cfg.phase_dir)
    try:
        old = typed(stored)
    except InputError as error:
        raise InputError(f"{cfg.phase_dir / RECORD} is of another version ({error}): choose another run_dir") from error
    changed = difference(_relocatable(old), _relocatable(cfg), ignore=MAY_CHANGE)
    if changed:
        raise InputError(
            f"{cfg.phase_dir} was made with another configuration ({', '.join(changed)}): go back to it or choose another run_dir"
        )


def recorded(phase_dir: Path) -> DictConfig:
    """The configuration that a phase was trained with, by this version or another. InputError for a damaged file."""
    path = phase_dir / RECORD
    try:
        found = OmegaConf.load(path)
    except (YAMLError, OSError) as error:
        raise InputError(f"{path} can't be read ({' '.join(str(error).split())}): bring it back") from error
    if not OmegaConf.is_dict(found) or not OmegaConf.is_dict(found.get("phase")):
        raise InputError(f"{path} is no record of a phase: bring it back")
    return found


@contextlib.contextmanager
def claimed(phase_dir: Path) -> Iterator[None]:
    """Hold the phase directory; it is free again when this process ends, however that happens. InputError when another process has it.

    From an earlier start of the same Slurm job, on a node that is lost, it is taken. Where the file system has no locks, nothing is held.
    """
    there = nearest(phase_dir)
    file = _locked(phase_dir / LOCK)
    with contextlib.suppress(OSError):  # a full disk is met by those who need room
        file.truncate(0)
        here = {"process": os.getpid(), "host": platform.node(), "since": _now(), "job": slurm.job_id(), "start": slurm.restart()}
        file.write(json.dumps(here).encode())
        os.fsync(file.fileno())
    try:
        yield
    finally:
        (phase_dir / LOCK).unlink(missing_ok=True)
        file.close()
        with contextlib.suppress(OSError):  # of a directory in which something was written
            for made in takewhile(lambda path: path != there, (phase_dir.absolute(), *phase_dir.absolute().parents)):
                made.rmdir()


def _locked(path: Path) -> BinaryIO:
    """The file, made and locked for this process."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as unless_kept, contextlib.suppress(FileNotFoundError):  # who had it has just removed it
            file = unless_kept.enter_context(path.open("ab", buffering=0))
            if not _is_free(file):
                holder = _holder(path)
                if not _is_earlier(holder):
                    by = "process {process} on {host} since {since}".format(**holder) if holder else "another process"
                    raise InputError(
                        f"{path.parent} is being trained by {by}: wait for its end, or choose another run_dir; "
                        f"if its node is lost, remove {path}"
                    )
                path.unlink()
            elif os.path.samestat(os.fstat(file.fileno()), path.stat()):
                unless_kept.pop_all()
                return file


def _is_free(file: BinaryIO) -> bool:
    """Whether this process has the lock now, or there are none on this file system."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def _holder(path: Path) -> dict[str, object]:
    """What the process that has the lock wrote; empty where it has not yet."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return {}


def _is_earlier(holder: dict[str, object]) -> bool:
    """Whether it is an earlier start of this process's Slurm job."""
    return holder.get("job") is not None and holder["job"] == slurm.job_id() and holder["start"] < slurm.restart()


def open_phase(cfg: Config, step: int) -> None:
    """Make or continue the phase directory at `step` (0: a fresh start): write the configuration, note this start, cut later metrics."""
    cfg.phase_dir.mkdir(parents=True, exist_ok=True)
    write_text(cfg.phase_dir / RECORD, OmegaConf.to_yaml(OmegaConf.structured(cfg)))
    environment = cfg.phase_dir / "environment.json"
    starts = json.loads(environment.read_text()) if environment.exists() else []
    write_text(environment, json.dumps([*starts, {"step": step, **_environment()}], indent=1))
    metrics = cfg.phase_dir / "metrics.jsonl"
    write_text(metrics, "".join(_lines_until(metrics, step)))


def finish(phase_dir: Path, step: int) -> None:
    """Mark the phase as done, after `step` updates."""
    write_text(phase_dir / "finished.json", json.dumps({"step": step, "at": _now()}))


def is_finished(phase_dir: Path) -> bool:
    return (phase_dir / "finished.json").exists()


def write_text(path: Path, text: str) -> None:
    """Write a file in one stroke: a reader sees the old content or the new, also after a crash."""
    aside = path.with_name(f".{path.name}.part")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def nearest(path: Path) -> Path:
    """The deepest that is there on the way to `path`, which may be itself."""
    return next(there for there in (path.absolute(), *path.absolute().parents) if there.exists())


def check_writable(path: Path, word: str) -> None:
    """Raise InputError, which names the `word` to change, when nothing can be written at `path`."""
    there = nearest(path)
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise InputError(f"{word} can't be written: {there} is {'read-only' if there.is_dir() else 'no folder'}; choose another")


def is_full(error: BaseException) -> bool:
    """Whether a disk or a quota has no room left. NumPy (`tofile`) and tokenizers (Rust) tell it in words alone, without a number."""
    numbers = errno.ENOSPC, errno.EDQUOT
    words = (*map(os.strerror, numbers), r"\d+ requested and \d+ written", r"Not enough free space to write \d+ bytes")
    return getattr(error, "errno", None) in numbers or bool(re.search("|".join(words), str(error)))


def git(*words: str) -> str | None:
    """Output of git in the repository; None where the code is no git checkout, or git is not installed."""
    if not ((REPOSITORY / ".git").exists() and shutil.which("git")):
        return None
    done = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _relocatable(cfg: Config) -> Config:
    """`cfg` with its run directory out of the paths that start there."""
    paths = {
        name: path and path.replace(cfg.run_dir, "<run_dir>") for name in ("start_from", "file") for path in [getattr(cfg.phase, name)]
    }
    return replace(cfg, phase=replace(cfg.phase, **paths), data=replace(cfg.data, cache=""))


def _lines_until(metrics: Path, step: int) -> list[str]:
    """Lines of the steps up to `step`; the rest was logged after the checkpoint that the run goes on from, or half-written."""
    if not metrics.exists():
        return []
    whole = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in whole if json.loads(line)["step"] <= step]


def _environment() -> dict[str, object]:
    packages = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "at": _now(),
        "argv": sys.argv,
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "git": {"commit": git("rev-parse", "HEAD"), "diff": git("diff", "HEAD")},
        "slurm": {k: v for k, v in os.environ.items() if k.startswith("SLURM_") and not any(word in k for word in SECRET)},
        "packages": dict(sorted(packages.items())),
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
