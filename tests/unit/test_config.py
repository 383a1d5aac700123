"""conf/ and its schema: every choice composes, every contradiction is one sentence and exit code 2 with nothing written."""

import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from megatron_tower import launch
from megatron_tower.command import entry_point, load
from megatron_tower.config import CONF, REPOSITORY, Config, InputError, check_phase, difference
from megatron_tower.recipe import phase_words, steps
from tools.init_model import link


def choices(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("model", choices("model"))
@pytest.mark.parametrize("phase", choices("phase"))
def test_every_model_and_phase_composes(model, phase):
    cfg = load([f"model={model}", f"phase={phase}"])
    assert cfg.model.num_attention_heads % cfg.model.num_query_groups == 0
    assert cfg.phase.name == phase and cfg.model.name == model


@pytest.mark.parametrize("group", ["data", "parallel", "eval", "recipe", "cluster"])
def test_every_other_choice_composes_and_carries_its_own_name(group):
    for choice in choices(group):
        large = ["model=qwen25_72b", "precision=bf16"] if group == "parallel" and "b_" in choice else []
        assert getattr(load([f"{group}={choice}", *large]), group).name == choice


@pytest.mark.parametrize("model, billions", [("gemma2_2b", 2.614), ("gemma2_9b", 9.242), ("qwen25_1_5b", 1.544), ("qwen25_72b", 72.706)])
def test_shapes_have_the_published_parameter_counts(model, billions):
    """Counts of the released checkpoints, tied embeddings counted once."""
    m = load([f"model={model}"]).model
    heads, groups, width = m.num_attention_heads, m.num_query_groups, m.kv_channels
    attention = m.hidden_size * width * (2 * heads + 2 * groups) + (heads + 2 * groups) * width * m.qkv_bias
    norms = (4 if m.family == "gemma2" else 2) * m.hidden_size
    layer = attention + norms + 3 * m.hidden_size * m.ffn_hidden_size
    embeddings = m.vocab_size * m.hidden_size * (1 if m.tie_embeddings else 2)
    assert (m.num_layers * layer + embeddings + m.hidden_size) / 1e9 == pytest.approx(billions, abs=1e-3)


BAD = {
    "phse=1": "phse",
    "phase.foo=1": "phase.foo",
    "+model.foo=3": "foo",
    "lr=1e-5": "lr is no key: did you mean phase.optimizer.lr?",
    "phase.optimiser.lr=1": "phase.optimiser.lr is no key: did you mean phase.optimizer.lr?",
    "+phase.optimiser.lr=1": "phase.optimiser is no key: did you mean phase.optimizer?",
    "nothing.like.it=1": "is no key: all keys stand in megatron_tower/config.py",
    "phase": "phase can't be read: words are key=value",
    "phase=cpt,sft": "phase=cpt,sft names several values: add -m",
    "phase=sftt": "phase=sftt is unknown: use one of cpt, grpo, sft, wpo",
    "model=nope": "model=nope is unknown: use one of .*tiny_gemma2",
    "eval.metrics.comet22=x": "write +eval.metrics.comet22=... to add it",
    "parallel.tensor=3": "parallel.tensor=3 does not divide",
    "parallel.tensor=0": "must be 1 or more",
    "parallel.pipeline=3": "4 layers",
    "parallel.virtual_pipeline=2": "parallel.pipeline of 2 or more",
    "parallel.sequence_parallel=true": "parallel.tensor of 2 or more",
    "precision=fp8_delayed": "Transformer Engine",
    "parallel.recompute=all": "use one of none, selective, mlp, full",
    "parallel.gradients=float16": "use one of float32, bfloat16",
    "model.attention_backend=magic": "use one of auto, eager, sdpa, flex, flash2, flash4, te",
    "model.attention_backend=sdpa": "sdpa has no soft-cap, which model=tiny_gemma2 needs: use auto",
    "model.attention_backend=flash4": "needs flash-attn-4, which is not installed: pip install flash-attn-4",
    "model.hf_folder=/nowhere": "config.json",
    "phase.seq_length=long": "phase.seq_length=long: Value 'long' of type 'str' could not be converted to Integer",
    "phase.objective=wpo": "phase.objective.name=wpo is unknown",
    "phase.objective.beta=1": "phase.objective.beta is no key of this objective: use it with phase=wpo",
}
BAD_PHASES = {
    "wpo": {
        "phase.objective.beta=0": "must be above 0",
        "phase.objective.label_smoothing=0.5": "below 0.5",
        "phase.objective.weighting=some": "use one of wpo, none",
        "phase.objective.reference=gone": "use one of stored, live",
        "phase.objective.name=dpo": "phase.objective.name=dpo is unknown: use one of causal_lm, wpo, grpo",
        "phase.file=null": "needs phase.file",
        "phase.dataset=chats": "does not learn from phase.dataset=chats: use preferences",
    },
    "grpo": {
        "phase.rollout.rollouts_per_prompt=1": "a group needs 2 or more answers",
        "phase.rollout.temperature=0": "must be above 0",
        "phase.rollout.max_new_tokens=8192": "below phase.seq_length",
        "phase.rollout.updates=3": "must divide phase.global_batch_size=128",
        "phase.rollout.timeout=0": "timeout above 0",
        "phase.rollout=null": "needs phase.rollout",
        "phase.objective.aggregation=mean": "use one of grpo, dr_grpo, dapo",
        "phase.objective.kl=-1": "must be 0 or more",
        "parallel=pp2 parallel.virtual_pipeline=13": "parallel.virtual_pipeline=13 can't",
    },
}


@pytest.mark.parametrize("word", BAD)
def test_bad_words_name_the_key(word):
    with pytest.raises(InputError, match=BAD[word].replace("+", r"\+").replace("?", r"\?")) as caught:
        load([word])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["phase.global_batch_size=7", "phase.micro_batch_size=2"], "phase.global_batch_size=7 is no multiple"),
        (["phase.global_batch_size=8", "phase.micro_batch_size=4", "parallel.data=4"], "use a multiple of 16"),
        (["parallel.context=2"], "parallel.context=2: attention is not split over a sequence yet"),
        (["phase.seq_length=255", "parallel=tp2_sp"], "as sequence_parallel needs"),
        (["phase.seq_length=4096"], "context of 1024: use that or less"),
        (["phase.epochs=1"], "either phase.train_steps or phase.epochs"),
        (["phase.train_steps=0"], "phase.train_steps=0 must be 1 or more"),
        (["phase.train_steps=null", "phase.epochs=-1"], "phase.epochs=-1.0 must be above 0"),
        (["phase.seq_length=0"], "phase.seq_length=0 must be 2 or more"),
        (["phase.log_every=0"], "phase.log_every=0 must be 1 or more"),
        (["phase.file=mine.jsonl"], "phase.dataset=documents learns from the corpora of data.folder"),
        (["seed=-1"], "seed=-1 must be from 0 to 4294967295"),
        (["phase.optimizer.lr=-1e-3"], "phase.optimizer.lr=-0.001 must be above 0"),
        (["phase.optimizer.lr=nan"], "phase.optimizer.lr=nan must be above 0"),
        (["phase.optimizer.warmup=500"], "phase.optimizer.warmup=500.0 must be from 0 to 1, a fraction of the steps"),
        (["phase.optimizer.min_lr=3"], "phase.optimizer.min_lr=3.0 must be from 0 to 1"),
        (["phase.optimizer.beta2=1"], "phase.optimizer.beta2=1.0 must be 0 or more and below 1"),
        (["phase.optimizer.clip_grad=-1"], "phase.optimizer.clip_grad=-1.0 must be 0 or more"),
        (["cluster.threads_per_rank=-2"], "cluster.threads_per_rank=-2 must be 0 or more"),
        (["phase.keep_last=0"], "phase.keep_last=0 must be 1 or more"),
        (["phase.keep_every=-1"], "keep_every=-1 0 or more"),
        (["phase.evaluate_every=4", "phase.save_every=2"], "no multiple of save_every=2 and of keep_every=0"),
        (["phase.evaluate_every=3", "phase.save_every=2", "phase.keep_every=3"], "phase.evaluate_every=3 is no multiple of save_every=2"),
        (["phase.export=gguf"], "use one of None, hf"),
    ],
)
def test_phase_that_does_not_fit(words, expected):
    fits = ["phase.seq_length=256", "phase.global_batch_size=16", "phase.micro_batch_size=8"]
    check_phase(load(fits))
    with pytest.raises(InputError, match=expected):
        check_phase(load(fits + words))


def test_a_folder_of_another_shape_or_without_a_readable_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "num_hidden_layers": 26, "hidden_size": 2304}')
    with pytest.raises(
        InputError, match=r"differ: family=gemma2 \(config.json: qwen2\), num_layers=42 \(config.json: 26\), hidden_size=3584"
    ):
        load(["model=gemma2_9b", f"model.hf_folder={tmp_path}"])
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(InputError, match=r"config.json can't be read .*: download it again"):
        load(["model=gemma2_9b", f"model.hf_folder={tmp_path}"])


def test_the_base_of_a_run_is_links_and_nothing_is_written_where_they_lead(tmp_path):
    folder, base = tmp_path / "gemma", tmp_path / "run" / "base"
    (folder / ".cache").mkdir(parents=True)
    (folder / "evaluation").mkdir()  # of another run
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)
    base.parent.mkdir()
    base.symlink_to(tmp_path / "gone")
    for _ in range(2):  # the second after a kill
        link(folder, base)
    (base / "evaluation").mkdir()
    assert sorted(path.name for path in base.iterdir()) == [".cache", "config.json", "evaluation", "model.safetensors"]
    assert (base / "config.json").read_text() == "config.json" and (base / "config.json").is_symlink()
    assert not list((folder / "evaluation").iterdir())


def test_command_line_says_one_sentence_exits_2_and_writes_nothing(tmp_path):
    for module, word in product(["megatron_tower.recipe", "tools.init_model"], ["parallel.tensor=3", "phase.foo=1"]):
        run = subprocess.run(
            [sys.executable, "-m", module, f"run_dir={tmp_path / 'run'}", f"data.folder={tmp_path / 'data'}", word],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 2
        assert run.stderr.startswith("error: ") and len(run.stderr.splitlines()) == 1, run.stderr
        assert not list(tmp_path.iterdir())


def test_a_ctrl_c_before_there_is_work_is_no_traceback(monkeypatch, capsys):
    def interrupted(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(SystemExit) as ended:
        entry_point(interrupted)()
    assert ended.value.code == 130 and capsys.readouterr().err == ""


def test_what_is_printed_can_be_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch", "--dry-run", "recipe=demo", f"run_dir={tmp_path}/my run", "recipe.phases=[cpt,sft]"])
    launch.main()
    command = shlex.split(capsys.readouterr().out.splitlines()[1])
    assert command == ["python", "-m", "megatron_tower.recipe", "recipe=demo", f"run_dir={tmp_path}/my run", "recipe.phases=[cpt,sft]"]


def test_launch_names_its_actions(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch", "stat", "recipe=demo"])
    with pytest.raises(SystemExit) as ended:
        launch.main()
    assert ended.value.code == 2 and "stat is neither an action nor key=value: use one of submit, status" in capsys.readouterr().err


@pytest.mark.parametrize("phase, words", [(phase, words) for phase, bad in BAD_PHASES.items() for words in bad])
def test_a_phase_that_can_not_run_is_refused(phase, words):
    with pytest.raises(InputError, match=BAD_PHASES[phase][words]):
        check_phase(load([f"phase={phase}", "model=gemma2_2b", *words.split()]))


@pytest.mark.parametrize("phase", choices("phase"))
def test_every_phase_runs_as_it_is(phase):
    check_phase(load([f"phase={phase}", "model=gemma2_2b"]))


def test_difference_ignores_how_a_run_is_spread_but_not_what_it_is():
    old, other = load(["run_dir=r"]), load(["run_dir=r", "parallel=tp2", "phase.optimizer.lr=0.5"])
    assert difference(old, replace(old, parallel=other.parallel)) == []
    assert difference(old, replace(old, phase=other.phase)) == ["phase.optimizer.lr: 2e-05 -> 0.5"]


def test_a_process_that_catches_sigterm_composes_its_phases() -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)  # the test's fixture puts the handler back
    cfg = load(["recipe=demo"])
    assert len(steps(cfg, ["recipe=demo"])) == 15


def test_recipe_steps_are_commands_and_the_users_words_win():
    words = ["run_dir=r", "phase.train_steps=3"]
    cfg: Config = load(words)
    plan = steps(cfg, words)
    assert [s.title for s in plan][:4] == ["data", "base model", "evaluate base", "train cpt"]
    assert load(phase_words(cfg, "sft", words)).phase.train_steps == 3
    assert plan[3].command[1:3] == ["-m", "megatron_tower.train"]
    with pytest.raises(InputError, match=r"phase\.seq_length"):
        steps(cfg, ["phase.seq_length=4096"])
    with pytest.raises(InputError, match=r"eval\.output=scores would take the scores of every phase"):
        steps(load(["eval.output=scores"]), [])
    with pytest.raises(InputError, match="names no phases"):
        steps(load(["recipe.phases=[]"]), [])


@pytest.mark.parametrize(("model", "layout"), [("gemma2_2b", "2b_8"), ("gemma2_9b", "9b_8"), ("qwen25_72b", "72b_8")])
def test_the_real_recipe_fits_into_the_gpus_of_the_real_layouts(model: str, layout: str):
    words = ["recipe=tower_plus", f"model={model}", f"parallel={layout}", "precision=bf16", "cluster=h100_pyxis", "run_dir=r"]
    assert "train grpo" in [step.title for step in steps(load(words), words)]
    with pytest.raises(InputError, match=r"phase=grpo .* needs .* GiB of a GPU"):
        steps(load([*words, "recipe.overrides.grpo=['phase.rollout.batch_size=512']"]), words)
    with pytest.raises(InputError, match=r"phase\.rollout\.batch_size=8 sets a key of a section that is null here"):  # in phase=cpt
        steps(load(words), [*words, "phase.rollout.batch_size=8"])


def test_every_recipe_number_carries_its_provenance():
    """Each line of conf/phase that sets a number says where it comes from (paper, second-hand, proxy, ours)."""
    for path in sorted((CONF / "phase").glob("*.yaml")):
        for line in Path(path).read_text().splitlines():
            key, _, value = line.partition(":")
            if value.split("#")[0].strip().replace(".", "").replace("e-", "").isdigit() and "micro_batch" not in key:
                assert any(tag in line for tag in ("paper", "second-hand", "proxy", "ours")), f"{path.name}: {line}"
