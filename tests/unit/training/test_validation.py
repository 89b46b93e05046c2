"""The validation loss: a plain sum over images and noise levels that nothing but the weights can change."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from musubi_tuner.config.schema.validation import ValidationSection
from musubi_tuner.data.batch import Batch
from musubi_tuner.data.buckets import place
from musubi_tuner.data.item import Item
from musubi_tuner.data.plan import MicroBatch
from musubi_tuner.models.tinyflux import TinyFluxDeep, TinyFluxProcess
from musubi_tuner.models.tinyflux.process import TeacherSettings
from musubi_tuner.models.tinyflux.settings import TinyFluxObjective
from musubi_tuner.randomness import normal
from musubi_tuner.training.checkpoint import Best
from musubi_tuner.training.validation import METRIC, Validator, time_grid, validation_batches
from tiny import TINY

CONFIG = replace(TINY, joint_attention_dim=12, pooled_projection_dim=10, lune_expert_dim=6)
SIZES = [(32, 32), (48, 32), (32, 32), (32, 32), (48, 32)]


def make_item(number: int) -> Item:
    size = SIZES[number % len(SIZES)]
    placement = place(size, size)
    name = f"image {number}"
    return Item(name, f"0:{name}", Path(f"{name}.png"), "text", Path("cache"), size, placement, 1, 2)


class Pictures:
    """Images in memory, as batches of the cached dataset."""

    def __init__(self, count: int = 7) -> None:
        self.items = [make_item(number) for number in range(count)]

    def __len__(self) -> int:
        return len(self.items)

    def row(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        width, height = self.items[index].bucket
        return {
            "latents": torch.randn(4, height // 8, width // 8, generator=generator),
            "t5_vec": torch.randn(5, 12, generator=generator),
            "clip_l_pooler": torch.randn(10, generator=generator),
            "lune_features": torch.randn(2, 6, generator=generator),
            "t_buckets": torch.tensor([0.0, 1.0]),
        }

    def __getitem__(self, planned: MicroBatch) -> Batch:
        rows = [self.row(index) for index in planned.items]
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        valid = {name: torch.ones(len(rows), dtype=torch.bool) for name in tensors}
        items = [self.items[index].id for index in planned.items]
        ids = torch.zeros(len(planned), dtype=torch.int64)
        return Batch(tensors, valid, items, planned.presentations, ids)


def make_model(dropout: float = 0.0) -> nn.Module:
    """A model whose every weight counts, with dropout behind its first layer."""
    generator = torch.Generator().manual_seed(0)
    model = TinyFluxDeep(CONFIG)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    model.add_module("dropout", nn.Dropout(dropout))
    model.img_in.register_forward_hook(lambda layer, inputs, output: model.dropout(output))
    return model.train()


def make_process(**settings: Any) -> TinyFluxProcess:
    return TinyFluxProcess(TinyFluxObjective(**settings), TeacherSettings(True, False, "sum"))


def make_validator(
    pictures: Pictures, process: TinyFluxProcess | None = None, rank: int = 0, processes: int = 1, **settings: Any
) -> Validator:
    section = ValidationSection(**{"split": 0.1, "times": 4, **settings})
    return Validator(
        pictures,  # type: ignore[arg-type]  # the same interface
        process or make_process(),
        section,
        device=torch.device("cpu"),
        compute_dtype=None,
        rank=rank,
        processes=processes,
        hidden=("lune_features",),
    )


def test_the_grid_is_the_middles_of_equal_slices_and_its_own_mirror() -> None:
    assert time_grid(4) == [0.125, 0.375, 0.625, 0.875]
    assert time_grid(1) == [0.5]
    assert [1 - t for t in time_grid(8)][::-1] == time_grid(8)


def test_batches_hold_every_image_once_with_one_bucket_each() -> None:
    items = Pictures(11).items
    batches = validation_batches(items)
    assert sorted(index for batch in batches for index in batch.items) == list(range(11))
    assert all(len({items[index].bucket for index in batch.items}) == 1 and len(batch) <= 2 for batch in batches)
    assert validation_batches(items) == batches


def test_the_loss_is_the_mean_over_images_and_noise_levels_of_a_plain_loop() -> None:
    pictures, model, process = Pictures(), make_model().eval(), make_process(min_snr_gamma=0)
    values = make_validator(pictures, process).measure(model, 0)
    expected: dict[float, list[float]] = {}
    for index, item in enumerate(pictures.items):
        row = pictures[MicroBatch((index,), (0,))]
        noise = normal(tuple(row.tensors["latents"].shape[1:]), 42, "validation", item.id)[None]
        for t in time_grid(4):
            time = torch.tensor([t])
            keep = {name: torch.tensor([0.999]) for name in process.uniforms}
            inputs = process.conditioning(row, time, keep)
            inputs.pop("lune")
            with torch.no_grad():
                guess, _ = process.predict(model, (1 - t) * noise + t * row.tensors["latents"], time, inputs)
            expected.setdefault(1 - t, []).append(float((guess - (row.tensors["latents"] - noise)).square().mean()))
    assert list(values) == [METRIC, *(f"{METRIC}_sigma_{sigma:.3f}" for sigma in sorted(expected))]
    means = {sigma: sum(losses) / len(losses) for sigma, losses in expected.items()}
    assert [values[f"{METRIC}_sigma_{sigma:.3f}"] for sigma in means] == pytest.approx(list(means.values()), rel=1e-5)
    assert values[METRIC] == pytest.approx(sum(means.values()) / 4, rel=1e-5)


def test_measuring_twice_gives_the_same_number_and_other_weights_another() -> None:
    validator, model = make_validator(Pictures()), make_model()
    first = validator.measure(model, 0)
    torch.rand(3)
    assert validator.measure(model, 500) == first
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert validator.measure(model, 0)[METRIC] != first[METRIC]


def test_another_seed_is_other_noise() -> None:
    model = make_model()
    assert make_validator(Pictures()).measure(model, 0) != make_validator(Pictures(), seed=1).measure(model, 0)


def test_text_is_not_dropped_and_teachers_are_not_fed() -> None:
    model, pictures = make_model(), Pictures()

    def loss(**settings: float) -> float:
        return make_validator(pictures, make_process(**settings)).measure(model, 0)[METRIC]

    kept = loss(text_dropout=0.0, lune_teacher_dropout=0.0)
    assert loss(text_dropout=0.999, lune_teacher_dropout=0.0) == kept
    assert loss(text_dropout=1.0, lune_teacher_dropout=0.0) != kept
    # Pictures are drawn without teachers; a run that feeds them and one that does not are measured alike.
    assert loss(text_dropout=0.0, lune_teacher_dropout=1.0) == kept
    open_book = make_validator(pictures, make_process(lune_teacher_dropout=0.0))
    open_book.hidden = ()
    assert open_book.measure(model, 0)[METRIC] != kept


def test_layers_drop_nothing_and_modes_and_random_numbers_are_left_as_they_were() -> None:
    model = make_model(dropout=0.5)
    model.get_submodule("img_in").eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first = make_validator(Pictures()).measure(model, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert make_validator(Pictures()).measure(model.eval(), 0) == first


def test_the_shares_of_the_processes_make_up_the_whole() -> None:
    whole = make_validator(Pictures()).batches
    shares = [make_validator(Pictures(), rank=rank, processes=3).batches for rank in range(3)]
    assert sorted(batch.items for share in shares for batch in share) == sorted(batch.items for batch in whole)


def test_the_best_is_the_lowest_and_is_never_nan() -> None:
    best = Best(METRIC)
    assert not best.improve(math.nan)
    assert best.improve(2.0) and not best.improve(2.0) and not best.improve(math.nan) and best.improve(1.5)
    assert best.value == 1.5


def test_the_best_continues_from_a_state_of_the_same_metric_only() -> None:
    best = Best(METRIC, 1.5)
    again, other = Best(METRIC), Best("epoch/loss")
    again.load_state(best.state())
    other.load_state(best.state())
    assert again == best
    assert other == Best("epoch/loss")
    other.load_state({"metric": "loss/epoch", "value": 0.5, "total": 3.0, "updates": 2})  # of an earlier version
    assert other.value == 0.5
    fresh = Best(METRIC)
    fresh.load_state(Best(METRIC).state())
    fresh.load_state(None)
    assert fresh.value == math.inf
