"""When a cache file is fresh, when it is stale, and what is said about it. The files are made by real jobs."""

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from musubi_tuner.caching.file_format import KINDS, cache_path
from musubi_tuner.caching.fingerprint import difference, expectation, file_state
from musubi_tuner.caching.status import examine, needed_kinds
from musubi_tuner.config import RunConfig
from musubi_tuner.encoders.locate import encoder_sources, file_sha256, identity
from musubi_tuner.errors import CheckpointError
from musubi_tuner.headers import read_header
from musubi_tuner.stamps import hash_file

pytestmark = pytest.mark.long

BIG = (1 << 20) + 1
"""Bytes of a file whose hash is remembered."""


def reasons(project: Any, kind: str, config: RunConfig | None = None) -> dict[str, str]:
    """Item id -> why its file of a kind is due, for those that are."""
    config = config or project.config()
    family = config.spec.family.checkpoint_options(config)
    status = examine(config, project.items(config), kind, family)
    assert status.fresh == len(project.items(config)) - len(status.due)
    return {key.partition(":")[2]: reason for key, reason in status.due.items()}


def test_files_that_were_just_made_are_fresh(cached: Any) -> None:
    assert {kind: reasons(cached, kind) for kind in KINDS} == {kind: {} for kind in KINDS}


def test_files_that_were_never_made_are_missing(project: Any) -> None:
    project.picture("a")
    assert {kind: reasons(project, kind) for kind in KINDS} == {kind: {"a": "missing"} for kind in KINDS}


def leave_out(cached: Any, key: str, value: Any) -> None:
    """Take a fact out of the fingerprints of all expert files, as if they were older than it."""
    for item in cached.items():
        path = cache_path(item, "experts", "tf")
        header = read_header(path)
        assert header.fingerprint is not None
        fingerprint = dict(header.fingerprint)
        assert fingerprint.pop(key) == value
        save_file(load_file(path), path, metadata={**header.metadata, "fingerprint": json.dumps(fingerprint)})


class TestImages:
    def test_touching_an_image_changes_nothing(self, cached: Any) -> None:
        path = cached.root / "images" / "a.png"
        os.utime(path, ns=(1, 1))
        assert {kind: reasons(cached, kind) for kind in KINDS} == {kind: {} for kind in KINDS}

    def test_writing_the_same_bytes_again_changes_nothing(self, cached: Any) -> None:
        path = cached.root / "images" / "a.png"
        shutil.copyfile(path, path.with_suffix(".copy"))
        path.unlink()
        path.with_suffix(".copy").rename(path)
        assert reasons(cached, "latents") == {}

    def test_other_pixels_of_the_same_size_make_latents_and_experts_stale_but_not_text(self, cached: Any) -> None:
        shutil.copyfile(cached.picture("z"), cached.root / "images" / "a.png")
        for suffix in (".png", ".txt"):
            (cached.root / "images" / f"z{suffix}").unlink()
        expected = {"a": "the image has changed"}
        assert {kind: reasons(cached, kind) for kind in KINDS} == {
            "latents": expected, "text": {}, "experts": expected,
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("change", "reason"), [({"crop": (8, 0)}, "the crop"), ({"resized": (72, 64)}, "the size before the crop")]
    )
    def test_another_placement_in_the_same_bucket_makes_latents_stale(
        self, cached: Any, change: Any, reason: str
    ) -> None:
        config, item = cached.config(), cached.items()[0]
        expected = expectation(config, "latents", config.spec.family.checkpoint_options(config), download=False)
        moved = replace(item, placement=replace(item.placement, **change))
        assert difference(expected.of(item), expected.of(item)) is None
        assert reason in str(difference(expected.of(item), expected.of(moved)))

    def test_a_picture_of_another_size_has_another_file(self, cached: Any) -> None:
        cached.picture("a", (64, 128))
        assert reasons(cached, "latents") == {"a": "missing"}
        (reason,) = reasons(cached, "experts").values()
        assert reason.startswith("the bucket was [64, 64]")

    def test_teachers_that_see_noise_only_do_not_depend_on_the_image(self, project: Any) -> None:
        project.tables["experts"]["expert_input"] = "random"
        project.picture("a")
        assert project.run("experts") == 0
        pixels = project.picture("z").read_bytes()
        for suffix in (".png", ".txt"):
            (project.root / "images" / f"z{suffix}").unlink()
        (project.root / "images" / "a.png").write_bytes(pixels)
        assert reasons(project, "experts") == {}


