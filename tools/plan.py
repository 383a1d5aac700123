"""What a run will take, before anything is queued: memory of each rank, time of a step, days, size of a checkpoint; or which layout.

    python -m tools.plan model=qwen25_72b cluster=h100_pyxis phase=cpt parallel=72b_64          this layout
    python -m tools.plan model=qwen25_72b cluster=h100_pyxis phase=cpt --gpus 256               the layouts that fit, the fastest first

Words are those of `megatron_tower.train`; precision is bf16 where none is named. Exit code 2 and one sentence where nothing fits.
How figures are made and how near they come: docs/plan.md. Leaves out: data that an epoch has; rewards, and loading, of GRPO.
"""

import argparse
from collections.abc import Iterator
from dataclasses import fields, replace

from megatron_tower.checks import layout_problems, phase_problems
from megatron_tower.command import load, refuse
from megatron_tower.config import Config, InputError, ParallelConfig, check_phase
from megatron_tower.plan import GIB, Memory, checkpoint_bytes, memory
from megatron_tower.step_time import StepTime, predict

TENSOR = (1, 2, 4, 8)
PIPELINE = (1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 16, 20)
VIRTUAL = (None, 2, 3, 4, 5, 7, 10)
SAVING = ({}, {"gradients": "bfloat16"}, {"gradients": "bfloat16", "offload": 1.0, "distributed_optimizer": True})  # what costs least first
SHOWN = 12  # layouts


def layouts(cfg: Config, gpus: int) -> list[Config]:
    """The run on each layout of `gpus` ranks that can work and fits, the fastest first. InputError when there is none."""
    fits = [other for degrees in _degrees(gpus) for other in _variants(cfg, degrees)]
    if not fits:
        check_phase(replace(cfg, cluster=replace(cfg.cluster, gpu_memory_gib=0.0)))  # a fault that is of no layout is told as it is
        raise InputError(
            f"phase={cfg.phase.name} of model={cfg.model.name} fits no layout of {gpus} GPUs of {cfg.cluster.gpu_memory_gib:g} GiB: "
            "give --gpus more, shorten phase.seq_length, or choose phase.global_batch_size as a multiple of more"
        )
    return sorted(fits, key=lambda other: predict(other).seconds)


