"""Every type of adapter: identity at the start, gradients, activations = weights, files, dropouts, storages, streaming, other programs."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from musubi_tuner.adapter_types import ADAPTERS, NORM, type_of
from musubi_tuner.adapters import attach, convert, detach, load_adapter, merge, read_adapter, save_adapter
from musubi_tuner.adapters.attach import AdapterSet, Placement, make_adapters, placements_of
from musubi_tuner.adapters.base import Adapter
from musubi_tuner.adapters.files import named_for_files, placements_of_file
from musubi_tuner.config.schema.adapter import AdapterSection, AdapterTarget
from musubi_tuner.config.schema.memory import MemorySection
from musubi_tuner.config.schema.optimizer import OptimizerSection
from musubi_tuner.errors import CheckpointError, ConfigError
from musubi_tuner.memory.compose import compose_memory
from musubi_tuner.memory.storage import Freeze, freeze_layers
from musubi_tuner.models.flux_dev import Flux, FluxConfig, build
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.spec import AdapterTargets
from musubi_tuner.randomness import generator
from musubi_tuner.training.optimizers import build_optimizer, load_optimizer_state, optimizer_state, trainable

pytestmark = pytest.mark.long

TYPES = [name for name in ADAPTERS if name != NORM]
SPEC = MODELS["fd"]
GEOMETRY = FluxConfig(
    in_channels=16, vec_in_dim=32, context_in_dim=24, hidden_size=64, mlp_ratio=4.0, num_heads=4, depth=3, depth_single_blocks=3,
    axes_dim=(4, 6, 6), theta=10_000, qkv_bias=True, guidance_embed=True,
)  # fmt: skip


def section(kind: str, **settings: Any) -> AdapterSection:
    own = {"block_size": 2} if kind == "dylora" else {}
    return AdapterSection(**{"type": kind, "rank": 6, "alpha": 3.0, **own, **settings})


def layer(rows: int = 72, columns: int = 48, seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(columns, rows).requires_grad_(False)


def adapter(kind: str, linear: nn.Linear, *, moved: bool = True, **options: Any) -> Adapter:
    """An adapter of a layer, trained or as it begins."""
    own = {"rank": 6, "alpha": 3.0, **({"block_size": 2} if kind == "dylora" else {}), **options}
    made = ADAPTERS[kind].load()(linear.in_features, linear.out_features, **own)
    made.initialize(generator(1, "start"))
    if made.starts:
        made.begin_from(linear.weight, fresh=True)
    if moved:
        draws = generator(2, "moved")
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draws) * 0.1)
    return made.eval()


def shown(made: Adapter, linear: nn.Linear, x: Tensor) -> Tensor:
    return made.apply_to(x, linear, lambda: linear.bias)


X = torch.randn(3, 5, 48, generator=generator(3, "x"))


@pytest.mark.parametrize("kind", TYPES)
def test_an_untrained_adapter_changes_nothing_and_each_part_of_a_trained_one_has_a_gradient(kind: str) -> None:
    linear = layer()
    made = adapter(kind, linear, moved=False)
    assert torch.equal(shown(made, linear, X), linear(X))
    made = adapter(kind, linear).train()
    if kind == "dylora":  # a call trains one block of ranks
        torch.manual_seed(0)
    shown(made, linear, X).square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("multiplier", [1.0, 0.6, -0.4, 0.0])
@pytest.mark.parametrize("kind", TYPES)
def test_the_change_of_activations_is_that_of_the_weight(kind: str, multiplier: float) -> None:
    """Also with alpha other than rank, where LyCORIS 4.1 merges LoHa and LoKr at alpha / rank squared."""
    linear = layer()
    made = adapter(kind, linear)
    made.multiplier = multiplier
    expected = nn.functional.linear(X, made.changed(linear.weight), linear.bias)
    torch.testing.assert_close(shown(made, linear, X), expected, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_a_layer_is_rebuilt_from_its_file_alone(kind: str) -> None:
    linear = layer()
    made = adapter(kind, linear)
    again = ADAPTERS[kind].load().of_parts(made.state_dict(), (72, 48)).eval()
    if again.starts:
        again.begin_from(linear.weight, fresh=False)
    assert torch.equal(shown(again, linear, X), shown(made, linear, X))
    leaves = {key: tensor.ndim for key, tensor in made.state_dict().items()}
    assert type_of(leaves) == (ADAPTERS[kind].written_as or kind)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (kind, setting)
        for kind in TYPES
        for setting in ("dropout", "rank_dropout", "module_dropout")
        if setting in (*ADAPTERS[kind].uses, "module_dropout")  # rule V47 refuses the others
    ],
)
def test_dropout_acts_while_training_and_only_then(kind: str, setting: str) -> None:
    """LyCORIS 4.1 takes network_dropout for LoRA, LoHa, LoKr and DoRA, and does nothing with it."""
    linear = layer()
    made = adapter(kind, linear, **{setting: 0.5})
    plain = adapter(kind, linear)
    assert torch.equal(shown(made, linear, X), shown(plain, linear, X))
    drawn = []
    for seed in range(6):
        for each in (made, plain):
            torch.manual_seed(seed)
            each.train()
        torch.manual_seed(seed)
        drawn.append(not torch.equal(shown(made, linear, X), shown(plain.eval(), linear, X)))
    assert any(drawn)
    if setting == "module_dropout":
        made.module_dropout = 1.0
        torch.testing.assert_close(shown(made, linear, X), linear(X))
        shown(made, linear, X).sum().backward()
        assert all(parameter.grad is not None for parameter in made.parameters())


# On a model


@pytest.fixture(scope="module")
def model() -> Iterator[Flux]:
    made = build(GEOMETRY).to_empty(device="cpu")
    draws = generator(5, "weights")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.15)
    yield made.requires_grad_(False).eval()


def inputs() -> dict[str, Tensor]:
    draws = generator(4, "inputs")

    def of(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws)

    ids = torch.zeros(1, 6, 3)
    ids[0, :, 1] = torch.arange(6)
    return {"img": of(1, 6, 16), "img_ids": ids, "txt": of(1, 4, 24), "txt_ids": torch.zeros(1, 4, 3), "timesteps": torch.tensor([0.4]),
            "y": of(1, 32), "guidance": torch.tensor([3.5])}  # fmt: skip


def predict(model: nn.Module) -> Tensor:
    result: Tensor = model(**inputs())
    return result


def moved_set(model: nn.Module, kind: str, seed: int = 0, **settings: Any) -> AdapterSet:
    own = section(kind, **settings)
    adapters = make_adapters(model, placements_of(model, SPEC.adapters, own), own, seed)
    draws = generator(seed, "moved")
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws) * 0.05)
    return adapters.eval()


def with_adapters(model: nn.Module, *sets: AdapterSet) -> Tensor:
    attach(model, *sets)
    try:
        return predict(model)
    finally:
        detach(model)


@pytest.mark.parametrize("kind", TYPES)
def test_a_file_gives_the_same_pictures_attached_and_merged(kind: str, model: Flux, tmp_path: Path) -> None:
    adapters = moved_set(model, kind, train_norm=True, include=["img_in", "final_layer.linear"])
    expected, plain = with_adapters(model, adapters), predict(model)
    assert (expected - plain).abs().max() > 1e-3
    path = tmp_path / "a.safetensors"
    save_adapter(path, named_for_files(adapters.state_dict()))
    begin = ADAPTERS[ADAPTERS[kind].written_as or kind].prefix
    assert (
        sum(key.startswith(begin) for key in load_file(path)) >= len(adapters.state_dict()) - 20
    )  # norms are LyCORIS'
    file = read_adapter(path, SPEC)
    placements = placements_of_file(file.tensors, model, SPEC.adapters, "file")
    again = make_adapters(model, placements, AdapterSection(type="lora"))
    load_adapter(again, file.tensors)
    assert torch.equal(with_adapters(model, again.eval()), expected)
    copy = build(GEOMETRY).to_empty(device="cpu")
    copy.load_state_dict(model.state_dict())
    report = merge(copy, file.tensors, SPEC.adapters)
    assert report.layers == len(adapters.paths)
    torch.testing.assert_close(predict(copy.eval()), expected, atol=1e-4, rtol=1e-4)
    again.set_multiplier(0.5)
    attach(model, again)
    half = predict(model)
    again.merge(model)
    torch.testing.assert_close(predict(model), half, atol=1e-4, rtol=1e-4)
    detach(model)
    assert torch.equal(predict(model), plain)


@pytest.mark.parametrize("first", ["lora", "dora", "diag-oft"])
@pytest.mark.parametrize("second", ["lokr", "dora", "ia3"])
def test_two_adapters_act_one_on_top_of_the_other(first: str, second: str, model: Flux) -> None:
    sets = [moved_set(model, kind, seed) for seed, kind in enumerate((first, second))]
    sets[1].strength = 0.5
    for each in sets:
        each.set_multiplier(1.0)
    expected = with_adapters(model, *sets)
    copy = build(GEOMETRY).to_empty(device="cpu")
    copy.load_state_dict(model.state_dict())
    merge(copy, sets[0].state_dict(), SPEC.adapters)
    merge(copy, sets[1].state_dict(), SPEC.adapters, 0.5)
    torch.testing.assert_close(predict(copy.eval()), expected, atol=2e-4, rtol=2e-4)
    assert not hasattr(model, "more_adapters")


@pytest.mark.parametrize("storage", ["plain", "fp8_scaled", "nf4"])
@pytest.mark.parametrize("kind", TYPES)
def test_streamed_blocks_of_any_storage_train_as_resident_ones(kind: str, storage: Any, model: Flux) -> None:
    """Loss and gradients of all blocks but two swapped are, bit for bit, those of none swapped."""
    found = []
    for swapped in (0, 2):
        base = build(GEOMETRY).to_empty(device="cpu")
        base.load_state_dict(model.state_dict())
        freeze_layers(
            base.requires_grad_(False), Freeze(storage, SPEC.quantizable, plain=r"(double|single)_blocks\..*")
        )
        adapters = moved_set(base, kind)
        attach(base, adapters)
        memory = MemorySection(blocks_to_swap=swapped, gradient_checkpointing=True)
        compose_memory(base, memory, SPEC, torch.device("cpu"))
        adapters.train()
        torch.manual_seed(7)
        loss = predict(base).square().mean()
        loss.backward()
        found.append((loss, {name: parameter.grad for name, parameter in adapters.named_parameters()}))
    (loss, gradients), (other, others) = found
    assert torch.equal(loss, other) and gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert gradient is not None and torch.equal(gradient, others[name]), name


@pytest.mark.parametrize("kind", TYPES)
def test_training_goes_on_from_a_state_to_the_same_bits(kind: str, model: Flux) -> None:
    own = section(kind, module_dropout=0.2)

    def fresh(seed: int) -> tuple[AdapterSet, torch.optim.Optimizer]:
        adapters = make_adapters(model, placements_of(model, SPEC.adapters, own), own, seed)
        return adapters, build_optimizer(trainable(adapters), OptimizerSection(lr=1e-2))

    def train(adapters: AdapterSet, optimizer: torch.optim.Optimizer, updates: range) -> float:
        attach(model, adapters.train())
        loss = torch.zeros(())
        for update in updates:
            torch.manual_seed(update)
            loss = (predict(model) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        detach(model)
        return loss.item()

    whole, moves = fresh(1)
    first, last = train(whole, moves, range(1)), train(whole, moves, range(1, 6))
    assert last < first
    begun, moves = fresh(1)
    train(begun, moves, range(3))
    again, other = fresh(2)
    again.load_state_dict(begun.state_dict())
    load_optimizer_state(other, *optimizer_state(moves))
    train(again, other, range(3, 6))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "glora", "diag-oft", "boft", "native"])
def test_names_of_comfyui_and_back(kind: str, model: Flux) -> None:
    tensors = dict(moved_set(model, kind, train_norm=True).state_dict())
    there = convert(tensors, "comfyui", arch="fd")
    assert all(key.startswith("diffusion_model.") for key in there)
    back = convert(there, "musubi", arch="fd")
    expected = with_adapters(model, loaded(model, tensors))
    torch.testing.assert_close(with_adapters(model, loaded(model, back)), expected, atol=2e-5, rtol=2e-5)


def loaded(model: Flux, tensors: dict[str, Tensor]) -> AdapterSet:
    adapters = make_adapters(
        model, placements_of_file(tensors, model, SPEC.adapters, "file"), AdapterSection(type="lora")
    )
    load_adapter(adapters, tensors)
    return adapters.eval()


def test_dora_of_diffusers_and_back(model: Flux) -> None:
    tensors = dict(moved_set(model, "dora").state_dict())
    there = convert(tensors, "diffusers", arch="fd")
    assert "transformer.transformer_blocks.0.attn.to_k.lora_magnitude_vector" in there
    back = convert(there, "musubi", arch="fd")
    expected = with_adapters(model, loaded(model, tensors))
    torch.testing.assert_close(with_adapters(model, loaded(model, back)), expected, atol=2e-5, rtol=2e-5)
    del there["transformer.transformer_blocks.0.attn.to_k.lora_magnitude_vector"]
    with pytest.raises(CheckpointError, match="only some of its parts have norms of DoRA"):
        convert(there, "musubi", arch="fd")


@pytest.mark.parametrize(("kind", "to", "program"), [("ia3", "comfyui", "ComfyUI"), ("loha", "diffusers", "diffusers")])
def test_types_that_a_program_does_not_read_are_refused_by_name(kind: str, to: Any, program: str, model: Flux) -> None:
    with pytest.raises(CheckpointError, match=f"is of type {kind}, which {program} does not read"):
        convert(moved_set(model, kind).state_dict(), to, arch="fd")


# Convolutions


class Convolutions(nn.Module):
    """Blocks of a convolution and a Linear layer, on [B, 6, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for stride in (1, 2):
            self.blocks.append(
                nn.ModuleDict({"conv": nn.Conv2d(6, 6, 3, stride, 1, dilation=1), "inner": nn.Linear(6, 6)})
            )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block["conv"](x))  # type: ignore[index, operator]
            x = block["inner"](x.movedim(1, -1)).movedim(-1, 1)  # type: ignore[index, operator]
        return x


