"""One update: the only place where gradients are made.

    for every phase that is due:
        forward and backward of this rank's micro-batches -> all its roles ready: averaged, unscaled, clipped, checked
        -> all of them step, or none does

Phases are outside and micro-batches inside, so P processes with accumulation A give the same result as one process with
accumulation P*A, for every task. The loss is
the sum over the samples of the update divided by their number.

No micro-batch synchronises with the device, except to fetch gradients of blocks that train in main memory. A phase
synchronises once, to see whether its gradients are finite.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from musubi_tuner.data.batch import Batch
from musubi_tuner.data.plan import MicroBatch, Update
from musubi_tuner.files import fault_point
from musubi_tuner.models.family import LossTerm
from musubi_tuner.precision import autocast
from musubi_tuner.randomness import seed_layers
from musubi_tuner.training.ranks import Ranks
from musubi_tuner.training.role import Role
from musubi_tuner.training.task import Phase, Position, Task, weighted_sum
from musubi_tuner.training.window import binned


@dataclass
class Outcome:
    """What an update gives.

    Attributes:
        sums: loss terms by name, unweighted and summed over this rank's samples, with the weighted ``total``.
        weights: factors of the terms other than ``main``.
        bins: see `binned`.
        measured: norms of gradients, and what the roles measured, by tag.
        items: ids of this rank's samples.
        moved: phases whose roles made a step.
        not_finite: phase whose gradients were not finite; it changed nothing, and those after it did not run.
        moved_anyway: it did change weights, during the backward pass.
    """

    bins: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Tensor] = field(default_factory=dict)
    items: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    not_finite: str | None = None
    moved_anyway: bool = False


def work_of(update: Update, ranks: Ranks) -> list[tuple[int | None, MicroBatch]]:
    """Micro-batches that this rank runs, with their index in the update.

    A rank without work still takes part in the exchange of gradients: it runs the first micro-batch with weight 0; its index is
    None. Where the model is sharded, all ranks run the same number.
    """
    work: list[tuple[int | None, MicroBatch]] = [(index, batch) for index, batch in update.share if batch is not None]
    wanted = len(update.share) if ranks.sharded else min(ranks.count - 1, 1)
    return work + [(None, update.micro_batches[0])] * (wanted - len(work))


def run_update(
    task: Task,
    update: Update,
    batches: Iterator[Batch],
    at: Position,
    *,
    ranks: Ranks,
    seed: int,
    compute_dtype: torch.dtype | None,
    bins: int,
) -> Outcome:
    """Run the phases of an update that are due.

    Args:
        batches: the micro-batches of `work_of`, in order; so many are taken.
        seed: of the run. compute_dtype: of the models' products; None = that of their weights.
        bins: slices of the noise level.
    """
    outcome = Outcome(torch.zeros(2, bins, device=ranks.device))
    phases = [phase for phase in task.phases if phase.due(at) and moving(task, phase)]
    work = work_of(update, ranks)
    taken: Iterable[Batch] = (next(batches) for _ in work)
    if len(phases) != 1:  # several phases share them, and none must leave them in the iterator
        taken = list(taken)
    for phase in phases:
        phase.begin(at)
        for role in moving(task, phase):
            role.begin(at.step)
        with only_trains(task, phase):
            for number, ((index, _), batch) in enumerate(zip(work, taken, strict=True)):
                batch = batch.to(ranks.device)
                draws = task.draws(batch, update, index or 0, at).to(ranks.device)
                seed_layers(seed, "layers", at.step, -1 if index is None else index)
                with ranks.accumulating(phase.exchange, is_last=number == len(work) - 1):
                    with autocast(ranks.device, compute_dtype):
                        terms = phase.losses(batch, draws, at)
                    loss = weighted_sum(terms)
                    # The ranks' gradients are averaged; the loss is a sum over them.
                    share = 0.0 if index is None else ranks.count / update.samples
                    task.roles[phase.roles[0]].backward(loss * share)
                _count(outcome, terms, loss.detach(), is_own=index is not None)
                if index is not None and phase is phases[0]:
                    outcome.items += batch.items
        phase.end(ranks.add_up)
        if not _move(task, phase, at, outcome):
            outcome.not_finite = phase.name
            break
        outcome.moved.append(phase.name)
        if phase is not phases[-1]:
            fault_point("train.phase")
    return outcome


def moving(task: Task, phase: Phase) -> list[Role]:
    """The roles that a phase moves, without those that are frozen."""
    return [role for name in phase.roles if not (role := task.roles[name]).frozen]


@contextmanager
def only_trains(task: Task, phase: Phase) -> Iterator[None]:
    """No gradients for the roles that a phase does not move."""
    own = moving(task, phase)
    others = [parameter for role in task.roles.values() if role not in own for _, parameter in role.parameters]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _count(outcome: Outcome, terms: dict[str, LossTerm], total: Tensor, is_own: bool) -> None:
    """Add the losses of a micro-batch.

    A rank without work of its own still names the terms, so that all ranks reduce the same ones.
    """
    sums = {**{name: term.per_sample_B.detach().sum() for name, term in terms.items()}, "total": total}
    for name, value in sums.items():
        outcome.sums.setdefault(name, torch.zeros_like(value))
        if is_own:
            outcome.sums[name] = outcome.sums[name] + value
    outcome.weights |= {name: term.weight for name, term in terms.items() if name != "main"}
    count = outcome.bins.shape[1]
    for term in terms.values():
        if is_own and count and term.sigma_B is not None:
            outcome.bins = outcome.bins + binned(term.sigma_B, term.per_sample_B.detach(), count)


def _move(task: Task, phase: Phase, at: Position, outcome: Outcome) -> bool:
    """Step with all roles of a phase if the gradients of all are finite; else with none. The same on all ranks."""
    roles = moving(task, phase)
    ready = [role.ready() for role in roles]
    finite = bool(torch.stack(ready).all())
    outcome.moved_anyway = not finite and any(role.has_moved for role in roles)
    for role in roles:
        several = len(task.roles) > 1
        outcome.measured[f"train/grad_norm_{role.name}" if several else "train/grad_norm"] = role.norm.detach()
        if finite:
            outcome.measured |= role.step()
        else:
            role.zero()
    if roles[0].scaler:
        roles[0].scaler.update()
    return finite