def _degrees(gpus: int) -> Iterator[dict[str, int | None]]:
    for tensor in TENSOR:
        for pipeline in PIPELINE:
            for virtual in VIRTUAL if pipeline > 1 else VIRTUAL[:1]:
                if gpus % (tensor * pipeline) == 0:
                    yield {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": virtual, "data": gpus // (tensor * pipeline)}


def _variants(cfg: Config, degrees: dict[str, int | None]) -> Iterator[Config]:
    """The fastest that fits of these degrees, with as little given up as can be."""
    many = degrees["data"] > 1
    split = {"sequence_parallel": True, "tensor_overlap": cfg.parallel.tensor_overlap} if degrees["tensor"] > 1 else {}
    whole = split | {"distributed_optimizer": many, "overlap": many}
    for saving in SAVING:
        given = degrees | whole | saving
        parallel = (ParallelConfig(name="planned", **given, recompute=recompute) for recompute in ("none", "mlp", "full"))
        found = [other for other in (replace(cfg, parallel=p) for p in parallel) if _works(other)]
        if found:
            yield min(found, key=lambda other: predict(other).seconds)
            return


def _works(cfg: Config) -> bool:
    return not any(layout_problems(cfg)) and not any(phase_problems(cfg))


def words(parallel: ParallelConfig) -> str:
    """A layout as words of a command line, what is left at its default not said."""
    said = ((f.name, getattr(parallel, f.name)) for f in fields(parallel) if f.name != "name" and getattr(parallel, f.name) != f.default)
    return " ".join(f"{name}={str(value).lower()}" for name, value in said) or "one rank"


def ranking(found: list[Config]) -> Iterator[str]:
    yield "| layout (parallel.*) | GiB of a GPU | s a step | tokens/s/GPU | MFU |"
    yield "|---|---:|---:|---:|---:|"
    for cfg in found[:SHOWN]:
        time, room = predict(cfg), max(stage.total for stage in memory(cfg)) / GIB
        yield f"| {words(cfg.parallel)} | {room:.1f} | {time.seconds:.1f} | {time.rate:,.0f} | {time.mfu:.1%} |"


def report(cfg: Config) -> Iterator[str]:
    """One layout in full."""
    stages, time = memory(cfg), predict(cfg)
    yield from memory_table(stages)
    yield ""
    yield from time_table(cfg, time)
    host = max(stage.host for stage in stages) * min(cfg.cluster.gpus_per_node or 8, cfg.parallel.world_size)
    yield f"\na checkpoint has {checkpoint_bytes(cfg) / 1e9:,.0f} GB" + (
        f"; the optimizer takes {host / GIB:,.0f} GiB of each node's memory" if host else ""
    )


def memory_table(stages: list[Memory]) -> Iterator[str]:
    """GiB on each rank of each pipeline stage; equal neighbours are one row."""
    names = [f.name for f in fields(Memory) if f.name not in ("stage", "host")]
    yield "| stage | " + " | ".join(names) + " | **GiB of a GPU** |"
    yield "|---|" + "---:|" * (len(names) + 1)
    for stage in stages:
        yield (
            f"| {stage.stage} | " + " | ".join(f"{getattr(stage, name) / GIB:.1f}" for name in names) + f" | **{stage.total / GIB:.1f}** |"
        )


def time_table(cfg: Config, time: StepTime) -> Iterator[str]:
    names = ("compute", "collectives", "bubble", "reduce", "optimizer", "rollout")
    yield "| " + " | ".join(names) + " | **s a step** | tokens/s/GPU | TFLOP/s/GPU | MFU | days |"
    yield "|" + "---:|" * (len(names) + 5)
    steps = cfg.phase.train_steps
    days = f"{steps * time.seconds / 86400:,.1f} for {steps:,} steps" if steps else "as many as there are data"
    yield (
        "| " + " | ".join(f"{getattr(time, name):.2f}" for name in names) + f" | **{time.seconds:.2f}** | {time.rate:,.0f} | "
        f"{time.rate * time.flops / 1e12:.0f} | {time.mfu:.1%} | {days} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.plan", description="Memory and time of a run, or the layouts that fit.")
    parser.add_argument("words", nargs="*", help="as for megatron_tower.train; without parallel= layouts are ranked")
    parser.add_argument("--gpus", type=int, help="to rank layouts of; one node's if not given")
    options = parser.parse_intermixed_args()
    try:
        if options.gpus is not None and options.gpus < 1:
            raise InputError(f"--gpus {options.gpus} must be 1 or more")
        named = {word.partition("=")[0].partition(".")[0] for word in options.words}
        cfg = load(([] if "precision" in named else ["precision=bf16"]) + options.words)
        if not cfg.cluster.gpu_memory_gib:
            raise InputError(f"cluster={cfg.cluster.name} says nothing of its GPUs: name one with gpu_memory_gib, as cluster=h100_pyxis")
        title = f"{cfg.model.name}, {cfg.phase.name}, precision={cfg.precision.name}"
        if "parallel" in named and not options.gpus:
            check_phase(cfg)
            print(f"{title}, {cfg.parallel.world_size} GPUs: {words(cfg.parallel)}", "", *report(cfg), sep="\n")
        else:
            gpus = options.gpus or cfg.cluster.gpus_per_node
            found = layouts(cfg, gpus)
            print(f"{title}, {gpus} GPUs: {len(found)} layouts fit", "", *ranking(found), "", *report(found[0]), sep="\n")
    except InputError as error:
        refuse(error)


if __name__ == "__main__":
    main()
