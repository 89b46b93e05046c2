"""A role: modules that are trained, and how they move.

    begin              learning rate; gradients start as None
    backward           scale the loss (fp16), add gradients
    ready              average what data parallelism did not, unscale, clip, check
    step               optimizer, limits, moving average

A model that trains alone, or the adapters on it, is one role. Where several roles share a phase, all of them are made ready
before any of them moves; see `update`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from musubi_tuner.adapters.attach import AdapterSet
from musubi_tuner.config import RunConfig
from musubi_tuner.errors import ConfigError
from musubi_tuner.memory.block_swap import BlockSwap
from musubi_tuner.optimizers import OPTIMIZERS
from musubi_tuner.training.ema import EMA, LoadReport
from musubi_tuner.training.optimizers import (
    averaged_parameters,
    build_optimizer,
    clip_gradients,
    load_optimizer_state,
    optimizer_state,
    rates_of_patterns,
    relative_rate,
    set_learning_rate,
    trainable,
)
from musubi_tuner.training.plateau import plateau_of
from musubi_tuner.training.ranks import Ranks
from musubi_tuner.training.schedulers import schedule_of
from musubi_tuner.training.stepping import FusedBackward, RoundedStep

if TYPE_CHECKING:
    from musubi_tuner.training.sharded import ShardedModel


@dataclass
class RoleState:
    """What must survive a restart of a role.

    Attributes:
        model, ema: weights and their average, by name; empty without an average.
        optimizer: tensors by ``parameter/entry``. scalars: plain values by parameter and entry.
        average_updates: number of updates the average has seen.
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    scalars: dict[str, dict[str, Any]]
    average_updates: int


