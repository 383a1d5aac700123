"""Rollouts inside training: what is dropped, counted and refilled, and that nothing but differences between answers moves the weights."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_tower.command import load
from megatron_tower.rewards.pool import Verdict
from megatron_tower.runtime import distributed
from tests.distributed.room import grpo_words


class Pool:
    """Verdicts by a rule, in this process. rule(call, number of the answer in it) -> Verdict."""

    def __init__(self, rule: Callable[[int, int], Verdict]):
        self.rule, self.calls, self.asked = rule, 0, []

    def score(self, answers: list[tuple[dict, str]]) -> list[Verdict]:
        self.calls += 1
        self.asked += answers
        return [self.rule(self.calls, i) for i in range(len(answers))]


@pytest.fixture
def trainer(folder: Path, tmp_path: Path) -> Iterator[Callable]:
    """`trainer(rule, *words)`: GRPO on 4 prompts x 4 answers, scored by `rule`, without weight decay."""
    from megatron_tower.train import build

    def made(rule: Callable, *words: str):
        cfg = load(grpo_words(folder, "gemma2", f"run_dir={tmp_path}/run", "phase.optimizer.weight_decay=0", *words))
        distributed.initialize(cfg.parallel, cfg.seed, cfg.cluster)
        trainer = build(cfg, Path(cfg.phase.start_from))
        trainer.source.pool = Pool(rule)
        return trainer

    yield made
    distributed.shutdown()


def weights(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for chunk in trainer.state.chunks for p in chunk.parameters()]


def varied(call: int, i: int) -> Verdict:
    return Verdict((i * 7 % 5) / 4)


@pytest.mark.parametrize("reward", [0.0, 0.7, 1.0])
def test_equal_rewards_leave_the_weights_untouched(trainer, reward):
    learner = trainer(lambda call, i: Verdict(reward))
    before = weights(learner)
    told = [learner.step() for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(before, weights(learner), strict=True))
    assert [t["dropped_groups"] for t in told] == [4, 4] and told[0]["groups"] == told[0]["gradient_norm"] == told[0]["loss"] == 0
    assert told[0]["reward"] == pytest.approx(reward)
    assert learner.state.step == 2 and learner.state.samples == 8


def test_unequal_rewards_move_them_and_the_better_answer_gains(trainer):
    """The log-probability of the answers with positive advantage rises, that of the others falls."""
    learner = trainer(varied, "phase.objective.kl=0", "phase.optimizer.lr=1e-3", "phase.optimizer.warmup=0")
    from megatron_tower.rollout.scoring import label_logprobs

    round_ = learner.source.round(0)
    learner.round = round_
    batches = list(round_.updates[0])
    before = label_logprobs(learner.state.chunks, batches)
    learner.step()
    after = label_logprobs(learner.state.chunks, batches)
    gains = torch.cat([batch.sums(b - a) for batch, a, b in zip(batches, before, after, strict=True)])
    advantages = torch.cat([batch.advantages for batch in batches])
    assert gains[advantages > 0].mean() > 0 > gains[advantages < 0].mean()


def test_what_has_no_verdict_is_left_out_and_counted(trainer):
    """Of each group the first answer times out, the second fails: two remain; never a score of 0 in their place."""

    def rule(call: int, i: int) -> Verdict:
        return [Verdict(None, "timeout"), Verdict(None, "error: ValueError: no"), Verdict(0.5), Verdict(1.0)][i % 4]

    learner = trainer(rule)
    told = learner.step()
    assert (told["timeouts"], told["errors"], told["groups"], told["dropped_groups"]) == (4, 4, 4, 0)
    assert told["reward"] == pytest.approx(0.75)
    kept = learner.source.round(0).updates[0]
    assert sum(batch.count for batch in kept) == 8
    assert sorted(torch.cat([batch.advantages for batch in kept]).tolist()) == pytest.approx([-1] * 4 + [1] * 4)


def test_a_group_with_one_verdict_is_dropped(trainer):
    learner = trainer(lambda call, i: Verdict(0.4) if i % 4 == 0 else Verdict(None, "nan"))
    told = learner.step()
    assert (told["groups"], told["dropped_groups"], told["errors"]) == (0, 4, 12)


def test_dropped_groups_are_refilled_with_further_prompts(trainer):
    """Two of the first four groups say nothing: two further prompts are asked."""

    def rule(call: int, i: int) -> Verdict:
        return Verdict(1.0) if call == 1 and i < 8 else varied(call, i)

    learner = trainer(rule, "phase.rollout.refills=2")
    told = learner.step()
    assert (told["groups"], told["dropped_groups"], told["refills"]) == (4, 2, 1)
    assert learner.state.samples == 6 and learner.source.pool.calls == 2
    assert len({item["prompt"] for item, _ in learner.source.pool.asked}) == 6


def test_several_updates_share_the_prompts_of_a_round(trainer):
    """Two updates of two groups each; the second is off-policy, so its ratios leave 1."""
    learner = trainer(varied, "phase.rollout.updates=2", "phase.optimizer.lr=5e-2", "phase.optimizer.warmup=0")
    first, second = learner.step(), learner.step()
    assert learner.source.pool.calls == 1 and learner.state.samples == 4 and not learner.round.updates
    assert first["clip_fraction"] == 0 < second["clip_fraction"]


@pytest.mark.parametrize("aggregation, mean_square", [("grpo", 1.0), ("dr_grpo", None)])
def test_advantages_are_standardised_but_for_dr_grpo(trainer, aggregation, mean_square):
    learner = trainer(varied, f"phase.objective.aggregation={aggregation}")
    values = torch.cat([batch.advantages for batch in learner.source.round(0).updates[0]])
    assert float(values.sum()) == pytest.approx(0, abs=1e-9)
    if mean_square:
        assert float(values.square().mean()) == pytest.approx(mean_square)
    else:
        assert float(values.abs().max()) < 1
