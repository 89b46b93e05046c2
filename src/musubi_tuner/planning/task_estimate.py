"""How much device memory a task of several roles will need: its phases run on tensors without storage.

Phases run one after the other, and each forgets its gradients at its end, so the largest one counts.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.config import RunConfig
from musubi_tuner.data.batch import Batch
from musubi_tuner.device import choose_device
from musubi_tuner.models.family import TaskOutline
from musubi_tuner.optimizers import state_bytes
from musubi_tuner.planning.estimate import Estimate
from musubi_tuner.planning.fake_step import Alive, autocast_of, fill_with_nothing, norms_of_gpus
from musubi_tuner.training.task import Position, weighted_sum
from musubi_tuner.units import Bytes


def estimate_task(config: RunConfig, bucket: tuple[int, int], batch_size: int) -> Estimate:
    """Device memory of an update.

    Args:
        bucket: width and height in pixels. batch_size: pictures of a micro-batch.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    gpu = choose_device(config.run.device).type == "cuda"
    outline = config.spec.task_family.outline_task(config, _outline_of_role)
    with FakeTensorMode(allow_non_fake_inputs=True), norms_of_gpus() if gpu else nullcontext():
        for module in outline.modules:
            fill_with_nothing(module)
        tensors = outline.batch(bucket, batch_size)
        trained = {
            name: [p for p in role.module.parameters() if p.requires_grad] for name, role in outline.task.roles.items()
        }
        moving = {name: own for name, own in trained.items() if name not in config.frozen}
        weights = _weights(outline.modules)
        phases = [
            (
                _held(config, outline, phase, trained, tensors),
                4 * sum(_values(moving[name]) for name in phase.roles if name in moving),
            )
            for phase in outline.task.phases
            if any(name in moving for name in phase.roles)
        ]
        activations, gradients = max(phases, key=sum, default=(0, 0))
        found = Estimate(
            weights=weights, ring=0, trained=0, gradients=gradients, optimizer=0, average=0, activations=activations, passing=0, host=0
        )  # fmt: skip
        for name, weights_of_role in moving.items():
            own, values = config.for_role(name), _values(weights_of_role)
            shapes = Counter(weight.shape for weight in weights_of_role)
            moments = state_bytes(own.optimizer.type, shapes, own.optimizer.args)
            average = 4 * values * own.ema.enabled
            found = _plus(found, moments, 0 if own.ema.on_cpu else average, average if own.ema.on_cpu else 0, values)
    return found


def _plus(found: Estimate, optimizer: Bytes, average: Bytes, averaged: Bytes, values: int) -> Estimate:
    """With another role."""
    more = {"optimizer": optimizer, "average": average, "averaged": averaged, "values": values}
    return Estimate(**{**vars(found), **{name: getattr(found, name) + size for name, size in more.items()}})


def _outline_of_role(name: str, module: nn.Module) -> Any:
    return SimpleNamespace(name=name, module=module)


def _held(
    config: RunConfig,
    outline: TaskOutline,
    phase: Any,
    trained: Mapping[str, Sequence[Tensor]],
    tensors: dict[str, Tensor],
) -> Bytes:
    """The most that is alive at once in forward and backward pass of a micro-batch in one phase, without gradients of weights."""
    count = len(next(iter(tensors.values())))
    every = torch.ones(count, dtype=torch.bool)
    batch = Batch(
        tensors, dict.fromkeys(tensors, every), [""] * count, tuple(range(count)), torch.zeros(count, dtype=torch.int64)
    )
    at, update = (
        Position(step=outline.step),
        SimpleNamespace(micro_batches=[SimpleNamespace(presentations=tuple(range(count)))]),
    )
    for name, weights in trained.items():
        for weight in weights:
            weight.requires_grad_(name in phase.roles)
    draws = outline.task.draws(batch, update, 0, at)  # type: ignore[arg-type]  # as much of an update as draws ask for
    alive = Alive()
    with alive:
        with autocast_of(config):
            loss = weighted_sum(phase.losses(batch, draws, at))
        loss.backward()
    gradients = 4 * sum(_values([w for w in trained[name] if w.grad is not None]) for name in phase.roles)
    for name in phase.roles:
        for weight in trained[name]:
            weight.grad = None
    return max(0, alive.peak - gradients)


def _values(weights: Sequence[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def _weights(modules: list[nn.Module]) -> Bytes:
    return sum(t.numel() * t.element_size() for module in modules for t in (*module.parameters(), *module.buffers()))
