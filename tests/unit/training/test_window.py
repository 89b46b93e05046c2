"""Training losses by noise level: the plain mean of each slice, whatever the split into micro-batches, lines and starts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from musubi_tuner.training.validation import METRIC, time_grid
from musubi_tuner.training.window import NoiseBins, Window, binned

CPU = torch.device("cpu")


def filled(sigma: torch.Tensor, loss: torch.Tensor, count: int = 4, parts: int = 1) -> NoiseBins:
    bins = NoiseBins(count, CPU)
    for some, own in zip(sigma.chunk(parts), loss.chunk(parts)):
        bins.add(binned(some, own, count))
    return bins


def means(bins: NoiseBins) -> dict[str, float]:
    return bins.means(bins.table.flatten().tolist())


@pytest.mark.parametrize("parts", [1, 5, 37])
def test_a_slice_holds_the_mean_loss_of_its_samples_however_they_are_split(parts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sigma, loss = torch.rand(200, generator=generator), torch.rand(200, generator=generator)
    found = means(filled(sigma, loss, parts=parts))
    for index, middle in enumerate((0.125, 0.375, 0.625, 0.875)):
        inside = [float(x) for s, x in zip(sigma, loss) if index / 4 <= float(s) < (index + 1) / 4]
        assert found[f"loss/sigma_{middle:.3f}"] == pytest.approx(sum(inside) / len(inside), rel=1e-6)


def test_tags_are_those_of_the_validation_at_as_many_noise_levels() -> None:
    validation = [f"{METRIC}_sigma_{middle:.3f}" for middle in time_grid(8)]
    assert [tag.replace("loss/", "loss/val_") for tag in NoiseBins(8, CPU).tags] == validation


def test_both_ends_belong_to_their_slices_and_empty_slices_are_left_out() -> None:
    assert means(filled(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 6.0]))) == {
        "loss/sigma_0.125": 2.0,
        "loss/sigma_0.875": 6.0,
    }


def test_a_loss_that_is_not_finite_stays_in_its_slice() -> None:
    found = means(filled(torch.tensor([0.1, 0.9]), torch.tensor([1.0, float("inf")])))
    assert found == {"loss/sigma_0.125": 1.0, "loss/sigma_0.875": float("inf")}


def test_a_state_continues_and_one_of_other_slices_counts_for_nothing() -> None:
    begun = filled(torch.tensor([0.1, 0.2]), torch.tensor([1.0, 3.0]))
    again, other = NoiseBins(4, CPU), NoiseBins(2, CPU)
    for bins in (again, other):
        bins.load_state(begun.state())
        bins.load_state(None)
    assert means(again) == {"loss/sigma_0.125": 2.0}
    assert means(other) == {}
    again.clear()
    assert means(again) == {}
    # A sum that needs more digits than float32 has.
    begun.add(filled(torch.tensor([0.1]), torch.tensor([2.0**-30])).table)
    again.load_state(begun.state())
    assert torch.equal(again.table, begun.table) and float(begun.table.max()) != 4.0


def test_none_are_kept_where_there_are_no_slices() -> None:
    bins = NoiseBins(0, CPU)
    assert bins.state() == [[], []] and means(bins) == {}
    bins.load_state(bins.state())


def test_a_term_that_is_not_in_every_update_has_the_mean_of_its_own_updates() -> None:
    ranks: Any = SimpleNamespace(count=1, main=True, sum_device=CPU, add_up=lambda values: None)
    window, again = Window(ranks, 0), Window(ranks, 0)
    for update in range(4):
        window.add("loss/main", torch.tensor(float(update)))
        if update == 2:
            window.add("loss/critic", torch.tensor(7.0))
        window.updates += 1
    again.load_state(window.state())
    older = {key: value for key, value in window.state().items() if key != "window_counts"}
    assert window.means()[0] == again.means()[0] == {"loss/critic": 7.0, "loss/main": 1.5}
    again.load_state(older)  # of a version in which every term was in every update
    assert again.means()[0]["loss/main"] == 1.5


def test_weights_of_terms_that_are_rare_survive_a_restart_and_end_with_their_line() -> None:
    """As that of R1, which is not computed in every update."""
    ranks: Any = SimpleNamespace(count=1, main=True, sum_device=CPU, add_up=lambda values: None)
    window, again = Window(ranks, 0), Window(ranks, 0)
    window.add("loss/r1", torch.tensor(1.0))
    window.weights |= {"r1": 5.0}
    again.load_state(window.state())
    assert again.weights == {"r1": 5.0}
    window.means()
    assert window.weights == {} and again.weights == {"r1": 5.0}
