"""The moving average moves in every precision, comes and goes without a trace, and survives its files."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from musubi_tuner.training.ema import EMA, LoadReport, unwrap
from musubi_tuner.training.schedulers import average_decay, start_left


class Net(nn.Module):
    """A weight matrix and a bias, a float buffer and a whole-number buffer."""

    counter: Tensor
    freqs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("freqs", torch.tensor([1.0, 0.5]))
        self.register_buffer("counter", torch.tensor(7))
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[0.5, -1.0, 2.0], [0.25, 4.0, -0.125]]))
            self.linear.bias.copy_(torch.tensor([1.0, -3.0]))


KEYS = {"linear.weight", "linear.bias", "freqs", "counter"}


def shift(model: nn.Module, amount: float) -> None:
    """Add to every parameter, as an optimizer would."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def trained(decay: float = 0.5, **settings: bool) -> tuple[Net, EMA]:
    """A model one update away from its start, and its average."""
    model = Net()
    ema = EMA(model, decay, **settings)
    shift(model, 1.0)
    ema.update(model)
    return model, ema


# Averaging


def test_first_average_is_a_copy_of_the_model() -> None:
    model = Net()
    start = weights(model)
    ema = EMA(model)
    shift(model, 1.0)
    assert_same(ema.shadow, start)


def test_average_moves_by_its_share_of_the_way() -> None:
    model, ema = trained(0.75)
    assert torch.equal(ema.shadow["linear.weight"], model.linear.weight.detach() - 0.75)


def test_average_of_a_bfloat16_model_moves_where_a_bfloat16_average_could_not() -> None:
    model = Net().bfloat16()
    ema = EMA(model, 0.9999)
    start = ema.shadow["linear.weight"].clone()
    stuck = model.linear.weight.detach().clone()
    shift(model, 1.0)
    goal = model.linear.weight.detach()
    for _ in range(100):
        ema.update(model)
        stuck.lerp_(goal, 1 - 0.9999)
    assert ema.shadow["linear.weight"].dtype == torch.float32
    expected = goal.float() + (start - goal.float()) * 0.9999**100
    # A hundred float32 roundings of numbers up to 4.
    assert (ema.shadow["linear.weight"] - expected).abs().max().item() < 100 * 4 * 2**-24
    assert (ema.shadow["linear.weight"] - start).abs().min().item() > 0.009
    unmoved = stuck == start.bfloat16()
    assert unmoved[start.abs() >= 0.5].all()


def test_buffers_are_copied_and_not_averaged() -> None:
    model = Net()
    ema = EMA(model, 0.9)
    model.freqs.copy_(torch.tensor([3.0, 9.0]))
    model.counter.fill_(11)
    ema.update(model)
    assert ema.shadow["freqs"].tolist() == [3.0, 9.0]
    assert ema.shadow["counter"].item() == 11
    assert ema.shadow["counter"].dtype == torch.int64


def test_parameter_of_two_names_is_averaged_under_both() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2, bias=False), "second": nn.Linear(2, 2, bias=False)})
    model["second"].weight = model["first"].weight
    ema = EMA(model, 0.5)
    shift(model, 1.0)
    ema.update(model)
    assert torch.equal(ema.shadow["second.weight"], ema.shadow["first.weight"])


def test_warm_up_begins_with_a_short_memory_and_ends_at_the_decay() -> None:
    model, ema = Net(), EMA(Net(), 0.5, warmup=True)
    decays = []
    for _ in range(12):
        decays.append(ema.current_decay())
        ema.update(model)
    expected = [1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5, 0.5, 0.5]
    assert decays == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.1, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("warmup", [False, True])
def test_what_is_left_of_the_start_is_the_product_of_all_decays(decay: float, warmup: bool) -> None:
    for updates in (0, 1, 2, 5, 200, 3000):
        product = math.prod(average_decay(update, decay, warmup) for update in range(updates))
        assert start_left(updates, decay, warmup) == pytest.approx(product, rel=1e-9, abs=1e-300)
    assert start_left(10**9, 0.999999, warmup) == 0.0


def test_what_is_left_of_the_start_is_left_in_the_average() -> None:
    model = Net()
    ema = EMA(model, 0.9, warmup=True)
    for shadow in ema.shadow.values():
        shadow.fill_(1.0)
    for parameter in model.parameters():
        parameter.data.zero_()
    for _ in range(5):
        ema.update(model)
    assert float(ema.shadow["linear.weight"].max()) == pytest.approx(start_left(5, 0.9, True))


