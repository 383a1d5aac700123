"""`LossTerms`: what an objective returns for one micro-batch."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LossTerms:
    """A loss as a sum and what to divide it by, so that the result does not depend on how a batch is cut up.

    sum: scalar with gradient.   weight: scalar, the number of things summed (tokens, pairs).
    stats: name -> scalar without gradient, each a sum over the same things; the trainer adds them up and divides by `weight` once.
    """

    sum: Tensor
    weight: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