class TestTransparency:
    def clear(self, cached: Any) -> None:
        """Give one of the pictures an alpha channel."""
        path = cached.root / "images" / "a.png"
        with Image.open(path) as image:
            pixels = image.convert("RGBA")
        pixels.putalpha(100)
        pixels.save(path)
        for kind in KINDS:
            assert cached.run(kind) == 0

    def test_another_background_makes_transparent_pictures_stale_and_no_others(self, cached: Any) -> None:
        self.clear(cached)
        assert {kind: reasons(cached, kind) for kind in KINDS} == {kind: {} for kind in KINDS}
        black = cached.config(general={"alpha_background": "black"})
        expected = {"a": "the colour under transparent pixels was '#ffffff', now '#000000'"}
        assert {kind: reasons(cached, kind, black) for kind in KINDS} == {
            "latents": expected, "text": {}, "experts": expected,
        }  # fmt: skip
        before = cached.files()
        for kind in ("latents", "experts"):
            assert cached.run(kind, black) == 0
        after = cached.files()
        changed = {name for name in after if after[name][1] != before[name][1]}
        assert changed == {"a_0064x0064_tf.safetensors", "a_tf_experts.safetensors"}

    def test_files_made_before_are_stale_for_transparent_pictures_and_fresh_for_opaque_ones(self, cached: Any) -> None:
        self.clear(cached)
        for item in cached.items():
            for kind in ("latents", "experts"):
                path = cache_path(item, kind, "tf")
                header = read_header(path)
                fingerprint = dict(header.fingerprint or {})
                del fingerprint["background"]
                save_file(load_file(path), path, metadata={**header.metadata, "fingerprint": json.dumps(fingerprint)})
        for kind in ("latents", "experts"):
            assert reasons(cached, kind) == {"a": "the colour under transparent pixels was 'kept', now '#ffffff'"}
        # Where alpha was the mask, the colours stayed then and stay now; only the mask is new here.
        masked = reasons(cached, "latents", cached.config(general={"alpha_mask": True}))
        assert masked == {"a": "the source of the mask was None, now 'alpha'"}

    def test_masks_with_transparent_parts_are_stale_where_these_counted_as_paint(self, cached: Any) -> None:
        (cached.root / "masks").mkdir()
        Image.new("L", (64, 64), 255).save(cached.root / "masks" / "a.png")
        Image.new("LA", (128, 64), 255).save(cached.root / "masks" / "b.png")
        cached.tables["datasets"][0]["mask_directory"] = "masks"
        assert cached.run("latents") == 0
        assert reasons(cached, "latents") == {}
        for item in cached.items():
            path = cache_path(item, "latents", "tf")
            header = read_header(path)
            fingerprint = dict(header.fingerprint or {})
            fingerprint.pop("mask_alpha", None)
            save_file(load_file(path), path, metadata={**header.metadata, "fingerprint": json.dumps(fingerprint)})
        assert reasons(cached, "latents") == {"b": "transparency of the mask was False, now True"}


class TestCaptions:
    def test_another_caption_makes_text_and_experts_stale_and_says_both(self, cached: Any) -> None:
        (cached.root / "images" / "a.txt").write_text("a green triangle")
        expected = {"a": "caption was 'a red circle', now 'a green triangle'"}
        assert {kind: reasons(cached, kind) for kind in KINDS} == {
            "latents": {}, "text": expected, "experts": expected,
        }  # fmt: skip

    def test_white_space_around_a_caption_does_not_count(self, cached: Any) -> None:
        (cached.root / "images" / "a.txt").write_text("\n a red circle \n")
        assert reasons(cached, "text") == {}

    def test_long_values_are_shortened(self, cached: Any) -> None:
        (cached.root / "images" / "a.txt").write_text("red " * 100)
        (reason,) = reasons(cached, "text").values()
        assert reason.startswith("caption was 'a red circle', now 'red red ")
        assert reason.endswith("...")
        assert len(reason) < 120


