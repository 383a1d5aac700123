"""Conversions: no bit changes either way, ranks load them, a kill costs nothing, memory stays small, bad input is met at the door."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_tower.config import InputError, ParallelConfig, PrecisionConfig
from megatron_tower.data.manifest import digest
from megatron_tower.models.families import family_of
from megatron_tower.models.folder import Form
from megatron_tower.models.mapping import differences
from megatron_tower.runtime import resumable
from megatron_tower.training import checkpoint, convert
from megatron_tower.training.convert import CheckpointSource, to_hf, to_megatron
from tests.unit import hf_folders
from tests.unit.hf_folders import MODELS, SMALL_FILES, same_bits, tensors_of
from tools import convert_hf_to_megatron, convert_megatron_to_hf

KILLS = 20  # each way


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return hf_folders.write(tmp_path / "hf", MODELS["qwen2"])


@pytest.mark.parametrize("layout", [(1, 1), (2, 2), (4, 3)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, layout: tuple[int, int]):
    monkeypatch.setattr(convert, "SHARD", 15_000)
    source = hf_folders.write(tmp_path / "hf", MODELS[name], torch.float32 if name == "gemma2" else torch.bfloat16)
    to_megatron(source, tmp_path / "run", *layout)
    checkpoint.verify(checkpoint.find(tmp_path / "run").path)
    to_hf(tmp_path / "run", tmp_path / "back")
    assert same_bits(tensors_of(tmp_path / "back"), tensors_of(source))
    for file in ("config.json", *SMALL_FILES):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    files = {path.name for path in (tmp_path / "back").glob("*.safetensors")}
    assert files == {f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))} and len(files) > 1
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", MODELS)
def test_training_loads_it(single_rank, tmp_path: Path, name: str):
    from megatron_tower.models.build import build_chunks
    from megatron_tower.models.hf import load_hf
    from megatron_tower.training.loading import load
    from megatron_tower.training.state import TrainingState

    source = hf_folders.write(tmp_path / "hf", MODELS[name])
    to_megatron(source, tmp_path / "run", 4, 2)
    found = checkpoint.find(tmp_path / "run")
    assert (found.step, found.samples) == (0, 0) and not differences(found.model, MODELS[name])
    checkpoint.same_architecture(found, MODELS[name])  # as a phase asks that starts from it
    converted, direct = (build_chunks(found.model, ParallelConfig(name="single"), PrecisionConfig(name="fp32")) for _ in range(2))
    load(found, TrainingState(converted))
    load_hf(direct, found.model, source)
    ours, theirs = (dict(chunks[0].named_parameters()) for chunks in (converted, direct))
    assert same_bits({k: v.detach() for k, v in ours.items()}, {k: v.detach() for k, v in theirs.items()})


def test_two_ranks_load_it_and_what_they_save_is_exported(launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(convert, "SHARD", 15_000)
    for name, layout in (("qwen2", (2, 1)), ("gemma2", (4, 2))):
        hf_folders.write(tmp_path / name, MODELS[name])
        to_megatron(tmp_path / name, tmp_path / f"{name}_converted", *layout)
    launch("tests.unit.conversion_ranks", 2, str(tmp_path))
    for name in ("qwen2", "gemma2"):
        expected = tensors_of(tmp_path / name)
        for layout in ("tp2", "pp2"):
            trained = tmp_path / f"{name}_trained_{layout}"
            assert same_bits(tensors_of(tmp_path / f"{name}_{layout}"), expected), f"{name} at {layout}, as loaded"
            shutil.copytree(tmp_path / f"{name}_converted" / "tokenizer", trained / "tokenizer")
            to_hf(trained, tmp_path / f"{name}_{layout}_exported")
            assert same_bits(tensors_of(tmp_path / f"{name}_{layout}_exported"), expected), f"{name} at {layout}, as saved"
        source = CheckpointSource(checkpoint.find(tmp_path / f"{name}_trained_tp2"))
        assert source._reader.tensors["embedding.word_embeddings.weight"].shape[0] == 102  # padded for two ranks, 101 come out
        assert source.tensors["model.embed_tokens.weight"] == Form((101, 32), torch.bfloat16)


def test_the_type_may_change(hf: Path, tmp_path: Path):
    to_megatron(hf, tmp_path / "run")
    to_hf(tmp_path / "run", tmp_path / "fp32", dtype="float32")
    assert same_bits(tensors_of(tmp_path / "fp32"), {name: tensor.float() for name, tensor in tensors_of(hf).items()})
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (hf, tmp_path / "fp32"))
    assert after == before | {"torch_dtype": "float32"}
    with pytest.raises(InputError, match="dtype=int8 is no type of weights"):
        to_hf(tmp_path / "run", tmp_path / "int8", dtype="int8")


def test_config_follows_the_model(hf: Path, tmp_path: Path):
    to_megatron(hf, tmp_path / "run")
    base = tmp_path / "run" / "tokenizer" / "config.json"
    base.write_text(json.dumps(json.loads(base.read_text()) | {"max_position_embeddings": 32, "transformers_version": "9"}))
    to_hf(tmp_path / "run", tmp_path / "laid_over")
    base.unlink()
    to_hf(tmp_path / "run", tmp_path / "made")
    over, made = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("laid_over", "made"))
    for said in (over, made):
        assert not differences(family_of("qwen2").from_hf(said), MODELS["qwen2"]) and said["torch_dtype"] == "bfloat16"
    assert over["transformers_version"] == "9" and over["_name_or_path"] == "somebody/else"
    assert made["eos_token_id"] == 1 and made["bos_token_id"] is None


def edit_config(hf: Path, **changes: object) -> None:
    said = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({key: value for key, value in (said | changes).items() if value != "gone"}))


def rewrite(hf: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """The folder's tensors after a change, in one file."""
    tensors = tensors_of(hf)
    change(tensors)
    for file in hf.glob("model*"):
        file.unlink()
    save_file(tensors, hf / "model.safetensors")


