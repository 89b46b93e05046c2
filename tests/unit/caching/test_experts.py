"""The teachers' cache job: what each U-Net is fed, how often, in which order, and what is left when it is killed."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from musubi_tuner.caching import experts, job
from musubi_tuner.caching.experts import ExpertsJob
from musubi_tuner.caching.file_format import cache_path
from musubi_tuner.caching.job import half_path
from musubi_tuner.data.buckets import place, squash
from musubi_tuner.data.pixels import read_pixels
from musubi_tuner.encoders import teachers, text
from musubi_tuner.encoders.autoencoder import load_autoencoder
from musubi_tuner.encoders.teachers import SplitTeacher, Teacher, geometric_sol, load_teacher
from musubi_tuner.errors import CacheError, CheckpointError, ConfigError
from musubi_tuner.headers import read_header
from musubi_tuner.randomness import normal

pytestmark = pytest.mark.long

TIMES = 3
"""Time buckets of these projects: 1/6, 1/2 and 5/6."""
ROUNDING = 1e-5
"""Float32 features of order one, computed in batches of another size."""


@pytest.fixture(scope="module")
def overlays(tmp_path_factory: pytest.TempPathFactory, encoders: Path) -> dict[str, str]:
    """Weights of two teachers: the U-Net's, each moved in its own way."""
    root = tmp_path_factory.mktemp("overlays")
    base = load_file(encoders / "unet" / "diffusion_pytorch_model.safetensors")
    for seed, name in enumerate(("lune", "sol")):
        generator = torch.Generator().manual_seed(seed)
        moved = {key: t + 0.1 * torch.randn(t.shape, generator=generator) for key, t in base.items()}
        save_file(moved, root / f"{name}.safetensors")
    return {name: str(root / f"{name}.safetensors") for name in ("lune", "sol")}


@pytest.fixture
def two(project: Any, overlays: dict[str, str]) -> Any:
    """A project whose teachers have weights of their own, two items per batch."""
    project.tables["experts"] |= overlays
    project.tables["cache"] = {"experts_batch_size": 2}
    return project


@dataclass
class Forward:
    """One call of a U-Net: whose, and what it was fed."""

    name: str
    pictures: Tensor
    timesteps: Tensor
    text: Tensor
    others_alive: int


