"""Parameter groups are as the config says, and optimizers continue from their files as if never stopped."""

import importlib
import inspect
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from musubi_tuner.config.schema.optimizer import OptimizerSection
from musubi_tuner.errors import CheckpointError, ConfigError
from musubi_tuner.models.tinyflux import TinyFluxConfig, TinyFluxDeep
from musubi_tuner.optimizers import OPTIMIZERS, Argument, Optimizer, state_bytes
from musubi_tuner.training.checkpoint import TrainingState, read_tensors, read_values, write_state
from musubi_tuner.training.optimizers import (
    build_optimizer,
    clip_gradients,
    load_optimizer_state,
    optimizer_state,
    parameter_groups,
    set_learning_rate,
    trainable,
)
from musubi_tuner.training.stepping import RoundedStep

pytestmark = pytest.mark.long

Build = Callable[[nn.Module, OptimizerSection], torch.optim.Optimizer]


class Net(nn.Module):
    """Two matrices large enough for 8-bit states (4096 numbers), a norm, a bias, a gate and a frozen matrix."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(64, 80, generator=generator) * 0.1)
        self.second = nn.Parameter(torch.randn(80, 64, generator=generator) * 0.1)
        self.norm = nn.Parameter(torch.ones(64))
        self.bias = nn.Parameter(torch.zeros(80))
        self.gate = nn.Parameter(torch.tensor(0.5))
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh((x * self.norm) @ self.first + self.bias)
        return self.gate * (hidden @ self.second)


PAGED = pytest.mark.filterwarnings("ignore:Paged optimizers")
MATRICES, REST = ["first", "second"], ["norm", "bias", "gate"]


def settings(type: str = "AdamW", **values: Any) -> OptimizerSection:
    """With the defaults of the optimizer, as loading a run file gives them."""
    usual = {key.removeprefix("optimizer."): value for key, value in OPTIMIZERS[type].defaults.items()
             if key.startswith("optimizer.")}  # type: ignore[index]  # fmt: skip
    if OPTIMIZERS[type].finds_rate:  # type: ignore[index]
        usual["args"] = {"d0": 0.01}  # so that a few updates move everything
    return OptimizerSection(type=type, **{**usual, **values})  # type: ignore[arg-type]


def build(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    return build_optimizer(trainable(model), section)


def rounding(optimizer: torch.optim.Optimizer, kind: str, dtype: torch.dtype) -> RoundedStep | None:
    """How a run steps weights of a dtype; None = plainly."""
    return RoundedStep(optimizer, seed=1) if dtype == torch.bfloat16 and OPTIMIZERS[kind].alone else None  # type: ignore[index]


def step(optimizer: torch.optim.Optimizer, rounded: RoundedStep | None, update: int) -> None:
    if rounded is None:
        optimizer.step()
    else:
        rounded.begin(update)
        rounded.step()
    optimizer.zero_grad(set_to_none=True)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int, rounded: RoundedStep | None = None
) -> None:
    """Updates ``begin`` to ``end``; the data of an update depends on its number only."""
    for update in range(begin, end):
        generator = torch.Generator().manual_seed(100 + update)
        x = torch.randn(4, 64, generator=generator).to(next(model.parameters()).dtype)
        loss = (model(x).float() - torch.randn(4, 64, generator=generator)).square().mean()
        loss.backward()
        set_learning_rate(optimizer, 0.01 / (1 + update))
        step(optimizer, rounded, update)


# Records


def constructor(kind: str) -> Any:
    """What takes the arguments of an optimizer."""
    module, name = OPTIMIZERS[kind].source.split(":")  # type: ignore[index]
    return torch.optim.Muon if kind == "Muon" else getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("kind", "record"), OPTIMIZERS.items())
def test_arguments_and_their_defaults_are_those_of_the_installed_constructor(kind: str, record: Optimizer) -> None:
    known = {name: parameter.default for name, parameter in inspect.signature(constructor(kind)).parameters.items()}
    usual = {
        name: list(value) if isinstance(value, tuple) else value for name, value in {**known, **record.given}.items()
    }
    assert set(record.given) <= set(known)
    assert {name: argument.default for name, argument in record.arguments.items()} == {
        name: usual[name] for name in record.arguments
    }
    # What [optimizer] passes by itself, and no more than that.
    betas = len(known["betas"]) if "betas" in known else 0
    # The AdamW beside Muon has both.
    expected = (2, True) if kind == "Muon" else (betas, isinstance(known.get("eps"), float))
    assert (0 if record.betas == "momentum" else record.betas, record.eps) == expected


def limits(argument: Argument) -> list[Any]:
    """The values at the ends of what a record accepts, or all of them."""
    if argument.choices or isinstance(argument.default, bool):
        return list(argument.choices) or [True, False]
    if isinstance(argument.default, list):
        return [argument.default]
    step = 1 if isinstance(argument.default, int) else 1e-6
    ends = [argument.ge, argument.le]
    ends += [None if end is None else end + way * step for end, way in ((argument.gt, 1), (argument.lt, -1))]
    return [end for end in ends if end is not None]


SHARED = ("/step", "/qmap1", "/qmap2", "/RMS")
"""Counters and code tables, which the plan leaves out."""


@PAGED
@pytest.mark.parametrize(("kind", "record"), OPTIMIZERS.items())
def test_arguments_at_their_limits_are_taken_and_planned(kind: str, record: Optimizer) -> None:
    for key, argument in record.arguments.items():
        for value in limits(argument):
            assert argument.accepts(value), (key, value)
            # The start of the relative step is nothing without it; D-Adaptation needs a rate to move at all.
            args = {"relative_step": value, key: value} if key == "warmup_init" else {key: value}
            model = Net()
            optimizer = build(model, settings(kind, args=args))
            generator = torch.Generator().manual_seed(0)
            for _ in range(2):
                (model(torch.randn(4, 64, generator=generator)).square().mean() + model.norm.sum()).backward()
                optimizer.step()
            assert all(parameter.isfinite().all() for parameter in model.parameters()), (key, value)
            kept = sum(x.nbytes for name, x in optimizer_state(optimizer)[0].items() if not name.endswith(SHARED))
            # Where a parameter is 0, Prodigy remembers that instead of the parameter.
            spared = 4 * model.bias[:: value if key == "slice_p" else 1].numel() - 4 if kind == "Prodigy" else 0
            assert state_bytes(kind, Counter(p.shape for _, p in trainable(model)), args) == kept + spared, (key, value)


@PAGED
@pytest.mark.parametrize(("kind", "record"), OPTIMIZERS.items())
def test_entries_of_a_group_that_change_are_remembered_and_no_others(kind: str, record: Optimizer) -> None:
    model = Net()
    optimizer = build(model, settings(kind, lr=0.01))
    before = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    train(model, optimizer, 0, 5)
    for group, old in zip(optimizer.param_groups, before, strict=True):
        found = {key for key in group if key not in ("params", "lr") and group[key] != old.get(key)}
        assert found <= set(record.remembers) <= set(group)


def toy(dtype: torch.dtype) -> nn.Sequential:
    """Two layers of 32 x 32 without biases."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Tanh(), nn.Linear(32, 32, bias=False))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = (torch.randn(32, 32, generator=generator) * 0.18).to(dtype)
    return model


