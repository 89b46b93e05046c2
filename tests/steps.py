"""The forward pass of a micro-batch as the trainer makes it, for tests that have a model and no run."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from musubi_tuner.data.batch import Batch
from musubi_tuner.training.task import Draws, FlowPhase, Position, weighted_sum


@dataclass
class StepOutput:
    """What a micro-batch gives.

    Attributes:
        loss: weighted sum of all terms over the samples. terms: unweighted sums by name, detached, with ``total``.
        sigma: noise level of every sample.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    sigma: Tensor


def training_step(model: nn.Module, process: Any, batch: Batch, draws: Draws, update: int) -> StepOutput:
    """Forward one micro-batch of a denoiser in the update after so many."""
    terms = FlowPhase(model, process, "model").losses(batch, draws, Position(step=update))
    loss = weighted_sum(terms)
    sums = {name: term.per_sample_B.detach().sum() for name, term in terms.items()}
    sigma = terms["main"].sigma_B
    assert sigma is not None
    return StepOutput(loss, {**sums, "total": loss.detach()}, sigma)