class TestSettings:
    @pytest.mark.parametrize(
        ("kind", "table", "key", "value", "expected"),
        [
            ("latents", "cache", "seed", 5, "the seed was 0, now 5"),
            ("latents", "cache", "latent_mode", "mean", "cache.latent_mode was 'sample', now 'mean'"),
            ("latents", "cache", "dtype", "bfloat16", "cache.dtype was 'float32', now 'bfloat16'"),
            ("latents", "model", "vae_dtype", "bfloat16", "the encoder's precision was 'float32', now 'bfloat16'"),
            ("text", "model", "t5_max_tokens", 6, "model.t5_max_tokens was 8, now 6"),
            ("text", "model", "text_dtype", "bfloat16", "the encoder's precision was 'float32', now 'bfloat16'"),
            ("text", "cache", "dtype", "float32", "cache.dtype was 'bfloat16', now 'float32'"),
            ("experts", "experts", "seed", 8, "the seed was 7, now 8"),
            ("experts", "experts", "time_buckets", 4, "time_buckets was 3, now 4"),
            ("experts", "experts", "resolution", 128, "resolution was 64, now 128"),
            ("experts", "experts", "expert_time", "reference", "expert_time was 'aligned', now 'reference'"),
            ("experts", "experts", "expert_input", "random", "expert_input was 'noised_image', now 'random'"),
            ("experts", "experts", "enable_lune", False, "lune_enabled was True, now False"),
            (
                "experts",
                "experts",
                "sol_source",
                "geometric",
                "experts.sol_source was 'extracted', now 'geometric'",
            ),
            ("experts", "experts", "dtype", "bfloat16", "the encoder's precision was 'float32', now 'bfloat16'"),
        ],
    )
    def test_a_setting_that_changes_the_content_is_named_with_both_values(
        self, cached: Any, kind: str, table: str, key: str, value: Any, expected: str
    ) -> None:
        found = reasons(cached, kind, cached.config(**{table: {key: value}}))
        assert set(found) == {"a", "b"}
        assert set(found.values()) == {expected}

    def test_another_bucket_makes_latents_stale_and_says_both(self, cached: Any) -> None:
        found = reasons(cached, "latents", cached.config(general={"resolution": 128}))
        assert found == {
            "a": "the bucket was [64, 64], now [128, 128]",
            "b": "the bucket was [80, 48], now [160, 96]",
        }
        assert reasons(cached, "text", cached.config(general={"resolution": 128})) == {}

    def test_another_filter_makes_latents_and_what_teachers_saw_stale(self, cached: Any) -> None:
        other = cached.config(general={"resize_interpolation": "bicubic"})
        expected = dict.fromkeys("ab", "resize_interpolation was None, now 'bicubic'")
        assert reasons(cached, "latents", other) == reasons(cached, "experts", other) == expected
        assert reasons(cached, "text", other) == {}
        assert reasons(cached, "latents", cached.config(general={"resize_interpolation": "auto"})) == {}

    def test_squashing_makes_latents_and_what_teachers_saw_stale(self, cached: Any) -> None:
        squashed = cached.config(general={"resize": "squash"})
        # The other image has the proportions of its bucket, but another picture may reach its teachers.
        assert set(reasons(cached, "latents", squashed)) <= {"a", "b"}
        assert reasons(cached, "experts", squashed) == dict.fromkeys("ab", "squashing of the image was False, now True")
        assert reasons(cached, "text", squashed) == {}

    def test_another_size_of_the_teachers_picture_makes_experts_stale(self, project: Any) -> None:
        """The teacher sees the item at the aspect of its bucket, so another bucket may mean another picture."""
        from musubi_tuner.caching.experts import teacher_grid

        project.picture("a", (160, 64))
        fingerprints, grids = [], []
        for resolution in (64, 128):
            config = project.config(general={"resolution": resolution}, experts={"resolution": 512})
            family = config.spec.family.checkpoint_options(config)
            (item,) = project.items(config)
            fingerprints.append(expectation(config, "experts", family, download=False).of(item))
            grids.append(teacher_grid(item, 512, keep_aspect=True))
        assert grids == [(48, 80), (40, 96)]
        assert difference(*fingerprints) is not None

    @pytest.mark.parametrize(
        ("table", "key", "value"),
        [
            ("general", "batch_size", 7),
            ("general", "num_repeats", 3),
            ("cache", "latents_batch_size", 4),
            ("cache", "workers", 0),
            ("cache", "nan_policy", "zero"),
            ("experts", "times_per_forward", 1),
            ("train", "max_steps", 77),
            ("run", "seed", 9),
        ],
    )
    def test_other_settings_change_nothing(self, cached: Any, table: str, key: str, value: Any) -> None:
        config = cached.config(**{table: {key: value}})
        assert {kind: reasons(cached, kind, config) for kind in KINDS} == {kind: {} for kind in KINDS}

    def test_the_seed_of_the_posterior_counts_only_where_it_is_used(self, cached: Any) -> None:
        cached.tables["cache"] = {"latent_mode": "mean"}
        assert cached.run("latents") == 0
        assert reasons(cached, "latents", cached.config(cache={"seed": 99})) == {}

    def test_always_makes_everything_due(self, cached: Any) -> None:
        found = reasons(cached, "text", cached.config(cache={"run": "always"}))
        assert found == {"a": "cache.run is always", "b": "cache.run is always"}

    def test_an_older_format_is_named(self) -> None:
        assert difference({"format": "0.9"}, {"format": "1.0.1"}) == "the cache format was '0.9', now '1.0.1'"

    def test_the_first_difference_is_the_one_named(self) -> None:
        assert difference({"a": 1, "b": 2}, {"a": 1, "b": 2}) is None
        assert difference({"a": 1, "b": 3, "c": 4}, {"a": 1, "b": 2, "c": 5}) == "b was 3, now 2"
        assert difference({}, {"clip": "x"}) == "the CLIP encoder was None, now 'x'"

    def test_files_that_name_no_source_of_sol_were_extracted(self, cached: Any) -> None:
        leave_out(cached, "sol_source", "extracted")
        assert reasons(cached, "experts") == {}
        found = reasons(cached, "experts", cached.config(experts={"sol_source": "geometric"}))
        assert set(found.values()) == {"experts.sol_source was 'extracted', now 'geometric'"}

    def test_files_that_do_not_say_that_padding_was_visible_are_stale(self, cached: Any) -> None:
        leave_out(cached, "text_padding", "visible")
        expected = "the padding of the text that teachers see was 'hidden', now 'visible'"
        assert set(reasons(cached, "experts").values()) == {expected}

    def test_the_stand_in_for_sol_is_stale_where_the_teacher_is_asked_for(self, project: Any) -> None:
        project.picture("a")
        assert project.run("experts", project.config(experts={"sol_source": "geometric"})) == 0
        assert reasons(project, "experts") == {"a": "experts.sol_source was 'geometric', now 'extracted'"}
        assert reasons(project, "experts", project.config(experts={"sol_source": "geometric"})) == {}
        # Without Sol its source does not matter.
        (reason,) = reasons(project, "experts", project.config(experts={"enable_sol": False})).values()
        assert reason == "sol_enabled was True, now False"


