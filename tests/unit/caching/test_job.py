"""The frame of a cache job: its fixed batches, what it writes and leaves alone, and how it fails. Real jobs are run."""

import errno
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from musubi_tuner.caching.experts import teacher_grid, time_buckets
from musubi_tuner.caching.file_format import KINDS, cache_path, caption_name, plain_name, split_caption
from musubi_tuner.caching.job import Encoded, Job, JobOptions, make_batches, parse_shard, run_job, storage_dtype, store
from musubi_tuner.caching.reader import CachedDataset
from musubi_tuner.data.buckets import place
from musubi_tuner.data.item import Item
from musubi_tuner.data.pixels import read_pixels
from musubi_tuner.data.plan import MicroBatch, caption_of
from musubi_tuner.errors import CacheError, ConfigError, DataError
from musubi_tuner.files import folder_lock
from musubi_tuner.headers import read_header

pytestmark = pytest.mark.long

Summary = Callable[[], list[str]]


def item(name: str, bucket: tuple[int, int] = (64, 64)) -> Item:
    return Item(name, f"0:{name}", Path(f"{name}.png"), "", Path("cache"), bucket, place(bucket, bucket), 1, 1)


class TestBatches:
    def test_items_are_sorted_and_cut(self) -> None:
        batches = make_batches([item(name) for name in "dbeca"], 2, by_bucket=True)
        assert [[entry.id for entry in batch] for batch in batches] == [["a", "b"], ["c", "d"], ["e"]]

    def test_buckets_are_kept_apart_only_where_shapes_matter(self) -> None:
        items = [item("a", (64, 64)), item("b", (128, 32)), item("c", (64, 64)), item("d", (128, 32))]
        assert [[e.id for e in batch] for batch in make_batches(items, 4, by_bucket=True)] == [["b", "d"], ["a", "c"]]
        assert [[e.id for e in batch] for batch in make_batches(items, 3, by_bucket=False)] == [["a", "b", "c"], ["d"]]

    @given(st.lists(st.tuples(st.text("abcdef", min_size=1, max_size=4), st.sampled_from([(64, 64), (32, 128)])),
                    unique_by=lambda pair: pair[0], max_size=25), st.integers(1, 7), st.booleans(), st.randoms())  # fmt: skip
    @settings(deadline=None)
    def test_the_partition_is_complete_and_does_not_depend_on_the_order(
        self, names: list[tuple[str, tuple[int, int]]], size: int, by_bucket: bool, rng: Any
    ) -> None:
        items = [item(*name) for name in names]
        batches = make_batches(items, size, by_bucket)
        assert sorted(entry.id for batch in batches for entry in batch) == sorted(name for name, _ in names)
        assert all(1 <= len(batch) <= size for batch in batches)
        if by_bucket:
            assert all(len({entry.bucket for entry in batch}) == 1 for batch in batches)
        rng.shuffle(items)
        assert make_batches(items, size, by_bucket) == batches


class TestShards:
    @pytest.mark.parametrize(
        ("text", "shard"), [("1/1", (1, 1)), ("2/4", (2, 4)), ("4/4", (4, 4)), ("10/12", (10, 12))]
    )
    def test_i_of_n(self, text: str, shard: tuple[int, int]) -> None:
        assert parse_shard(text) == shard

    @pytest.mark.parametrize("text", ["", "1", "/", "0/2", "3/2", "-1/2", "1/2/3", "a/b", "1.0/2", " 1/2", "²/3"])
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_shard(text)
        assert str(caught.value) == f"--shard is {text!r}, expected i/n with 1 <= i <= n, such as 2/4"

    def test_shards_together_write_what_one_job_writes(self, project: Any, summary: Summary) -> None:
        project.tables["cache"] = {"latents_batch_size": 2, "text_batch_size": 2}
        for name in "abcdefg":
            project.picture(name, caption=f"a red {name}")
        assert project.run("latents") == project.run("text") == 0
        whole = project.files()
        for path in (project.root / "cache").glob("*.safetensors"):
            path.unlink()
        summary()
        done = []
        for index in (1, 2, 3):
            for kind in ("latents", "text"):
                assert project.run(kind, shard=(index, 3)) == 0
            done.append(summary()[-1])
        assert project.files() == whole
        # Seven items make four batches; the first shard has the first and the last of them.
        assert [re.findall(r"encoded (\d+)", line)[0] for line in done] == ["3", "2", "2"]


