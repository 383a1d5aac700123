"""Transformer Engine's own code on a CPU: its layers learn what plain ones do, FP8 what bf16 does, on any layout, after a resume too."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from megatron_tower.config import REPOSITORY
from tests.distributed import curves, room
from tests.te import package

FAMILIES = ("gemma2", "qwen2")
RECIPES = ("delayed", "tensorwise", "blockwise")
ALONE = ("gemma2:single", "qwen2:single", "gemma2_wpo:single", "gemma2_grpo:single")
TWO = ("gemma2:tp2_sp", "qwen2:tp2_sp", "gemma2:tp2_sp_full", "gemma2:pp2", "gemma2:dp2_overlap")
FP8_TWO = (
    "gemma2:tp2_sp:fp8_blockwise",
    "gemma2:tp2_sp_mlp:fp8_tensorwise",
    "gemma2:tp2_sp_full:fp8_delayed",
    "gemma2:pp2:fp8_delayed",
    "gemma2:dp2_overlap:fp8_tensorwise",
    "gemma2:tp2_sp_gathered:fp8_tensorwise",
    "gemma2:pp2_gathered:fp8_blockwise",
    "gemma2:dp2_gathered:fp8_delayed",
)
RESUMED = (  # the course that is gone on with, the straight one
    *((f"gemma2:single-single:fp8_{recipe}", f"gemma2:single:fp8_{recipe}") for recipe in RECIPES),
    *((f"gemma2:gathered-gathered:fp8_{recipe}", f"gemma2:gathered:fp8_{recipe}") for recipe in ("delayed", "blockwise")),
    ("gemma2:dp2_gathered-dp2_gathered:fp8_delayed", "gemma2:dp2_gathered:fp8_delayed"),
    ("goes_on:gemma2:dp2_gathered_overlap:fp8_delayed", "gemma2:dp2_gathered:fp8_delayed"),
    ("gemma2:dp2_offload-dp2_offload:bf16", "gemma2:dp2_offload:bf16"),
)
BESIDE = (
    "gemma2:tp2_sp:bf16",
    "gemma2:tp2_sp_mlp:fp8_tensorwise",
    "gemma2:tp2_sp_full:fp8_delayed",
    "qwen2:tp2_sp_edges:fp8_tensorwise",
)

pytestmark = pytest.mark.skipif(not package.FOLDER.exists(), reason=f"needs {package.INSTALL}")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict]:
    """Of a case its curve and calls: all cases made in one launch of one rank and one of two; plain ones here, when they are asked for."""
    from megatron_tower.runtime.local import run_ranks

    folder = tmp_path_factory.mktemp("room")
    (folder / "curves").mkdir()
    for family in FAMILIES:
        room.prepare(folder, family)
    alone = ["memory", *(f"layers:{family}" for family in FAMILIES), *ALONE, "gemma2:single:bf16", "gemma2:recomputed:fp8_delayed"]
    alone += [f"gemma2:{layout}:fp8_{recipe}" for recipe in RECIPES for layout in ("single", "gathered")]
    alone += ["gemma2:gathered-single:fp8_tensorwise", "gemma2:edges:fp8_tensorwise"]
    alone += [case for case, _ in RESUMED if "dp2" not in case]
    two = [*dict.fromkeys((*TWO, *FP8_TWO, *BESIDE)), *(f"beside:{case}" for case in BESIDE), "gemma2:dp2_offload:bf16"]
    two += [case for case, _ in RESUMED if "dp2" in case]
    for ranks, cases in ((1, alone), (2, two)):
        assert run_ranks(["tests.te.cases", str(folder), *cases], ranks, threads=1, logs=folder / "logs") == 0
    plain: dict[str, list[float]] = {}

    def of(case: str) -> dict:
        if not case.startswith("plain "):
            return json.loads((folder / "curves" / f"te_{case}.json").read_text())
        case = case.removeprefix("plain ")
        plain[case] = plain.get(case) or curves.curve(folder, case)
        return {"curve": plain[case]}

    return of


@pytest.mark.parametrize("case", [*ALONE, *TWO])
def test_layers_learn_what_plain_ones_learn(told: Callable, case: str):
    made = told(case)
    assert made["curve"] == pytest.approx(told(f"plain {case.partition(':')[0]}:single")["curve"], abs=1e-5)
    assert min(made["calls"][kernel] for kernel in ("generic_gemm", "rmsnorm_fwd", "fused_rope_forward", "multi_tensor_adam")) > 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_follows_bf16(told: Callable, recipe: str):
    """Every product of a layer is one of FP8 numbers: forward, and both of the backward pass."""
    made = told(f"gemma2:single:fp8_{recipe}")
    assert made["curve"] == pytest.approx(told("gemma2:single:bf16")["curve"], rel=0.01)
    assert made["curve"] != pytest.approx(told("gemma2:single:bf16")["curve"], rel=1e-5)
    linears, micro_batches = 4 * 4, 2
    assert made["calls"]["fp8_gemm"] == made["calls"]["generic_gemm"] == 3 * linears * micro_batches * curves.STEPS


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_kept_in_fp8_learn_what_cast_ones_learn(told: Callable, recipe: str):
    kept, cast = (told(f"gemma2:{layout}:fp8_{recipe}")["curve"] for layout in ("gathered", "single"))
    assert kept == pytest.approx(cast, rel=5e-4)


def test_first_and_last_layer_stay_in_bf16(told: Callable):
    made = told("gemma2:edges:fp8_tensorwise")
    assert made["curve"] == pytest.approx(told("gemma2:single:bf16")["curve"], rel=0.01)
    assert made["calls"]["fp8_gemm"] == made["calls"]["generic_gemm"] / 2  # of four layers


def test_other_weights_go_on_from_those_kept_in_fp8(told: Callable):
    """A checkpoint has what they were cast from."""
    resumed, straight = (told(f"gemma2:{layouts}:fp8_tensorwise")["curve"] for layouts in ("gathered-single", "single"))
    assert resumed == pytest.approx(straight[curves.HALF :], rel=5e-4)


@pytest.mark.parametrize(("case", "straight"), RESUMED)
def test_it_goes_on_as_if_it_had_not_been_saved(told: Callable, case: str, straight: str):
    """With FP8's scales, what its weights are cast from, and offloaded state."""
    assert told(case)["curve"] == told(straight)["curve"][curves.HALF :]


