"""Rounding at random is right in the mean and repeatable; stepping in the backward pass gives the bits of the ordinary step."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from musubi_tuner.config.schema.optimizer import OptimizerSection
from musubi_tuner.optimizers import OPTIMIZERS, having
from musubi_tuner.training.optimizers import (
    build_optimizer,
    clip_gradients,
    load_optimizer_state,
    optimizer_state,
    trainable,
)
from musubi_tuner.training.stepping import FusedBackward, RoundedStep, round_stochastically, step_alone

ALONE = having(lambda record: record.alone)
BF16 = torch.bfloat16


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Rounding


def test_the_mean_of_many_draws_is_the_value() -> None:
    values = torch.tensor([1.001, -1.001, 3.14159, -2.71828e-20, 1e30, 7e-39, 0.999])
    count = 40_000
    draws = round_stochastically(values.expand(count, -1), generator()).double()
    low, high = draws.amin(0), draws.amax(0)
    assert (low < values.double()).all() and (values.double() < high).all()
    # Two neighbours, drawn in proportion: at most half a spacing of deviation, here within 5 standard errors.
    assert all(len(column.unique()) == 2 for column in draws.T)
    assert ((draws.mean(0) - values.double()).abs() <= 5 * 0.5 * (high - low) / count**0.5).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0078125, 2.0**-133, 3.3895313892515355e38])
def test_a_value_that_bfloat16_has_stays(value: float) -> None:
    exact = torch.full((500,), value)
    assert torch.equal(exact.to(BF16).float(), exact)
    rounded = round_stochastically(exact, generator())
    assert rounded.dtype == BF16 and torch.equal(rounded.view(torch.int16), exact.to(BF16).view(torch.int16))


def test_infinities_and_nan_stay_what_they_are() -> None:
    values = torch.tensor([float("inf"), float("-inf"), float("nan")]).repeat(300)
    # A NaN whose set bits are all among those that are cut off, and one that a carry would turn into a number.
    odd = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32).repeat(300)
    rounded = round_stochastically(values, generator()).float()
    assert torch.equal(rounded.nan_to_num(3.0, 1.0, 2.0), values.nan_to_num(3.0, 1.0, 2.0))
    assert round_stochastically(odd, generator()).isnan().all()


def test_draws_depend_on_the_key_alone() -> None:
    values = torch.randn(1000, generator=generator(5))
    first = round_stochastically(values, generator(1))
    torch.manual_seed(9)
    assert torch.equal(first, round_stochastically(values, generator(1)))
    assert not torch.equal(first, round_stochastically(values, generator(2)))


# Steps of bfloat16 weights


class Net(nn.Module):
    """Matrices, one of them used twice, and a bias: two groups."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(80, 64), nn.Linear(64, 80, bias=False)
        for number, parameter in enumerate(self.parameters()):
            parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator(number))).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return x


def built(model: nn.Module, kind: str = "AdamW", **settings: Any) -> torch.optim.Optimizer:
    betas = {key[10:]: value for key, value in OPTIMIZERS[kind].defaults.items() if key == "optimizer.betas"}  # type: ignore[index]
    section = OptimizerSection(**{"type": kind, "lr": 1e-2, **betas, **settings})
    return build_optimizer(trainable(model), section, rates={"second.weight": (0.5, None)})


def loss(model: nn.Module, update: int) -> Tensor:
    x = torch.randn(4, 80, generator=generator(update)).to(next(model.parameters()).dtype)
    return (model(x).float() - 1).square().mean()


def test_steps_far_below_the_spacing_move_weights_in_the_mean_only_if_they_are_rounded_at_random() -> None:
    """Each step is a 1500th of the spacing of bfloat16 below 1."""
    step, count, updates = 2.0**-8 / 1500, 4096, 300

    def moved(rounded: bool) -> Tensor:
        weight = nn.Parameter(torch.full((count,), 0.75, dtype=BF16))
        optimizer = build_optimizer([("weight", weight)], OptimizerSection(type="SGD", lr=step, args={"momentum": 0.0}))
        stepping = RoundedStep(optimizer, seed=1)
        for update in range(updates):
            weight.grad = torch.full_like(weight, -1.0)
            stepping.begin(update)
            (stepping if rounded else optimizer).step()
        return weight.detach().double() - 0.75

    assert not moved(False).any()
    # Each weight goes up by a spacing with probability 1 / 1500 per update: 0.2 in the mean, standard error 0.007.
    assert moved(True).mean().item() == pytest.approx(updates * step, rel=0.15)


@pytest.mark.parametrize("kind", ALONE)
def test_weights_are_bfloat16_and_the_state_that_was_float32_stays_that(kind: str) -> None:
    model = Net(BF16)
    optimizer = built(model, kind)
    stepping = RoundedStep(optimizer, seed=1)
    for update in range(2):
        loss(model, update).backward()
        stepping.begin(update)
        stepping.step()
        optimizer.zero_grad()
    assert {parameter.dtype for parameter in model.parameters()} == {BF16}
    tensors, values = optimizer_state(optimizer)
    assert set(values) == {name for name, _ in model.named_parameters()}
    assert tensors and BF16 not in {tensor.dtype for tensor in tensors.values()}
    assert set(optimizer.state) == set(model.parameters())  # the copies have left nothing behind


