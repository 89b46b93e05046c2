"""The order of an epoch, and how updates, processes and accumulation cut it."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musubi_tuner.data.plan import MicroBatch, PlanItem, Update, plan_epoch, updates_of_epoch

BUCKETS = [(64, 64), (64, 128), (128, 64), (512, 512)]


@st.composite
def item_lists(draw: st.DrawFn) -> list[PlanItem]:
    """Up to 30 items of unique ids in random order, buckets, repeats and batch sizes."""
    names = draw(st.lists(st.text("abcxyz019_/", min_size=1, max_size=6), unique=True, max_size=30))
    return [
        PlanItem(
            name,
            draw(st.sampled_from(BUCKETS)),
            draw(st.integers(1, 4)),
            draw(st.sampled_from([None, 1, 2, 3, 7])),
        )
        for name in names
    ]


seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 6)


def by_name(items: list[PlanItem], planned: list[MicroBatch]) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    return [(tuple(items[index].id for index in batch.items), batch.presentations) for batch in planned]


@given(item_lists(), seeds, st.integers(0, 50), sizes)
@settings(deadline=None)
def test_every_item_is_presented_exactly_as_often_as_it_repeats(
    items: list[PlanItem], seed: int, epoch: int, size: int
) -> None:
    planned = plan_epoch(items, seed, epoch, size)
    counts = Counter(index for batch in planned for index in batch.items)
    assert counts == Counter({index: item.num_repeats for index, item in enumerate(items)})


@given(item_lists(), seeds, sizes)
@settings(deadline=None)
def test_presentations_are_numbered_in_the_order_of_training(items: list[PlanItem], seed: int, size: int) -> None:
    numbers = [number for batch in plan_epoch(items, seed, 0, size) for number in batch.presentations]
    assert numbers == list(range(sum(item.num_repeats for item in items)))


@given(item_lists(), seeds, sizes)
@settings(deadline=None)
def test_a_micro_batch_has_one_bucket_one_size_and_only_the_last_of_a_bucket_is_short(
    items: list[PlanItem], seed: int, size: int
) -> None:
    planned = plan_epoch(items, seed, 0, size)
    lengths: dict[object, list[int]] = {}
    for batch in planned:
        assert len(batch) == len(batch.items) == len(batch.presentations) > 0
        groups = {(items[index].bucket, items[index].micro_batch or size) for index in batch.items}
        assert len(groups) == 1
        lengths.setdefault(groups.pop(), []).append(len(batch))
    for (_, limit), found in lengths.items():  # type: ignore[misc]  # the keys are the pairs made above
        assert sorted(found, reverse=True)[:-1] == [limit] * (len(found) - 1)
        assert min(found) <= limit


@given(item_lists(), seeds, sizes, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_plan_does_not_depend_on_the_order_of_the_items(
    items: list[PlanItem], seed: int, size: int, shuffler: object
) -> None:
    other = list(items)
    shuffler.shuffle(other)  # type: ignore[attr-defined]  # a random.Random
    assert by_name(items, plan_epoch(items, seed, 2, size)) == by_name(other, plan_epoch(other, seed, 2, size))


@given(item_lists(), seeds, sizes)
@settings(deadline=None, max_examples=30)
def test_asking_again_or_for_other_epochs_in_between_changes_nothing(
    items: list[PlanItem], seed: int, size: int
) -> None:
    first = plan_epoch(items, seed, 3, size)
    plan_epoch(items, seed, 1, size)
    plan_epoch(items, seed + 1, 3, size)
    assert plan_epoch(items, seed, 3, size) == first


SIXTY = [PlanItem(f"{index:02d}", BUCKETS[index % 2]) for index in range(60)]


def test_order_of_items_and_of_batches_is_keyed_by_seed_and_epoch() -> None:
    plans = {
        (seed, epoch): tuple(batch.items for batch in plan_epoch(SIXTY, seed, epoch, 4))
        for seed in (0, 1)
        for epoch in range(4)
    }
    assert len(set(plans.values())) == len(plans)
    # Not only the batches change places: their members change too.
    members = [frozenset(frozenset(batch) for batch in plan) for plan in plans.values()]
    assert len(set(members)) == len(members)


def test_buckets_take_turns_over_an_epoch() -> None:
    buckets = [SIXTY[batch.items[0]].bucket for batch in plan_epoch(SIXTY, 0, 0, 2)]
    changes = sum(left != right for left, right in pairwise(buckets))
    # 30 batches of two buckets in random order change about 15 times; bucket after bucket would be once.
    assert 6 <= changes <= 24


def test_items_of_another_bucket_leave_the_batches_of_a_bucket_alone() -> None:
    """A bucket's shuffle is its own: only the order of the batches of the epoch may change."""
    extra = [*SIXTY, PlanItem("zz", (256, 256))]
    before = {batch.items for batch in plan_epoch(SIXTY, 5, 1, 4)}
    after = {batch.items for batch in plan_epoch(extra, 5, 1, 4)}
    assert after == before | {(60,)}