@pytest.fixture
def own_encoders(project: Any, encoders: Path) -> Path:
    """A copy of the encoders that a test may change, used by the project."""
    own = Path(shutil.copytree(encoders, project.root / "encoders"))
    for table in ("model", "experts"):
        for key, value in project.tables[table].items():
            if isinstance(value, str) and str(encoders) in value:
                project.tables[table][key] = value.replace(str(encoders), str(own))
    return own


def nudge(file: Path) -> None:
    """Change one weight of a file."""
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, file)


class TestEncoders:
    @pytest.mark.parametrize(
        ("encoder", "stale"),
        [
            ("vae", {"latents": "the autoencoder"}),
            ("t5", {"text": "the T5 encoder"}),
            ("clip", {"text": "the CLIP encoder", "experts": "the CLIP encoder"}),
            ("unet", {"experts": "the teacher's U-Net"}),
            ("expert_vae", {"experts": "the teacher's autoencoder"}),
        ],
    )
    def test_other_weights_make_the_kinds_stale_that_use_them(
        self, project: Any, own_encoders: Path, encoder: str, stale: dict[str, str]
    ) -> None:
        project.picture("a")
        for kind in KINDS:
            assert project.run(kind) == 0
        nudge(next((own_encoders / encoder).glob("*.safetensors")))
        for kind in KINDS:
            found = reasons(project, kind)
            if kind in stale:
                assert found["a"].startswith(f"{stale[kind]} was '")
            else:
                assert found == {}

    def test_the_config_of_an_encoder_counts_too(self, project: Any, own_encoders: Path) -> None:
        project.picture("a")
        assert project.run("latents") == 0
        path = own_encoders / "vae" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 2.0}))
        assert reasons(project, "latents")["a"].startswith("the autoencoder was ")

    def test_a_tokenizer_inside_the_encoders_folder_counts_too(self, project: Any, own_encoders: Path) -> None:
        project.picture("a")
        assert project.run("text") == 0
        path = own_encoders / "t5" / "tokenizer.json"
        path.write_text(path.read_text().replace('"red"', '"rouge"'))
        assert reasons(project, "text")["a"].startswith("the T5 encoder was ")

    def test_a_tokenizer_that_is_named_counts_too(self, project: Any, own_encoders: Path) -> None:
        tokenizer = Path(shutil.copytree(own_encoders / "t5", own_encoders / "other"))
        (tokenizer / "model.safetensors").unlink()
        project.tables["model"]["t5_tokenizer"] = str(tokenizer)
        project.picture("a")
        assert project.run("text") == 0
        path = tokenizer / "tokenizer.json"
        path.write_text(path.read_text().replace('"red"', '"rouge"'))
        assert reasons(project, "text")["a"].startswith("the T5 tokenizer was ")

    @pytest.mark.parametrize("place", ["t5/tokenizer", "tokenizer"])
    def test_a_tokenizer_that_is_found_beside_the_encoder_counts_too(
        self, project: Any, own_encoders: Path, place: str
    ) -> None:
        """It is used although no key names it, so a change of it must not go unnoticed."""
        folder = own_encoders / place
        folder.mkdir()
        for path in (own_encoders / "t5").glob("tokenizer*.json"):
            path.rename(folder / path.name)
        project.picture("a")
        assert project.run("text") == 0
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace('"red"', '"rouge"'))
        assert "a" in reasons(project, "text")

    def test_moving_an_encoder_changes_nothing(self, project: Any, own_encoders: Path) -> None:
        project.picture("a")
        assert project.run("latents") == 0
        (own_encoders / "vae").rename(own_encoders / "renamed")
        project.tables["model"]["vae_path"] = str(own_encoders / "renamed")
        assert reasons(project, "latents") == {}

    def test_an_encoder_that_is_not_there_is_named(self, project: Any, own_encoders: Path) -> None:
        project.picture("a")
        config = project.config()
        shutil.rmtree(own_encoders / "vae")
        with pytest.raises(CheckpointError) as caught:
            encoder_sources(config, "latents").paths(download=False)
        assert str(caught.value) == f"model.vae_path: {own_encoders / 'vae'}: no such file or folder"

    def test_an_encoder_that_is_not_downloaded_leaves_everything_due(self, cached: Any) -> None:
        config = cached.config(model={"vae_path": "nobody/nothing-of-this-name:vae"})
        assert not expectation(config, "latents", {}, download=False).complete
        reason = "its encoder is not downloaded yet, so it cannot be checked"
        assert reasons(cached, "latents", config) == {"a": reason, "b": reason}

    def test_needed_kinds_follow_the_teachers(self, project: Any) -> None:
        assert needed_kinds(project.config()) == ["latents", "text", "experts"]
        assert needed_kinds(project.config(experts={"enable_lune": False})) == ["latents", "text", "experts"]
        none = project.config(experts={"enable_lune": False, "enable_sol": False})
        assert needed_kinds(none) == ["latents", "text"]


