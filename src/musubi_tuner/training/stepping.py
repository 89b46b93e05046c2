"""Stepping one parameter at a time: as soon as its gradient is complete, and on a float32 copy of a bfloat16 weight.

Only for optimizers that look at one parameter at a time (`Optimizer.alone`): their state lies with the parameters.
"""

from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.randomness import keyed_seed


def step_alone(optimizer: torch.optim.Optimizer, group: dict[str, Any], name: str, parameter: nn.Parameter) -> None:
    """Step one parameter of a group."""
    groups = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": [parameter], "names": [name]}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 values as bfloat16, up or down so that the mean is right.

    Of the 16 bits that are cut off, a random number is added first: a value is rounded up with the probability that its lower bits
    are of a step. Values that are not finite stay.
    """
    noise = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    rounded = (values.contiguous().view(torch.int32) + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


class RoundedStep:
    """Steps bfloat16 weights in float32, and rounds them at random, keyed by update and name.

    A plain sum in bfloat16 loses every change below a 256th of the weight. The optimizer's state is float32.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, seed: int) -> None:
        self.optimizer, self.seed, self._update = optimizer, seed, 0

    def begin(self, update: int) -> None:
        """Begin an update, counted from 0."""
        self._update = update

    @torch.no_grad()
    def step(self) -> None:
        """Step all parameters that have a gradient."""
        for group in self.optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is not None:
                    self.step_one(group, name, parameter)

    @torch.no_grad()
    def step_one(self, group: dict[str, Any], name: str, parameter: nn.Parameter) -> None:
        """Step one of them."""
        if parameter.dtype != torch.bfloat16:
            step_alone(self.optimizer, group, name, parameter)
            return
        assert parameter.grad is not None
        state, exact = self.optimizer.state, nn.Parameter(parameter.detach().float())
        exact.grad = parameter.grad.float()
        if parameter in state:
            state[exact] = state.pop(parameter)
        step_alone(self.optimizer, group, name, exact)
        if exact in state:  # SGD without momentum remembers nothing
            state[parameter] = state.pop(exact)
        draws = torch.Generator(parameter.device).manual_seed(keyed_seed(self.seed, "rounding", self._update, name))
        parameter.copy_(round_stochastically(exact.detach(), draws))


class FusedBackward:
    """Steps a parameter in the backward pass, when its gradient is complete, and frees that at once. A rate of 0 keeps it as it is.

    Args:
        rounded: how, for bfloat16 weights; None = plainly.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rounded: RoundedStep | None) -> None:
        self.optimizer, self.rounded = optimizer, rounded
        self._squares: list[Tensor] = []
        self._places = {
            parameter: (group, name)
            for group in optimizer.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
        }
        for parameter in self._places:
            parameter.register_post_accumulate_grad_hook(self._step)

    def begin(self, update: int) -> None:
        """Begin an update."""
        self._squares = []

    @torch.no_grad()
    def _step(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        group, name = self._places[parameter]
        if group["lr_scale"]:
            self._squares.append(parameter.grad.float().square().sum())
            if self.rounded is not None:
                self.rounded.step_one(group, name, parameter)
            else:
                step_alone(self.optimizer, group, name, parameter)
        parameter.grad = None

    def norm(self) -> Tensor:
        """Norm of all gradients of the update; a float32 scalar."""
        return torch.stack(self._squares).sum().sqrt() if self._squares else torch.zeros(())
