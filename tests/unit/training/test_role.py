"""What a role moves and shows: rates of patterns, its own rate, the weights of schedule-free optimizers."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from musubi_tuner.adapters.attach import AdapterSet
from musubi_tuner.adapters.lora import LoRALinear
from musubi_tuner.config.schema.adapter import AdapterSection
from musubi_tuner.config.schema.ema import EmaSection
from musubi_tuner.config.schema.optimizer import OptimizerSection
from musubi_tuner.config.schema.scheduler import SchedulerSection
from musubi_tuner.config.schema.train import TrainSection
from musubi_tuner.errors import ConfigError
from musubi_tuner.optimizers import OPTIMIZERS, having
from musubi_tuner.training import actions
from musubi_tuner.training.role import Role, weights_of
from musubi_tuner.training.validation import METRIC

RANKS: Any = SimpleNamespace(
    count=1, device=torch.device("cpu"), average_gradients=lambda parameters: None
)  # fmt: skip
PAGED = pytest.mark.filterwarnings("ignore:Paged optimizers")
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """Two blocks of matrices with biases, and a head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 16)
        for parameter in self.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def make_role(module: nn.Module, kind: str = "AdamW", *, train: dict[str, Any] | None = None, **settings: Any) -> Role:
    """With the defaults of the optimizer, as loading a run file gives them, and a constant rate."""
    record = OPTIMIZERS[kind]  # type: ignore[index]
    usual = {key.removeprefix("optimizer."): value for key, value in record.defaults.items() if "optimizer." in key}
    config: Any = SimpleNamespace(
        run=SimpleNamespace(seed=1),
        optimizer=OptimizerSection(type=kind, **{**usual, **settings}),  # type: ignore[arg-type]
        scheduler=SchedulerSection(type="constant", warmup_steps=0),
        adapter=AdapterSection(),
        ema=EmaSection(enabled=False),
        train=TrainSection(**(train or {})),
        warms_average=False,
        frozen=(),
    )
    config.for_role = lambda name: config
    return Role("model", module, config, total=9, ranks=RANKS, wrapped=False)


def update(role: Role, number: int, loss: Callable[[], Tensor]) -> bool:
    """One update as `run_update` makes it; whether it was finite."""
    role.begin(number)
    role.backward(loss())
    finite = bool(role.ready())
    if finite:
        role.step()
    return finite


def train(role: Role, updates: int, begin: int = 0) -> Role:
    """Towards the shifted input."""
    for number in range(begin, begin + updates):
        assert update(role, number, lambda: (role.module(X) - X.roll(1, 0)).square().mean())
    return role


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {key for key, value in module.state_dict().items() if not torch.equal(before[key], value)}


# Rates of patterns

MOVING = {"head.weight", "head.bias"}