def test_offloaded_state_gives_the_same_course(told: Callable):
    assert told("gemma2:dp2_offload:bf16")["curve"] == pytest.approx(told("gemma2:single:bf16")["curve"], abs=1e-3)


def test_fp8_recomputed_is_the_same(told: Callable):
    assert told("gemma2:recomputed:fp8_delayed")["curve"] == told("gemma2:single:fp8_delayed")["curve"]


@pytest.mark.parametrize("case", FP8_TWO)
def test_fp8_on_two_ranks(told: Callable, case: str):
    """Ranks that hold a part of a weight scale it by what that part holds, so curves are near each other, not equal."""
    assert told(case)["curve"] == pytest.approx(told(f"gemma2:single:{case.rpartition(':')[2]}")["curve"], rel=0.005)


@pytest.mark.parametrize("case", BESIDE)
def test_collectives_beside_products_change_nothing(told: Callable, case: str):
    """Bit for bit. Of each layer, forward: two products gather, two scatter; backward: two gather, two move what another needs each way."""
    made, plain = told(f"beside:{case}"), told(case)
    assert made["curve"] == plain["curve"]
    assert not any(name.startswith("CommOverlap") for name in plain["calls"])
    gathered, scattered, *bulk = (made["calls"][f"CommOverlapType.{kind}"] for kind in ("AG", "RS", "AG.bulk", "RS.bulk"))
    layers, micro_batches = 4, 2
    assert bulk == [2 * layers * micro_batches * curves.STEPS] * 2 and gathered == sum(bulk)
    assert scattered >= bulk[0] and (scattered == bulk[0]) == ("_full" not in case and "_mlp" not in case)


def test_what_a_card_is_to_run_first_runs_here():
    """tests/gpu's precision over these kernels, with its own bounds, but for its long courses."""
    words = ["-q", "-p", "tests.te.plugin", "tests/gpu/test_gpu_precision.py", "-k", "not follows_the_curve and not kept"]
    done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr
