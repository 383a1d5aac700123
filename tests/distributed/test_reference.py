"""The reference model of preference optimisation: stored by content, reused, or kept live; the same training either way."""

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from megatron_tower.command import load
from megatron_tower.config import InputError
from megatron_tower.rollout import scoring
from megatron_tower.runtime import distributed
from megatron_tower.training import checkpoint, reference, saving
from tests.distributed.room import wpo_words


@pytest.fixture
def build(folder: Path, tmp_path: Path):
    """`build(*words)`: a WPO trainer at its start, or at its newest checkpoint if there is one."""
    from megatron_tower.train import build

    def made(*words: str):
        cfg = load(wpo_words(folder, "gemma2", f"run_dir={tmp_path}/run", *words))
        distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
        return build(cfg, checkpoint.latest(cfg.phase_dir) or Path(cfg.phase.start_from))

    yield made
    distributed.shutdown()


def stored_file(trainer) -> Path:
    (path,) = (trainer.cfg.phase_dir / "reference").glob("*")
    return path


def test_live_and_stored_reference_train_alike(build):
    told = [[build(f"phase.objective.reference={kind}").step()["loss"] for _ in range(1)] for kind in ("stored", "live")]
    assert told[0] == pytest.approx(told[1], abs=1e-6)


def test_margins_follow_the_live_reference_as_the_policy_moves(build):
    """After an update the policy has left the reference, which has not moved."""
    curves = []
    for kind in ("stored", "live"):
        trainer = build(f"phase.objective.reference={kind}")
        curves.append([trainer.step()["margin"] for _ in range(4)])
    assert curves[0] == pytest.approx(curves[1], abs=1e-5) and abs(curves[0][0]) < 1e-6 < abs(curves[0][3])


def test_stored_once_and_read_again(build, monkeypatch):
    """120 answers of 60 pairs; a second start scores nothing."""
    first = build("phase.train_steps=10")
    assert load_file(stored_file(first))["logprobs"].shape == (120,)
    before = stored_file(first).stat().st_mtime_ns
    monkeypatch.setattr(reference, "label_logprobs", None)
    again = build("phase.train_steps=10")
    assert stored_file(again).stat().st_mtime_ns == before and again.source.reference.known == first.source.reference.known


def test_only_what_is_trained_on_is_scored(build):
    """Two steps of eight pairs, the first 16 in the order of the seed."""
    trainer = build("phase.train_steps=2")
    assert 30 <= len(load_file(stored_file(trainer))["logprobs"]) <= 32


def test_a_resumed_run_whose_pairs_changed_is_refused(build, folder: Path, tmp_path: Path):
    pairs = tmp_path / "pairs.jsonl"
    lines = (folder / "gemma2_pairs.jsonl").read_text().splitlines(keepends=True)
    pairs.write_text("".join(lines))
    words = ("phase.train_steps=10", f"phase.file={pairs}")
    trainer = build(*words)
    trainer.step()
    saving.save(trainer.cfg, trainer.state)
    pairs.write_text("".join(lines[:-1]) + lines[-1].replace('"chosen": "', '"chosen": "never '))
    with pytest.raises(InputError, match=r"lacks 1 of the 120 answers of .*pairs\.jsonl, which changed since the phase began"):
        build(*words)


def test_a_damaged_file_is_refused(build):
    path = stored_file(build("phase.train_steps=2"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="is damaged"):
        build("phase.train_steps=2")


def test_a_reference_of_other_weights_ends_the_run_before_the_first_update(build):
    trainer = build("phase.train_steps=10")
    known = trainer.source.reference.known
    trainer.source.reference.known = {key: value - 3 * i for i, (key, value) in enumerate(known.items())}
    with pytest.raises(InputError, match="at the start the policy differs from the reference"):
        trainer.step()
    assert trainer.state.step == 0


def test_scores_are_those_of_the_whole_sequence(build):
    """Summed log-probabilities of the answers equal those of each answer run alone."""
    trainer = build("phase.train_steps=2")
    round_ = trainer.source.round(0)
    for batch in round_.updates[0]:
        (found,) = scoring.label_logprobs(trainer.state.chunks, [batch])
        assert batch.sums(found).tolist() == pytest.approx(batch.reference.tolist(), abs=1e-3)
