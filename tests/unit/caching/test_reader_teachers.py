"""Datasets with different teachers in one run: which files are demanded, whose features come, and how often."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from musubi_tuner.caching.file_format import cache_path, latents_key
from musubi_tuner.caching.reader import CachedDataset
from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.data.item import Item
from musubi_tuner.data.plan import MicroBatch, plan_epoch
from musubi_tuner.data.sources import scan
from musubi_tuner.errors import CacheError
from musubi_tuner.flow import linear_lookup

RUN = """
schema_version = 1
[run]
name = "t"
output_dir = "out"
[model]
arch = "tf"
init = "scratch"
vae_path = "vae"
clip_path = "clip"
t5_path = "t5"
[experts]
unet = "unet"
expert_input = "random"
time_buckets = 4
[scheduler]
warmup_steps = 0
[train]
max_steps = 10
[general]
resolution = 64
batch_size = 4
"""
DATASETS = ("", "experts = false", "experts = {time_buckets = 2}", "experts = {enable_sol = false}\nnum_repeats = 3")
"""What each of the four datasets says; every one is of a single picture named after its number."""
KINDS = ["latents", "experts"]


@pytest.fixture
def config(tmp_path: Path, picture: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(tmp_path)
    text = RUN
    for name in ("vae", "clip", "t5", "unet"):
        (tmp_path / name).mkdir()
    for number, lines in enumerate(DATASETS):
        picture(tmp_path / f"images{number}" / f"p{number}.png", (64, 64))
        text += f'[[datasets]]\nimage_directory = "images{number}"\ncache_directory = "cache{number}"\n{lines}\n'
    (tmp_path / "run.toml").write_text(text)
    return load_config(tmp_path / "run.toml")


@pytest.fixture
def items(config: RunConfig) -> list[Item]:
    return scan(config.datasets, "tf").items


def tables(length: int, seed: int) -> dict[str, Tensor]:
    """Features of both teachers at random ascending times."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "t_buckets_float32": torch.rand(length, generator=generator).sort().values,
        "lune_features_float32": torch.randn(length, 6, generator=generator),
        "sol_stats_float32": torch.randn(length, 3, generator=generator),
        "sol_spatial_float32": torch.rand(length, 4, 4, generator=generator),
    }


def write(item: Item, kind: str, tensors: dict[str, Tensor]) -> Path:
    path = cache_path(item, kind, "tf")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def write_all(items: list[Item]) -> None:
    """Latents of all, and features of all but those of the dataset that has none."""
    for item in items:
        latents = torch.full((16, 8, 8), float(item.dataset))
        write(item, "latents", {latents_key(latents.shape, "float32"): latents})
        if item.dataset != 1:
            write(item, "experts", tables({0: 4, 2: 2, 3: 4}[item.dataset], item.dataset))


def test_batch_says_which_dataset_every_row_is_from(config: RunConfig, items: list[Item]) -> None:
    write_all(items)
    found = CachedDataset(config, items, KINDS)[MicroBatch((3, 0, 2, 0), (5, 6, 7, 8))]
    assert found.dataset_ids.dtype == torch.int64
    assert found.dataset_ids.tolist() == [3, 0, 2, 0] == found.tensors["latents"][:, 0, 0, 0].tolist()
    assert found.to(torch.device("meta")).dataset_ids.device.type == "meta"


def test_every_row_has_the_teachers_of_its_dataset(config: RunConfig, items: list[Item]) -> None:
    write_all(items)
    found = CachedDataset(config, items, KINDS)[MicroBatch((0, 1, 2, 3), (0, 1, 2, 3))]
    assert {name: valid.tolist() for name, valid in found.valid.items() if name != "latents"} == {
        "lune_features": [True, False, True, True],
        "sol_spatial": [True, False, True, False],
        "sol_stats": [True, False, True, False],
        "t_buckets": [True, False, True, True],
    }


@pytest.mark.parametrize("rows", [(0, 1, 2, 3), (1,), (1, 2), (3, 1)])
def test_teachers_that_a_dataset_lacks_are_zeros_that_count_if_asked(
    config: RunConfig, items: list[Item], rows: tuple[int, ...]
) -> None:
    """As published: fed and learned like features."""
    write_all(items)
    planned = MicroBatch(rows, rows)
    plain = CachedDataset(config, items, KINDS)[planned]
    objective = config.objective.model_copy(update={"missing_teacher": "zeros"})
    found = CachedDataset(config.model_copy(update={"objective": objective}), items, KINDS)[planned]
    for name, width in (("lune_features", (6,)), ("sol_stats", (3,)), ("sol_spatial", (4, 4))):
        assert found.valid[name].all()
        looked_up = linear_lookup(found.tensors[name], found.tensors["t_buckets"], torch.full((len(rows),), 0.4))
        assert looked_up.shape == (len(rows), *width)
        for row in range(len(rows)):
            if name in plain.valid and plain.valid[name][row]:
                times, table = plain.tensors["t_buckets"][row : row + 1], plain.tensors[name][row : row + 1]
                assert torch.equal(looked_up[row], linear_lookup(table, times, torch.tensor([0.4]))[0])
            else:
                assert not looked_up[row].any()