@pytest.mark.parametrize("kind", ALONE)
def test_a_rounded_step_is_the_step_of_float32_weights_but_for_the_last_bit(kind: str) -> None:
    model, exact = Net(BF16), Net(BF16).float()
    optimizer, other = built(model, kind), built(exact, kind)
    loss(model, 0).backward()
    for parameter, copy in zip(model.parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None
        copy.grad = parameter.grad.float()
    RoundedStep(optimizer, seed=1).step()
    other.step()
    for parameter, copy in zip(model.parameters(), exact.parameters(), strict=True):
        spacing = 2.0 ** (copy.detach().abs().log2().floor() - 7)
        assert ((parameter.detach().float() - copy.detach()).abs() < spacing).all()
    (tensors, _), (expected, _) = optimizer_state(optimizer), optimizer_state(other)
    assert tensors.keys() == expected.keys()
    # Fused kernels of one tensor and of several may sum in another order.
    assert all(torch.allclose(tensor.float(), expected[key].float(), rtol=1e-6) for key, tensor in tensors.items())


def test_parameters_and_updates_and_seeds_are_rounded_by_draws_of_their_own() -> None:
    def rounded(name: str = "a", update: int = 0, seed: int = 1) -> Tensor:
        weight = nn.Parameter(torch.ones(500, dtype=BF16))
        optimizer = build_optimizer([(name, weight)], OptimizerSection(type="SGD", lr=0.001))
        stepping = RoundedStep(optimizer, seed)
        weight.grad = torch.ones_like(weight)
        stepping.begin(update)
        stepping.step()
        return weight.detach()

    assert torch.equal(rounded(), rounded())
    for other in (rounded(name="b"), rounded(update=1), rounded(seed=2)):
        assert not torch.equal(rounded(), other)


def test_float32_weights_are_stepped_as_they_are() -> None:
    model, other = Net(), Net()
    optimizer, plain = built(model), built(other)
    stepping = RoundedStep(optimizer, seed=1)
    for update in range(3):
        for each in (model, other):
            loss(each, update).backward()
        stepping.begin(update)
        stepping.step()
        plain.step()
        optimizer.zero_grad()
        plain.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# In the backward pass


def run(
    model: nn.Module, optimizer: torch.optim.Optimizer, updates: range, *, fused: bool, rounded: bool
) -> tuple[list[float], int]:
    """Train; norms of the gradients, and the largest number of gradients that were held when a parameter was stepped."""
    rounding = RoundedStep(optimizer, seed=1) if rounded else None
    stepping = FusedBackward(optimizer, rounding) if fused else None
    norms, held = [], 0

    def count(*_: Any) -> None:
        nonlocal held
        held = max(held, sum(parameter.grad is not None for parameter in model.parameters()))

    handle = optimizer.register_step_pre_hook(count)
    for update in updates:
        for each in (stepping, rounding):
            if each is not None:
                each.begin(update)
        loss(model, update).backward()
        if stepping is not None:
            assert all(parameter.grad is None for parameter in model.parameters())
            norms.append(stepping.norm().item())
        else:
            norms.append(clip_gradients(model.parameters(), 0.0).item())
            (rounding or optimizer).step()
            optimizer.zero_grad()
    handle.remove()
    return norms, held


KINDS = ["AdamW", "AdamW8bit", "Adafactor", "Lion", "SGDNesterov", "CAME"]


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_stepping_in_the_backward_pass_gives_the_bits_and_the_norm_of_the_ordinary_step(
    kind: str, dtype: torch.dtype
) -> None:
    ordinary, fused = Net(dtype), Net(dtype)
    optimizers = [built(ordinary, kind), built(fused, kind)]
    assert len(optimizers[0].param_groups) == 3
    rounded = dtype == BF16
    norms, _ = run(ordinary, optimizers[0], range(4), fused=False, rounded=rounded)
    found, held = run(fused, optimizers[1], range(4), fused=True, rounded=rounded)
    assert all(torch.equal(a, b) for a, b in zip(ordinary.parameters(), fused.parameters(), strict=True))
    assert held == 1
    # bfloat16 norms of single gradients are rounded to 8 bits by torch, ours are sums in float32.
    assert found == pytest.approx(norms, rel=1e-2 if rounded else 1e-5)
    (tensors, values), (others, other_values) = (optimizer_state(each) for each in optimizers)
    assert values == other_values and tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["AdamW", "Adafactor", "Lion8bit"])
def test_rounded_steps_go_on_from_a_state_to_the_bits_of_an_unbroken_run(kind: str, fused: bool) -> None:
    whole, model, continued = Net(BF16), Net(BF16), Net(BF16)
    run(whole, built(whole, kind), range(6), fused=fused, rounded=True)
    first, second = built(model, kind), built(continued, kind)
    run(model, first, range(3), fused=fused, rounded=True)
    continued.load_state_dict(model.state_dict())
    load_optimizer_state(second, *optimizer_state(first))
    run(continued, second, range(3, 6), fused=fused, rounded=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), continued.parameters(), strict=True))


def test_a_failing_step_leaves_all_groups_in_the_optimizer() -> None:
    model = Net()
    optimizer = built(model)
    groups = optimizer.param_groups
    model.first.weight.grad = torch.zeros_like(model.first.weight)

    def fail(*_: Any) -> None:
        raise KeyError

    optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyError):
        step_alone(optimizer, groups[0], "first.weight", model.first.weight)
    assert optimizer.param_groups is groups