def unlike_its_checksum(hf: Path) -> None:
    file = hf / "model-00002-of-00003.safetensors"
    note = hf / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"0123abc\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n1700000000.0\n")
    flip(file)


def flip(file: Path, place: int = -100) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def quantise(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


def mix_in_a_fused_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.k_proj.weight"] = tensors["model.layers.1.self_attn.k_proj.weight"].float()


def mix_in_a_stacked_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.3.input_layernorm.weight"] = tensors["model.layers.3.input_layernorm.weight"].float()


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda hf: edit_config(hf, model_type="mistral9"), "mistral9 is unknown"),
        (lambda hf: edit_config(hf, model_type="llama", architectures=["LlamaForCausalLM"]), r"_proj.bias is not part of this model"),
        (lambda hf: edit_config(hf, vocab_size=100), r"\(101, 32\), the config asks for \(100, 32\)"),
        (lambda hf: edit_config(hf, hidden_act="relu"), "hidden_act=relu"),
        (lambda hf: edit_config(hf, rope_scaling={"rope_type": "yarn", "factor": 4.0}), "yarn"),
        (lambda hf: edit_config(hf, use_sliding_window=True), "use_sliding_window=True"),
        (lambda hf: edit_config(hf, num_key_value_heads="gone"), "num_key_value_heads"),
        (lambda hf: edit_config(hf, tie_word_embeddings=True), r"lm_head.weight differs from model.embed_tokens.weight"),
        (lambda hf: edit_config(hf, num_hidden_layers=5), r"model.layers.4.*is missing"),
        (lambda hf: rewrite(hf, quantise), r"model.norm.weight is int8: give a folder that is not quantised"),
        (lambda hf: rewrite(hf, mix_in_a_fused_one), r"k_proj.weight float32, which are one tensor in a checkpoint"),
        (lambda hf: rewrite(hf, mix_in_a_stacked_one), r"layers.3.input_layernorm.weight float32, which are one tensor"),
        (unlike_its_checksum, r"model-00002-of-00003.safetensors was changed or damaged on its way"),
    ],
)
def test_a_folder_is_refused_in_one_sentence(hf: Path, tmp_path: Path, damage: Callable[[Path], None], told: str):
    damage(hf)
    with pytest.raises(InputError, match=told) as raised:
        to_megatron(hf, tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


@pytest.mark.parametrize(
    "tensor, pipeline, told",
    [(3, 1, "4 query groups"), (8, 1, "4 query groups"), (1, 5, "4 stages"), (0, 1, "1 or more")],
)
def test_a_layout_is_refused_in_one_sentence(hf: Path, tmp_path: Path, tensor: int, pipeline: int, told: str):
    with pytest.raises(InputError, match=told):
        to_megatron(hf, tmp_path / "run", tensor, pipeline)
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def without_a_tensor(step: Path) -> None:
    """Another model in a manifest that is sound in itself."""
    told = checkpoint.manifest(step)
    told["model"]["tie_embeddings"] = False
    (step / checkpoint.MANIFEST).write_text(json.dumps(told | {"sha256": digest(told)}))


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda step: flip(step / "__1_0.distcp"), "__1_0.distcp was changed or damaged"),
        (lambda step: os.truncate(step / "__1_0.distcp", 5000), "__1_0.distcp is missing, cut off"),
        (lambda step: (step / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda step: flip(step / ".metadata"), r"\.metadata"),
        (lambda step: flip(step / checkpoint.MANIFEST), "manifest.json was changed"),
        (lambda step: shutil.rmtree(step.parent.parent / "tokenizer"), "tokenizer is missing"),
        (lambda step: shutil.rmtree(step.parent), "is no checkpoint and no run with one"),
        (without_a_tensor, "lacks output_layer.weight"),
    ],
)
def test_a_checkpoint_is_refused_in_one_sentence(tmp_path: Path, damage: Callable[[Path], None], told: str):
    source = hf_folders.write(tmp_path / "hf", MODELS["qwen2_tied"])
    to_megatron(source, tmp_path / "run", tensor=2)
    damage(tmp_path / "run" / convert.STEP)
    with pytest.raises(InputError, match=told) as raised:
        to_hf(tmp_path / "run", tmp_path / "back")
    assert "\n" not in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "run"}