class TestWriting:
    def test_every_kind_writes_its_tensors(self, project: Any, summary: Summary) -> None:
        project.picture("a", (128, 64))
        for kind in KINDS:
            assert project.run(kind) == 0
            assert summary()[-1] == f"{kind}: encoded 1, up to date 0, failed 0"
        (entry,) = project.items()
        shapes = {
            kind: {
                key: (tuple(tensor.shape), tensor.dtype)
                for key, tensor in load_file(cache_path(entry, kind, "tf")).items()
            }
            for kind in KINDS
        }
        assert shapes == {
            "latents": {"latents_1x6x10_float32": ((16, 6, 10), torch.float32)},
            "text": {
                "t5_vec_bfloat16": ((8, 16), torch.bfloat16),
                "t5_mask": ((8,), torch.int64),
                "clip_l_pooler_bfloat16": ((16,), torch.bfloat16),
            },
            "experts": {
                "t_buckets_float32": ((3,), torch.float32),
                "lune_features_float32": ((3, 16), torch.float32),
                "sol_stats_float32": ((3, 3), torch.float32),
                "sol_spatial_float32": ((3, 8, 8), torch.float32),
            },
        }
        buckets = load_file(cache_path(entry, "experts", "tf"))["t_buckets_float32"]
        assert torch.allclose(buckets, torch.tensor([1 / 6, 1 / 2, 5 / 6]))

    def test_cached_latents_equal_the_autoencoders(self, project: Any, encoders: Path) -> None:
        from musubi_tuner.encoders.autoencoder import load_autoencoder

        project.picture("a", (100, 70))
        assert project.run("latents") == 0
        (entry,) = project.items()
        vae = load_autoencoder(encoders / "vae", channels=16)
        expected = vae.encode(read_pixels(entry)[None], None, use_shift=False)[0]
        (found,) = load_file(cache_path(entry, "latents", "tf")).values()
        assert torch.equal(found, expected)

    def test_a_second_run_writes_nothing(self, project: Any, summary: Summary) -> None:
        for name in "abc":
            project.picture(name)
        for kind in KINDS:
            assert project.run(kind) == 0
        times = {path: path.stat().st_mtime_ns for path in (project.root / "cache").glob("*.safetensors")}
        summary()
        for kind in KINDS:
            assert project.run(kind) == 0
        assert summary() == [f"{kind}: encoded 0, up to date 3, failed 0" for kind in KINDS]
        assert {path: path.stat().st_mtime_ns for path in times} == times

    def test_only_due_items_of_a_batch_are_written(self, project: Any, summary: Summary) -> None:
        project.tables["cache"] = {"latents_batch_size": 4}
        for name in "abcd":
            project.picture(name)
        assert project.run("latents") == 0
        before = project.files()
        path = project.root / "cache" / "b_0064x0064_tf.safetensors"
        others = {other: other.stat().st_mtime_ns for other in path.parent.glob("*.safetensors") if other != path}
        path.unlink()
        summary()
        assert project.run("latents") == 0
        assert summary()[-1] == "latents: encoded 1, up to date 3, failed 0"
        assert {other: other.stat().st_mtime_ns for other in others} == others
        assert project.files() == before

    def test_a_batch_with_one_due_item_is_computed_whole(self, project: Any) -> None:
        for name in "abcde":
            project.picture(name)
        seen: list[list[str]] = []

        def encode(items: list[Item], inputs: list[Any]) -> list[Encoded]:
            seen.append([entry.id for entry in items])
            return [{"latents_1x8x8_float32": torch.zeros(16, 8, 8)} for _ in items]

        job, config = Job("latents", 2, True, lambda: encode), project.config()
        assert run_job(config, job, JobOptions(), {}) == 0
        assert seen == [["a", "b"], ["c", "d"], ["e"]]
        seen.clear()
        (project.root / "cache" / "d_0064x0064_tf.safetensors").unlink()
        assert run_job(config, job, JobOptions(), {}) == 0
        assert seen == [["c", "d"]]

    def test_a_file_has_the_same_content_whatever_existed_before(self, project: Any) -> None:
        """Encoders may differ in the last bits between batch sizes, so a batch is computed whole for one due item."""
        project.tables["cache"] = {"experts_batch_size": 3, "text_batch_size": 3}
        for name in "abcde":
            project.picture(name, caption=f"a red {name}")
        for kind in ("text", "experts"):
            assert project.run(kind) == 0
        whole = project.files()
        for names in ("a", "ce", "bd"):
            for name in names:
                for path in (project.root / "cache").glob(f"{name}_tf_*.safetensors"):
                    path.unlink()
            for kind in ("text", "experts"):
                assert project.run(kind) == 0
            assert project.files() == whole

    def test_a_new_item_leaves_the_noise_of_the_others_alone(self, project: Any) -> None:
        for name in "bc":
            project.picture(name)
        assert project.run("experts") == 0
        before = project.files()
        project.picture("a")
        assert project.run("experts", project.config(cache={"run": "always"})) == 0
        after = project.files()
        # Fingerprints hold no batch, and each item is a batch of its own here.
        assert {name: after[name] for name in before} == before

    def test_dry_run_says_what_is_due_and_touches_nothing(self, project: Any, summary: Summary) -> None:
        for name in "abc":
            project.picture(name)
        assert project.run("text", dry_run=True) == 0
        assert summary() == ["text: would encode 3, up to date 0", "  3 x missing"]
        assert not (project.root / "cache").exists()
        assert project.run("text") == 0
        (project.root / "images" / "b.txt").write_text("other")
        summary()
        assert project.run("text", dry_run=True) == 0
        assert summary() == [
            "text: would encode 1, up to date 2",
            "  1 x caption was 'a red circle', now 'other'",
        ]

    def test_notes_about_captions_are_printed(self, project: Any, summary: Summary) -> None:
        project.tables["datasets"][0]["missing_caption"] = "empty"
        project.picture("a").with_suffix(".txt").unlink()
        assert project.run("text") == 0
        assert summary()[0].startswith("note: datasets[0]: 1 of 1 images in images have no .txt file (a.png)")

    def test_captions_that_are_cut_are_named_before_they_are_encoded(self, project: Any, summary: Summary) -> None:
        project.picture("a", caption="red " * 20)
        project.picture("b", caption="red")
        assert project.run("text") == 0
        t5, clip, encoders, *_ = summary()
        assert t5.startswith("note: T5 takes 8 tokens; 1 of 2 captions have more and are cut (a: 21)")
        assert clip.startswith("note: CLIP takes 10 tokens; 1 of 2 captions have more and are cut (a: 22)")
        assert encoders.startswith("text: T5 and CLIP in ")
        project.picture("c", caption="blue " * 8)
        assert project.run("text") == 0
        assert [line for line in summary() if line.startswith("note")] == [
            "note: T5 takes 8 tokens; 1 of 1 captions have more and are cut (c: 9); shorten them, or raise model.t5_max_tokens"
        ], "only of what is due, and of CLIP nothing: it takes 10 tokens, and c has 10"

    def test_several_datasets_are_cached_into_their_own_folders(self, project: Any, summary: Summary) -> None:
        project.picture("a")
        (project.root / "images").rename(project.root / "more")
        (project.root / "images").mkdir()
        project.picture("a", (128, 64), caption="a blue square")
        project.tables["datasets"].append({"image_directory": "more", "resolution": 128})
        config = project.config()
        for kind in KINDS:
            assert project.run(kind, config) == 0
        assert summary()[-1] == "experts: encoded 2, up to date 0, failed 0"
        assert sorted(path.name for path in (project.root / "more").glob("*.safetensors")) == [
            "a_0064x0064_tf.safetensors",
            "a_tf_experts.safetensors",
            "a_tf_te.safetensors",
        ]
        dataset = CachedDataset(config, project.items(config), list(KINDS))
        shapes = [tuple(dataset[MicroBatch((index,), (0,))].tensors["latents"].shape) for index in (0, 1)]
        assert shapes == [(1, 16, 6, 10), (1, 16, 16, 16)]