@PAGED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "record"), OPTIMIZERS.items())
def test_a_hundred_updates_lower_the_loss(kind: str, record: Optimizer, dtype: torch.dtype) -> None:
    """Ten times the usual rate, since there are so few; DAdaptSGD finds one that is too large for a batch without noise."""
    section = settings(kind)
    factor = {"DAdaptSGD": 0.1}.get(kind, 1.0 if record.finds_rate else 10.0)
    model = toy(dtype)
    optimizer = build(model, section.model_copy(update={"lr": factor * section.lr}))
    rounded, generator = rounding(optimizer, kind, dtype), torch.Generator().manual_seed(1)
    x, other = torch.randn(64, 32, generator=generator), torch.randn(32, 32, generator=generator)
    target, losses = torch.tanh(x) @ other * 0.18, []
    for update in range(100):
        loss = (model(x.to(dtype)).float() - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        step(optimizer, rounded, update)
    # Most end below a quarter; Muon and the paged Lion in plain bfloat16 are the slowest.
    assert losses[-1] < 0.95 * losses[0]
    if record.finds_rate:
        assert float(optimizer.param_groups[0]["d"]) > 0.01


def test_muon_moves_a_matrix_about_as_far_as_adamw_would() -> None:
    model = Net()
    optimizer = build(model, settings("Muon", lr=0.01, weight_decay=0.0))
    before = model.first.detach().clone()
    model.first.grad = torch.randn(64, 80, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    # The root mean square of its updates is 0.2, as that of AdamW usually is; of torch's own choice it would be 0.11.
    assert (model.first.detach() - before).square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.2)


# Groups


def test_matrices_decay_and_everything_else_does_not() -> None:
    groups = parameter_groups(trainable(Net()), settings(weight_decay=0.1, lr=0.02))
    assert [(group["names"], group["weight_decay"], group["lr"]) for group in groups] == [
        (MATRICES, 0.1, 0.02),
        (REST, 0.0, 0.02),
    ]


def test_names_and_parameters_of_a_group_belong_together() -> None:
    model = Net()
    for group in parameter_groups(trainable(model), settings()):
        assert [id(parameter) for parameter in group["params"]] == [
            id(model.get_parameter(name)) for name in group["names"]
        ]


def test_decay_all_makes_one_group_of_everything_in_order() -> None:
    groups = parameter_groups(trainable(Net()), settings(weight_decay=0.1, decay_all=True))
    assert [(group["names"], group["weight_decay"]) for group in groups] == [(MATRICES + REST, 0.1)]


@pytest.mark.parametrize("names", [MATRICES, REST])
def test_empty_group_is_left_out(names: list[str]) -> None:
    chosen = [(name, parameter) for name, parameter in trainable(Net()) if name in names]
    assert [group["names"] for group in parameter_groups(chosen, settings())] == [names]


def test_frozen_parameters_are_not_trained() -> None:
    assert [name for name, _ in trainable(Net())] == MATRICES + REST


def test_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nothing is trainable: every parameter of the model is frozen"):
        trainable(Net().requires_grad_(False))


def test_decay_shrinks_matrices_only() -> None:
    model = Net()
    optimizer = build(model, settings(lr=0.1, weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        # Decoupled decay: the weight loses lr * weight_decay of itself.
        expected = before[name] * (0.95 if name in MATRICES else 1.0)
        torch.testing.assert_close(parameter.detach(), expected)


def test_settings_reach_the_optimizer() -> None:
    optimizer = build(Net(), settings(lr=0.003, betas=[0.8, 0.95], eps=1e-6, weight_decay=0.2))
    assert isinstance(optimizer, torch.optim.AdamW)
    for group, decay in zip(optimizer.param_groups, (0.2, 0.0)):
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (0.003, (0.8, 0.95), 1e-6)
        assert group["weight_decay"] == decay


@pytest.mark.parametrize(
    ("name", "module"), [("AdamW", "torch"), ("AdamW8bit", "bitsandbytes"), ("Adafactor", "transformers")]
)
def test_type_chooses_the_optimizer(name: str, module: str) -> None:
    chosen = type(build(Net(), settings(type=name)))
    assert (chosen.__name__, chosen.__module__.partition(".")[0]) == (name, module)


def test_adamw_equals_its_formula() -> None:
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    section = settings(lr=0.1, betas=[0.9, 0.99], eps=1e-8, weight_decay=0.01)
    optimizer = build_optimizer([("weight", parameter)], section)
    gradients = [torch.tensor([[0.5, 1.0]]), torch.tensor([[-0.25, 2.0]])]
    expected, first, second = parameter.detach().clone().double(), 0.0, 0.0
    for count, gradient in enumerate(gradients, start=1):
        parameter.grad = gradient
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.99 * second + 0.01 * gradient.double().square()
        expected = expected * (1 - 0.1 * 0.01)
        expected = expected - 0.1 * (first / (1 - 0.9**count)) / ((second / (1 - 0.99**count)).sqrt() + 1e-8)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=1e-6)


def test_learning_rate_is_set_for_all_groups() -> None:
    optimizer = build(Net(), settings())
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


# States


def save_and_load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, build: Build, kind: str) -> Any:
    """A new model and optimizer that know the old ones by their files only."""
    tensors, values = optimizer_state(optimizer, OPTIMIZERS[kind].remembers)  # type: ignore[index]
    write_state(folder, TrainingState(model.state_dict(), {}, tensors, {"step": 0, "optimizer": values}))
    restored = Net().to(next(model.parameters()).dtype)
    restored.load_state_dict(read_tensors(folder, "model"))
    continued = build(restored, settings(type=kind, lr=0.01))
    load_optimizer_state(continued, read_tensors(folder, "optimizer"), read_values(folder)["optimizer"])
    return restored, continued


@PAGED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_stopped_and_continued_training_equals_an_unbroken_one_bit_for_bit(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    def begun() -> tuple[Net, torch.optim.Optimizer]:
        model = Net().to(dtype)
        return model, build(model, settings(type=kind, lr=0.01))

    unbroken, optimizer = begun()
    train(unbroken, optimizer, 0, 7, rounding(optimizer, kind, dtype))

    model, optimizer = begun()
    train(model, optimizer, 0, 3, rounding(optimizer, kind, dtype))
    restored, continued = save_and_load(tmp_path / "run-state", model, optimizer, build, kind)
    train(restored, continued, 3, 7, rounding(continued, kind, dtype))

    for name, parameter in unbroken.named_parameters():
        assert torch.equal(restored.get_parameter(name), parameter), name
        moved = not torch.equal(parameter, begun()[0].get_parameter(name))
        # A plain sum in bfloat16 may lose all steps of weights that are 1.
        assert moved == (name != "frozen") or (name in REST and dtype == torch.bfloat16), name


@pytest.mark.parametrize("kind", [kind for kind, record in OPTIMIZERS.items() if record.elementwise])
def test_shards_of_a_weight_move_as_the_whole(kind: str) -> None:
    """What sharding relies on; one shard is empty, as where there are more processes than rows."""
    whole = nn.ParameterDict({"w": nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))})
    parts = nn.ParameterDict(
        {
            str(index): nn.Parameter(part.clone())
            for index, part in enumerate([*whole["w"].detach().split(2), torch.zeros(0, 4)])
        }
    )
    optimizers = [build_optimizer(trainable(module), settings(kind)) for module in (whole, parts)]
    for update in range(5):
        gradient = torch.randn(5, 4, generator=torch.Generator().manual_seed(update))
        whole["w"].grad = gradient
        for part, cut in zip(parts.values(), [*gradient.split(2), torch.zeros(0, 4)], strict=True):
            part.grad = cut.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert not torch.equal(whole["w"], torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(torch.cat(list(parts.values())), whole["w"], rtol=1e-6, atol=1e-7)
    tensors, _ = optimizer_state(optimizers[0])
    assert {tensor.shape for tensor in tensors.values()} <= {whole["w"].shape, torch.Size([])}


@pytest.mark.parametrize("kind", ["AdamW", "AdamW8bit", "Adafactor"])
def test_saved_state_comes_back_entry_by_entry(kind: str, tmp_path: Path) -> None:
    model = Net()
    optimizer = build(model, settings(type=kind, lr=0.01))
    train(model, optimizer, 0, 2)
    _, continued = save_and_load(tmp_path / "run-state", model, optimizer, build, kind)
    tensors, values = optimizer_state(optimizer)
    found_tensors, found_values = optimizer_state(continued)
    assert found_values == values
    assert set(values) == {*MATRICES, *REST}
    assert found_tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found_tensors[name].dtype == tensor.dtype, name
        assert torch.equal(found_tensors[name], tensor), name


def test_eight_bit_state_is_saved_in_eight_bits() -> None:
    model = Net()
    optimizer = build(model, settings(type="AdamW8bit", lr=0.01))
    train(model, optimizer, 0, 1)
    tensors, _ = optimizer_state(optimizer)
    found = {name for name, tensor in tensors.items() if tensor.dtype == torch.uint8}
    assert found == {"first/state1", "first/state2", "second/state1", "second/state2"}


def test_state_before_the_first_update_is_empty_and_loads(tmp_path: Path) -> None:
    model = Net()
    optimizer = build(model, settings())
    assert optimizer_state(optimizer) == ({}, {})
    restored, continued = save_and_load(tmp_path / "run-state", model, optimizer, build, "AdamW")
    train(model, optimizer, 0, 2)
    train(restored, continued, 0, 2)
    assert torch.equal(restored.first, model.first)


def test_parameter_without_a_gradient_has_no_state_and_no_place_in_the_file(tmp_path: Path) -> None:
    model = Net()
    optimizer = build(model, settings())
    model.first.grad = torch.ones_like(model.first)
    optimizer.step()
    tensors, values = optimizer_state(optimizer)
    assert set(values) == {"first"}
    _, continued = save_and_load(tmp_path / "run-state", model, optimizer, build, "AdamW")
    assert optimizer_state(continued)[0].keys() == tensors.keys()


def test_state_belongs_to_names_and_not_to_positions() -> None:
    model = Net()
    optimizer = build(model, settings())
    train(model, optimizer, 0, 2)
    other = Net()
    reordered = build_optimizer(trainable(other)[::-1], settings())
    load_optimizer_state(reordered, *optimizer_state(optimizer))
    for name in MATRICES + REST:
        expected = optimizer.state[model.get_parameter(name)]["exp_avg"]
        assert torch.equal(reordered.state[other.get_parameter(name)]["exp_avg"], expected), name


def test_loading_leaves_rates_and_decay_to_the_config() -> None:
    model = Net()
    optimizer = build(model, settings(lr=0.01, weight_decay=0.3))
    train(model, optimizer, 0, 1)
    changed = build(Net(), settings(lr=0.5, weight_decay=0.1))
    load_optimizer_state(changed, *optimizer_state(optimizer))
    assert [(group["lr"], group["weight_decay"]) for group in changed.param_groups] == [(0.5, 0.1), (0.5, 0.0)]


def test_state_of_other_parameters_is_refused_by_name() -> None:
    optimizer = build(Net(), settings())
    with pytest.raises(CheckpointError) as caught:
        load_optimizer_state(optimizer, {}, {"first": {}, "b.weight": {}, "a.weight": {}})
    assert str(caught.value) == "the optimizer state has 2 unknown parameters (a.weight, b.weight)"


def test_state_that_cannot_be_written_is_refused_by_name() -> None:
    model = Net()
    optimizer = build(model, settings())
    optimizer.state[model.norm]["history"] = [1, 2]
    with pytest.raises(CheckpointError, match=r"optimizer state norm/history is a list; it cannot be saved"):
        optimizer_state(optimizer)


# Clipping


def with_gradients() -> list[nn.Parameter]:
    """Gradients (3, 0) and (0, 4), whose norm is 5, and a parameter without one."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    return parameters


def gradients(parameters: list[nn.Parameter]) -> list[float]:
    return [value for parameter in parameters if parameter.grad is not None for value in parameter.grad.tolist()]


def test_clipping_scales_to_the_limit_and_returns_the_norm_before() -> None:
    parameters = with_gradients()
    assert clip_gradients(parameters, 1.0).item() == pytest.approx(5.0)
    # torch adds 1e-6 to the norm that it divides by.
    assert gradients(parameters) == pytest.approx([0.6, 0.0, 0.0, 0.8], rel=1e-6)


@pytest.mark.parametrize("limit", [0.0, 5.1])
def test_gradients_are_left_alone_without_a_limit_and_below_it(limit: float) -> None:
    parameters = with_gradients()
    assert clip_gradients(parameters, limit).item() == pytest.approx(5.0)
    assert gradients(parameters) == [3.0, 0.0, 0.0, 4.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_norm_of_gradients_that_are_not_finite_is_not_finite(value: float) -> None:
    parameters = with_gradients()
    assert parameters[1].grad is not None
    parameters[1].grad[0] = value
    assert not clip_gradients(parameters, 0.0).isfinite()


def test_own_rates_and_decays_form_groups_beside_lora_plus() -> None:
    names = [f"{layer}.{part}.weight" for layer in ("one", "two", "three") for part in ("lora_down", "lora_up")]
    parameters = [(name, nn.Parameter(torch.zeros(2, 2))) for name in names]
    rates = dict.fromkeys(names[2:4], (0.5, None)) | dict.fromkeys(names[4:], (1.0, 0.0))
    groups = parameter_groups(parameters, settings(lr=1e-3, weight_decay=0.1), 4.0, rates)
    assert [(group["names"], group["lr"], group["weight_decay"], group["name"]) for group in groups] == [
        (["one.lora_down.weight"], 1e-3, 0.1, "lr_1.00e-03"),
        (["three.lora_down.weight"], 1e-3, 0.0, "lr_1.00e-03"),
        (["two.lora_down.weight"], 5e-4, 0.1, "lr_5.00e-04"),
        (["one.lora_up.weight"], 4e-3, 0.1, "lr_4.00e-03"),
        (["three.lora_up.weight"], 4e-3, 0.0, "lr_4.00e-03"),
        (["two.lora_up.weight"], 2e-3, 0.1, "lr_2.00e-03"),
    ]
    optimizer = build_optimizer(parameters, settings(lr=1e-3), 4.0, rates)
    set_learning_rate(optimizer, 1e-2)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2, 5e-3, 4e-2, 4e-2, 2e-2]


@PAGED
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_planned_state_is_what_the_optimizer_keeps(kind: str) -> None:
    """Matrices, thin ones of adapters, vectors, a kernel and a scalar, below and above the size that is kept in 8 bits."""
    shapes = [(64, 96), (4, 300), (300, 4), (4, 3072), (33, 129), (50,), (5000,), (8, 4, 3, 3), ()]
    parameters = [
        (f"p{i}.{j}", nn.Parameter(torch.ones(shape))) for i, shape in enumerate(shapes) for j in range(1 + i % 2)
    ]
    optimizer = build_optimizer(parameters, settings(kind, lr=1e-3))
    for _, parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors, _ = optimizer_state(optimizer)
    kept = sum(tensor.nbytes for key, tensor in tensors.items() if not key.endswith(SHARED))
    assert state_bytes(kind, Counter(parameter.shape for _, parameter in parameters)) == kept


def published_shapes() -> Counter[torch.Size]:
    """Of all parameters of TinyFlux-Deep."""
    with torch.device("meta"):
        return Counter(parameter.shape for parameter in TinyFluxDeep(TinyFluxConfig()).parameters())


@PAGED
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_planned_state_of_tinyflux_is_within_three_percent(kind: str) -> None:
    """One parameter of every shape is stepped; all that is kept of it, with its counters, counts as often as the model has the shape."""
    shapes = published_shapes()
    assert len(shapes) > 20 and sum(count * shape.numel() for shape, count in shapes.items()) > 2e8
    if kind == "Muon":  # whose products of matrices take a minute
        shapes = Counter({torch.Size(-(-side // 8) for side in shape): count for shape, count in shapes.items()})
    parameters = {shape: nn.Parameter(torch.ones(shape)) for shape in shapes}
    optimizer = build_optimizer([(str(shape), parameter) for shape, parameter in parameters.items()], settings(kind))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = {shape: optimizer.state[parameter] for shape, parameter in parameters.items()}
    # Of bitsandbytes, shared by all parameters.
    tables = {id(value) for state in states.values() for key, value in state.items() if "qmap" in key}
    kept = sum(
        shapes[shape] * value.nbytes
        for shape, state in states.items()
        for value in state.values()
        if isinstance(value, Tensor) and id(value) not in tables
    )
    assert len(tables) <= 2
    assert state_bytes(kind, shapes) == pytest.approx(kept, rel=0.03)