CONVOLUTIONS = AdapterTargets(layers={"blocks": ("inner",)}, convolutions={"blocks": ("conv",)}, network_module="none")


def test_locon_takes_convolutions_where_a_rank_for_them_is_given() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Convolutions().requires_grad_(False)
    x = torch.randn(2, 6, 9, 9, generator=generator(6, "x"))
    own = section("locon", conv_rank=3, conv_alpha=1.5, dropout=0.2)
    placements = placements_of(model, CONVOLUTIONS, own)
    assert {p.path: (p.rank, p.alpha) for p in placements if "conv" in p.path} == {
        "blocks.0.conv": (3, 1.5), "blocks.1.conv": (3, 1.5),
    }  # fmt: skip
    assert not any("conv" in p.path for p in placements_of(model, CONVOLUTIONS, section("locon")))
    adapters = make_adapters(model, placements, own)
    plain = model(x)
    attach(model, adapters.eval())
    assert torch.equal(model(x), plain)
    for parameter in adapters.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator(7, str(parameter.shape))) * 0.2)
    expected = model(x)
    adapters.train()
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters())
    detach(model)
    tensors = adapters.state_dict()
    again = make_adapters(model, placements_of_file(tensors, model, CONVOLUTIONS, "file"), AdapterSection(type="lora"))
    load_adapter(again, tensors)
    attach(model, again.eval())
    assert torch.equal(model(x), expected)
    again.merge(model)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    detach(model)
    merge(model, tensors, CONVOLUTIONS)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_types_that_take_no_convolutions_are_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"blocks\.0\.conv is a convolution, which type loha does not take; locon does"
    ):
        make_adapters(Convolutions(), [Placement("blocks.0.conv", 2, 1.0, type="loha")], section("loha"))


