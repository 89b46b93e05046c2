"""Names, keys and headers of cache files."""

import struct
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from musubi_tuner.caching.file_format import (
    KINDS,
    cache_path,
    caption_name,
    kind_of,
    latents_key,
    mask_key,
    plain_name,
    split_caption,
)
from musubi_tuner.caching.job import half_path
from musubi_tuner.data.buckets import place
from musubi_tuner.data.item import Item
from musubi_tuner.errors import CacheError
from musubi_tuner.files import temporary_path
from musubi_tuner.headers import DTYPES, read_header


def item(stem: str, size: tuple[int, int] = (512, 768), suffix: str = ".png") -> Item:
    path = Path("images") / f"{stem}{suffix}"
    return Item(stem, f"0:{stem}", path, "", Path("cache"), size, place(size, size), 1, 1)


class TestNames:
    def test_the_published_examples(self) -> None:
        found = {kind: cache_path(item("img001"), kind, "fd").name for kind in KINDS}
        assert found["latents"] == "img001_0512x0768_fd.safetensors"
        assert found["text"] == "img001_fd_te.safetensors"
        assert cache_path(item("img001"), "experts", "tf").name == "img001_tf_experts.safetensors"

    def test_the_size_is_the_originals_and_may_need_more_than_four_digits(self) -> None:
        assert cache_path(item("a", (7, 12345)), "latents", "tf") == Path("cache/a_0007x12345_tf.safetensors")

    @pytest.mark.parametrize(
        "stem",
        [
            "a",
            "a_b_c",
            "_",
            "a_0512x0768",
            "a_tf",
            "a_tf_te",
            "a_0512x0768_tf",
            "x_tf_experts",
            "a.b",
            "a b",
            "Ähre",
            "[1]",
        ],
    )
    def test_every_stem_gives_three_names_of_the_right_kind(self, stem: str) -> None:
        names = {kind: cache_path(item(stem), kind, "tf").name for kind in KINDS}
        assert len(set(names.values())) == 3
        assert {kind: kind_of(name, "tf") for kind, name in names.items()} == {kind: kind for kind in KINDS}
        assert {kind_of(name, "fd") for name in names.values()} == {None}

    @pytest.mark.parametrize("character", ["a", "猫", "\N{SMILING FACE WITH SUNGLASSES}", "e\u0301"])
    def test_long_names_fit_into_255_bytes_even_while_they_are_written(self, character: str) -> None:
        """With the longest size, beside a temporary name and as a half that waits for its other half."""
        size = len(character.encode())
        for length in range(120 // size, 251 // size + 1):
            for kind in KINDS:
                path = cache_path(item(character * length, (12345, 12345)), kind, "tf")
                for name in (path, half_path(path), temporary_path(path), temporary_path(half_path(path))):
                    assert len(name.name.encode()) <= 255
                assert kind_of(path.name, "tf") == kind
                long = len(f".{character * length}_12345x12345_tf.safetensors.half".encode()) > 255
                assert not long or kind != "latents" or "~" in path.name

    def test_names_that_fit_stay_as_they_are(self) -> None:
        for stem in ("a" * 219, "猫" * 73):
            assert cache_path(item(stem, (64, 64)), "latents", "tf").name == f"{stem}_0064x0064_tf.safetensors"
        stem = "a" * 230
        assert cache_path(item(stem), "latents", "tf").name.startswith("a" * 160 + "~")
        # One kind may fit where another does not.
        assert cache_path(item(stem), "text", "tf").name == f"{stem}_tf_te.safetensors"

    def test_the_name_of_a_long_stem_is_fixed(self) -> None:
        """Caches are found again by it, so it must never change: 160 bytes and the sha256 of 'a' * 250."""
        found = cache_path(item("a" * 250, (64, 64)), "latents", "tf").name
        assert found == f"{'a' * 160}~{sha256(b'a' * 250).hexdigest()[:16]}_0064x0064_tf.safetensors"

    def test_long_stems_that_begin_alike_have_different_names(self) -> None:
        stems = ["a" * 249 + last for last in "bcd"] + ["a" * length for length in (240, 245, 250)]
        names = [cache_path(item(stem), kind, "tf").name for stem in stems for kind in KINDS]
        assert len(set(names)) == len(names)

    def test_names_of_different_stems_never_meet(self) -> None:
        stems = ["a", "a_tf", "a_tf_te", "a_0512x0768", "a_0512x0768_tf", "a_tf_experts", "a_te"]
        names = [cache_path(item(stem), kind, "tf").name for stem in stems for kind in KINDS]
        assert len(set(names)) == len(names)

    @pytest.mark.parametrize(
        "name",
        [
            "model.safetensors",
            "a_tf.safetensors",
            "a_12x34_tf.safetensors",
            "a_0512x_tf.safetensors",
            "a_x0512_tf.safetensors",
            "_0512x0768_tf.safetensors",
            "a_0512x0768_tf.pt",
            "a_0512x0768_tf.safetensors.tmp",
            "a_0512x0768_xtf.safetensors",
            "a_0512x0768_fd.safetensors",
            "a_tf_te.txt",
            "atf_te.safetensors",
            "index_tf.json",
        ],
    )
    def test_other_names_are_no_cache_files(self, name: str) -> None:
        assert kind_of(name, "tf") is None

    def test_video_caches_of_another_program_count_as_latents_of_their_stem(self) -> None:
        """Their frame numbers stand before the size, where only the stem is expected."""
        assert kind_of("clip_00000-025_0512x0768_tf.safetensors", "tf") == "latents"


class TestKeys:
    @pytest.mark.parametrize(
        ("key", "name"),
        [
            ("latents_1x96x64_float32", "latents"),
            ("latents_96x64_bfloat16", "latents"),
            ("latents_25x96x64_float16", "latents"),
            ("latents_control_1x96x64_float32", "latents_control"),
            ("latents_control_0_1x96x64_float32", "latents_control_0"),
            ("latents_control_12_96x64_float32", "latents_control_12"),
            ("latents_flip_1x96x64_float32", "latents_flip"),
            ("t5_vec_bfloat16", "t5_vec"),
            ("t5_vec_float8_e4m3fn", "t5_vec"),
            ("t5_vec_float8_e5m2", "t5_vec"),
            ("clip_l_pooler_float16", "clip_l_pooler"),
            ("t5_mask", "t5_mask"),
            ("varlen_t5_vec_float32", "t5_vec"),
            ("varlen_t5_mask", "t5_mask"),
            ("t_buckets_float32", "t_buckets"),
            ("lune_features_float32", "lune_features"),
            ("sol_spatial_float16", "sol_spatial"),
            ("ids_int32", "ids"),
            ("mask_weights_1x12x8_float32", "mask_weights"),
            ("no_dtype_here", "no_dtype_here"),
            ("xfloat32", "xfloat32"),
        ],
    )
    def test_suffixes_are_dropped(self, key: str, name: str) -> None:
        assert plain_name(key) == name

    @pytest.mark.parametrize("dtype", DTYPES.values())
    def test_every_dtype_is_dropped(self, dtype: str) -> None:
        assert plain_name(f"thing_{dtype}") == "thing"
        assert plain_name(latents_key((16, 8, 12), dtype)) == "latents"

    def test_the_key_of_latents_is_rows_then_columns(self) -> None:
        assert latents_key((16, 96, 64), "float32") == "latents_1x96x64_float32"


@pytest.fixture
def cache_file(tmp_path: Path) -> Path:
    path = tmp_path / "a_tf_te.safetensors"
    tensors = {"t5_vec_bfloat16": torch.ones(3, 4, dtype=torch.bfloat16), "t5_mask": torch.tensor([1, 1, 0])}
    save_file(tensors, path, metadata={"architecture": "tinyflux", "fingerprint": '{"format": "1.0.1"}'})
    return path


def header_length(path: Path) -> int:
    return struct.unpack("<Q", path.read_bytes()[:8])[0]


class TestHeader:
    def test_entries_point_at_the_bytes_of_their_tensors(self, cache_file: Path) -> None:
        header = read_header(cache_file)
        raw = cache_file.read_bytes()
        mask, vec = header.tensors["t5_mask"], header.tensors["t5_vec_bfloat16"]
        assert (mask.dtype, mask.shape) == ("int64", (3,))
        assert (vec.dtype, vec.shape) == ("bfloat16", (3, 4))
        assert struct.unpack("<3q", raw[mask.start : mask.end]) == (1, 1, 0)
        assert raw[vec.start : vec.end] == b"\x80\x3f" * 12
        assert header.metadata["architecture"] == "tinyflux"
        assert header.fingerprint == {"format": "1.0.1"}

    def test_a_file_without_tensors_is_complete(self, tmp_path: Path) -> None:
        save_file({}, tmp_path / "x.safetensors", metadata={"a": "b"})
        assert read_header(tmp_path / "x.safetensors").tensors == {}

    def test_a_missing_file_stays_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            read_header(tmp_path / "x.safetensors")

    @pytest.mark.parametrize("text", [None, "no json", "[1]", '"text"', "7"])
    def test_a_header_without_a_usable_fingerprint_has_none(self, tmp_path: Path, text: str | None) -> None:
        save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata=text and {"fingerprint": text})
        assert read_header(tmp_path / "x.safetensors").fingerprint is None

    @pytest.mark.parametrize("size", range(8))
    def test_a_file_cut_inside_the_length(self, cache_file: Path, size: int) -> None:
        cache_file.write_bytes(cache_file.read_bytes()[:size])
        with pytest.raises(CacheError) as caught:
            read_header(cache_file)
        assert str(caught.value) == f"{cache_file}: is cut short ({size} bytes); delete it and run the cache job again"

    def test_a_file_cut_anywhere_in_its_header(self, cache_file: Path) -> None:
        whole, length = cache_file.read_bytes(), header_length(cache_file)
        for size in range(8, 8 + length):
            cache_file.write_bytes(whole[:size])
            with pytest.raises(CacheError) as caught:
                read_header(cache_file)
            assert str(caught.value) == f"{cache_file}: has a broken header; delete it and run the cache job again"

    def test_a_file_cut_anywhere_in_its_data(self, cache_file: Path) -> None:
        whole, begin = cache_file.read_bytes(), 8 + header_length(cache_file)
        for size in range(begin, len(whole)):
            cache_file.write_bytes(whole[:size])
            with pytest.raises(CacheError) as caught:
                read_header(cache_file)
            for part in (str(cache_file), f"{size} bytes", f"says {len(whole)}", "run the cache job again"):
                assert part in str(caught.value)

    def test_a_file_with_bytes_behind_its_data(self, cache_file: Path) -> None:
        whole = cache_file.read_bytes()
        cache_file.write_bytes(whole + b"\0")
        with pytest.raises(CacheError, match=f"has {len(whole) + 1} bytes, its header says {len(whole)}"):
            read_header(cache_file)

    def test_a_file_of_zeros_as_a_power_cut_leaves_it(self, cache_file: Path) -> None:
        cache_file.write_bytes(b"\0" * cache_file.stat().st_size)
        with pytest.raises(CacheError, match="has a broken header"):
            read_header(cache_file)

    def test_a_file_of_another_kind_is_not_read_into_memory(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        for content in (b"PK\x03\x04 this is a zip archive", struct.pack("<Q", (100 << 20) + 1) + b"{}"):
            path.write_bytes(content)
            with pytest.raises(CacheError) as caught:
                read_header(path)
            assert str(caught.value) == f"{path}: is not a safetensors file"

    @pytest.mark.parametrize(
        "content",
        [
            "[]",
            "7",
            "null",
            '"text"',
            '{"a": 1}',
            '{"a": {}}',
            '{"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}',
            '{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["x", 4]}}',
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": 4}}',
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.4]}}',
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}',
            "\ud800",
            "[" * 100_000,
        ],
        ids=lambda text: text[:70],
    )
    def test_a_header_of_another_form_is_broken(self, tmp_path: Path, content: str) -> None:
        raw = content.encode("utf-8", "surrogatepass")
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 4)
        with pytest.raises(CacheError, match="has a broken header; delete it and run the cache job again"):
            read_header(path)

    @pytest.mark.parametrize("metadata", ["null", "[]", "7", '{"fingerprint": 7}'])
    def test_metadata_of_another_form_holds_no_fingerprint(self, tmp_path: Path, metadata: str) -> None:
        raw = f'{{"__metadata__": {metadata}}}'.encode()
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", len(raw)) + raw)
        assert fingerprint_or_error(path) is None

    def test_any_flipped_bit_of_a_header_gives_a_header_or_a_cache_error(self, cache_file: Path) -> None:
        whole, length = cache_file.read_bytes(), header_length(cache_file)
        broken = 0
        for position in range(8 + length):
            for bit in range(8):
                damaged = bytearray(whole)
                damaged[position] ^= 1 << bit
                cache_file.write_bytes(damaged)
                try:
                    header = read_header(cache_file)
                except CacheError as error:
                    assert str(error).startswith(f"{cache_file}: ")
                    broken += 1
                else:
                    assert header.fingerprint is None or isinstance(header.fingerprint, dict)
        assert broken > length  # most damage to the structure is seen; text inside quotes is not protected


