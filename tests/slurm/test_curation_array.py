"""A data folder as an array on a real Slurm: the shards of a local run, byte for byte, also when one of its tasks is killed."""

import os
import random
import signal
import sys
from pathlib import Path

import pytest

from megatron_tower.command import load
from megatron_tower.config import REPOSITORY
from megatron_tower.curation.engine import run, total
from megatron_tower.curation.pipeline import Pipeline
from tests.unit.test_curation_pipeline import content

STAGES = "[filter,duplicates,select]"  # those that read text; what follows is the same code in one process (tests/unit)
KEPT = "handbook_pages"  # of the sources of conf/data/debian.yaml, with pages of our own


def words(folder: Path, name: str) -> list[str]:
    """The command's, for pages in `folder` and shards in `folder`/`name`."""
    source = f"data.curation.sources.{KEPT}"
    others = [f"~data.curation.sources.{other}" for other in load(["data=debian"]).data.curation.sources if other != KEPT]
    pages = [f"{source}.fetch=[]", f"{source}.files=['{folder}/{{locale}}/*.html']"]
    curation = [f"data.curation.work={folder}/{name}", f"data.curation.stages={STAGES}", "data.curation.patience=1"]
    return ["data=debian", *others, *pages, *curation, "data.curation.workers=1", f"run_dir={folder}/run", "cluster=local_slurm"]


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """40 pages in each of 10 locales, of words of this repository's documentation in another order."""
    rng = random.Random(7)
    vocabulary = sorted({word for path in REPOSITORY.glob("docs/*.md") for word in path.read_text().split() if word.isalpha()})
    for locale in load(["data=debian"]).data.curation.sources[KEPT].locales.values():
        (tmp_path / locale).mkdir()
        for number in range(40):
            sentences = [" ".join(rng.choices(vocabulary, k=20)).capitalize() + "." for _ in range(12)]
            body = "".join(f"<p>{' '.join(sentences[at : at + 3])}</p>" for at in range(0, 12, 3))
            (tmp_path / locale / f"{number}.html").write_text(f"<html><body>{body}</body></html>")
    return tmp_path


def test_an_array_makes_the_shards_of_a_local_run(cluster, pages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cluster.env, "PYTHON", sys.executable)
    monkeypatch.setitem(cluster.env, "PYTHONPATH", str(REPOSITORY))
    local = Pipeline(load(words(pages, "local")))
    for stage in local.stages[:3]:
        run(stage, 2)
    told = total(local.filter.facts())
    assert told["rows"]["en"] - sum(of.get("en", 0) for of in told["removed"].values()) > 20  # the others' language is not theirs
    array = Pipeline(load(words(pages, "array")))
    number = cluster.submit("--array=0-2", f"--output={pages}/%A_%a.out", "slurm/prepare_data.sbatch", *words(pages, "array"))
    cluster.until(lambda: array.filter.root.is_dir(), "the array has begun")
    ours = {pid for task in ("0", "1", "2") for pid in cluster.processes(f"{number}_{task}")}
    for pid in sorted(ours):
        if b"tools.prepare_data" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
            break
    cluster.until(lambda: not any(stage.missing() or [*stage.root.glob(".*")] for stage in array.stages[:3]), "all is done and cleared")
    assert content(array.stages[:3]) == content(local.stages[:3])  # a traceback would show