def test_scales_of_norms_are_dropped_as_other_changes() -> None:
    made = ADAPTERS[NORM].load()(4, 4, module_dropout=1.0)
    made.w_norm.data.fill_(1.0)  # type: ignore[operator, union-attr]
    assert made.eval().shown(torch.ones(4)).tolist() == [2.0] * 4  # type: ignore[operator]
    assert made.train().shown(torch.ones(4)).tolist() == [1.0] * 4  # type: ignore[operator]


# Sizes


def test_numbers_by_block(model: Flux) -> None:
    def ranks(**settings: Any) -> dict[str, int]:
        own = section("lora", **settings)
        return {placement.path: placement.rank for placement in placements_of(model, SPEC.adapters, own)}

    listed = ranks(block_rank=[1, 2, 3, 4, 5, 0])
    assert listed["double_blocks.0.img_attn.qkv"] == 1 and listed["single_blocks.1.linear2"] == 5
    assert not any(path.startswith("single_blocks.2") for path in listed)
    named = ranks(block_rank={"double.0-1": 9, "single_blocks.2": 2})
    assert (
        named["double_blocks.1.txt_mlp.0"],
        named["double_blocks.2.txt_mlp.0"],
        named["single_blocks.2.linear1"],
    ) == (9, 6, 2)
    with pytest.raises(ConfigError, match=r"has 25 values, this model needs 6 \(3 double_blocks \+ 3 single_blocks\)"):
        ranks(block_rank=[1] * 25)
    with pytest.raises(
        ConfigError, match=r"'double\.9' names no blocks of this model; they are double_blocks\.0-2, single"
    ):
        ranks(block_rank={"double.9": 1})