def fingerprint_or_error(path: Path) -> dict[str, Any] | None:
    """None also where the file is refused: both mean that nothing made by us is known of it."""
    try:
        return read_header(path).fingerprint
    except CacheError:
        return None


def test_this_module_and_its_readers_do_not_load_torch() -> None:
    """Planning reads headers of every item before anything heavy is loaded."""
    import subprocess
    import sys

    code = "import sys, musubi_tuner.caching.index, musubi_tuner.caching.status; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_mask_has_a_plain_name_without_size_and_dtype() -> None:
    assert mask_key((96, 64)) == "mask_weights_1x96x64_float32"
    assert plain_name(mask_key((96, 64))) == "mask_weights"


@pytest.mark.parametrize(
    ("name", "caption", "expected"),
    [
        ("t5_vec", 0, "t5_vec"),
        ("t5_vec", 1, "t5_vec_v1"),
        ("t5_mask", 2, "t5_v2_mask"),
        ("sol_stats", 10, "sol_stats_v10"),
    ],
)
def test_names_of_captions_convert_both_ways(name: str, caption: int, expected: str) -> None:
    assert caption_name(name, caption) == expected
    assert split_caption(expected) == (name, caption)


@pytest.mark.parametrize("name", ["t5_vec", "t_buckets", "latents_v", "_v1", "x_v0", "x_v01"])
def test_other_names_belong_to_the_first_caption(name: str) -> None:
    assert split_caption(name) == (name, 0)
