"""Gradient checkpointing changes no number and no name, and runs every block twice."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from musubi_tuner.config.schema.memory import MemorySection
from musubi_tuner.memory.checkpointing import checkpoint_blocks
from musubi_tuner.memory.compose import compose_memory
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.tinyflux import TinyFluxDeep, initialize
from musubi_tuner.models.tinyflux.state_dict import example_inputs
from tiny import TINY

BLOCK_LISTS = MODELS["tf"].block_lists
CONFIG = replace(
    TINY, joint_attention_dim=12, pooled_projection_dim=10, num_double_layers=2, num_single_layers=3, lune_expert_dim=6,
    lune_hidden_dim=64, lune_dropout=0.5,
)  # fmt: skip


def random_model() -> TinyFluxDeep:
    """A model in training mode in which every path acts; Lune's dropout does unless a test says otherwise."""
    generator = torch.Generator().manual_seed(0)
    model = TinyFluxDeep(CONFIG)
    initialize(model, "reference", generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() == 0:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.train()


def run(model: nn.Module, seed: int = 3, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Velocity of a forward pass under a global seed, and the gradients of all parameters."""
    torch.manual_seed(7)
    inputs = example_inputs(CONFIG, 2, 4, 6, 5)
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        velocity = model(**inputs, height=4, width=6)
    velocity.float().square().mean().backward()
    return velocity.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Equal bit for bit."""
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [block for name in BLOCK_LISTS for block in getattr(model, name)]


def count_calls(model: nn.Module, action: Callable[[], object]) -> list[int]:
    """How often each block computes while ``action`` runs; counted inside the block."""
    counts = [0] * len(blocks_of(model))

    def counter(index: int) -> Callable[..., None]:
        def count(module: nn.Module, args: object) -> None:
            counts[index] += 1

        return count

    hooks = [
        block.get_submodule("attn").register_forward_pre_hook(counter(index))
        for index, block in enumerate(blocks_of(model))
    ]
    action()
    for hook in hooks:
        hook.remove()
    return counts


def test_lists_of_the_family_hold_all_its_blocks() -> None:
    assert len(blocks_of(random_model())) == CONFIG.num_double_layers + CONFIG.num_single_layers


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_without_checkpointing_bit_for_bit(autocast: bool) -> None:
    plain, checkpointed = random_model(), random_model()
    checkpoint_blocks(checkpointed, BLOCK_LISTS)
    expected = run(plain, autocast=autocast)
    assert_same(run(checkpointed, autocast=autocast), expected)
    assert len(expected[1]) > 50


def test_gradients_are_equal_without_dropout_too() -> None:
    plain, checkpointed = random_model(), random_model()
    for model in (plain, checkpointed):
        model.lune_predictor.eval()
    checkpoint_blocks(checkpointed, BLOCK_LISTS)
    assert_same(run(checkpointed), run(plain))


def test_dropout_of_this_model_acts() -> None:
    # Otherwise the test above would say nothing about it.
    model = random_model()
    checkpoint_blocks(model, BLOCK_LISTS)
    assert not torch.equal(run(model, seed=3)[0], run(model, seed=4)[0])


def test_recomputation_leaves_the_random_state_where_plain_training_does() -> None:
    plain, checkpointed = random_model(), random_model()
    checkpoint_blocks(checkpointed, BLOCK_LISTS)
    run(plain)
    expected = torch.get_rng_state()
    run(checkpointed)
    assert torch.equal(torch.get_rng_state(), expected)


class DropoutBlocks(nn.Module):
    """Blocks that draw random numbers of their own."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.GELU()) for _ in range(3))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_dropout_inside_a_block_is_replayed() -> None:
    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        model = DropoutBlocks()
        if checkpointed:
            checkpoint_blocks(model, ("layers",))
        x = torch.linspace(-1, 1, 32).view(4, 8)
        torch.manual_seed(5)
        model(x).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert len(found) == len(expected) == 6
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_block_computes_twice_in_a_training_step() -> None:
    model = random_model()
    assert count_calls(model, lambda: run(model)) == [1] * 5
    checkpoint_blocks(model, BLOCK_LISTS)
    assert count_calls(model, lambda: run(model)) == [2] * 5


@pytest.mark.parametrize("on", [False, True])
def test_memory_setting_acts_on_a_model_that_trains(on: bool) -> None:
    model = random_model()
    compose_memory(model, MemorySection(gradient_checkpointing=on), MODELS["tf"], torch.device("cpu"))
    assert count_calls(model, lambda: run(model)) == [1 + on] * 5


def test_only_the_named_lists_are_checkpointed() -> None:
    model = random_model()
    checkpoint_blocks(model, BLOCK_LISTS[:1])
    assert count_calls(model, lambda: run(model)) == [2, 2, 1, 1, 1]


def test_blocks_compute_once_without_gradients() -> None:
    model = random_model()
    checkpoint_blocks(model, BLOCK_LISTS)

    @torch.no_grad()
    def forward() -> None:
        model(**example_inputs(CONFIG, 2, 4, 6, 5), height=4, width=6)

    assert count_calls(model, forward) == [1] * 5


def test_names_and_values_of_the_state_stay_as_they_are() -> None:
    plain, checkpointed = random_model(), random_model()
    checkpoint_blocks(checkpointed, BLOCK_LISTS)
    expected = plain.state_dict()
    assert list(checkpointed.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in checkpointed.state_dict().items())
    assert [name for name, _ in checkpointed.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in checkpointed.named_modules()] == [name for name, _ in plain.named_modules()]


def test_weights_loaded_later_are_used() -> None:
    model, other = random_model(), random_model()
    checkpoint_blocks(model, BLOCK_LISTS)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    model.load_state_dict(other.state_dict())
    assert_same(run(model), run(other))


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (100, [0])])
def test_every_nth_block_is_recomputed(every: int, expected: list[int]) -> None:
    model = nn.Module()
    model.first = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    model.second = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    checkpoint_blocks(model, ("first", "second"), every)
    blocks = [*model.first, *model.second]
    assert [index for index, block in enumerate(blocks) if "forward" in vars(block)] == expected