@PAGED
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_rate_of_0_keeps_parameters_bit_for_bit_and_the_others_learn(kind: str) -> None:
    """Weight decay and D-Adaptation, whose packages know no rate of 0, leave them alone too; blocks come before the head."""
    args = {"d0": 0.01} if OPTIMIZERS[kind].finds_rate else {}  # type: ignore[index]
    net = Net()
    before = copied(net)
    role = make_role(net, kind, group_lr={"blocks.*": 0.0}, weight_decay=0.5, args=args)
    # RAdamScheduleFree waits for five updates.
    assert changed(before, train(role, 8).module) == MOVING
    assert not any(role.optimizer.state.get(parameter) for parameter in net.blocks.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_the_norm_and_the_clipping_leave_out_what_is_kept(fused: bool) -> None:
    train_settings = {"max_grad_norm": 0.0}
    net, other = Net(), Net()
    for parameter in other.blocks.parameters():
        parameter.requires_grad_(False)
    kept = make_role(net, group_lr={"blocks.*": 0.0}, fused_backward=fused, train=train_settings)
    frozen = make_role(other, train=train_settings)
    train(kept, 2)
    train(frozen, 2)
    torch.testing.assert_close(kept.norm, frozen.norm, rtol=1e-6, atol=0)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


@PAGED
def test_a_rate_of_0_at_the_front_stops_nothing_behind_it() -> None:
    """DAdaptAdan takes the rate of the first group for all."""
    role = make_role(Net(), "DAdaptAdan", group_lr={"blocks.0.*": 0.0})
    assert [group["lr_scale"] for group in role.optimizer.param_groups] == [1.0, 1.0, 0.0, 0.0]


def test_the_first_pattern_that_matches_gives_the_rate() -> None:
    rates = {"blocks.1.*": 3e-3, "blocks.*": 2e-3, "*.bias": 5e-4}
    role = make_role(Net(), lr=1e-3, group_lr=rates)
    role.begin(0)
    found = {name: group["lr"] for group in role.optimizer.param_groups for name in group["names"]}
    assert found == pytest.approx(
        {"blocks.0.weight": 2e-3, "blocks.0.bias": 2e-3, "blocks.1.weight": 3e-3, "blocks.1.bias": 3e-3,
         "head.weight": 1e-3, "head.bias": 5e-4}
    )  # fmt: skip


def test_a_parameter_moves_by_its_own_rate() -> None:
    net, other = Net(), Net()
    before = copied(net)
    train(make_role(net, "SGD", lr=1e-3, group_lr={"head.*": 4e-3}, weight_decay=0.0), 1)
    train(make_role(other, "SGD", lr=1e-3, weight_decay=0.0), 1)
    for key, value in other.state_dict().items():
        factor = 4 if key.startswith("head.") else 1
        torch.testing.assert_close(
            net.state_dict()[key] - before[key], factor * (value - before[key]), rtol=1e-2, atol=1e-7
        )


def test_a_pattern_without_a_parameter_is_refused_with_its_name_and_an_example() -> None:
    with pytest.raises(
        ConfigError, match=r"'bocks\.\*' matches no trained parameter; their names are like blocks\.0\.weight"
    ):
        make_role(Net(), group_lr={"blocks.*": 1e-3, "bocks.*": 1e-3})


def test_patterns_are_compared_with_the_dotted_paths_of_adapted_layers() -> None:
    adapters = AdapterSet({"blocks.0.attn.qkv": LoRALinear(4, 4, 2, 1.0), "blocks.1.mlp.0": LoRALinear(4, 4, 2, 1.0)})
    role = make_role(adapters, lr=1e-3, group_lr={"*.mlp.*": 2e-3, "blocks.0.*.lora_up.weight": 0.0})
    role.begin(0)
    found = {name: group["lr"] for group in role.optimizer.param_groups for name in group["names"]}
    assert found == pytest.approx(
        {
            "lora_unet_blocks_0_attn_qkv.lora_down.weight": 1e-3,
            "lora_unet_blocks_0_attn_qkv.lora_up.weight": 0.0,
            "lora_unet_blocks_1_mlp_0.lora_down.weight": 2e-3,
            "lora_unet_blocks_1_mlp_0.lora_up.weight": 2e-3,
        }
    )
    with pytest.raises(ConfigError, match=r"their names are like blocks\.0\.attn\.qkv\.lora_down\.weight"):
        make_role(adapters, group_lr={"lora_unet_*": 1e-3})


# Weights of schedule-free optimizers

FREE = having(lambda record: record.averages)


@pytest.mark.parametrize("kind", FREE)
def test_weights_to_use_are_those_of_the_package_and_the_trained_ones_stay(kind: str) -> None:
    role = train(make_role(Net(), kind, lr=0.05), 12)
    trained = copied(role.module)
    shown = role.weights()
    assert changed(trained, role.module) == set()
    theirs = copy.deepcopy((role.module, role.optimizer))
    theirs[1].eval()  # type: ignore[attr-defined]
    for key, value in theirs[0].state_dict().items():
        assert not torch.equal(value, trained[key]), key
        torch.testing.assert_close(shown[key], value, rtol=1e-6, atol=1e-7)
    kept = weights_of([role])
    assert kept.trained.keys() == shown.keys() and kept.averaged == {}


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("kind", FREE)
def test_they_are_in_the_module_inside_the_block_and_every_bit_comes_back(kind: str, wanted: bool) -> None:
    role = train(make_role(Net(), kind, lr=0.05), 12)
    trained, shown = copied(role.module), role.weights()
    with pytest.raises(KeyError), role.averaged(wanted):
        assert all(torch.equal(value, shown[key]) for key, value in role.module.state_dict().items())
        raise KeyError  # as when drawing fails
    assert changed(trained, role.module) == set()


@pytest.mark.parametrize(("kind", "which"), [("AdamWScheduleFree", "averaged"), ("AdamW", "trained")])
def test_validation_measures_the_weights_that_its_line_names(kind: str, which: str) -> None:
    role = train(make_role(Net(), kind, lr=0.05), 12)
    expected, said = role.weights(), list[str]()

    def measure(module: nn.Module, step: int) -> dict[str, float]:
        assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())
        return {METRIC: 0.5}

    run: Any = SimpleNamespace(
        position=SimpleNamespace(step=3),
        config=SimpleNamespace(validation=SimpleNamespace(weights="ema")),
        role=role,
        roles=[role],
        model=role.module,
        best=None,
        snapshot=SimpleNamespace(until=None),
        validator=SimpleNamespace(measure=measure, dataset=[1], times=[0.5]),
        metrics=SimpleNamespace(measured=lambda *_: None, say=said.append),
    )
    actions.validate(run)
    assert f"({which} weights, 1 image(s)" in said[0]