class TestForeignFiles:
    def strip(self, project: Any) -> Path:
        """Remove our fingerprint from the text file of item a, as another program would write it."""
        path = project.root / "cache" / "a_tf_te.safetensors"
        save_file(load_file(path), path, metadata={"architecture": "tinyflux", "caption1": "a red circle"})
        return path

    def test_a_file_without_fingerprint_is_stale(self, cached: Any) -> None:
        self.strip(cached)
        assert reasons(cached, "text") == {"a": "it does not say what made it (no fingerprint)"}

    def test_by_name_it_is_accepted(self, cached: Any) -> None:
        self.strip(cached)
        assert reasons(cached, "text", cached.config(cache={"skip_existing": "name"})) == {}

    def test_by_name_any_setting_is_accepted_but_no_broken_file(self, cached: Any) -> None:
        config = cached.config(cache={"skip_existing": "name", "seed": 5})
        assert reasons(cached, "latents", config) == {}
        path = cached.root / "cache" / "a_0064x0064_tf.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        assert reasons(cached, "latents", config)["a"].endswith("delete it and run the cache job again")

    def test_a_cut_file_is_due_again_with_its_reason(self, cached: Any) -> None:
        path = cached.root / "cache" / "a_tf_te.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        assert reasons(cached, "text")["a"].endswith("delete it and run the cache job again")

    def test_a_file_of_another_item_under_this_name_is_stale(self, cached: Any) -> None:
        """Someone renamed files: the content belongs to another caption and item."""
        folder = cached.root / "cache"
        shutil.copyfile(folder / "b_tf_te.safetensors", folder / "a_tf_te.safetensors")
        assert reasons(cached, "text") == {"a": "caption was 'a blue square', now 'a red circle'"}

    def test_a_file_of_another_item_with_the_same_caption_is_stale(self, project: Any) -> None:
        for name in ("a", "b"):
            project.picture(name, caption="a circle")
        assert project.run("text") == 0
        folder = project.root / "cache"
        shutil.copyfile(folder / "b_tf_te.safetensors", folder / "a_tf_te.safetensors")
        assert reasons(project, "text") == {"a": "item was 'b', now 'a'"}

    def test_headers_hold_the_facts_that_others_read(self, cached: Any) -> None:
        (first, _) = cached.items()
        latents = read_header(cache_path(first, "latents", "tf")).metadata
        assert {key: latents[key] for key in latents if key not in ("fingerprint", "code_version")} == {
            "architecture": "tinyflux",
            "format_version": "1.0.1",
            "width": "64",
            "height": "64",
            "bucket_width": "64",
            "bucket_height": "64",
            "vae_shift_applied": "false",
        }
        assert read_header(cache_path(first, "text", "tf")).metadata["caption1"] == "a red circle"
        experts = read_header(cache_path(first, "experts", "tf")).metadata
        assert (experts["time_convention"], experts["seed"]) == ("data_at_1", "7")