def test_the_stored_example_never_changes() -> None:
    """A run that is continued by another version of this code must find the same order."""
    items = [
        PlanItem("0:cat", (64, 64)),
        PlanItem("0:dog", (64, 64), 3),
        PlanItem("0:eel", (128, 64), 2),
        PlanItem("1:ant", (64, 64)),
        PlanItem("1:bee", (128, 64), 1, 1),
    ]
    assert by_name(items, plan_epoch(items, 42, 0, 2)) == STORED[0]
    assert by_name(items, plan_epoch(items, 42, 1, 2)) == STORED[1]


STORED: list[list[tuple[tuple[str, ...], tuple[int, ...]]]] = [
    [
        (("0:dog",), (0,)),
        (("1:ant", "0:cat"), (1, 2)),
        (("0:eel", "0:eel"), (3, 4)),
        (("1:bee",), (5,)),
        (("0:dog", "0:dog"), (6, 7)),
    ],
    [
        (("1:bee",), (0,)),
        (("0:dog", "0:dog"), (1, 2)),
        (("1:ant", "0:dog"), (3, 4)),
        (("0:cat",), (5,)),
        (("0:eel", "0:eel"), (6, 7)),
    ],
]


def test_an_epoch_without_items_is_empty() -> None:
    assert plan_epoch([], 0, 0, 4) == []
    assert updates_of_epoch([], num_processes=2, grad_accum_steps=2, rank=1) == []


def rank_updates(planned: list[MicroBatch], processes: int, accumulation: int) -> list[list[Update]]:
    return [
        updates_of_epoch(planned, num_processes=processes, grad_accum_steps=accumulation, rank=rank)
        for rank in range(processes)
    ]


@given(item_lists(), st.integers(1, 4), st.integers(1, 4))
@settings(deadline=None)
def test_processes_times_accumulation_equals_one_process(
    items: list[PlanItem], processes: int, accumulation: int
) -> None:
    """P processes with accumulation A make the updates of one process with accumulation P x A."""
    planned = plan_epoch(items, 7, 0, 3)
    (single,) = rank_updates(planned, 1, processes * accumulation)
    ranks = rank_updates(planned, processes, accumulation)
    for updates in ranks:
        assert [update.micro_batches for update in updates] == [update.micro_batches for update in single]
        assert [update.samples for update in updates] == [update.samples for update in single]
    for step, whole in enumerate(single):
        together = [entry for updates in ranks for entry in updates[step].share]
        assert together == list(whole.share)


@given(item_lists(), st.integers(1, 4), st.integers(1, 4))
@settings(deadline=None)
def test_updates_cover_the_epoch_once_and_only_the_last_is_short(
    items: list[PlanItem], processes: int, accumulation: int
) -> None:
    planned = plan_epoch(items, 7, 0, 3)
    ranks = rank_updates(planned, processes, accumulation)
    assert [batch for update in ranks[0] for batch in update.micro_batches] == planned
    whole = processes * accumulation
    assert all(len(update.micro_batches) == whole for update in ranks[0][:-1])
    run = [batch for step in range(len(ranks[0])) for updates in ranks for _, batch in updates[step].share if batch]
    assert run == planned
    for update in ranks[0]:
        assert update.samples == sum(len(batch) for batch in update.micro_batches) > 0
    for updates in ranks:
        # Collective operations must match: every rank runs the same number of micro-batches in every update.
        assert all(len(update.share) == accumulation for update in updates)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_short_last_update_leaves_later_ranks_without_work(rank: int) -> None:
    planned = [MicroBatch((index,), (index,)) for index in range(8)]
    *_, last = updates_of_epoch(planned, num_processes=3, grad_accum_steps=2, rank=rank)
    assert last.micro_batches == (planned[6], planned[7])
    assert last.samples == 2
    expected = {0: ((0, planned[6]), (1, planned[7])), 1: ((2, None), (3, None)), 2: ((4, None), (5, None))}
    assert last.share == expected[rank]