@pytest.mark.parametrize("kind", FREE)
def test_a_state_holds_the_trained_weights_and_goes_on_to_the_same_bits(kind: str) -> None:
    whole = train(make_role(Net(), kind, lr=0.05), 12)
    half = train(make_role(Net(), kind, lr=0.05), 7)
    with half.averaged():
        pass
    state = copy.deepcopy(half.state())
    assert all(torch.equal(value, half.module.state_dict()[key]) for key, value in state.model.items())
    continued = make_role(Net(), kind, lr=0.05)
    assert continued.load_state(state) == []
    assert changed(copied(whole.module), train(continued, 5, begin=7).module) == set()
    assert all(torch.equal(value, whole.weights()[key]) for key, value in continued.weights().items())


# Adafactor's own rate


@pytest.mark.parametrize("warmup_init", [False, True])
def test_the_relative_rate_is_the_one_that_adafactor_uses(warmup_init: bool) -> None:
    role = make_role(Net(), "Adafactor", args={"relative_step": True, "warmup_init": warmup_init})
    for number in [*range(4), 20_000]:
        for state in role.optimizer.state.values() if number > 4 else ():
            state["step"] = number  # as after so many updates
        train(role, 1, begin=number)
        (group, *_), parameter = role.optimizer.param_groups, role.parameters[0][1]
        assert group["lr"] is None
        used = role.optimizer._get_lr(group, role.optimizer.state[parameter])  # type: ignore[attr-defined]
        assert role.rate(number) == used, number
    assert role.rate(0) == (1e-6 if warmup_init else 1e-2) and role.rate(20_000) < 1e-2


def test_an_8_bit_optimizer_that_saves_nothing_says_so() -> None:
    (said,) = make_role(Net(), "AdamW8bit").remarks()
    assert said.startswith("warning: optimizer.type: all 6 trained tensors have fewer than 4096 values")
    assert make_role(Net(), "AdamW8bit", args={"min_8bit_size": 256}).remarks() == []
    assert make_role(Net(), "AdamW").remarks() == []


def test_a_role_with_another_optimizer_takes_none_of_what_that_of_the_run_brings_along() -> None:
    from musubi_tuner.config import RunConfig
    from musubi_tuner.config.schema.roles import RoleSection, roles_section

    def of_role(**own: Any) -> OptimizerSection:
        config = RunConfig.model_construct(
            optimizer=OptimizerSection(type="Prodigy", lr=1.0, weight_decay=0.3, args={"d_coef": 2.0}),
            scheduler=SchedulerSection(),
            ema=EmaSection(),
            roles=roles_section("a")(a=RoleSection(optimizer=own)),
        )
        return config.for_role("a").optimizer

    assert (of_role(weight_decay=0.0).lr, of_role().args) == (1.0, {"d_coef": 2.0})
    other = of_role(type="AdamW")
    assert (other.lr, other.args, other.weight_decay) == (1e-4, {}, 0.3)
    assert (of_role(type="Lion").lr, of_role(type="Lion").betas) == (3e-5, [0.9, 0.99])