class TestOrphans:
    def test_files_of_no_item_are_counted_and_kept(self, project: Any, summary: Summary) -> None:
        for name in "ab":
            project.picture(name)
        assert project.run("text") == project.run("latents") == 0
        for suffix in (".png", ".txt"):
            (project.root / "images" / f"b{suffix}").unlink()
        before = project.files()
        summary()
        assert project.run("text") == 0
        assert summary()[-1] == (
            "text: encoded 0, up to date 1, failed 0, 1 files belong to no item "
            "(python -m musubi_tuner.caching gc removes them)"
        )
        assert project.files() == before

    def test_gc_removes_them_after_asking(self, project: Any, summary: Summary, capsys: Any) -> None:
        from musubi_tuner.caching.__main__ import main

        for name in "ab":
            project.picture(name)
        assert project.run("text") == project.run("latents") == 0
        foreign = project.root / "cache" / "mine.safetensors"
        save_file({"x": torch.ones(1)}, foreign)
        for suffix in (".png", ".txt"):
            (project.root / "images" / f"b{suffix}").unlink()
        capsys.readouterr()
        assert main(["gc", "run.toml"]) == 2
        assert capsys.readouterr().err == "error: 2 files would be removed; run again with --yes\n"
        assert main(["gc", "run.toml", "--yes"]) == 0
        assert summary() == [
            str(project.root / "cache" / "b_0064x0064_tf.safetensors"),
            str(project.root / "cache" / "b_tf_te.safetensors"),
            "removed 2 files",
        ]
        assert set(project.files()) == {"a_0064x0064_tf.safetensors", "a_tf_te.safetensors", "mine.safetensors"}
        assert main(["gc", "run.toml", "--yes"]) == 0
        assert summary() == ["every cache file belongs to an item; nothing to remove"]

    def test_files_in_mirrored_sub_folders_are_found_when_their_images_are_gone(
        self, project: Any, summary: Summary
    ) -> None:
        project.tables["datasets"][0]["recursive"] = True
        project.picture("a")
        gone = project.picture("sub/b")
        assert project.run("text") == 0
        for suffix in (".png", ".txt"):
            gone.with_suffix(suffix).unlink()
        summary()
        assert project.run("text") == 0
        assert "1 files belong to no item" in summary()[-1]

    def test_leftovers_of_a_killed_job_are_removed(self, project: Any) -> None:
        project.picture("a")
        (project.root / "cache").mkdir()
        leftover = project.root / "cache" / ".tmp-123-456-a_tf_te.safetensors"
        leftover.write_bytes(b"half")
        assert project.run("text") == 0
        assert not leftover.exists()


