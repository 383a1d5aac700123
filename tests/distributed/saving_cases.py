"""Lives of runs that save beside the training, for test_async_save.py.

    python -m tests.distributed.saving_cases kills FOLDER      one rank after another, each killed at a random moment
    python -m tests.distributed.saving_cases ranks FOLDER      on two ranks: bit-equality, and a writer that fails

One start for many lives: each is a fork of a process that has imported everything.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from megatron_tower.config import Config
from megatron_tower.runtime import cpu, distributed
from tests.distributed import curves

KILLS = 20
LONGEST = 3  # steps of training before a kill
STEPS = "phase.train_steps=300"
LAYOUTS = {"tp2": "fp32", "dp2_distributed": "bf16"}


def kills(folder: Path) -> None:
    """Train with a save after each step, killed 20 times; then go on to the end. Writes what was seen to FOLDER/kills.json."""
    from megatron_tower.data import build, tokenizer  # noqa: F401  these for all lives, which would each import them
    from megatron_tower.rollout import experience  # noqa: F401
    from megatron_tower.training import checkpoint, loading, reference, trainer  # noqa: F401

    saving = ["phase.async_save=true", "phase.save_every=1", "phase.log_every=1000"]
    cfg = curves.config(folder, "gemma2", "single", f"run_dir={folder}/killed", *saving, STEPS)
    tokenizer.load(Path(cfg.data.folder) / "tokenizer")  # imports most of transformers
    rng = random.Random(4)
    steps, torn = [], 0
    for _ in range(KILLS):
        _live(lambda tell: _train(cfg, tell), kill_after=rng.uniform(1, LONGEST))
        torn += any((cfg.phase_dir / "checkpoints").glob(".step_*.part"))
        if found := checkpoint.latest(cfg.phase_dir):
            checkpoint.verify(found.path)
        steps.append(found.step if found else 0)
    last = steps[-1] + 2
    straight = curves.config(folder, "gemma2", "single", f"run_dir={folder}/straight", STEPS)
    ends = []
    for end in (cfg, straight):
        _live(lambda tell, end=end: _train_until(end, last))
        ends.append(checkpoint.latest(end.phase_dir))
    tensors = [(end.path / "__0_0.distcp").read_bytes() for end in ends]
    told = {"steps": steps, "torn": torn, "last": [end.step for end in ends], "equal": tensors[0] == tensors[1]}
    told["left"] = sorted(p.name for p in (cfg.phase_dir / "checkpoints").iterdir())
    (folder / "kills.json").write_text(json.dumps(told | {"orphan": _orphan(cfg)}))


def _live(life: Callable[[int], None], kill_after: float | None = None) -> None:
    """Fork a process that lives `life(tell)`; it is killed when so many of the steps that it tells of are over, of the last a part."""
    hear, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(hear)
        code = 1
        try:
            life(tell)
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(tell)
    if kill_after is not None:
        assert os.read(hear, 1), "it died before it trained"
        began = time.monotonic()
        for _ in range(int(kill_after)):
            assert os.read(hear, 1), "it died while it trained"
        time.sleep(kill_after % 1 * (time.monotonic() - began) / int(kill_after))
        os.kill(child, signal.SIGKILL)
    os.close(hear)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (0 if kill_after is None else -signal.SIGKILL), code


def _trainer(cfg: Config) -> "object":
    from megatron_tower.train import build
    from megatron_tower.training import checkpoint

    distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
    return build(cfg, checkpoint.latest(cfg.phase_dir) or Path(cfg.phase.start_from))


def _train(cfg: Config, tell: int) -> None:
    from megatron_tower.runtime.stop import StopSignal

    trainer = _trainer(cfg)
    cfg.phase_dir.mkdir(parents=True, exist_ok=True)
    step = trainer.step

    def told() -> dict:
        os.write(tell, b"!")
        return step()

    trainer.step = told
    trainer.run(StopSignal(Path(cfg.run_dir) / "triggers"))


def _train_until(cfg: Config, last: int) -> None:
    """The rest of `last` steps, and a checkpoint of the plain kind."""
    from megatron_tower.training import saving

    trainer = _trainer(cfg)
    while trainer.state.step < last:
        trainer.step()
    saving.save(cfg, trainer.state)


def _orphan(cfg: Config) -> bool:
    """Whether a writer that has all the time in the world outlives the training, whose end comes at once."""
    from megatron_tower.training import writer

    hear, tell = os.pipe()

    def life(begun: int) -> None:
        def write(buckets: list) -> str:
            os.write(tell, str(os.getpid()).encode())
            os.write(begun, b"!!")  # not before: killed earlier, it would never say who it is
            time.sleep(600)
            return "never"

        writer.write = write
        writer.Writer([])
        time.sleep(600)

    _live(life, kill_after=1)
    pid = int(os.read(hear, 20))
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        if time.monotonic() > deadline:
            return True
        time.sleep(0.01)
    return False


def ranks(folder: Path) -> None:
    """Each layout: a save beside two further steps beside a plain one of the same step. Then rank 1 can't write."""
    from megatron_tower.training import checkpoint, saving

    told = {}
    for layout, precision in LAYOUTS.items():
        words = [f"precision={precision}", f"run_dir={folder}/{layout}"]
        plain = curves.config(folder, "gemma2", layout, *words)
        beside = curves.config(folder, "gemma2", layout, words[0], f"{words[1]}_async", "phase.async_save=true")
        trainer = _trainer(plain)
        trainer.step()
        saving.save(plain, trainer.state)
        with saving.Saver(beside) as saver:
            saver.save(trainer.state)
            trainer.step()
            trainer.step()
        paths = [checkpoint.latest(cfg.phase_dir).path for cfg in (plain, beside)]
        names = [sorted(p.name for p in path.iterdir()) for path in paths]
        equal = all((paths[0] / name).read_bytes() == (paths[1] / name).read_bytes() for name in names[0] if name.endswith(".distcp"))
        told[layout] = {"files": len(names[0]), "equal": equal and names[0] == names[1], "step": paths[1].name}
    told["failed"] = _failed(beside)
    if distributed.is_rank_zero():
        (folder / "ranks.json").write_text(json.dumps(told))
    distributed.shutdown()


def _failed(cfg: Config) -> str:
    """What both ranks are told when the disk of one is full, and what is there afterwards."""
    from megatron_tower.training import saving, writer

    trainer = _trainer(cfg)
    trainer.step()
    if not distributed.is_rank_zero():
        writer.write = lambda buckets: "OSError: [Errno 28] No space left on device"
    try:
        with saving.Saver(cfg) as saver:
            saver.save(trainer.state)
            saver.wait()
    except RuntimeError as error:
        said = str(error)
    return f"{said} {sorted(p.name for p in (cfg.phase_dir / 'checkpoints').iterdir())}"


if __name__ == "__main__":
    cpu.install()
    {"kills": kills, "ranks": ranks}[sys.argv[1]](Path(sys.argv[2]))