def test_warm_up_acts_on_the_average() -> None:
    model, ema = trained(0.999, warmup=True)
    # The first decay is 1/10, so nine tenths of the step of 1 are made.
    torch.testing.assert_close(ema.shadow["linear.weight"], model.linear.weight.detach() - 0.1)


def test_without_warm_up_the_decay_is_constant() -> None:
    _, ema = trained(0.999)
    assert ema.current_decay() == 0.999
    assert ema.updates == 1


def test_shadow_lives_on_the_device_it_is_given() -> None:
    ema = EMA(Net(), device="meta")
    assert {value.device.type for value in ema.shadow.values()} == {"meta"}


def test_moving_the_average_returns_it() -> None:
    ema = EMA(Net())
    assert ema.to("meta") is ema
    assert {value.device.type for value in ema.shadow.values()} == {"meta"}


# Applying and restoring


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_average_is_in_the_model_and_the_training_weights_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    ema = EMA(model, 0.3)
    shift(model, 0.7)
    ema.update(model)
    before = weights(model)
    with ema.applied(model):
        applied = weights(model)
    assert torch.equal(applied["linear.weight"], ema.shadow["linear.weight"].to(dtype))
    assert not torch.equal(applied["linear.weight"], before["linear.weight"])
    assert_same(weights(model), before)


def test_applying_twice_is_refused_and_loses_nothing() -> None:
    model, ema = trained()
    before = weights(model)
    ema.apply_shadow(model)
    with pytest.raises(RuntimeError, match=r"the averaged weights are applied already; call restore first"):
        ema.apply_shadow(model)
    ema.restore(model)
    assert_same(weights(model), before)


def test_second_restore_does_nothing() -> None:
    model, ema = trained()
    ema.apply_shadow(model)
    ema.restore(model)
    shift(model, 5.0)
    later = weights(model)
    ema.restore(model)
    assert_same(weights(model), later)


def test_restore_without_apply_does_nothing() -> None:
    model, ema = trained()
    before = weights(model)
    ema.restore(model)
    assert_same(weights(model), before)


def test_training_weights_come_back_after_an_exception() -> None:
    model, ema = trained()
    before = weights(model)
    with pytest.raises(KeyError, match="sampling failed"), ema.applied(model):
        raise KeyError("sampling failed")
    assert_same(weights(model), before)
    with ema.applied(model):  # and the average can be applied again
        pass


def test_average_that_does_not_fit_leaves_the_training_weights_in_the_model() -> None:
    model, ema = trained()
    ema.shadow["gone.weight"] = torch.zeros(1)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"gone\.weight"), ema.applied(model):
        pass
    assert_same(weights(model), before)


# States


def test_state_returns_to_another_average_as_a_copy() -> None:
    _, ema = trained(0.25)
    other = EMA(Net(), 0.9)
    other.load_state_dict(ema.state_dict())
    assert (other.decay, other.updates) == (0.25, 1)
    kept = {key: value.clone() for key, value in ema.shadow.items()}
    assert_same(other.shadow, kept)
    ema.shadow["linear.bias"].add_(1.0)
    assert_same(other.shadow, kept)


def test_state_without_decay_keeps_that_of_the_average() -> None:
    ema = EMA(Net(), 0.9)
    ema.load_state_dict({"shadow": ema.shadow})
    assert (ema.decay, ema.updates) == (0.9, 0)


def test_state_holds_references() -> None:
    _, ema = trained()
    assert ema.state_dict()["shadow"]["linear.weight"] is ema.shadow["linear.weight"]


def test_loading_counts_what_is_loaded_skipped_and_initialised() -> None:
    model, ema = trained()
    shift(model, 1.0)
    given = {"linear.weight": torch.full((2, 3), 9.0), "gone.weight": torch.zeros(1), "gone.bias": torch.zeros(1)}
    assert ema.load_shadow(given, model) == LoadReport(loaded=1, skipped=2, initialized=3)
    assert torch.equal(ema.shadow["linear.weight"], given["linear.weight"])
    assert torch.equal(ema.shadow["linear.bias"], model.linear.bias.detach())


