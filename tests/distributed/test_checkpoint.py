"""A checkpoint is whole or refused, in one sentence and before anything is written or run."""

import errno
import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from megatron_tower.config import InputError
from megatron_tower.data.sources import sha256
from megatron_tower.runtime import distributed, run_dir
from megatron_tower.training import checkpoint, loading, saving
from tests.distributed import curves


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run stopped halfway."""
    cfg = curves.config(folder, "gemma2", "single", f"run_dir={folder}/run_checkpoint")
    curves.saved(cfg)
    distributed.shutdown()
    return Path(cfg.run_dir)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be spoiled."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / f"run/cpt/checkpoints/step_{curves.HALF:08d}"


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def refused(copy: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *more: str) -> str:
    """What the training command says when it is to go on from the spoiled copy; it must exit with 2 and write nothing."""
    from megatron_tower import train

    run_dir = copy.parent.parent.parent
    before = files(run_dir)
    words = curves.words(folder, "gemma2", *curves.PHASE["gemma2"], f"phase.train_steps={curves.STEPS}", f"run_dir={run_dir}", *more)
    monkeypatch.setattr(sys, "argv", ["train", *words])
    with pytest.raises(SystemExit) as ended:
        train.main()
    distributed.shutdown()
    assert ended.value.code == 2 and files(run_dir) == before
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    return said


def test_manifest_lists_every_file(run: Path) -> None:
    found = checkpoint.latest(run / "cpt")
    assert (found.step, found.samples, found.model.family) == (curves.HALF, 8 * curves.HALF, "gemma2")
    listed = json.loads((found.path / "manifest.json").read_text())["files"]
    assert {*listed, "manifest.json"} == {p.name for p in found.path.iterdir()}
    checkpoint.verify(found.path)
    assert checkpoint.find(run) == checkpoint.find(run / "cpt") == checkpoint.find(found.path) == found


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "common.pt", "metadata.json", "manifest.json"])
def test_flipped_byte(copy: Path, name: str) -> None:
    flip(copy / name)
    with pytest.raises(InputError, match=f"{name} was changed"):
        checkpoint.verify(copy)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(InputError, match=rf"{name} is missing|no {name}"):
        checkpoint.verify(copy)


def test_truncated_shard(copy: Path) -> None:
    shard = copy / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"has [\d,]+ bytes instead of [\d,]+"):
        checkpoint.verify(copy)


def test_pickle_that_would_run_code(copy: Path, tmp_path: Path) -> None:
    """Checksums keep accidents out, not people: whoever can change `.metadata` can write a manifest to it."""

    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    (copy / ".metadata").write_bytes(pickle.dumps(Evil()))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"][".metadata"] = {"bytes": (copy / ".metadata").stat().st_size, "sha256": sha256(copy / ".metadata")}
    (copy / "manifest.json").write_text(json.dumps(manifest | {"sha256": checkpoint.digest(manifest)}))
    with pytest.raises(InputError, match=r"\.metadata names pathlib\.Path\.touch|\.metadata names"):
        checkpoint.verify(copy)
    assert not (tmp_path / "ran").exists()


def test_command_refuses_a_flipped_byte(copy: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    flip(copy / "__0_0.distcp")
    assert "__0_0.distcp was changed after it was written" in refused(copy, folder, monkeypatch, capsys)


def test_command_refuses_it_before_ranks_are_started(
    copy: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (copy / "__0_0.distcp").unlink()
    monkeypatch.setattr("megatron_tower.runtime.local.run_ranks", lambda *_: pytest.fail("ranks were started"))
    assert "__0_0.distcp is missing" in refused(copy, folder, monkeypatch, capsys, "parallel=tp2")


def test_command_refuses_another_architecture(
    copy: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    said = refused(copy, folder, monkeypatch, capsys, "phase=sft", "phase.epochs=null", f"phase.start_from={copy}", "model.num_layers=2")
    assert "another architecture (num_layers: 4 -> 2)" in said


@pytest.mark.parametrize("layout", ["single", "tp2"])
def test_command_refuses_a_run_that_another_process_trains(
    copy: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, layout: str
) -> None:
    (copy.parent.parent / ".lock").touch()
    monkeypatch.setattr(run_dir.fcntl, "lockf", lock_of_another)
    assert "cpt is being trained by another process: wait for its end" in refused(copy, folder, monkeypatch, capsys, f"parallel={layout}")


def lock_of_another(file: BinaryIO, how: int) -> None:
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


def test_a_full_disk_ends_a_phase_that_goes_on(copy: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as bad input: another start may find room."""
    usage, before = shutil.disk_usage(copy), files(copy)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=f"step {curves.HALF} can't be saved") as full:
        refused(copy, folder, monkeypatch, None)
    distributed.shutdown()
    assert files(copy) == before
    said = str(full.value)
    needed = int(said.split(" takes ")[1].split(" bytes")[0].replace(",", ""))
    taken = sum(p.stat().st_size for p in copy.iterdir())
    assert "has 1,000 free" in said and 0.9 * taken < needed < 1.2 * taken


