"""Cross entropy against float64, value and gradient, whole and split over ranks; independence of how a batch is cut."""

import torch

from megatron_tower.data.batch import Batch
from megatron_tower.objectives.causal_lm import CausalLM
from tests.unit import objective_cases as cases


def test_one_rank(single_rank):
    cases.check()


def test_two_ranks(launch):
    launch("tests.unit.objective_cases", 2)


def test_sums_do_not_depend_on_micro_batches(single_rank):
    logits, batch = cases.logits_and_batch()
    objective = CausalLM()
    whole = objective.loss(logits.float(), batch)
    rows = [Batch(*(x[i : i + 1] for x in (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids))) for i in range(3)]
    parts = [objective.loss(logits[i : i + 1].float(), row) for i, row in enumerate(rows)]
    torch.testing.assert_close(sum(part.sum for part in parts), whole.sum)
    assert sum(part.weight for part in parts) == whole.weight == batch.loss_mask.sum()
    assert not whole.stats["loss"].requires_grad


def test_logits_are_left_alone(single_rank):
    logits, batch = cases.logits_and_batch()
    before = logits.float()
    given = before.clone().requires_grad_()
    CausalLM().loss(given, batch).sum.backward()
    assert torch.equal(given.detach(), before)