def test_what_does_not_act_on_a_type_leaves_its_layers_as_they_are(model: Flux) -> None:
    targets = [{"pattern": "single_blocks.*.linear2", "rank": 2, "depth": 3}]
    own = section("loha", depth=4, targets=targets)
    ranks = {each.path: (each.rank, each.alpha) for each in placements_of(model, SPEC.adapters, own)}
    assert ranks["double_blocks.0.img_attn.qkv"] == (6, 3.0) and ranks["single_blocks.0.linear2"] == (2, 3.0)
    own = section("ia3", block_rank=[0] * 6, rank_patterns={r"single_blocks\..*": 0})
    assert len(placements_of(model, SPEC.adapters, own)) == len(ranks)


def test_layers_outside_the_blocks_are_adapted_where_a_pattern_of_their_own_names_them(model: Flux) -> None:
    def outside(**settings: Any) -> list[str]:
        own = section("lora", **settings)
        return [
            placement.path for placement in placements_of(model, SPEC.adapters, own) if "blocks" not in placement.path
        ]

    assert outside(include=[".*"], exclude=[]) == outside() == []
    assert outside(include=["(img|txt)_in"]) == ["img_in", "txt_in"]
    assert outside(targets=[AdapterTarget(pattern="final_layer.**", enabled=True)]) == [
        "final_layer.linear", "final_layer.adaLN_modulation.1",
    ]  # fmt: skip