def test_loading_without_a_model_leaves_the_rest_as_it_is() -> None:
    _, ema = trained()
    bias = ema.shadow["linear.bias"].clone()
    report = ema.load_shadow({"linear.weight": torch.zeros(2, 3)})
    assert report == LoadReport(loaded=1, skipped=0, initialized=0)
    assert torch.equal(ema.shadow["linear.bias"], bias)


def test_loading_copies_into_float32_storage_of_its_own() -> None:
    _, ema = trained()
    given = torch.full((2, 3), 1.5, dtype=torch.bfloat16)
    ema.load_shadow({"linear.weight": given})
    given.zero_()
    assert ema.shadow["linear.weight"].dtype == torch.float32
    assert ema.shadow["linear.weight"].unique().tolist() == [1.5]


def test_loading_a_tensor_of_another_shape_names_it() -> None:
    _, ema = trained()
    with pytest.raises(ValueError) as caught:
        ema.load_shadow({"linear.weight": torch.zeros(3, 2)})
    assert str(caught.value) == "linear.weight is [3, 2], the average has [2, 3]"


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_loading_removes_the_prefixes_of_wrappers(prefix: str) -> None:
    model, ema = trained()
    report = ema.load_shadow({prefix + key: value for key, value in model.state_dict().items()})
    assert report == LoadReport(loaded=4, skipped=0, initialized=0)
    assert_same(ema.shadow, weights(model))


def test_file_holds_the_average_under_the_keys_of_the_model(tmp_path: Path) -> None:
    _, ema = trained()
    path = tmp_path / "ema.safetensors"
    ema.save(path)
    with safe_open(str(path), "pt") as file:
        assert set(file.keys()) == KEYS
    assert [entry.name for entry in tmp_path.iterdir()] == ["ema.safetensors"]


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"average\.pt: averages are written as safetensors"):
        EMA(Net(), 0.9).save(tmp_path / "average.pt")
    assert not list(tmp_path.iterdir())


def test_file_comes_back_bit_for_bit(tmp_path: Path) -> None:
    _, ema = trained()
    ema.save(tmp_path / "ema.safetensors")
    other = EMA(Net())
    other.load(tmp_path / "ema.safetensors")
    assert_same(other.shadow, ema.shadow)


def test_loaded_average_does_not_need_its_file_any_more(tmp_path: Path) -> None:
    model, ema = trained()
    path = tmp_path / "ema.safetensors"
    ema.save(path)
    other = EMA(Net())
    other.load(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert_same(other.shadow, ema.shadow)
    other.update(model)  # and it can be moved on


def test_average_from_bfloat16_moves_in_float32(tmp_path: Path) -> None:
    """In bfloat16 a step of 1 - 0.9999 is below the rounding step."""
    model, ema = trained()
    narrow = {key: value.bfloat16() if value.is_floating_point() else value for key, value in ema.shadow.items()}
    save_file(narrow, tmp_path / "ema.safetensors")
    loaded, taken = EMA(Net(), 0.9999), EMA(Net(), 0.9999)
    loaded.load(tmp_path / "ema.safetensors")
    taken.load_state_dict({"shadow": narrow})
    for other in (loaded, taken):
        assert_same(other.shadow, {key: value.to(ema.shadow[key].dtype) for key, value in narrow.items()})
        before = other.shadow["linear.weight"].clone()
        other.update(model)
        assert other.shadow["linear.weight"].dtype == torch.float32
        assert not torch.equal(other.shadow["linear.weight"], before)


# Wrapped models


def compiled(model: nn.Module) -> nn.Module:
    wrapped = torch.compile(model, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "data parallel": nn.DataParallel,
    "data parallel of compiled": lambda model: nn.DataParallel(compiled(model)),
    "compiled data parallel": lambda model: compiled(nn.DataParallel(model)),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrapped_model_has_the_average_of_the_bare_one(kind: str) -> None:
    model = Net()
    wrapped = WRAPPERS[kind](model)
    assert set(wrapped.state_dict()) != KEYS
    assert unwrap(wrapped) is model
    ema = EMA(wrapped, 0.5)
    assert set(ema.shadow) == KEYS
    shift(model, 1.0)
    ema.update(wrapped)
    before = weights(model)
    with ema.applied(wrapped):
        assert_same(weights(model), ema.shadow)
    assert_same(weights(model), before)
    assert torch.equal(ema.shadow["linear.weight"], model.linear.weight.detach() - 0.5)


def test_submodule_called_module_is_no_wrapper() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Net()

    holder = Holder()
    assert unwrap(holder) is holder