@dataclass
class Watch:
    """What the networks of the job were asked for.

    Attributes:
        fits: pictures that fit into memory together; more raise what CUDA raises. kept: what a failed forward pass held.
    """

    loaded: list[str] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    fits: int | None = None
    kept: list[weakref.ref[Tensor]] = field(default_factory=list)
    alive: "weakref.WeakSet[Any]" = field(default_factory=weakref.WeakSet)

    def rows(self, name: str) -> list[int]:
        """Pictures in each forward pass of a teacher."""
        return [len(call.pictures) for call in self.forwards if call.name == name]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()

    def load(*arguments: Any, name: str, **options: Any) -> Teacher:
        assert not watch.alive, f"{name} is loaded while another U-Net is in memory"
        teacher = load_teacher(*arguments, name=name, **options)
        watch.loaded.append(name)
        watch.alive.add(teacher.unet)

        def before(unet: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            pictures, timesteps = arguments
            assert not [kept for kept in watch.kept if kept() is not None], "a failed forward pass is still in memory"
            watch.forwards.append(
                Forward(name, pictures, timesteps, options["encoder_hidden_states"], len(watch.alive) - 1)
            )
            assert options.get("encoder_attention_mask") is None  # padding takes part

        def middle(module: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
            if watch.fits is not None and len(output) > watch.fits:
                watch.kept.append(weakref.ref(output))
                raise torch.OutOfMemoryError("CUDA out of memory")

        teacher.unet.register_forward_pre_hook(before, with_kwargs=True)
        teacher.unet.mid_block.register_forward_hook(middle)  # type: ignore[union-attr]
        return teacher

    begin, encode = ExpertsJob.__init__, text.TextEncoder.encode

    def start(self: ExpertsJob, *arguments: Any) -> None:
        watch.alive.clear()  # What an earlier job of this test left to the collector: it would have been another process.
        begin(self, *arguments)

    def count(self: Any, texts: Any) -> Any:
        watch.texts.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(ExpertsJob, "__init__", start)
    monkeypatch.setattr(experts, "load_teacher", load)
    monkeypatch.setattr(text.TextEncoder, "encode", count)
    return watch


class Killed(BaseException):
    """Stands for the end of the process; nothing in the job catches it."""


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """End the next job after so many batches, counted over both halves."""

    def arm(batches: int) -> None:
        left = batches

        def point(name: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                monkeypatch.setattr(job, "fault_point", lambda name: None)
                raise Killed

        monkeypatch.setattr(job, "fault_point", point)

    return arm


def five(project: Any) -> None:
    """Five items: three batches of one bucket."""
    for number, name in enumerate("abcde"):
        project.picture(name, caption=f"a red {'circle' if number % 2 else 'square'}")


def halves(project: Any) -> list[str]:
    """Items whose first half waits for the second."""
    return sorted(path.name[1 : -len("_tf_experts.safetensors.half")] for path in project.root.rglob(".*.half"))


def features(project: Any, name: str = "a") -> dict[str, Tensor]:
    return load_file(project.root / "cache" / f"{name}_tf_experts.safetensors")


class TestWhatATeacherSees:
    @pytest.mark.parametrize("expert_time", ["reference", "aligned"])
    @pytest.mark.parametrize("expert_input", ["random", "noised_image"])
    def test_pictures_and_times(
        self, two: Any, watch: Watch, encoders: Path, expert_input: str, expert_time: str
    ) -> None:
        for name in "ab":
            two.picture(name)
        two.tables["experts"] |= {"expert_input": expert_input, "expert_time": expert_time}
        assert two.run("experts") == 0
        vae = load_autoencoder(encoders / "expert_vae", channels=4, key="experts.vae")
        pictures, times = [], []
        for item in two.items():
            # At 64 px the teacher sees the picture as the bucket has it.
            image = vae.encode(read_pixels(item)[None], None, use_shift=False)[0]
            for bucket, t in enumerate((1 / 6, 1 / 2, 5 / 6)):
                noise = normal((4, 8, 8), 7, "teacher", item.id, 0, bucket)
                pictures.append(noise if expert_input == "random" else (1 - t) * noise + t * image)
                times.append({"reference": 1000 * t, "aligned": 1000 * (1 - t)}[expert_time])
        assert [call.name for call in watch.forwards] == ["lune", "sol"]
        for call in watch.forwards:
            assert torch.allclose(call.pictures, torch.stack(pictures), atol=1e-6)
            assert torch.allclose(call.timesteps, torch.tensor(times), atol=1e-3)

    def test_a_checkpoint_that_was_taught_with_images_asks_for_the_autoencoder(self, two: Any, watch: Watch) -> None:
        two.picture("a")
        two.tables["experts"]["expert_input"] = "random"
        del two.tables["experts"]["vae"]
        config = two.config()
        with pytest.raises(ConfigError, match=r"^experts\.vae: is needed, because the checkpoint was trained with"):
            ExpertsJob(config, {"expert_input": "noised_image", "expert_time": "aligned"})
        assert watch.loaded == []

    @pytest.mark.parametrize("resize", ["crop", "squash"])
    def test_a_picture_is_cut_or_squashed_as_for_the_model(
        self, two: Any, watch: Watch, encoders: Path, resize: str
    ) -> None:
        two.picture("a", (192, 64))
        two.tables["general"] |= {"resolution": 64, "enable_bucket": False, "resize": resize}
        two.tables["experts"]["expert_input"] = "noised_image"
        assert two.run("experts") == 0
        vae = load_autoencoder(encoders / "expert_vae", channels=4, key="experts.vae")
        (item,) = two.items()
        assert item.squashed == (resize == "squash")
        noise = normal((4, 8, 8), 7, "teacher", item.id, 0, 0)
        seen = {}
        for name, own in (("crop", place), ("squash", squash)):
            image = read_pixels(replace(item, placement=own(item.size, item.bucket)))
            seen[name] = 5 / 6 * noise + 1 / 6 * vae.encode(image[None], None, use_shift=False)[0]
        assert (seen["crop"] - seen["squash"]).abs().max().item() > 0.01
        assert torch.allclose(watch.forwards[0].pictures[0], seen[resize], atol=1e-6)

    def test_random_noise_is_the_same_for_any_image(self, two: Any, watch: Watch) -> None:
        two.tables["experts"]["expert_input"] = "random"
        two.picture("a")
        assert two.run("experts") == 0
        shutil.copyfile(two.picture("other"), two.root / "images" / "a.png")
        for suffix in (".png", ".txt"):
            (two.root / "images" / f"other{suffix}").unlink()
        two.tables["cache"]["run"] = "always"
        assert two.run("experts") == 0
        first, _, second, _ = watch.forwards
        assert torch.equal(first.pictures, second.pictures)
        assert abs(first.pictures.mean().item()) < 0.15
        assert abs(first.pictures.std().item() - 1) < 0.1

    def test_both_teachers_see_the_same_and_each_has_its_own_weights(
        self, two: Any, watch: Watch, encoders: Path, overlays: dict[str, str]
    ) -> None:
        two.picture("a", caption="a blue square")
        assert two.run("experts") == 0
        lune, sol = watch.forwards
        assert torch.equal(lune.pictures, sol.pictures)
        assert torch.equal(lune.text, sol.text)
        found = features(two)
        for name, call in (("lune", lune), ("sol", sol)):
            teacher = load_teacher(
                encoders / "unet", Path(overlays[name]), name=name, dtype=torch.float32, device="cpu"
            )
            expected = teacher.features(call.pictures, call.timesteps, call.text, lune=True, sol=True)
            for key in ("lune_features",) if name == "lune" else ("sol_stats", "sol_spatial"):
                assert (found[f"{key}_float32"] - expected[key]).abs().max().item() <= ROUNDING


class TestForwards:
    def test_all_times_of_a_batch_go_through_together(self, two: Any, watch: Watch) -> None:
        five(two)
        assert two.run("experts") == 0
        assert watch.rows("lune") == watch.rows("sol") == [2 * TIMES, 2 * TIMES, TIMES]

    def test_teachers_of_the_same_weights_share_their_forward_passes(self, project: Any, watch: Watch) -> None:
        five(project)
        assert project.run("experts") == 0
        assert watch.loaded == ["lune"]
        assert watch.rows("lune") == [TIMES] * 5
        assert halves(project) == []

    @pytest.mark.parametrize(("times", "rows"), [(1, [2, 2, 2]), (2, [4, 2]), (3, [6]), (9, [6])])
    def test_fewer_times_may_go_through_together(self, two: Any, watch: Watch, times: int, rows: list[int]) -> None:
        for name in "ab":
            two.picture(name)
        assert two.run("experts") == 0
        expected = features(two)
        watch.forwards.clear()
        two.tables["cache"]["run"] = "always"
        two.tables["experts"]["times_per_forward"] = times
        assert two.run("experts") == 0
        assert watch.rows("lune") == watch.rows("sol") == rows
        for key, tensor in features(two).items():
            assert (tensor - expected[key]).abs().max().item() <= ROUNDING

    def test_the_split_is_no_reason_to_make_files_again(self, two: Any, watch: Watch) -> None:
        two.picture("a")
        assert two.run("experts") == 0
        two.tables["experts"]["times_per_forward"] = 1
        assert two.run("experts") == 0
        assert len(watch.forwards) == 2

    def test_clip_reads_each_caption_once(self, two: Any, watch: Watch) -> None:
        texts = {"a": ["a red circle", "a blue square"], "b": ["a blue circle"]}
        rows = []
        for name, captions in texts.items():
            two.picture(name)
            columns = {f"text{number}": caption for number, caption in enumerate(captions)}
            rows.append(json.dumps({"image_path": f"images/{name}.png", **columns}))
        (two.root / "list.jsonl").write_text("\n".join(rows))
        two.tables["datasets"] = [
            {"image_jsonl_file": "list.jsonl", "cache_directory": "cache", "caption_columns": ["text0", "text1"]}
        ]
        assert two.run("experts") == 0
        assert sorted(watch.texts) == sorted(text for captions in texts.values() for text in captions)
        assert watch.rows("lune") == watch.rows("sol") == [2 * TIMES, TIMES]
        for lune, sol in zip(watch.forwards[:2], watch.forwards[2:], strict=True):
            assert torch.equal(lune.text, sol.text)
            assert torch.equal(lune.pictures, sol.pictures)

    def test_lune_alone_reduces_no_attention(self, two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def walk(*arguments: Any) -> Any:
            raise AssertionError("attention was reduced")

        two.picture("a")
        monkeypatch.setattr(teachers.StreamingAttention, "_walk", walk)
        two.tables["experts"]["enable_sol"] = False
        assert two.run("experts") == 0
        with pytest.raises(AssertionError, match="attention was reduced"):
            two.run("experts", two.config(experts={"enable_sol": True}))


class TestMemory:
    def test_one_unet_at_a_time(self, two: Any, watch: Watch) -> None:
        """`watch` refuses to load a U-Net while one is alive. The job itself frees it, not a lucky garbage collection."""
        five(two)
        gc.disable()
        try:
            assert two.run("experts") == 0
        finally:
            gc.enable()
        assert watch.loaded == ["lune", "sol"]
        assert [call.name for call in watch.forwards] == ["lune"] * 3 + ["sol"] * 3
        assert {call.others_alive for call in watch.forwards} == {0}

    def test_the_batch_is_halved_until_it_fits_and_stays_so(
        self, two: Any, watch: Watch, caplog: pytest.LogCaptureFixture
    ) -> None:
        five(two)
        assert two.run("experts") == 0
        expected = two.files()
        watch.forwards.clear()
        two.tables["cache"]["run"] = "always"
        watch.fits = 2
        assert two.run("experts") == 0
        # 6 and then 3 are too many; what fits is kept for the next batches. The second teacher finds out for itself.
        assert watch.rows("lune") == watch.rows("sol") == [6, 3] + [1] * 15
        assert [record.getMessage() for record in caplog.records] == [
            f"{name}: {tried} pictures do not fit into the device's memory together; continuing with {rest} per forward pass"
            for name in ("lune", "sol")
            for tried, rest in ((6, 3), (3, 1))
        ]
        assert len(watch.kept) == 4
        found = two.files()
        assert found.keys() == expected.keys()
        for name in "abcde":
            again, before = features(two, name), expected[f"{name}_tf_experts.safetensors"][1]
            assert again.keys() == before.keys()
            for key, tensor in again.items():
                dtype, shape, raw = before[key]
                value = torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype)).view(shape)
                assert (tensor - value).abs().max().item() <= ROUNDING, key

    def test_what_was_done_before_memory_ran_out_is_kept(self, encoders: Path) -> None:
        teacher = load_teacher(encoders / "unet", None, name="lune", dtype=torch.float32, device="cpu")
        calls = []

        def middle(module: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
            calls.append(len(output))
            if len(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

        teacher.unet.mid_block.register_forward_hook(middle)  # type: ignore[union-attr]
        split = SplitTeacher(teacher, "lune")
        split.most = 4
        given = {
            "latents": torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
            "timestep_B": torch.linspace(50, 950, 10),
            "text": torch.randn(10, 6, 16, generator=torch.Generator().manual_seed(1)),
        }
        found = split.features(**given, lune=True, sol=True, together=None)
        assert calls == [4, 4, 2, 2, 2]
        expected = teacher.features(**given, lune=True, sol=True)
        for name, tensor in expected.items():
            assert (found[name] - tensor).abs().max().item() <= ROUNDING

    def test_a_single_picture_that_does_not_fit_is_an_error(self, two: Any, watch: Watch) -> None:
        two.picture("a")
        watch.fits = 0
        with pytest.raises(CacheError) as caught:
            two.run("experts")
        for part in ("lune", "a single picture does not fit", 'experts.dtype = "float16"', "experts.resolution"):
            assert part in str(caught.value)
        assert watch.rows("lune") == [3, 1]

    def test_a_number_of_times_is_taken_at_its_word(self, two: Any, watch: Watch) -> None:
        for name in "ab":
            two.picture(name)
        watch.fits = 3
        two.tables["experts"]["times_per_forward"] = 2
        with pytest.raises(CacheError) as caught:
            two.run("experts")
        for part in ("lune", "4 pictures", "cache.experts_batch_size", 'experts.times_per_forward = "auto"'):
            assert part in str(caught.value)
        assert watch.rows("lune") == [4]

    def test_other_errors_are_not_taken_for_a_lack_of_memory(
        self, two: Any, watch: Watch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(self: Any, *arguments: Any, **options: Any) -> Any:
            raise RuntimeError("something else")

        two.picture("a")
        monkeypatch.setattr(Teacher, "features", fail)
        with pytest.raises(RuntimeError, match="something else"):
            two.run("experts")


class TestInterruption:
    """Three batches of Lune and then three of Sol, ended after some of them; then the same job again."""

    @pytest.mark.parametrize(
        ("batches", "waiting", "done", "lune", "sol"),
        [
            (1, "ab", "", 2, 3),
            (2, "abcd", "", 1, 3),
            (3, "abcde", "", 0, 3),
            # The batch is written, its halves are not removed yet.
            (4, "abcde", "ab", 0, 2),
            (6, "e", "abcde", 0, 0),
        ],
    )
    def test_nothing_is_computed_twice_and_the_files_are_the_same(
        self,
        two: Any,
        watch: Watch,
        kill_after: Any,
        batches: int,
        waiting: str,
        done: str,
        lune: int,
        sol: int,
    ) -> None:
        five(two)
        assert two.run("experts") == 0
        whole = two.files()
        assert halves(two) == []
        for path in (two.root / "cache").glob("*.safetensors"):
            path.unlink()
        kill_after(batches)
        with pytest.raises(Killed):
            two.run("experts")
        assert halves(two) == list(waiting)
        assert sorted(name[0] for name in two.files()) == list(done)
        for seen in (watch.loaded, watch.forwards):
            seen.clear()
        assert two.run("experts") == 0
        assert (len(watch.rows("lune")), len(watch.rows("sol"))) == (lune, sol)
        assert watch.loaded == ["lune"] * bool(lune) + ["sol"] * bool(sol)
        assert two.files() == whole
        assert halves(two) == []

    @pytest.fixture
    def half_done(self, two: Any, watch: Watch, kill_after: Any) -> Any:
        """Killed when all of Lune was done."""
        five(two)
        kill_after(3)
        with pytest.raises(Killed):
            two.run("experts")
        for seen in (watch.loaded, watch.forwards, watch.texts):
            seen.clear()
        return two

    def test_a_half_says_what_made_it(self, half_done: Any) -> None:
        item = half_done.items()[0]
        path = half_path(cache_path(item, "experts", "tf"))
        assert path.name == ".a_tf_experts.safetensors.half"
        assert set(load_file(path)) == {
            "t_buckets_float32", "lune_features_float32", "seen_text", "seen_image",
        }  # fmt: skip
        fingerprint = read_header(path).fingerprint
        assert fingerprint is not None
        assert half_done.run("experts") == 0
        assert read_header(cache_path(item, "experts", "tf")).fingerprint == fingerprint
        assert not any(key.startswith("seen_") for key in features(half_done))

    def test_only_batches_with_a_changed_item_are_begun_again(self, half_done: Any, watch: Watch) -> None:
        (half_done.root / "images" / "d.txt").write_text("a green triangle")
        assert half_done.run("experts") == 0
        assert (len(watch.rows("lune")), len(watch.rows("sol"))) == (1, 3)
        assert watch.texts == ["a red square", "a green triangle"]

    def test_other_settings_begin_everything_again(self, half_done: Any, watch: Watch) -> None:
        half_done.tables["experts"]["seed"] = 8
        assert half_done.run("experts") == 0
        assert (len(watch.rows("lune")), len(watch.rows("sol"))) == (3, 3)

    def test_always_takes_no_half_of_an_earlier_job(self, half_done: Any, watch: Watch) -> None:
        half_done.tables["cache"]["run"] = "always"
        assert half_done.run("experts") == 0
        assert (len(watch.rows("lune")), len(watch.rows("sol"))) == (3, 3)

    def test_a_half_that_is_cut_short_is_made_again(self, half_done: Any, watch: Watch) -> None:
        path = half_path(half_done.root / "cache" / "c_tf_experts.safetensors")
        path.write_bytes(path.read_bytes()[:-1])
        assert half_done.run("experts") == 0
        assert (len(watch.rows("lune")), len(watch.rows("sol"))) == (1, 3)

    def test_halves_that_no_item_waits_for_are_removed(self, half_done: Any) -> None:
        for suffix in (".png", ".txt"):
            (half_done.root / "images" / f"b{suffix}").unlink()
        assert half_done.run("experts", shard=(1, 2)) == 0
        assert halves(half_done) == ["b", "d", "e"]
        assert half_done.run("latents") == 0
        assert halves(half_done) == ["b", "d", "e"]
        assert half_done.run("experts", dry_run=True) == 0
        assert halves(half_done) == ["b", "d", "e"]
        assert half_done.run("experts") == 0
        assert halves(half_done) == []

    def test_they_are_removed_when_one_teacher_is_left(self, half_done: Any, watch: Watch) -> None:
        half_done.tables["experts"]["enable_sol"] = False
        assert half_done.run("experts") == 0
        assert halves(half_done) == []
        assert (len(watch.rows("lune")), len(watch.rows("sol"))) == (3, 0)

    def test_an_image_that_changes_between_the_halves_is_stale_afterwards(
        self, two: Any, watch: Watch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in "ab":
            two.picture(name)
        pixels = two.picture("z").read_bytes()
        for suffix in (".png", ".txt"):
            (two.root / "images" / f"z{suffix}").unlink()
        free = job.free_memory

        def change() -> None:
            (two.root / "images" / "a.png").write_bytes(pixels)
            free()

        monkeypatch.setattr(job, "free_memory", change)
        assert two.run("experts") == 0
        watch.forwards.clear()
        assert two.run("experts") == 0
        assert len(watch.forwards) == 2


class TestFailures:
    def test_a_broken_image_is_reported_once_and_the_others_are_written(
        self, two: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        five(two)
        path = two.root / "images" / "b.png"
        path.write_bytes(path.read_bytes()[:-600])
        assert two.run("experts") == 1
        out, err = capsys.readouterr()
        assert out.splitlines()[-1] == "experts: encoded 4, up to date 0, failed 1"
        assert err.count("failed: ") == err.count("images/b.png: broken image") == 1
        assert sorted(name[0] for name in two.files()) == list("acde")
        assert halves(two) == []

    def test_features_that_are_not_finite_are_reported_with_their_names(
        self, two: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        two.picture("a")
        run = SplitTeacher.features

        def spoil(self: Any, *arguments: Any, **options: Any) -> Any:
            return {
                name: t * (float("nan") if name == "lune_features" else 1)
                for name, t in run(self, *arguments, **options).items()
            }

        monkeypatch.setattr(SplitTeacher, "features", spoil)
        assert two.run("experts") == 1
        assert "images/a.png: lune_features_float32 is not finite" in capsys.readouterr().err
        assert two.files() == {}
        assert halves(two) == []

    def test_weights_that_do_not_fit_are_found_before_the_first_teacher_works(
        self, two: Any, watch: Watch, tmp_path: Path, overlays: dict[str, str]
    ) -> None:
        tensors = {key: t for key, t in load_file(overlays["sol"]).items() if not key.startswith("mid_block.")}
        save_file(tensors, tmp_path / "bad.safetensors")
        two.tables["experts"]["sol"] = str(tmp_path / "bad.safetensors")
        two.picture("a")
        with pytest.raises(CheckpointError, match=r"experts\.sol: .*bad\.safetensors: provides "):
            two.run("experts")
        assert watch.forwards == []

    @pytest.mark.parametrize("name", ["cut.safetensors", "cut.pt"])
    def test_a_broken_file_of_weights_too(self, two: Any, watch: Watch, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
        two.tables["experts"]["sol"] = str(tmp_path / name)
        two.picture("a")
        with pytest.raises(CheckpointError, match=name):
            two.run("experts")
        assert watch.forwards == []


class TestGeometricSol:
    def test_the_stand_in_is_stored_and_only_lune_is_run(self, two: Any, watch: Watch) -> None:
        two.picture("a")
        two.tables["experts"]["sol_source"] = "geometric"
        assert two.run("experts") == 0
        assert watch.loaded == ["lune"]
        found = features(two)
        stats, spatial = geometric_sol(torch.tensor([1 / 6, 1 / 2, 5 / 6]))
        assert torch.allclose(found["sol_stats_float32"], stats, atol=1e-6)
        assert torch.allclose(found["sol_spatial_float32"], spatial, atol=1e-6)
        assert found["lune_features_float32"].shape == (TIMES, 16)
        fingerprint = read_header(two.root / "cache" / "a_tf_experts.safetensors").fingerprint
        assert fingerprint is not None
        assert fingerprint["sol_source"] == "geometric"
        assert "sol" not in fingerprint

    def test_without_lune_no_network_is_needed(self, project: Any, watch: Watch) -> None:
        project.picture("a")
        for key in ("unet", "vae"):
            del project.tables["experts"][key]
        project.tables["experts"] |= {"enable_lune": False, "sol_source": "geometric"}
        assert project.run("experts") == 0
        assert watch.loaded == watch.texts == []
        assert set(features(project)) == {"t_buckets_float32", "sol_stats_float32", "sol_spatial_float32"}
        fingerprint = read_header(project.root / "cache" / "a_tf_experts.safetensors").fingerprint
        assert fingerprint is not None
        # Nothing of a teacher decides.
        assert {"unet", "clip", "expert_input", "expert_time", "seed", "image"} & set(fingerprint) == set()
        project.tables["experts"]["seed"] = 9
        project.picture("a", (64, 64)).write_bytes(project.picture("z").read_bytes())
        for suffix in (".png", ".txt"):
            (project.root / "images" / f"z{suffix}").unlink()
        before = project.files()
        assert project.run("experts") == 0
        assert project.files() == before

    def test_every_caption_has_it(self, project: Any) -> None:
        project.picture("a")
        (project.root / "list.jsonl").write_text(
            json.dumps({"image_path": "images/a.png", "one": "a red circle", "two": "a blue square"})
        )
        project.tables["datasets"] = [
            {"image_jsonl_file": "list.jsonl", "cache_directory": "cache", "caption_columns": ["one", "two"]}
        ]
        project.tables["experts"]["sol_source"] = "geometric"
        assert project.run("experts") == 0
        found = features(project)
        assert torch.equal(found["sol_stats_float32"], found["sol_stats_v1_float32"])
        assert torch.equal(found["sol_spatial_float32"], found["sol_spatial_v1_float32"])