def test_rs_lora_is_in_the_alpha_of_the_file(model: Flux) -> None:
    own = section("lora", rank=16, alpha=2.0, rs_lora=True)
    adapters = make_adapters(model, placements_of(model, SPEC.adapters, own), own)
    assert {each.scale for _, each in adapters.items()} == {2.0 / 4}


def test_sizes_of_blocks_of_outputs_are_the_nearest_that_fit() -> None:
    oft, boft = ADAPTERS["diag-oft"].load(), ADAPTERS["boft"].load()
    assert tuple(oft(8, 96, 7).oft_blocks.shape) == (16, 6, 6)
    assert tuple(boft(8, 96, 7).oft_blocks.shape) == (5, 16, 6, 6)
    assert tuple(boft(8, 9216, 16).oft_blocks.shape) == (10, 512, 18, 18)
    with pytest.raises(ValueError, match="even number of outputs"):
        boft(8, 9, 4)


def test_dylora_trains_one_block_and_is_a_lora_of_any_smaller_rank() -> None:
    linear, torch_seed = layer(), 3
    made = adapter("dylora", linear).train()
    torch.manual_seed(torch_seed)
    shown(made, linear, X).square().sum().backward()
    rows = made.lora_down.weight.grad.abs().sum(1) > 0  # type: ignore[union-attr, operator]
    assert rows.sum() == 2 and rows.nonzero().flatten()[0] % 2 == 0
    state = made.state_dict()
    small = {"lora_down.weight": state["lora_down.weight"][:2], "lora_up.weight": state["lora_up.weight"][:, :2],
             "alpha": state["alpha"] / 3}  # fmt: skip
    cut = ADAPTERS["lora"].load().of_parts(small, (72, 48))
    assert cut.scale == made.scale


