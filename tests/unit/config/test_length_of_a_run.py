"""The number of updates of a run, counted from real buckets."""

from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musubi_tuner.config import Steps, calculate_steps, sentence
from musubi_tuner.errors import ConfigError


@pytest.mark.parametrize(
    ("buckets", "options", "expected"),
    [
        ([(50 * 10, 2)], {"max_epochs": 5}, 1250),
        ([(50 * 10, 4)], {"max_epochs": 5}, 625),
        ([(7, 2)], {"max_epochs": 1}, 4),
        ([(3, 2), (4, 2)], {"max_epochs": 1}, 4),
        ([(1, 4), (1, 4), (5, 4)], {"max_epochs": 1}, 4),
        ([(100, 4)], {"max_epochs": 3, "grad_accum_steps": 2}, 39),
        ([(100, 4)], {"max_epochs": 3, "grad_accum_steps": 2, "num_processes": 2}, 21),
    ],
)
def test_total_updates(buckets: list[tuple[int, int]], options: dict[str, int], expected: int) -> None:
    assert calculate_steps(buckets, **options).total_updates == expected


def test_all_counts_of_a_run() -> None:
    assert calculate_steps([(7, 2), (5, 4)], grad_accum_steps=4, max_epochs=3) == Steps(
        micro_batches=6, updates_per_epoch=2, total_updates=6, epochs=3, images_per_epoch=12, per_update=4, short_batches=2,
        short_update=True, budget="max_epochs",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("buckets", "options", "sources", "expected"),
    [
        ([(500, 2)], {"max_epochs": 5}, [(50, 10, 2)], "50 images x 10 repeats x 5 epochs / 2 = 1,250 steps"),
        ([(3, 2), (4, 2)], {"max_epochs": 2}, [(7, 1, 2)],
         "7 images x 2 epochs / 2 = 8 steps (1 of them because 1 bucket ends in a short batch)"),
        ([(3, 2), (3, 2)], {"max_epochs": 1}, [(6, 1, 2)],
         "6 images x 1 epoch / 2 = 4 steps (1 of them because 2 buckets end in a short batch)"),
        ([(100, 4)], {"max_steps": 26, "grad_accum_steps": 2}, [(100, 1, 4)],
         "100 images / 4 / 2 micro-batches per update = 13 steps per epoch (1 of them because the last update of an epoch is "
         "shorter); 26 steps are 2 epochs of 13"),
        ([(8, 4), (20, 1)], {"max_epochs": 3}, [(8, 1, 4), (10, 2, 1)],
         "(8 images / 4 + 10 images x 2 repeats) x 3 epochs = 66 steps"),
        ([(1, 1)], {"max_epochs": 1}, [(1, 1, 1)], "1 image x 1 epoch = 1 steps"),
    ],
)  # fmt: skip
def test_the_number_of_updates_in_words(
    buckets: list[tuple[int, int]], options: dict[str, int], sources: list[tuple[int, int, int]], expected: str
) -> None:
    assert sentence(calculate_steps(buckets, **options), sources) == expected


def test_datasets_may_have_batch_sizes_of_their_own() -> None:
    assert calculate_steps([(10, 5), (10, 1)], max_epochs=1).micro_batches == 12


def test_empty_bucket_counts_nothing() -> None:
    assert calculate_steps([(0, 4), (4, 4)], max_epochs=1).micro_batches == 1


@pytest.mark.parametrize(
    ("max_steps", "max_epochs", "total", "epochs"),
    [(10, None, 10, 3), (None, 3, 12, 3), (10, 3, 10, 3), (50, 3, 12, 3)],
)
def test_whichever_budget_ends_first(max_steps: int | None, max_epochs: int | None, total: int, epochs: int) -> None:
    steps = calculate_steps([(4, 1)], max_steps=max_steps, max_epochs=max_epochs)
    assert (steps.total_updates, steps.epochs) == (total, epochs)


@given(
    buckets=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5)), min_size=1, max_size=5),
    processes=st.integers(1, 3),
    accumulation=st.integers(1, 4),
    max_steps=st.integers(1, 60),
)
@settings(deadline=None)
def test_equals_counting_by_hand(
    buckets: list[tuple[int, int]], processes: int, accumulation: int, max_steps: int
) -> None:
    micro_batches = [size for count, size in buckets for _ in range(0, count, size)]
    if not micro_batches:
        return
    done = epochs = 0
    while done < max_steps:
        epochs += 1
        left = list(micro_batches)
        while left and done < max_steps:
            del left[: processes * accumulation]
            done += 1
    steps = calculate_steps(buckets, num_processes=processes, grad_accum_steps=accumulation, max_steps=max_steps)
    assert (steps.total_updates, steps.epochs) == (done, epochs)
    assert steps.micro_batches == len(micro_batches)
    assert steps.updates_per_epoch == ceil(len(micro_batches) / (processes * accumulation))
    assert steps.images_per_epoch == sum(count for count, _ in buckets)


@pytest.mark.parametrize("buckets", [[], [(0, 4)]])
def test_nothing_to_train_on(buckets: list[tuple[int, int]]) -> None:
    with pytest.raises(ConfigError) as caught:
        calculate_steps(buckets, max_epochs=1)
    assert str(caught.value) == "there is nothing to train on: no data set has a usable image"


def test_a_budget_is_required() -> None:
    with pytest.raises(ConfigError) as caught:
        calculate_steps([(4, 1)])
    assert str(caught.value) == "train.max_steps or train.max_epochs is required"