def test_tables_of_different_lengths_come_in_one_batch_each_with_its_own_times(
    config: RunConfig, items: list[Item]
) -> None:
    write_all(items)
    found = CachedDataset(config, items, KINDS)[MicroBatch((2, 0, 1), (0, 1, 2))].tensors
    assert found["t_buckets"].shape == (3, 4)
    for t in (0.0, 0.2, 0.5, 0.8, 1.0):
        features = linear_lookup(found["lune_features"], found["t_buckets"], torch.full((3,), t))
        for row, (number, length) in enumerate(((2, 2), (0, 4))):
            own = tables(length, number)
            values, times = own["lune_features_float32"][None], own["t_buckets_float32"]
            assert torch.equal(features[row], linear_lookup(values, times, torch.tensor([t]))[0])
        assert features[2].tolist() == [0.0] * 6  # finite, and marked as not valid


def test_tables_of_one_teacher_are_as_long_as_the_times_of_the_batch(config: RunConfig, items: list[Item]) -> None:
    write_all(items)
    found = CachedDataset(config, items, KINDS)[MicroBatch((2, 3), (0, 1))].tensors  # the longer file has no Sol
    assert {name: tensor.shape[:2] for name, tensor in found.items() if name != "latents"} == dict.fromkeys(
        ("lune_features", "sol_spatial", "sol_stats", "t_buckets"), (2, 4)
    )
    assert found["t_buckets"][0, 2:].tolist() == [float("inf")] * 2


def test_files_of_teachers_are_demanded_only_where_a_dataset_has_some(config: RunConfig, items: list[Item]) -> None:
    write_all(items)
    assert [sorted(files) for files in CachedDataset(config, items, KINDS).files] == [
        ["experts", "latents"], ["latents"], ["experts", "latents"], ["experts", "latents"],
    ]  # fmt: skip
    cache_path(items[2], "experts", "tf").unlink()
    with pytest.raises(CacheError) as caught:
        CachedDataset(config, items, KINDS)
    assert str(caught.value).splitlines()[1:] == ["  p2: no experts cache (p2_tf_experts.safetensors)"]


def test_files_made_before_the_teachers_were_turned_off_are_not_used(config: RunConfig, items: list[Item]) -> None:
    write_all(items)
    write(items[1], "experts", tables(4, 1))
    found = CachedDataset(config, items, KINDS)[MicroBatch((1, 3), (0, 1))]
    assert sorted(found.tensors) == ["latents", "lune_features", "t_buckets"]  # dataset 3 has a file with Sol, too
    assert found.valid["lune_features"].tolist() == [False, True]


def test_tables_must_fit_the_times_of_their_file(config: RunConfig, items: list[Item]) -> None:
    write_all(items)
    write(items[0], "experts", tables(4, 0) | {"sol_stats_float32": torch.zeros(5, 3)})
    without = tables(2, 2)
    del without["t_buckets_float32"], without["sol_stats_float32"], without["sol_spatial_float32"]
    write(items[2], "experts", without)
    with pytest.raises(CacheError) as caught:
        CachedDataset(config, items, KINDS)
    assert str(caught.value).splitlines() == [
        "features of teachers do not fit their times; run the experts job again",
        "  p0: sol_stats is [5, 3], t_buckets is [4]",
        "  p2: lune_features is [2, 6], t_buckets is missing",
    ]


def test_features_of_different_widths_still_cannot_share_a_batch(config: RunConfig, items: list[Item]) -> None:
    write_all(items)
    write(items[2], "experts", tables(2, 2) | {"lune_features_float32": torch.zeros(2, 7)})
    with pytest.raises(CacheError, match=r"p2: its lune_features is \[4, 7\], others of its batch have \[4, 6\]"):
        CachedDataset(config, items, KINDS)[MicroBatch((0, 2), (0, 1))]


def test_shapes_are_listed_for_every_dataset(config: RunConfig, items: list[Item]) -> None:
    write_all(items)
    write(items[2], "experts", tables(2, 2) | {"lune_features_float32": torch.zeros(2, 7)})
    found = CachedDataset(config, items, KINDS).shapes()
    assert [(number, shapes.get("lune_features")) for number, shapes in found] == [
        (0, (4, 6)), (1, None), (2, (2, 7)), (3, (4, 6)),
    ]  # fmt: skip


def test_repeats_weigh_the_datasets_of_an_epoch(config: RunConfig, items: list[Item]) -> None:
    write_all(items)
    dataset = CachedDataset(config, items, KINDS)
    for epoch in range(3):
        batches = [dataset.read(planned, epoch) for planned in plan_epoch(dataset.plan_items(), 0, epoch)]
        ids = torch.cat([batch.dataset_ids for batch in batches])
        assert Counter(ids.tolist()) == {0: 1, 1: 1, 2: 1, 3: 3}
