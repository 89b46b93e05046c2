"""Cache files as micro-batches: every dtype, memory of its own, and what is said about files that do not fit."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from musubi_tuner.caching.file_format import cache_path, latents_key, mask_key
from musubi_tuner.caching.reader import CachedDataset, read_tensor
from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.data.batch import PlannedBatches
from musubi_tuner.data.item import Item
from musubi_tuner.data.masks import Mask
from musubi_tuner.data.plan import MicroBatch
from musubi_tuner.data.sources import scan
from musubi_tuner.errors import CacheError
from musubi_tuner.headers import DTYPES, read_header
from musubi_tuner.randomness import uniform

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
enable_lune = false
enable_sol = false
[scheduler]
warmup_steps = 0
[train]
max_steps = 10
[general]
resolution = 64
enable_bucket = true
[[datasets]]
image_directory = "images"
cache_directory = "cache"
batch_size = 3
"""


@pytest.fixture
def config(tmp_path: Path, picture: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run over four pictures, the last of another shape; its encoders are never opened."""
    monkeypatch.chdir(tmp_path)
    for name in ("vae", "clip", "t5"):
        (tmp_path / name).mkdir()
    for name, size in (("a", (64, 64)), ("b", (64, 64)), ("c", (64, 64)), ("d", (128, 64))):
        picture(tmp_path / "images" / f"{name}.png", size)
    (tmp_path / "run.toml").write_text(RUN)
    return load_config(tmp_path / "run.toml")


@pytest.fixture
def items(config: RunConfig) -> list[Item]:
    return scan(config.datasets, "tf").items


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(item: Item, kind: str, tensors: dict[str, Tensor]) -> Path:
    path = cache_path(item, kind, "tf")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def write_latents(items: Sequence[Item], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    latents = {}
    for index, item in enumerate(items):
        width, height = item.bucket
        latents[item.id] = numbers(16, height // 8, width // 8, seed=index).to(dtype)
        write(item, "latents", {latents_key(latents[item.id].shape, str(dtype)[6:]): latents[item.id]})
    return latents


def batch(*indices: int) -> MicroBatch:
    return MicroBatch(indices, tuple(range(10, 10 + len(indices))))


def test_latents_come_stacked_as_float32_with_ids_and_presentations(config: RunConfig, items: list[Item]) -> None:
    latents = write_latents(items, torch.bfloat16)
    found = CachedDataset(config, items, ["latents"])[batch(2, 0)]
    assert found.tensors["latents"].dtype == torch.float32
    assert torch.equal(found.tensors["latents"], torch.stack([latents["c"], latents["a"]]).float())
    assert found.items == ["c", "a"]
    assert found.presentations == (10, 11)
    assert set(found.tensors) == set(found.valid) == {"latents"}


def test_one_item_may_come_several_times_in_a_batch(config: RunConfig, items: list[Item]) -> None:
    latents = write_latents(items)
    found = CachedDataset(config, items, ["latents"])[batch(0, 0, 1)]
    assert torch.equal(found.tensors["latents"], torch.stack([latents[name] for name in "aab"]))


def values_of(dtype: torch.dtype) -> Tensor:
    """All kinds of values of a dtype: negative, fractions, extremes."""
    if dtype == torch.bool:
        return torch.tensor([[True, False, True], [False, False, True]])
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return torch.tensor([[info.min, info.max, 0], [1, 7, 100]], dtype=dtype)
    return torch.tensor([[-1.5, 0.1, 0.0], [448.0, -0.001, 3.0]]).to(dtype)


@pytest.mark.parametrize("name", DTYPES.values())
def test_every_dtype_comes_back_bit_for_bit(config: RunConfig, items: list[Item], name: str) -> None:
    write_latents(items)
    stored = values_of(getattr(torch, name))
    for item in items:
        write(item, "text", {f"thing_{name}": stored})
    found = CachedDataset(config, items, ["latents", "text"])[batch(1)].tensors["thing"]
    assert found.dtype == stored.dtype
    assert torch.equal(found[0].view(torch.uint8), stored.view(torch.uint8))


def test_scalars_and_empty_tensors_come_back(config: RunConfig, items: list[Item]) -> None:
    write_latents(items)
    for item in items:
        write(item, "text", {"scalar_float32": torch.tensor(2.5), "empty_int64": torch.zeros(0, 3, dtype=torch.int64)})
    found = CachedDataset(config, items, ["latents", "text"])[batch(0, 1)].tensors
    assert torch.equal(found["scalar"], torch.tensor([2.5, 2.5]))
    assert found["empty"].shape == (2, 0, 3)


def test_names_are_plain_and_masks_keep_theirs(config: RunConfig, items: list[Item]) -> None:
    write_latents(items)
    for item in items:
        write(
            item,
            "text",
            {
                "t5_vec_bfloat16": numbers(4, 8).bfloat16(),
                "t5_mask": torch.tensor([1, 1, 0, 0]),
                "clip_l_pooler_bfloat16": numbers(6).bfloat16(),
            },
        )
    found = CachedDataset(config, items, ["latents", "text"])[batch(0, 1)]
    assert {name: tuple(tensor.shape) for name, tensor in found.tensors.items()} == {
        "latents": (2, 16, 8, 8),
        "t5_vec": (2, 4, 8),
        "t5_mask": (2, 4),
        "clip_l_pooler": (2, 6),
    }
    assert all(valid.tolist() == [True, True] for valid in found.valid.values())


def test_tensors_own_their_memory(config: RunConfig, items: list[Item]) -> None:
    """A file that is rewritten in place afterwards must not reach into a batch that was read before."""
    latents = write_latents(items)
    found = CachedDataset(config, items, ["latents"])[batch(0)]
    path = cache_path(items[0], "latents", "tf")
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(found.tensors["latents"][0], latents["a"])


def test_batches_do_not_share_memory(config: RunConfig, items: list[Item]) -> None:
    latents = write_latents(items)
    dataset = CachedDataset(config, items, ["latents"])
    dataset[batch(0)].tensors["latents"].zero_()
    assert torch.equal(dataset[batch(0)].tensors["latents"][0], latents["a"])


def test_an_item_without_a_teacher_tensor_gets_a_zero_row_that_is_marked(config: RunConfig, items: list[Item]) -> None:
    write_latents(items)
    features = numbers(10, 32)
    for item, keys in zip(items, (("lune_features", "sol_stats"), ("sol_stats",), ("lune_features",), ())):
        stored = {"lune_features_float32": features, "sol_stats_float32": features[:, :3]}
        write(
            item,
            "experts",
            {"t_buckets_float32": torch.arange(10.0)}
            | {name: tensor for name, tensor in stored.items() if name.removesuffix("_float32") in keys},
        )
    both = config.experts.model_copy(update={"enable_lune": True, "enable_sol": True})
    dataset = CachedDataset(config.model_copy(update={"experts": both}), items, ["latents", "experts"])
    found = dataset[batch(0, 1, 2)]
    assert {name: valid.tolist() for name, valid in found.valid.items() if name != "latents"} == {
        "lune_features": [True, False, True],
        "sol_stats": [True, True, False],
        "t_buckets": [True, True, True],
    }
    assert torch.equal(found.tensors["lune_features"][0], features)
    assert torch.equal(found.tensors["lune_features"][1], torch.zeros(10, 32))


def test_latents_of_another_size_are_listed(config: RunConfig, items: list[Item]) -> None:
    write_latents(items)
    write(items[1], "latents", {"latents_1x4x8_float32": numbers(16, 4, 8)})
    write(items[3], "latents", {"latents_1x6x10_float32": numbers(4, 6, 10)})
    with pytest.raises(CacheError) as caught:
        CachedDataset(config, items, ["latents"])
    assert str(caught.value).split("\n  ") == [
        "latents were cached with other settings; run the latents job again",
        "b: latents [16, 4, 8], this run needs [16, 8, 8]",
        "d: latents [4, 6, 10], this run needs [16, 6, 10]",
    ]


def test_a_long_list_of_wrong_latents_is_cut(
    config: RunConfig, items: list[Item], picture: Callable[..., Path]
) -> None:
    for index in range(12):
        picture(Path("images") / f"n{index:02d}.png")
    items = scan(config.datasets, "tf").items
    for item in items:
        write(item, "latents", {"latents_1x1x1_float32": numbers(16, 1, 1)})
    with pytest.raises(CacheError) as caught:
        CachedDataset(config, items, ["latents"])
    lines = str(caught.value).split("\n  ")
    assert len(lines) == 12
    assert lines[-1] == "... and 6 more"


def test_a_latents_file_without_latents_is_named(config: RunConfig, items: list[Item]) -> None:
    write_latents(items)
    path = write(items[2], "latents", {"other_float32": numbers(3)})
    with pytest.raises(CacheError, match=rf"{path.name}|c: "):
        CachedDataset(config, items, ["latents"])


def test_text_of_different_lengths_is_a_cache_error_and_not_a_failure_to_stack(
    config: RunConfig, items: list[Item]
) -> None:
    """Text files of two token limits can only meet where files are accepted by name alone."""
    write_latents(items)
    for item in items:
        write(item, "text", {"t5_vec_float32": numbers(5 if item.id == "b" else 4, 8)})
    with pytest.raises(CacheError, match=r"b_tf_te|b: "):
        CachedDataset(config, items, ["latents", "text"])[batch(0, 1)]


def test_missing_and_broken_files_are_listed_with_their_job(config: RunConfig, items: list[Item]) -> None:
    write_latents(items)
    for item in items[1:]:
        write(item, "text", {"t5_mask": torch.ones(4)})
    cache_path(items[3], "latents", "tf").unlink()
    cut = cache_path(items[2], "text", "tf")
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(CacheError) as caught:
        CachedDataset(config, items, ["latents", "text"])
    head, *lines = str(caught.value).split("\n  ")
    assert head == "caches are not complete; run the cache jobs first"
    assert lines[0] == "a: no text cache (a_tf_te.safetensors)"
    assert lines[1].startswith(f"{cut}: has ")
    assert lines[1].endswith("delete it and run the cache job again")
    assert lines[2] == "d: no latents cache (d_0128x0064_tf.safetensors)"
    assert len(lines) == 3


def test_a_file_that_vanishes_or_shrinks_while_training_is_named(config: RunConfig, items: list[Item]) -> None:
    write_latents(items)
    dataset = CachedDataset(config, items, ["latents"])
    first, second = (cache_path(item, "latents", "tf") for item in items[:2])
    first.unlink()
    with pytest.raises(CacheError, match=rf"{first.name}: changed or removed while training \(.*No such file"):
        dataset[batch(0)]
    os.truncate(second, 200)
    with pytest.raises(CacheError, match=rf"{second.name}: was overwritten after its header was read"):
        dataset[batch(1)]


def test_another_file_in_place_of_a_cache_file_is_not_read_while_training(config: RunConfig, items: list[Item]) -> None:
    """Same layout, size and time: the name alone would say that it is the same."""
    write_latents(items)
    path = cache_path(items[0], "latents", "tf")
    dataset = CachedDataset(config, items, ["latents"])
    before, tensors = path.stat(), load_file(path)
    copy = path.with_suffix(".copy")
    save_file(tensors, copy, metadata={"fingerprint": "{}"})
    assert dataset[batch(0)].tensors["latents"].shape == (1, 16, 8, 8)
    path.touch()
    assert dataset[batch(0)].tensors["latents"].shape == (1, 16, 8, 8)
    copy.replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CacheError, match="was overwritten after its header was read"):
        dataset[batch(0)]


def test_reading_one_tensor_by_its_entry(tmp_path: Path) -> None:
    tensors = {"a": numbers(3, 5), "b": torch.arange(4)}
    save_file(tensors, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    with (tmp_path / "x.safetensors").open("rb") as file:
        for name, tensor in tensors.items():
            assert torch.equal(read_tensor(file, header.tensors[name]), tensor)


def test_the_plan_sees_bucket_repeats_and_batch_size(config: RunConfig, items: list[Item]) -> None:
    write_latents(items)
    found = CachedDataset(config, items, ["latents"]).plan_items()
    assert [(item.id, item.bucket, item.num_repeats, item.micro_batch) for item in found] == [
        ("0:a", (64, 64), 1, 3),
        ("0:b", (64, 64), 1, 3),
        ("0:c", (64, 64), 1, 3),
        ("0:d", (80, 48), 1, 3),
    ]


def test_planned_batches_are_read_by_position(config: RunConfig, items: list[Item]) -> None:
    write_latents(items)
    planned = PlannedBatches(CachedDataset(config, items, ["latents"]), [batch(1, 2), batch(3)], 0)
    assert len(planned) == 2
    assert [planned[index].items for index in range(2)] == [["b", "c"], ["d"]]


def test_loader_workers_read_the_same_batches(config: RunConfig, items: list[Item]) -> None:
    from torch.utils.data import DataLoader

    latents = write_latents(items)
    planned = PlannedBatches(CachedDataset(config, items, ["latents"]), [batch(0, 1), batch(3), batch(2)], 0)
    loader = DataLoader(planned, batch_size=None, num_workers=2)
    found = list(loader)
    assert [entry.items for entry in found] == [["a", "b"], ["d"], ["c"]]
    assert torch.equal(found[0].tensors["latents"], torch.stack([latents["a"], latents["b"]]))


# Masks


def with_mask(item: Item) -> Item:
    return replace(item, mask=Mask("product"))


def masked_run(config: RunConfig, masked_loss: bool = True) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"masked_loss": masked_loss})})


def test_a_mixed_batch_marks_who_has_a_mask(config: RunConfig, items: list[Item]) -> None:
    latents = write_latents(items)
    mask = numbers(8, 8).sigmoid()
    write(items[0], "latents", {"latents_1x8x8_float32": latents["a"], mask_key((8, 8)): mask})
    found = CachedDataset(masked_run(config), [with_mask(items[0]), *items[1:]], ["latents"])[batch(0, 1)]
    assert torch.equal(found.tensors["mask_weights"], torch.stack([mask, torch.zeros(8, 8)]))
    assert found.valid["mask_weights"].tolist() == [True, False]


def test_latents_cached_with_other_masks_are_refused_where_masks_count(config: RunConfig, items: list[Item]) -> None:
    latents = write_latents(items)
    path = write(items[1], "latents", {"latents_1x8x8_float32": latents["b"], mask_key((8, 8)): torch.ones(8, 8)})
    own = [with_mask(items[0]), *items[1:]]
    with pytest.raises(CacheError) as caught:
        CachedDataset(masked_run(config), own, ["latents"])
    name = cache_path(items[0], "latents", "tf").name
    assert str(caught.value).splitlines()[1:] == [f"  a: {name} holds no mask", f"  b: {path.name} holds another mask"]
    CachedDataset(masked_run(config, False), own, ["latents"])


# Several captions


def test_the_draw_of_a_caption_is_keyed_by_epoch_and_presentation(config: RunConfig, items: list[Item]) -> None:
    write_latents(items)
    for item in items:
        write(item, "text", {"t5_vec_float32": torch.zeros(2), "t5_vec_v1_float32": torch.ones(2)})
    own = [replace(item, more_captions=("another",)) for item in items]
    dataset = CachedDataset(config, own, ["latents", "text"])
    planned = [MicroBatch((0,), (number,)) for number in range(200)]

    def drawn(epoch: int) -> list[int]:
        source = PlannedBatches(dataset, planned, epoch)
        return [int(source[number].tensors["t5_vec"][0, 0]) for number in range(200)]

    expected = [int(2 * uniform(config.run.seed, "caption", 3, number)) for number in range(200)]
    assert drawn(3) == expected
    assert drawn(4) != expected
    assert 70 < sum(expected) < 130


def test_shapes_are_those_of_one_caption(config: RunConfig, items: list[Item]) -> None:
    write_latents(items)
    for item in items:
        write(item, "text", {"t5_vec_float32": torch.zeros(2), "t5_vec_v1_float32": torch.ones(2)})
    own = [replace(item, more_captions=("another",)) for item in items]
    assert CachedDataset(config, own, ["latents", "text"]).shapes() == [
        (0, {"latents": (16, 6, 10), "t5_vec": (2,)}),
        (0, {"latents": (16, 8, 8), "t5_vec": (2,)}),
    ]


def test_files_of_other_captions_are_refused(config: RunConfig, items: list[Item]) -> None:
    write_latents(items)
    for item in items:
        write(item, "text", {"t5_vec_float32": torch.zeros(2)})
    own = [replace(items[0], more_captions=("another",)), *items[1:]]
    with pytest.raises(CacheError) as caught:
        CachedDataset(config, own, ["latents", "text"])
    name = cache_path(items[0], "text", "tf").name
    assert str(caught.value).splitlines()[1:] == [f"  a: {name} is of 1 captions, the data has 2"]