class TestFailures:
    def test_a_broken_image_is_reported_and_the_others_are_written(
        self, project: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        project.tables["cache"] = {"latents_batch_size": 3}
        for name in "abc":
            project.picture(name)
        path = project.picture("broken")
        photo = path.with_suffix(".jpg")
        with Image.open(path) as image:
            image.save(photo)
        path.unlink()
        photo.write_bytes(photo.read_bytes()[:-600])
        assert project.run("latents") == 1
        out, err = capsys.readouterr()
        assert out.splitlines()[-1] == "latents: encoded 3, up to date 0, failed 1"
        assert re.search(
            r"^failed: images/broken\.jpg: broken image \(.*truncated.*\); replace or remove it$", err, re.M
        )
        assert len(project.files()) == 3

    def test_more_than_ten_failures_are_counted(self, project: Any, capsys: pytest.CaptureFixture[str]) -> None:
        for index in range(12):
            project.picture(f"p{index:02d}")

        def fail(entry: Item) -> None:
            raise DataError(f"{entry.path}: no")

        config = project.config()
        job = Job("latents", 1, True, lambda: lambda items, inputs: [], fail)
        assert run_job(config, job, JobOptions(), {}) == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "failed: images/p00.png: no"
        assert [line for line in lines if line.startswith("...")] == ["... and 2 more"]
        assert sum(line.startswith("failed:") for line in lines) == 10

    @pytest.mark.parametrize("workers", [0, 3])
    def test_reading_ahead_keeps_the_order(self, project: Any, workers: int) -> None:
        names = [f"p{index}" for index in range(8)]
        for name in names:
            project.picture(name)
        seen: list[str] = []

        def read(entry: Item) -> str:
            time.sleep(0.02 if entry.stem in ("p0", "p3") else 0)
            return entry.stem

        def encode(items: list[Item], inputs: list[Any]) -> list[Encoded]:
            assert [entry.stem for entry in items] == inputs
            seen.extend(inputs)
            return [{"x_float32": torch.zeros(1)} for _ in items]

        config = project.config(cache={"workers": workers})
        assert run_job(config, Job("latents", 3, True, lambda: encode, read), JobOptions(), {}) == 0
        assert seen == names

    def test_the_encoders_are_not_opened_when_nothing_is_due(self, project: Any) -> None:
        project.picture("a")
        assert project.run("latents") == 0

        def never(status: Any) -> Any:
            raise AssertionError("the encoder was opened")

        config = project.config()
        assert run_job(config, Job("latents", 1, True, never), JobOptions(), {}) == 0

    @pytest.mark.parametrize("kind", list(KINDS))
    def test_a_batch_that_does_not_fit_into_memory_names_the_key(self, project: Any, kind: str) -> None:
        project.picture("a")

        def encode(items: list[Item], inputs: list[Any]) -> list[Encoded]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        options = {"expert_input": "latents", "expert_time": "index"}
        with pytest.raises(CacheError) as caught:
            run_job(project.config(), Job(kind, 1, True, lambda: encode), JobOptions(), options)
        assert str(caught.value).startswith(
            f"the device's memory is full (2.00 GiB more were wanted); lower cache.{kind}_batch_size"
        )

    def test_another_writer_is_refused_by_name(self, project: Any) -> None:
        project.picture("a")
        (project.root / "cache").mkdir()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        holder = context.Process(target=hold, args=("cache", ".lock_text_1of1", theirs))
        holder.start()
        try:
            assert ours.recv() == "locked"
            with pytest.raises(CacheError) as caught:
                project.run("text")
            for part in (f"process {holder.pid} on {platform.node()}", "--shard i/n"):
                assert part in str(caught.value)
            # Another kind, and another shard, have locks of their own.
            assert project.run("latents") == 0
            assert project.run("text", shard=(1, 2)) == 0
        finally:
            ours.send("done")
            holder.join(30)
        assert project.run("text") == 0

    def test_complete_caches_on_a_read_only_disk_are_fine_and_others_are_named(
        self, project: Any, summary: Summary, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        project.picture("a")
        assert project.run("latents") == 0

        def read_only(path: Any, *rest: Any) -> int:
            if ".lock" in str(path):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return opened(path, *rest)

        opened = os.open
        monkeypatch.setattr(os, "open", read_only)
        assert project.run("latents") == 0
        assert summary()[-1].startswith("latents: encoded 0, up to date 1")
        project.picture("b")
        with pytest.raises(
            CacheError, match=r"^cache: cannot be written to, and latents files are to be made there \(missing\)"
        ):
            project.run("latents")


def hold(folder: str, name: str, pipe: Connection) -> None:
    with folder_lock(Path(folder), RuntimeError, name):
        pipe.send("locked")
        pipe.recv()


class TestValues:
    def test_storage_precision(self, project: Any) -> None:
        assert storage_dtype(project.config(), "bfloat16") == torch.bfloat16
        assert storage_dtype(project.config(cache={"dtype": "float16"}), "bfloat16") == torch.float16

    def test_what_overflows_is_refused_with_its_size(self) -> None:
        values = torch.tensor([1.0, -70000.0])
        with pytest.raises(CacheError) as caught:
            store(values, torch.float16)
        for part in ("7e+04", "torch.float16", 'cache.dtype = "float32"'):
            assert part in str(caught.value)
        assert torch.equal(store(values, torch.bfloat16), values.bfloat16())
        assert torch.equal(store(torch.tensor([65504.0]), torch.float16), torch.tensor([65504.0], dtype=torch.float16))

    def test_values_that_were_not_finite_before_are_left_to_the_policy(self) -> None:
        assert store(torch.tensor([float("nan"), 1e9]), torch.float16).isnan()[0]

    @pytest.fixture
    def job(self) -> Job:
        """Encodes item a into values that are not finite, and everything else into ones."""

        def encode(items: list[Item], inputs: list[Any]) -> list[Encoded]:
            bad = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])
            return [
                {"x_float32": bad if entry.stem == "a" else torch.ones(4), "n_int64": torch.arange(2)}
                for entry in items
            ]

        return Job("latents", 2, True, lambda: encode)

    def test_an_item_that_is_not_finite_fails_and_the_others_are_written(
        self, project: Any, job: Job, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in "ab":
            project.picture(name)
        assert run_job(project.config(), job, JobOptions(), {}) == 1
        out, err = capsys.readouterr()
        assert out == "latents: encoded 1, up to date 0, failed 1\n"
        assert (
            "failed: images/a.png: x_float32 is not finite; a wider precision for the encoder or cache.dtype may help\n"
        ) in err
        assert set(project.files()) == {"b_0064x0064_tf.safetensors"}

    def test_zero_replaces_what_is_not_finite_and_warns(
        self, project: Any, job: Job, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in "ab":
            project.picture(name)
        assert run_job(project.config(cache={"nan_policy": "zero"}), job, JobOptions(), {}) == 0
        assert (
            "warning: images/a.png: values that are not finite in x_float32 were set to 0\n" in capsys.readouterr().err
        )
        found = load_file(project.root / "cache" / "a_0064x0064_tf.safetensors")
        assert found["x_float32"].tolist() == [1, 0, 0, 0]
        assert torch.equal(load_file(project.root / "cache" / "b_0064x0064_tf.safetensors")["x_float32"], torch.ones(4))


class TestTeacherInputs:
    @pytest.mark.parametrize(
        ("bucket", "resolution", "grid"),
        [((512, 512), 512, (64, 64)), ((1024, 1024), 512, (64, 64)), ((704, 368), 512, (48, 88)), ((368, 704), 512, (88, 48)),
         ((2048, 512), 512, (32, 128)), ((64, 64), 64, (8, 8)), ((128, 32), 64, (8, 16))],
    )  # fmt: skip
    def test_the_aspect_is_kept_at_about_the_resolution_in_steps_of_64_pixels(
        self, bucket: tuple[int, int], resolution: int, grid: tuple[int, int]
    ) -> None:
        assert teacher_grid(item("a", bucket), resolution, keep_aspect=True) == grid
        assert teacher_grid(item("a", bucket), resolution, keep_aspect=False) == (resolution // 8, resolution // 8)

    def test_times_are_the_centres_of_equal_slices(self) -> None:
        assert torch.allclose(time_buckets(10), torch.arange(0.05, 1, 0.1), atol=1e-6)
        assert time_buckets(1).tolist() == [0.5]

    def test_pictures_become_numbers_from_minus_one_to_one(self, project: Any) -> None:
        path = project.picture("a")
        pixels = np.zeros((64, 64, 3), dtype=np.uint8)
        pixels[..., 0], pixels[:32, :, 1] = 255, 128
        Image.fromarray(pixels).save(path)
        (entry,) = project.items()
        found = read_pixels(entry)
        assert found.shape == (3, 64, 64)
        assert found.dtype == torch.float32
        assert (found[0].min(), found[2].max()) == (1, -1)
        assert found[1, 0, 0].item() == pytest.approx(128 / 127.5 - 1, abs=1e-6)  # float32 near one

    def test_features_depend_on_caption_image_and_time(self, project: Any) -> None:
        project.picture("a", caption="a red circle")
        assert project.run("experts") == 0
        path = project.root / "cache" / "a_tf_experts.safetensors"
        first = load_file(path)["lune_features_float32"]
        assert (first[0] - first[2]).abs().max() > 1e-3
        (project.root / "images" / "a.txt").write_text("a blue square")
        assert project.run("experts") == 0
        second = load_file(path)["lune_features_float32"]
        assert (first - second).abs().max() > 1e-4
        (project.root / "images" / "a.png").write_bytes(project.picture("z").read_bytes())
        assert project.run("experts") == 0
        assert (second - load_file(path)["lune_features_float32"]).abs().max() > 1e-4

    def test_noise_belongs_to_the_item_and_not_to_its_place(self, project: Any) -> None:
        project.tables["experts"]["expert_input"] = "random"  # so that nothing else tells the items apart
        for name in "ab":
            project.picture(name)

        def features(**cache: Any) -> list[torch.Tensor]:
            assert project.run("experts", project.config(cache=cache)) == 0
            files = [project.root / "cache" / f"{name}_tf_experts.safetensors" for name in "ab"]
            return [load_file(path)["lune_features_float32"] for path in files]

        first, second = features(experts_batch_size=2)
        assert (first - second).abs().max() > 1e-3
        for found, expected in zip(features(run="always"), (first, second), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # another batch sums in another order

    def test_switched_off_teachers_leave_no_tensors(self, project: Any) -> None:
        project.picture("a")
        path = project.root / "cache" / "a_tf_experts.safetensors"
        for off, names in (
            ("enable_lune", {"t_buckets_float32", "sol_stats_float32", "sol_spatial_float32"}),
            ("enable_sol", {"t_buckets_float32", "lune_features_float32"}),
        ):
            assert project.run("experts", project.config(experts={off: False})) == 0
            assert set(load_file(path)) == names

    def test_a_unet_for_another_text_width_is_named(self, project: Any, tmp_path: Path) -> None:
        from diffusers import UNet2DConditionModel

        config = UNet2DConditionModel.load_config(project.tables["experts"]["unet"])
        UNet2DConditionModel.from_config(config, cross_attention_dim=24).save_pretrained(tmp_path / "unet")
        project.picture("a")
        with pytest.raises(
            CacheError.__mro__[1], match=r"experts\.unet: expects text of width 24, but model\.clip_path"
        ):
            project.run("experts", project.config(experts={"unet": str(tmp_path / "unet")}))


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_killed_job_leaves_complete_files_only_and_is_continued(project: Any, summary: Summary) -> None:
    for name in "abcd":
        project.picture(name)
    config = project.config()
    assert project.run("latents", config) == 0
    whole = project.files()
    for path in (project.root / "cache").glob("*.safetensors"):
        path.unlink()
    command = [sys.executable, "-m", "musubi_tuner.caching", "latents", "run.toml"]
    result = subprocess.run(
        command, env=os.environ | {"MUSUBI_FAULT": "file.written:3"}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == -9, result.stderr
    assert set(project.files()) == set(list(whole)[:2])
    assert len(list((project.root / "cache").glob(".tmp-*"))) == 1
    summary()
    assert project.run("latents", config) == 0
    assert summary()[-1] == "latents: encoded 2, up to date 2, failed 0"
    assert project.files() == whole
    assert list((project.root / "cache").glob(".tmp-*")) == []


class TestMasks:
    def test_masks_lie_beside_the_latents_at_their_size(self, project: Any) -> None:
        project.picture("a", (100, 70))
        project.picture("b")
        rows = np.zeros((70, 100), dtype=np.uint8)
        rows[:35] = 255
        (project.root / "masks").mkdir()
        Image.fromarray(rows).save(project.root / "masks" / "a.png")
        project.tables["datasets"][0]["mask_directory"] = "masks"
        assert project.run("latents") == 0
        first, second = project.items()
        tensors = load_file(cache_path(first, "latents", "tf"))
        assert set(tensors) == {"latents_1x6x10_float32", "mask_weights_1x6x10_float32"}
        mask = tensors["mask_weights_1x6x10_float32"]
        assert mask.dtype == torch.float32
        assert mask[:3].eq(1).all()
        assert mask[3:].eq(0).all()
        assert set(load_file(cache_path(second, "latents", "tf"))) == {"latents_1x8x8_float32"}

    def test_masks_stay_float32_where_latents_are_halved(self, project: Any) -> None:
        project.picture("a")
        project.tables["datasets"][0]["mask_source"] = "product"
        project.tables["cache"]["dtype"] = "bfloat16"
        assert project.run("latents") == 0
        (entry,) = project.items()
        dtypes = {key: tensor.dtype for key, tensor in load_file(cache_path(entry, "latents", "tf")).items()}
        assert dtypes == {"latents_1x8x8_bfloat16": torch.bfloat16, "mask_weights_1x8x8_float32": torch.float32}

    def test_a_broken_mask_is_named_and_the_others_go_on(
        self, project: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in "ab":
            project.picture(name)
        (project.root / "masks").mkdir()
        path = project.root / "masks" / "a.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:2000])
        project.tables["datasets"][0]["mask_directory"] = "masks"
        assert project.run("latents") == 1
        assert "masks/a.png: broken image" in capsys.readouterr().err
        assert [cache_path(item, "latents", "tf").exists() for item in project.items()] == [False, True]


class TestLists:
    """A JSONL file whose pictures lie in several folders: `test_roots` has the rules, here they act on jobs."""

    def write(self, project: Any, names: list[str]) -> None:
        rows = [{"image_path": f"images/{name}.png", "caption": "a red circle"} for name in names]
        (project.root / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        project.tables["datasets"] = [{"image_jsonl_file": "list.jsonl", "cache_directory": "cache"}]

    def test_a_picture_of_another_folder_is_all_that_is_made(
        self, project: Any, summary: Callable[[], list[str]]
    ) -> None:
        for name in ("a/p", "a/q", "b/p"):
            project.picture(name)
        self.write(project, ["a/p", "a/q"])
        assert project.run("latents") == 0
        before = project.files()
        assert list(before) == ["p_0064x0064_tf.safetensors", "q_0064x0064_tf.safetensors"]
        self.write(project, ["b/p", "a/q", "a/p"])
        summary()
        assert project.run("latents") == 0
        assert summary()[-1] == "latents: encoded 1, up to date 2, failed 0"
        after = project.files()
        assert len(after) == 3
        assert before.items() <= after.items()

    def test_the_root_is_written_with_the_first_files_and_not_before(self, project: Any) -> None:
        project.picture("a/p")
        self.write(project, ["a/p"])
        root = project.root / "cache" / "cache.json"
        assert project.run("text", dry_run=True) == 0
        assert not root.exists()
        assert project.run("text") == 0
        assert json.loads(root.read_text())["roots"] == [str(project.root / "images" / "a")]


class TestSeveralCaptions:
    @pytest.fixture
    def several(self, project: Any) -> Any:
        """Pictures a and b of one bucket, from a listing, with three captions and with one."""
        texts = {"a": ["a red circle", "a blue square", "a green triangle"], "b": ["a blue circle"]}
        rows = []
        for name, captions in texts.items():
            project.picture(name)
            columns = {f"text{number}": caption for number, caption in enumerate(captions)}
            rows.append(json.dumps({"image_path": f"images/{name}.png", **columns}))
        (project.root / "list.jsonl").write_text("\n".join(rows))
        project.tables["datasets"] = [
            {
                "image_jsonl_file": "list.jsonl",
                "cache_directory": "cache",
                "caption_columns": ["text0", "text1", "text2"],
            }
        ]
        return project

    @pytest.mark.parametrize("kind", ["text", "experts"])
    def test_each_caption_has_the_tensors_of_a_file_of_its_own(self, several: Any, kind: str) -> None:
        several.tables["cache"] |= {"experts_batch_size": 2, "text_batch_size": 1}
        several.tables["experts"]["expert_input"] = "random"
        assert several.run(kind) == 0
        first, second = several.items()
        together = load_file(cache_path(first, kind, "tf"))
        names = [plain_name(key) for key in together]
        plain = {
            "text": ["t5_vec", "t5_mask", "clip_l_pooler"],
            "experts": ["lune_features", "sol_stats", "sol_spatial"],
        }
        assert sorted(name for name in names if name != "t_buckets") == sorted(
            caption_name(name, number) for name in plain[kind] for number in range(3)
        )
        header = read_header(cache_path(first, kind, "tf"))
        assert [header.metadata[f"caption{number}"] for number in (1, 2, 3)] == list(first.captions)
        alone = read_header(cache_path(second, kind, "tf"))
        assert {split_caption(plain_name(key))[1] for key in alone.tensors} == {0}
        assert "caption2" not in alone.metadata
        # Texts are encoded one by one here, so each equals the file of an image with that caption alone.
        several.tables["cache"]["experts_batch_size"] = 1
        for number, caption in enumerate(first.captions):
            several.tables["datasets"][0] |= {"caption_columns": [f"text{number}"], "missing_caption": "skip"}
            several.tables["datasets"][0]["cache_directory"] = f"cache{number}"
            assert several.run(kind) == 0
            entry = several.items()[0]
            assert entry.captions == (caption,)
            single = {plain_name(key): value for key, value in load_file(cache_path(entry, kind, "tf")).items()}
            for name in plain[kind]:
                found = together[next(key for key in together if plain_name(key) == caption_name(name, number))]
                if kind == "text" or number == 0:
                    assert torch.allclose(found.float(), single[name].float(), atol=1e-5)
                else:  # the teachers' noise is the caption's own
                    assert found.shape == single[name].shape
                    assert not torch.allclose(found, single[name], atol=1e-5)

    def test_teachers_read_each_caption(self, several: Any) -> None:
        several.tables["experts"]["expert_input"] = "random"
        found = []
        for columns in (["text0", "text1"], ["text0", "text2"]):
            several.tables["datasets"][0]["caption_columns"] = columns
            assert several.run("experts") == 0
            found.append(load_file(cache_path(several.items()[0], "experts", "tf")))
        assert torch.equal(*(tensors["lune_features_float32"] for tensors in found))
        assert not torch.allclose(*(tensors["lune_features_v1_float32"] for tensors in found), atol=1e-5)

    def test_text_and_teachers_of_a_presentation_are_of_one_caption(self, several: Any) -> None:
        for kind in KINDS:
            assert several.run(kind) == 0
        items = several.items()
        dataset = CachedDataset(several.config(), items, list(KINDS))
        text, experts = (load_file(cache_path(items[0], kind, "tf")) for kind in ("text", "experts"))
        taken = set()
        for presentation in range(30):
            found = dataset[MicroBatch((0, 1), (presentation, presentation))]
            assert set(found.tensors) == {
                "latents", "t5_vec", "t5_mask", "clip_l_pooler", "lune_features", "sol_stats", "sol_spatial", "t_buckets",
            }  # fmt: skip
            number = caption_of(len(dataset.items[0].captions), dataset.seed, 0, presentation)
            pairs = {
                "t5_vec": text[caption_name("t5_vec", number) + "_bfloat16"],
                "t5_mask": text[caption_name("t5_mask", number)],
                "lune_features": experts[caption_name("lune_features", number) + "_float32"],
                "sol_spatial": experts[caption_name("sol_spatial", number) + "_float32"],
            }
            assert all(torch.equal(found.tensors[name][0], expected) for name, expected in pairs.items())
            taken.add(number)
        assert taken == {0, 1, 2}

    def test_other_captions_make_text_and_experts_stale(self, several: Any, summary: Summary) -> None:
        for kind in KINDS:
            assert several.run(kind) == 0
        several.tables["datasets"][0]["caption_columns"] = ["text0", "text2"]
        summary()
        for kind in KINDS:
            assert several.run(kind, dry_run=True) == 0
        assert summary() == [
            "latents: would encode 0, up to date 2",
            "text: would encode 1, up to date 1",
            "  1 x the list of captions was ['a red circle', 'a blue square', 'a green triangle'], now "
            "['a red circle', 'a green triangle']",
            "experts: would encode 1, up to date 1",
            "  1 x the list of captions was ['a red circle', 'a blue square', 'a green triangle'], now "
            "['a red circle', 'a green triangle']",
        ]
        several.tables["datasets"][0]["caption_columns"] = ["text0"]
        assert several.run("text", dry_run=True) == 0
        assert summary()[0] == "text: would encode 1, up to date 1"
