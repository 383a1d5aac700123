"""WPO and GRPO against their formulas written out in float64: value and gradient, whole and split over ranks, packed and unpacked."""

import math

import pytest
import torch

from megatron_tower.config import GRPOConfig, InputError, WPOConfig
from megatron_tower.objectives.grpo import GRPO
from megatron_tower.objectives.wpo import WPO
from tests.unit import sequence_objective_cases as cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_rank(single_rank, dtype):
    cases.check(dtype)


def test_terms_of_one_pass(single_rank):
    cases.check_extras()
    cases.check_chunks()


def test_two_ranks(launch):
    launch("tests.unit.sequence_objective_cases", 2)


def test_packed_equals_unpacked(single_rank):
    """The same sums and statistics, whatever the layout of the rows."""
    for objective, batch_of in ((WPO(cases.WPO_FORMS[0]), cases.preference_batch), (GRPO(cases.GRPO_FORMS[3], cases.ROLLOUT), both)):
        told = [objective.loss(cases.logits_of(batch).float(), batch_of(batch)) for batch in (cases.packed(3), cases.unpacked())]
        for name in told[0].stats:
            torch.testing.assert_close(told[0].stats[name].double(), told[1].stats[name].double(), rtol=1e-6, atol=1e-7, msg=name)


def both(batch):
    return cases.rollout_batch(batch, kl=True)


def test_no_weighting_is_dpo(single_rank):
    batch = cases.preference_batch(cases.packed())
    terms = WPO(WPOConfig(beta=0.3, weighting="none")).loss(cases.logits_of(batch).float(), batch)
    margins = []
    for i, (p, y) in enumerate(cases.answers(batch, cases.logits_of(batch))):
        margins.append(p.gather(-1, y[:, None]).log().sum() - batch.reference[i])
    margins = 0.3 * torch.stack([margins[0] - margins[1], margins[2] - margins[3]])
    torch.testing.assert_close(terms.sum, -torch.nn.functional.logsigmoid(margins).sum(), rtol=1e-6, atol=1e-6)
    assert terms.stats["weight_mean"] == terms.weight == 2


def test_the_weight_has_no_gradient_and_a_bound(single_rank):
    """Likely answers reach the clamp; the gradient of the loss is W times DPO's."""
    batch = cases.preference_batch(cases.packed())
    likely = torch.nn.functional.one_hot(batch.labels, cases.VOCABULARY).float() * 9
    grads = []
    for weighting in ("wpo", "none"):
        logits = likely.clone().requires_grad_()
        terms = WPO(WPOConfig(beta=0.3, weighting=weighting, clamp=0.5)).loss(logits, batch)
        terms.sum.backward()
        grads.append(logits.grad)
    assert terms.stats["weight_mean"] == 2 and math.isclose(
        float(WPO(WPOConfig(beta=0.3, clamp=0.5)).loss(likely, batch).stats["weight_mean"]), 1.0
    )
    torch.testing.assert_close(grads[0], 0.5 * grads[1])


def test_start_is_the_reference(single_rank):
    """Margin 0 and loss W ln 2 where policy and reference agree; one clear error where they don't."""
    batch = cases.preference_batch(cases.packed())
    logits = cases.logits_of(batch).float()
    own = torch.stack([p.gather(-1, y[:, None]).log().sum() for p, y in cases.answers(batch, cases.logits_of(batch))])
    objective = WPO(WPOConfig(beta=0.3, sft_coefficient=0.5, label_smoothing=0.1))
    for reference, fits in ((own, True), (own + torch.tensor([0.0, 0.5, 0, 0]), False)):
        terms = objective.loss(logits, cases.PreferenceBatch(**vars(batch) | {"reference": reference}))
        means = {name: float(value) / 2 for name, value in terms.stats.items()}
        if fits:
            assert abs(means["margin"]) < 1e-6
            assert means["loss"] == pytest.approx(means["weight_mean"] * math.log(2) + 0.5 * means["chosen_nll"], abs=1e-6)
            objective.check_start(means, "float32")
            assert objective.summary(dict(means))["weight_std"] >= 0
        else:
            with pytest.raises(InputError, match=r"at the start the policy differs .* W ln 2"):
                objective.check_start(means, "float32")


def test_on_policy_statistics(single_rank):
    """Without old log-probabilities the ratio is 1: nothing is clipped; the mismatch is measured against the rollout."""
    batch = cases.rollout_batch(cases.packed(), kl=False, old=False)
    objective = GRPO(GRPOConfig(), cases.ROLLOUT)
    terms = objective.loss(cases.logits_of(batch).float(), batch)
    told = objective.summary({name: float(value) / batch.count for name, value in terms.stats.items()})
    assert told["clip_fraction"] == 0 and told["kl"] == 0
    assert told["mismatch_kl"] > 0 and 0 < told["effective_sample_size"] < 1
    assert terms.sum.item() == pytest.approx(-float(batch.advantages.sum()), rel=1e-6)


def test_nothing_to_learn_from_gives_zero(single_rank):
    """A row of padding: weight 0, gradient 0, no NaN."""
    empty = cases.end_to_end([], 0, 4)
    batch = cases.RolloutBatch(**vars(empty), advantages=torch.zeros(0, dtype=torch.float64), rollout_logprobs=torch.zeros(1, 4))
    logits = torch.randn(1, 4, cases.VOCABULARY, requires_grad=True)
    terms = GRPO(GRPOConfig(kl=0.1), cases.ROLLOUT).loss(logits, batch)
    terms.sum.backward()
    assert terms.weight == 0 and terms.sum == 0 and torch.equal(logits.grad, torch.zeros_like(logits))