def test_outputs_are_never_mixed(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(convert, "SHARD", 15_000)
    run = tmp_path / "run"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "write_metadata", stop)  # all files are written, not what makes them a checkpoint
    with pytest.raises(KeyboardInterrupt):
        to_megatron(hf, run)
    monkeypatch.undo()
    monkeypatch.setattr(convert, "SHARD", 15_000)
    assert not run.exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run.partial").rglob("*.distcp")}
    assert len(kept) > 3
    with pytest.raises(InputError, match=r"begun with another plan \(tensor: 1 -> 2\): remove it"):
        to_megatron(hf, run, tensor=2)
    with (tmp_path / "run.partial" / resumable.DONE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is writing"):
            to_megatron(hf, run)
    to_megatron(hf, run)
    assert {run / path.relative_to(tmp_path / "run.partial"): when for path, when in kept.items()} == {
        path: path.stat().st_mtime_ns for path in run.rglob("*.distcp")
    }, "finished files were written again"
    capsys.readouterr()
    to_megatron(hf, run)
    assert capsys.readouterr().out == f"{run} is there already\n"
    for other, told in ((run, "holds other files already"), (hf, "holds other files already")):
        with pytest.raises(InputError, match=told):
            to_megatron(hf, other, tensor=2)
    (tmp_path / "next.partial").mkdir()
    (tmp_path / "next.partial" / "mine.txt").write_text("dear")
    with pytest.raises(InputError, match="not begun here"):
        to_megatron(hf, tmp_path / "next")


def test_the_disk_is_asked_first(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match="1,000 free: free some space or choose an output on another disk"):
        to_megatron(hf, tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_a_full_disk_costs_only_what_was_unfinished(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(convert, "SHARD", 15_000)

    def full(sink: resumable.Sink) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(InputError, match=r"the disk of .*run.partial is full: free some space"):
        patched.setattr(resumable.Sink, "close", full)
        to_megatron(hf, tmp_path / "run")
    with monkeypatch.context() as patched, pytest.raises(InputError, match=r"run.partial cannot be made \(Permission denied\)"):
        patched.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied")))
        to_megatron(hf, tmp_path / "run")
    to_megatron(hf, tmp_path / "run")
    to_hf(tmp_path / "run", tmp_path / "back")
    assert same_bits(tensors_of(tmp_path / "back"), tensors_of(hf))


def test_command_lines(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def run(module: object, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["tool", *words])
        module.main()
        return capsys.readouterr().out

    there = ["--hf", str(hf), "--output", str(tmp_path / "run"), "--tp", "2"]
    told = run(convert_hf_to_megatron, *there, "--dry-run")
    assert "__1_0.distcp" in told and "GB  to write" in told and "GB free" in told and not (tmp_path / "run").exists()
    assert f"{hf} -> {tmp_path / 'run'}" in run(convert_hf_to_megatron, *there)
    back = ["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "back")]
    assert "model.safetensors" in run(convert_megatron_to_hf, *back, "--dry-run") and not (tmp_path / "back").exists()
    run(convert_megatron_to_hf, *back, "--dtype", "float16")
    assert tensors_of(tmp_path / "back")["model.norm.weight"].dtype == torch.float16
    with pytest.raises(SystemExit) as ended:
        run(convert_megatron_to_hf, *back)
    assert ended.value.code == 2 and "holds other files already" in capsys.readouterr().err


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of some 10 MB, in a folder, and converted."""
    folder = tmp_path_factory.mktemp("parts")
    model = replace(MODELS["qwen2"], hidden_size=128, ffn_hidden_size=512, num_layers=16, kv_channels=16, vocab_size=2001)
    hf_folders.write(folder / "hf", model)
    hf_folders.import_in_parts(folder / "hf", folder / "run")
    hf_folders.export_in_parts(folder / "run", folder / "back")
    return folder


@pytest.mark.parametrize(
    "work, source, whole",
    [(hf_folders.import_in_parts, "hf", "run"), (hf_folders.export_in_parts, "run", "back")],
    ids=["to_megatron", "to_hf"],
)
def test_a_kill_costs_only_what_was_unfinished(parts: Path, tmp_path: Path, work: Callable[[Path, Path], None], source: str, whole: str):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.unit.hf_folders"])
    expected = contents(parts / whole)
    files = [name for name in expected if name.endswith((".distcp", ".safetensors"))]
    rng = random.Random(5)
    killed = set()
    for attempt in range(2 * KILLS):
        output = tmp_path / f"killed{attempt}"
        partial = output.with_name(f"{output.name}.partial")
        process = processes.Process(target=work, args=(parts / source, output))
        process.start()
        goal = attempt % KILLS * (len(files) + 1) // KILLS  # files to wait for: the kills spread over the whole of the work
        while process.is_alive() and sum((partial / name).exists() for name in files) < goal:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        left = contents(partial)
        finished = {name for name in files if name in left}
        assert all(left[name] == expected[name] for name in finished), "a file with its final name is not whole"
        assert not output.exists() or contents(output) == expected
        if process.exitcode == -signal.SIGKILL:
            killed.add((attempt, len(finished)))
        work(parts / source, output)
        assert contents(output) == expected
        shutil.rmtree(output)
        if len(killed) == KILLS:
            break
    # Of eight files, or twenty that get their names two at a time, nine or eleven moments can be told apart.
    assert len(killed) == KILLS and len({count for _, count in killed}) >= KILLS // 4, f"the kills fell at few moments: {killed}"


def contents(folder: Path) -> dict[str, str]:
    """File name -> sha256 of all but what lies aside or tells of the work."""
    names = (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names if not re.search(r"\.part$|^\.", name)}


MEASURED = """
import re, sys
from pathlib import Path
from tools import convert_hf_to_megatron, convert_megatron_to_hf
from megatron_tower.training import convert
heavy = [name for name in ("megatron.core", "transformers") if name in sys.modules]
assert not heavy, heavy
def peak():  # of this program: ru_maxrss would begin with that of the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))
before = peak()
convert.to_megatron(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[4]), 1)
convert.to_hf(Path(sys.argv[2]), Path(sys.argv[3]))
print(before, peak())
"""


@pytest.mark.parametrize("tensor", [1, 2])
def test_memory_is_that_of_two_tensors(tmp_path: Path, tensor: int):
    shape = {"hidden_size": 1024, "ffn_hidden_size": 6144, "num_layers": 8, "kv_channels": 128, "vocab_size": 2001}
    model = replace(MODELS["llama"], **shape)
    hf_folders.write(tmp_path / "hf", model)
    largest, total = 1024 * 6144 * 2, sum(file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors"))
    words = [str(tmp_path / name) for name in ("hf", "run", "back")]
    done = subprocess.run([sys.executable, "-c", MEASURED, *words, str(tensor)], capture_output=True, text=True, check=True)
    before, peak = (int(word) * 1024 for word in done.stdout.split()[-2:])
    assert total > 20 * largest and peak < 2 * largest + (500 << 20)
    assert peak - before < 2 * largest + (128 << 20), f"{(peak - before) >> 20} MB beside what importing takes"