def test_reasons_are_counted_by_frequency(cached: Any) -> None:
    for name in ("c", "d", "e"):
        cached.picture(name)
    (cached.root / "images" / "a.txt").write_text("other")
    config = cached.config()
    status = examine(config, cached.items(config), "text", {})
    assert status.reasons == [("missing", 3), ("caption was 'a red circle', now 'other'", 1)]
    assert status.fresh == 1


class TestIdentity:
    def test_names_inside_a_folder_count_and_the_name_of_a_single_file_does_not(self, tmp_path: Path) -> None:
        folder = tmp_path / "one"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "README.md").write_text("one")
        before = identity(folder)
        (folder / "README.md").write_text("two")
        assert identity(folder) == before
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        assert identity(folder) != before
        single = identity(folder / "other.safetensors")
        (folder / "other.safetensors").rename(folder / "third.safetensors")
        assert identity(folder / "third.safetensors") == single

    @pytest.mark.parametrize("name", ["weights.json", "config.json", "model_config.json"])
    def test_a_config_beside_a_single_file_counts(self, tmp_path: Path, name: str) -> None:
        """It decides the geometry and scale of what the file computes; loading looks for these three names."""
        weights = tmp_path / "weights.safetensors"
        weights.write_bytes(b"weights")
        before = identity(weights)
        (tmp_path / name).write_text("{}")
        with_config = identity(weights)
        (tmp_path / name).write_text("[]")
        assert len({before, with_config, identity(weights)}) == 3

    def test_a_large_file_is_hashed_once(
        self, tmp_path: Path, hash_memory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "big.safetensors"
        path.write_bytes(b"x" * BIG)
        digest = file_sha256(path)
        assert digest == hash_file(path)
        (memory,) = hash_memory.iterdir()
        stored = json.loads(memory.read_text())
        assert (stored["path"], stored["size"], stored["sha256"]) == (str(path), BIG, digest)
        # What is remembered is believed, so the file was not read again.
        memory.write_text(json.dumps(stored | {"sha256": "remembered"}))
        assert file_sha256(path) == "remembered"

    def test_a_large_file_that_changed_is_hashed_again(self, tmp_path: Path, hash_memory: Path) -> None:
        path = tmp_path / "big.safetensors"
        path.write_bytes(b"x" * BIG)
        status, first = path.stat(), file_sha256(path)
        path.write_bytes(b"y" * BIG)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        second = file_sha256(path)
        assert second == hash_file(path) != first
        os.utime(path, ns=(0, 0))
        assert file_sha256(path) == second

    def test_small_files_are_always_read(self, tmp_path: Path, hash_memory: Path) -> None:
        path = tmp_path / "config.json"
        path.write_text("{}")
        status, first = path.stat(), file_sha256(path)
        path.write_text("[]")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert file_sha256(path) != first
        assert not hash_memory.exists()

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"null"])
    def test_a_broken_memory_is_no_obstacle(self, tmp_path: Path, hash_memory: Path, content: bytes) -> None:
        path = tmp_path / "big.safetensors"
        path.write_bytes(b"x" * BIG)
        digest = file_sha256(path)
        (memory,) = hash_memory.iterdir()
        memory.write_bytes(content)
        assert file_sha256(path) == digest
        assert json.loads(memory.read_text())["sha256"] == digest

    def test_a_memory_that_cannot_be_written_only_warns(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").write_text("not a folder")
        monkeypatch.setenv("MUSUBI_CACHE_HOME", str(tmp_path / "file"))
        path = tmp_path / "big.safetensors"
        path.write_bytes(b"x" * BIG)
        with caplog.at_level(logging.WARNING):
            assert file_sha256(path) == hash_file(path)
        (record,) = caplog.records
        assert record.getMessage() == f"cannot remember file hashes in {tmp_path / 'file' / 'hashes'} (Not a directory)"


def test_a_fingerprint_holds_all_that_decides_the_content(cached: Any) -> None:
    """What is stored is what is expected, and for images their state beside it."""
    config = cached.config()
    family = config.spec.family.checkpoint_options(config)
    for kind in KINDS:
        expected = expectation(config, kind, family, download=False)
        for item in cached.items():
            stored = read_header(cache_path(item, kind, "tf")).fingerprint
            assert stored is not None
            image = stored.pop("image", None)
            assert expected.shared.get("precision") == "auto" and stored["precision"] == "float32"  # as a CPU computes
            assert stored == expected.of(item) | {"precision": "float32"}
            assert (image is not None) == expected.needs_image == (kind != "text")
            assert file_state(item, expected, "tf")[0] is None


def test_always_makes_nothing_due_where_nothing_is_encoded(cached: Any) -> None:
    """Under a launcher a run with cache.run = "always" could otherwise never begin."""
    cached.tables["cache"]["run"] = "always"
    config = cached.config()
    items = cached.items(config)
    assert len(examine(config, items, "text", {}).due) == len(items)
    assert examine(config, items, "text", {}, encodes=False).due == {}


class TestMasks:
    @pytest.fixture
    def masked(self, project: Any) -> Any:
        """Two items, the first with a mask file, whose latents are cached."""
        project.picture("a")
        project.picture("b")
        (project.root / "masks").mkdir()
        Image.new("L", (64, 64), 255).save(project.root / "masks" / "a.png")
        project.tables["datasets"][0]["mask_directory"] = "masks"
        assert project.run("latents") == 0
        return project

    def test_masks_that_were_just_cached_are_fresh_and_touching_them_changes_nothing(self, masked: Any) -> None:
        assert reasons(masked, "latents") == {}
        os.utime(masked.root / "masks" / "a.png", ns=(1, 1))
        assert reasons(masked, "latents") == {}

    def test_another_mask_makes_the_latents_stale_and_nothing_else(self, masked: Any) -> None:
        assert masked.run("text") == masked.run("experts") == 0
        Image.new("L", (64, 64), 254).save(masked.root / "masks" / "a.png")
        assert reasons(masked, "latents") == {"a": "the mask has changed"}
        assert reasons(masked, "text") == reasons(masked, "experts") == {}

    def test_a_mask_that_comes_or_goes_makes_the_latents_stale(self, masked: Any) -> None:
        (masked.root / "masks" / "a.png").rename(masked.root / "masks" / "b.png")
        assert reasons(masked, "latents") == {
            "a": "the source of the mask was 'file', now None",
            "b": "the source of the mask was None, now 'file'",
        }

    def test_another_source_makes_the_latents_stale(self, masked: Any) -> None:
        masked.tables["datasets"][0]["mask_source"] = "smpl"
        assert reasons(masked, "latents") == {"a": "the source of the mask was 'file', now 'smpl'"}

    def test_latents_that_say_nothing_of_masks_stay_fresh_for_images_without_one(self, cached: Any) -> None:
        for item in cached.items():
            path = cache_path(item, "latents", "tf")
            header, tensors = read_header(path), load_file(path)
            fingerprint = header.fingerprint
            assert fingerprint is not None
            del fingerprint["mask"]
            save_file(tensors, path, metadata={**header.metadata, "fingerprint": json.dumps(fingerprint)})
        assert reasons(cached, "latents") == {}
