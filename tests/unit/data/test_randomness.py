"""Keyed draws: fixed for ever by their key, and unrelated between keys."""

import statistics

import pytest
import torch

from musubi_tuner.randomness import generator, keyed_random, keyed_seed, normal, seed_layers, uniform

# Stored results: a run that is continued with another version of this code must draw the same numbers.
SEEDS = {
    (): 8238016292129134938,
    (0,): 6711488920161924273,
    ("0",): 7229554788928137032,
    (42, "noise", 0, 0): 4463041451815504799,
    (42, "noise", 0, 1): 6178231991923585989,
    (43, "noise", 0, 0): 1884937125488427851,
    (0, "latent", "cats/a b", 0): 2220352397799852576,
    (42, "teacher", "Ähre", 0, 9): 4909113836074687627,
    (4294967295, "layers", 123456, 7): 7162123250417984681,
    (-1, ""): 1191401955753694782,
}
SHUFFLED = [2, 5, 3, 0, 1, 4, 7, 6]
NORMAL = [0.6564003, 1.6667296, -0.7354333, 1.6529138]
NORMAL_OF_A_LATENT = [-0.0550703, 0.6823853, 0.1673997, -0.521028]
UNIFORM = 0.635348582442359


@pytest.mark.parametrize("key", SEEDS, ids=repr)
def test_seeds_never_change(key: tuple[int | str, ...]) -> None:
    assert keyed_seed(*key) == SEEDS[key]


def test_shuffles_normal_and_uniform_draws_never_change() -> None:
    order = list(range(8))
    keyed_random(42, "batch order", 3).shuffle(order)
    assert order == SHUFFLED
    # 1e-6: torch computes normal numbers with logarithm and cosine, whose last bit is the processor's.
    assert torch.allclose(normal((4,), 42, "noise", 0, 7), torch.tensor(NORMAL), rtol=0, atol=1e-6)
    # From 16 numbers on, torch fills in another order.
    latent = normal((4, 2, 4), 42, "noise", 0, 7)[:, 1, 3]
    assert torch.allclose(latent, torch.tensor(NORMAL_OF_A_LATENT), rtol=0, atol=1e-6)
    assert uniform(42, "coin", 5) == UNIFORM


def test_a_draw_depends_on_its_key_alone() -> None:
    first = normal((3, 5), 1, "noise", 2, 3)
    torch.manual_seed(99)
    torch.randn(10)
    normal((100,), 1, "noise", 2, 4)
    keyed_random(1, "other").random()
    assert torch.equal(first, normal((3, 5), 1, "noise", 2, 3))
    assert first.dtype == torch.float32
    assert first.device.type == "cpu"


def test_draws_leave_the_global_generators_alone() -> None:
    import random

    torch.manual_seed(5)
    random.seed(5)
    expected = (torch.rand(3), random.random())
    torch.manual_seed(5)
    random.seed(5)
    normal((4,), 1, "a")
    uniform(1, "a")
    keyed_random(1, "a").random()
    generator(1, "a")
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]


def test_seed_layers_sets_the_global_generator_by_key() -> None:
    seed_layers(7, "layers", 0, 1)
    first = torch.rand(4)
    torch.rand(10)
    seed_layers(7, "layers", 0, 1)
    assert torch.equal(torch.rand(4), first)
    seed_layers(7, "layers", 0, 2)
    assert not torch.equal(torch.rand(4), first)


def test_every_part_of_a_key_counts() -> None:
    base = (42, "noise", 3, 17)
    others = [(43, "noise", 3, 17), (42, "time", 3, 17), (42, "noise", 4, 17), (42, "noise", 3, 18)]
    others += [(42, "noise", 3), (42, "noise", 3, 17, 0), ("noise", 42, 3, 17), (42, "noise", 17, 3)]
    seeds = {keyed_seed(*key) for key in [base, *others]}
    assert len(seeds) == 1 + len(others)


def test_a_number_and_its_text_are_different_keys() -> None:
    assert keyed_seed(1) != keyed_seed("1")
    assert keyed_seed("a", 1) != keyed_seed("a", "1")


def test_parts_do_not_run_into_each_other() -> None:
    keys = [(1, 23), (12, 3), (123,), ("a", "b"), ("ab",), ("a,b",), ("",), ("", ""), ()]
    assert len({keyed_seed(*key) for key in keys}) == len(keys)


def test_seeds_fit_into_63_bits_and_use_them() -> None:
    seeds = [keyed_seed("spread", index) for index in range(2000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len(set(seeds)) == len(seeds)
    for bit in range(63):
        share = statistics.fmean(seed >> bit & 1 for seed in seeds)
        # Five standard deviations of 2000 fair coins are 0.056.
        assert abs(share - 0.5) < 0.056, bit


def test_neighbouring_keys_give_independent_normal_numbers() -> None:
    rows = torch.stack([normal((256,), 42, "noise", 0, index) for index in range(200)])
    # Standard errors: mean 1/226, deviation 1/320, correlation of two rows 1/16; five of each.
    assert abs(rows.mean().item()) < 5 / 226
    assert abs(rows.std().item() - 1) < 5 / 320
    correlation = torch.corrcoef(rows).fill_diagonal_(0)
    assert correlation.abs().max().item() < 5 / 16


def test_uniform_numbers_lie_in_the_unit_interval_and_fill_it() -> None:
    draws = [uniform("uniform", index) for index in range(2000)]
    assert all(0 <= draw < 1 for draw in draws)
    # Standard error of the mean: 0.289 / sqrt(2000) = 0.0065; five of it.
    assert abs(statistics.fmean(draws) - 0.5) < 0.033
    assert min(draws) < 0.01
    assert max(draws) > 0.99