class Role:
    """Modules with their optimizer, schedule, limit of the gradient, loss scaler and average.

    Args:
        name: by which settings and files call it.
        module: whose parameters with ``requires_grad`` train: a whole model, or an `AdapterSet`.
        total: updates of the run.
        swap: of the blocks of the model, if there is one.
        scaler: of fp16, shared by the roles of a run; None for other precisions.
        sharded: ``module``, where it is a model that is sharded across the ranks.
        wrapped: whether data parallelism wraps the model and averages gradients during the backward pass; otherwise `ready` does.

    Attributes:
        parameters: by name, in the order of the optimizer's state.
        frozen: it stays as it is; no phase moves it.
        plateau: what measurements have left of the rate; None where they do not act on it.
        norm: of its gradients in the last update, before they were clipped; a float32 scalar.

    Raises:
        ConfigError: if nothing in it is trainable, or its optimizer is not installed.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        config: RunConfig,
        *,
        total: int,
        ranks: Ranks,
        swap: BlockSwap | None = None,
        scaler: torch.amp.GradScaler | None = None,
        wrapped: bool = True,
        sharded: "ShardedModel | None" = None,
    ) -> None:
        config = config.for_role(name)
        self.name = name
        self.frozen = name in config.frozen
        self.module = module
        self.parameters = trainable(module)
        self.lr = config.optimizer.lr
        self.schedule = schedule_of(config, total)
        self.plateau = None if self.frozen else plateau_of(config, total)
        self.max_grad_norm = config.train.max_grad_norm
        self.max_norm = config.adapter.max_norm
        self.scaler = scaler
        self.ema: EMA | None = None
        self.norm = torch.zeros(())
        self._ranks = ranks
        self._swap = swap
        self._record = OPTIMIZERS[config.optimizer.type]
        self.optimizer_args = config.optimizer.args
        args = self._record.complete(self.optimizer_args)
        self._own_rate = bool(args.get("relative_step"))
        self._warmup_init = bool(args.get("warmup_init"))
        self.optimizer = build_optimizer(
            self.parameters, config.optimizer, config.adapter.loraplus_lr_ratio, rates_of(module, config)
        )
        # Without a gradient they stay; several optimizers shrink, or even move, what has a rate of 0.
        self._kept = [p for group in self.optimizer.param_groups if not group["lr_scale"] for p in group["params"]]
        self._fused: FusedBackward | None = None
        self._rounded: RoundedStep | None = None
        if config.train.full_half and config.train.stochastic_rounding:
            self._rounded = RoundedStep(self.optimizer, config.run.seed)
        if config.optimizer.fused_backward and not self.frozen:
            if ranks.count > 1:
                raise ConfigError(
                    "optimizer.fused_backward: steps before the gradients of several processes are averaged; set it to false, or run one "
                    "process"
                )
            self._fused = FusedBackward(self.optimizer, self._rounded)
        # DDP does not see parameters in main memory; their gradients are averaged block by block.
        streamed = [[p for p in block.trained if p.requires_grad] for block in swap.streamed] if swap else []
        self._by_hand = streamed if wrapped else [[parameter for _, parameter in self.parameters]]
        self._sharded = sharded
        if sharded is not None:
            self._by_hand = [sharded.replicated]
        if swap is not None and any(streamed):
            swap.watch(self.optimizer)
        if config.ema.enabled and not self.frozen:
            where = "cpu" if config.ema.on_cpu else None
            self.ema = EMA(module, config.ema.decay, warmup=config.warms_average, device=where)

    def remarks(self) -> list[str]:
        """What a person should know of its optimizer."""
        least = self._record.complete(self.optimizer_args).get("min_8bit_size")
        if least is None or any(parameter.numel() >= least for _, parameter in self.parameters):
            return []
        return [
            f"warning: optimizer.type: all {len(self.parameters)} trained tensors have fewer than {least} values, which stay in 32 bits: it saves nothing"
        ]

    @property
    def by_hand(self) -> list[nn.Parameter]:
        """Parameters whose gradients `ready` averages over the ranks."""
        return [parameter for group in self._by_hand for parameter in group]

    def rate(self, step: int) -> float:
        """Learning rate of an update, counted from 0; each parameter group multiplies it by its own factor.

        With a plateau, of an update since its last fall.
        """
        if self._own_rate:
            return relative_rate(step, self._warmup_init)
        return self.lr * self.schedule(step) * (self.plateau.share if self.plateau else 1.0)

    def begin(self, step: int) -> None:
        """Begin an update.

        Args:
            step: updates done before.
        """
        set_learning_rate(self.optimizer, self.rate(step))
        for stepping in (self._fused, self._rounded):
            if stepping is not None:
                stepping.begin(step)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def ready(self) -> Tensor:
        """Complete the gradients of an update and clip them; whether they are finite, as a boolean on the device."""
        if self._fused is not None:
            self.norm = self._fused.norm()
            return torch.isfinite(self.norm).to(self._ranks.device)
        if self._sharded is not None:
            self._sharded.collect_gradients()
        for parameter in self._kept:
            parameter.grad = None
        for group in self._by_hand:
            self._ranks.average_gradients(group)
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        if self._sharded is not None:
            self.norm = self._sharded.clip_gradients(self.max_grad_norm, self._ranks.add_up)
        else:
            self.norm = clip_gradients([parameter for _, parameter in self.parameters], self.max_grad_norm)
        return torch.isfinite(self.norm).to(self._ranks.device)

    @property
    def has_moved(self) -> bool:
        """Whether it moves before its gradients are known to be finite."""
        return self._fused is not None

    def step(self) -> dict[str, Tensor]:
        """Make a step with the gradients that `ready` completed, and forget them; what was measured, by tag."""
        if self._rounded is not None and self._fused is None:
            self._rounded.step()
        elif self.scaler is None and self._fused is None:
            self.optimizer.step()
        elif self.scaler is not None and any(parameter.grad is not None for _, parameter in self.parameters):
            self.scaler.step(self.optimizer)  # which takes no role that the losses of this update did not reach
        self.zero()
        measured = {}
        if self.max_norm is not None and isinstance(self.module, AdapterSet):
            measured = self.module.limit_norms(self.max_norm)
        if self.ema:
            self.ema.update(self.module)
        return measured

    def zero(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        if self._sharded is not None:
            self._sharded.forget_gradients()

    @property
    def averages_itself(self) -> bool:
        """Whether its optimizer keeps the average that `averaged` shows."""
        return self._record.averages

    @property
    def sharded(self) -> bool:
        """Whether it is sharded across the ranks: then they ask for its weights, averages and state together."""
        return self._sharded is not None

    def weights(self) -> dict[str, Tensor]:
        """The weights to use, by name: those that train, or of a schedule-free optimizer what it averages; only these are copies.

        Of a sharded role whole, on the main rank; empty on the others.
        """
        return self._gathered(self._own_weights())

    def average(self) -> dict[str, Tensor]:
        """The average, or `weights` if there is none."""
        return self._gathered(self.ema.shadow) if self.ema else self.weights()

    def start_average(self, average: Mapping[str, Tensor]) -> LoadReport:
        """Begin with another average than the weights."""
        assert self.ema is not None
        return self.ema.load_shadow(self._cut(average), self.module)

    def _own_weights(self) -> dict[str, Tensor]:
        weights = self.module.state_dict()
        return {**weights, **averaged_parameters(self.optimizer)} if self._record.averages else weights

    def _gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors if self._sharded is None else self._sharded.gathered(tensors, _parameter_of)

    def _cut(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return tensors if self._sharded is None else self._sharded.cut(tensors, _parameter_of)

    @contextmanager
    def averaged(self, wanted: bool = True) -> Iterator[None]:
        """The average in the place of the weights inside the block, if it is wanted; the trained weights after it."""
        try:
            if wanted and self.ema:
                with self.ema.applied(self.module), self._in_use():
                    yield
            elif self._record.averages:
                trained = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
                try:
                    self.module.load_state_dict(self._own_weights())
                    with self._in_use():
                        yield
                finally:
                    self.module.load_state_dict(trained)
            else:
                with self._in_use():
                    yield
        finally:
            self.refresh()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """The present weights on the device inside the block, those of all ranks."""
        self.refresh()
        with self._sharded.whole() if self._sharded is not None else nullcontext():
            yield

    def refresh(self) -> None:
        """Let copies of weights on the device follow a change."""
        if self._swap is not None:
            self._swap.refresh()

    def state(self) -> RoleState:
        """What a state holds of it; tensors are not copied. Of a sharded role whole tensors, on the main rank."""
        tensors, scalars = optimizer_state(self.optimizer, self._record.remembers)
        return RoleState(
            self._gathered(self.module.state_dict()),
            self._gathered(self.ema.shadow) if self.ema else {},
            self._gathered(tensors),
            scalars,
            self.ema.updates if self.ema else 0,
        )

    def load_state(self, state: RoleState) -> list[str]:
        """Go on from a state.

        Returns:
            Names of weights that are missing from it or unexpected in it.

        Raises:
            CheckpointError: if the state of the optimizer belongs to other parameters.
        """
        missing, unexpected = self.module.load_state_dict(self._cut(state.model), strict=False)
        if missing or unexpected:
            return [*missing, *unexpected]
        load_optimizer_state(self.optimizer, dict(self._cut(state.optimizer)), state.scalars)
        if self.ema:
            self.ema.load_shadow(self._cut(state.ema))
            self.ema.updates = state.average_updates
        return []


def rates_of(module: nn.Module, config: RunConfig) -> dict[str, tuple[float, float | None]]:
    """Parameter name -> factor of its learning rate, and its weight decay (None = the optimizer's).

    Raises:
        ConfigError: for a pattern of optimizer.group_lr that matches nothing.
    """
    names = {name: name for name, parameter in module.named_parameters() if parameter.requires_grad}
    rates: dict[str, tuple[float, float | None]] = {}
    if isinstance(module, AdapterSet):
        rates, names = module.parameter_rates(), module.dotted_names()
    for name, factor in rates_of_patterns(names, config.optimizer).items():
        rates[name] = (factor, rates[name][1] if name in rates else None)
    return rates


def _parameter_of(key: str) -> str:
    """Parameter of an entry of a model, an average or an optimizer's state."""
    return key.partition("/")[0]


def prefix_of(role: Role) -> str:
    """Prefix of the names of a role's tensors in files and states; a denoiser has none."""
    return "" if role.name == "model" else f"{role.name}."


class Weights(NamedTuple):
    """What a checkpoint holds of roles, by name; tensors are not copied.

    Attributes:
        averaged: averages, and the weights of roles that have none; empty where no role has one.
    """

    trained: dict[str, Tensor]
    averaged: dict[str, Tensor]


def weights_of(roles: Sequence[Role]) -> Weights:
    """The weights and averages of roles, on the main rank. All ranks call it together where a role is sharded."""
    trained = {f"{prefix_of(role)}{key}": tensor for role in roles for key, tensor in role.weights().items()}
    if not any(role.ema for role in roles):
        return Weights(trained, {})
    return Weights(
        trained, {f"{prefix_of(role)}{key}": tensor for role in roles for key, tensor in role.average().items()}
    )