# Oracles


@pytest.fixture(scope="module")
def lycoris() -> Any:
    return importlib.import_module("lycoris.modules")


WRAPPERS = {
    "lora": ("locon", "LoConModule"), "dora": ("locon", "LoConModule"), "loha": ("loha", "LohaModule"), "lokr": ("lokr", "LokrModule"),
    "glora": ("glora", "GLoRAModule"), "ia3": ("ia3", "IA3Module"), "diag-oft": ("diag_oft", "DiagOFTModule"),
    "boft": ("boft", "ButterflyOFTModule"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRAPPERS)
def test_lycoris_computes_the_same_from_our_file(kind: str, lycoris: Any) -> None:
    """Its forward pass; its merging and its rebuilding are wrong for some (fixed scale, on_input), which the tests above cover."""
    linear = layer(96)
    made = adapter(kind, linear, **({"alpha": 0.0} if kind in ("diag-oft", "boft") else {}))
    module, name = WRAPPERS[kind]
    cls = getattr(importlib.import_module(f"lycoris.modules.{module}"), name)
    own = {"factor": -1} if kind == "lokr" else {"weight_decompose": True} if kind == "dora" else {}
    rank = made.rank
    other = cls("x", linear, 1.0, lora_dim=rank, alpha=3.0, **own)
    theirs = other.state_dict()
    ours = {key: tensor.reshape(theirs[key].shape) for key, tensor in made.state_dict().items() if key in theirs}
    assert set(theirs) - set(ours) <= {"scalar"}
    other.load_state_dict({**theirs, **ours})
    if kind in ("diag-oft", "boft"):
        other.constraint = 0.0
    other.apply_to()
    other.eval()
    with torch.no_grad():
        theirs_out = other(X)
    linear.forward = type(linear).forward.__get__(linear)  # type: ignore[method-assign]
    torch.testing.assert_close(shown(made, linear, X), theirs_out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_computes_the_same(kind: str) -> None:
    import peft

    linear = layer()
    made = adapter(kind, linear)
    holder = nn.Sequential(linear)
    config = peft.LoraConfig(r=6, lora_alpha=3, target_modules=["0"], use_dora=kind == "dora")
    other = peft.get_peft_model(holder, config).eval()
    inner = other.base_model.model[0]
    with torch.no_grad():
        inner.lora_A["default"].weight.copy_(made.lora_down.weight)  # type: ignore[operator, union-attr]
        inner.lora_B["default"].weight.copy_(made.lora_up.weight)  # type: ignore[operator, union-attr]
        if kind == "dora":
            inner.lora_magnitude_vector["default"].weight.copy_(made.dora_scale.flatten())  # type: ignore[operator, union-attr]
        theirs = other(X)
    torch.testing.assert_close(shown(made, linear, X), theirs, atol=1e-5, rtol=1e-5)