def test_a_full_disk_is_met_at_the_door(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A phase that has trained nothing is refused; later the same is an error of a save."""
    from megatron_tower.train import build

    cfg = curves.config(folder, "gemma2", "single", f"run_dir={tmp_path}/run")
    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"a checkpoint takes [\d,]+ bytes and .* has 1,000 free"):
        build(cfg, Path(cfg.phase.start_from))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    trainer = build(cfg, Path(cfg.phase.start_from))
    trainer.state.step = 7
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="step 7 can't be saved"):
        saving.save(cfg, trainer.state)
    distributed.shutdown()
    assert not (tmp_path / "run").exists()


def test_keeps_the_last_and_clears_what_a_crash_left(folder: Path, tmp_path: Path) -> None:
    from megatron_tower.train import build

    cfg = curves.config(folder, "gemma2", "single", f"run_dir={tmp_path}/run")
    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    trainer = build(cfg, Path(cfg.phase.start_from))
    left = cfg.phase_dir / "checkpoints/.step_00000003.part"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_text("half")
    assert checkpoint.latest(cfg.phase_dir) is None
    for _ in range(3):
        trainer.step()
        saving.save(cfg, trainer.state)
    distributed.shutdown()
    assert sorted(p.name for p in left.parent.iterdir()) == ["latest", "step_00000002", "step_00000003"]
    checkpoint.verify(checkpoint.latest(cfg.phase_dir).path)


def test_finished_phase_is_exported_with_its_card(folder: Path, tmp_path: Path) -> None:
    """`phase.export=hf`: what transformers loads has the checkpoint's weights; saved beside the training, published before the export."""
    from transformers import AutoModelForCausalLM

    from megatron_tower.train import train
    from megatron_tower.training.convert import CheckpointSource

    words = ["phase.export=hf", "phase.async_save=true", "phase.save_every=2", "phase.train_steps=3"]
    cfg = curves.config(folder, "gemma2", "single", f"run_dir={tmp_path}/run", *words)
    train(cfg, Path(cfg.phase.start_from))
    assert run_dir.is_finished(cfg.phase_dir)
    found = checkpoint.latest(cfg.phase_dir)
    told = checkpoint.manifest(found.path)
    assert (found.step, found.tokens) == (3, 3 * 8 * 64) and told["layout"]["tensor"] == 1 and told["optimizer"]
    assert told["data"] == json.loads((cfg.phase_dir / "data_manifest.json").read_text())["sha256"]
    source = CheckpointSource(found)
    weights = AutoModelForCausalLM.from_pretrained(cfg.phase_dir / "hf").state_dict()
    assert all(weights[name].equal(source.read(name)) for name in source.tensors)
    assert "tiny_gemma2 after CPT" in (cfg.phase_dir / "hf/README.md").read_text()


def test_opens_for_inference(run: Path, folder: Path, tmp_path: Path) -> None:
    """From a run and from the HF folder it began with; neither weights nor shape get lost."""
    cfg = curves.config(folder, "gemma2", "single")
    shutil.copytree(folder / "gemma2/tokenizer", run / "cpt/tokenizer", dirs_exist_ok=True)
    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    trained, tokenizer, model = loading.open_for_inference(run, cfg.parallel, cfg.precision)
    base, _, shape = loading.open_for_inference(folder / "gemma2_base", cfg.parallel, cfg.precision)
    assert not trained.training and len(tokenizer) == model.vocab_size and model.num_layers == shape.num_layers
    weights = trained.state_dict()["embedding.word_embeddings.weight"]
    assert weights.shape == (model.vocab_size, model.hidden_size)
    assert not weights.equal(base.state_dict()["embedding.word_embeddings.weight"])
    with pytest.raises(InputError, match="neither a Hugging Face folder nor a run"):
        loading.open_for_inference(tmp_path, cfg.parallel, cfg.precision)
    distributed.shutdown()
