"""What a folder or a JSONL file gives to train on, and how everything wrong with it is reported at once."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from musubi_tuner.config.captions import CaptionSettings
from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.data.buckets import Placement, place, squash
from musubi_tuner.data.images import resize_crop
from musubi_tuner.data.sources import ScannedItems, scan
from musubi_tuner.errors import DataError

Make = Callable[..., Path]
Entry = Callable[..., DatasetConfig]


def problems(*datasets: DatasetConfig) -> list[str]:
    """The lines of the error that scanning raises, without its first."""
    with pytest.raises(DataError) as caught:
        scan(datasets, "tf")
    head, *lines = str(caught.value).split("\n  ")
    assert head == ("data: 1 problem" if len(lines) == 1 else f"data: {len(lines)} problems")
    return lines


def ids(found: ScannedItems) -> list[str]:
    return [item.id for item in found.items]


class TestFolder:
    def test_images_are_listed_by_id_with_caption_size_and_bucket(
        self, tmp_path: Path, picture: Make, dataset: Entry
    ) -> None:
        picture(tmp_path / "images" / "b.png", (128, 64), "  two words\n")
        picture(tmp_path / "images" / "a.jpg", (64, 64), "one\nand more\n")
        found = scan([dataset(num_repeats=3, batch_size=4)], "tf")
        assert found.notes == []
        assert ids(found) == ["a", "b"]
        first, second = found.items
        assert (first.caption, second.caption) == ("one\nand more", "two words")
        assert (first.size, first.bucket) == ((64, 64), (64, 64))
        assert (second.size, second.bucket) == ((128, 64), (80, 48))
        assert (first.key, first.stem, first.path.name) == ("0:a", "a", "a.jpg")
        assert (first.num_repeats, first.batch_size) == (3, 4)
        assert first.cache_directory == tmp_path / "images"

    def test_the_order_of_the_folder_does_not_matter(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        names = ["z", "B", "a10", "a2", "a", "-x"]
        for name in names:
            picture(tmp_path / "images" / f"{name}.png")
        assert ids(scan([dataset()], "tf")) == sorted(names)

    def test_other_files_hidden_files_and_folders_are_ignored(
        self, tmp_path: Path, picture: Make, dataset: Entry
    ) -> None:
        picture(tmp_path / "images" / "a.png")
        picture(tmp_path / "images" / ".hidden.png")
        picture(tmp_path / "images" / "sub" / "b.png")
        (tmp_path / "images" / "folder.png").mkdir()
        (tmp_path / "images" / "notes.md").write_text("no image")
        assert ids(scan([dataset()], "tf")) == ["a"]

    def test_extensions_count_in_upper_case_too(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        picture(tmp_path / "images" / "a.PNG")
        picture(tmp_path / "images" / "b.Jpeg")
        assert ids(scan([dataset()], "tf")) == ["a", "b"]

    def test_dots_and_spaces_in_names_belong_to_the_stem(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        picture(tmp_path / "images" / "a.b.png", caption="first")
        picture(tmp_path / "images" / "a c_d.png", caption="second")
        found = scan([dataset()], "tf")
        assert {item.stem: item.caption for item in found.items} == {"a.b": "first", "a c_d": "second"}
        assert ids(found) == ["a c_d", "a.b"]

    def test_another_caption_extension(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        path = picture(tmp_path / "images" / "a.png", caption="not this")
        path.with_suffix(".caption").write_text("this")
        assert scan([dataset(caption_extension=".caption")], "tf").items[0].caption == "this"

    def test_brackets_in_the_path_are_plain_characters(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        folder = tmp_path / "set [v1] {a,b} *"
        picture(folder / "x.png")
        picture(folder / "sub[0]" / "y.png")
        assert ids(scan([dataset(image_directory=folder)], "tf")) == ["x"]
        assert ids(scan([dataset(image_directory=folder, recursive=True)], "tf")) == ["sub[0]/y", "x"]

    def test_a_byte_order_mark_is_no_part_of_the_caption(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        path = picture(tmp_path / "images" / "a.png")
        path.with_suffix(".txt").write_bytes(b"\xef\xbb\xbfeine \xc3\x84hre\r\n")
        assert scan([dataset()], "tf").items[0].caption == "eine Ähre"

    @pytest.mark.parametrize(
        ("raw", "words"),
        [
            (b"Gr\xfc\xdfe", "is not UTF-8 text: line 1 holds the byte FC, \'ü\' in Windows code page 1252"),
            ("a red circle".encode("utf-16"), "is UTF-16 text; convert it to UTF-8"),
            ("a red circle".encode("utf-16-be"), "is UTF-16 text without a byte order mark; convert it to UTF-8"),
            ("a red circle".encode("utf-32"), "is UTF-32 text; convert it to UTF-8"),
            (b"a red\0 circle", "holds a NUL character at byte 5; save it as plain UTF-8 text"),
        ],
        ids=["cp1252", "utf-16", "utf-16 without mark", "utf-32", "NUL"],
    )  # fmt: skip
    def test_a_caption_that_is_not_utf8_is_named(
        self, tmp_path: Path, picture: Make, dataset: Entry, raw: bytes, words: str
    ) -> None:
        path = picture(tmp_path / "images" / "a.png").with_suffix(".txt")
        path.write_bytes(raw)
        (problem,) = problems(dataset())
        assert f"{path}: {words}" in problem

    @pytest.mark.skipif(os.name == "nt", reason="Windows words the error differently")
    def test_a_caption_that_cannot_be_read_is_named(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        path = picture(tmp_path / "images" / "a.png", caption=None)
        path.with_suffix(".txt").mkdir()
        assert problems(dataset()) == [f"{path.with_suffix('.txt')}: cannot be read (Is a directory)"]

    def test_an_exif_orientation_decides_the_bucket(self, tmp_path: Path, dataset: Entry) -> None:
        exif = Image.Exif()
        exif[0x0112] = 8
        (tmp_path / "images").mkdir()
        Image.new("RGB", (160, 80)).save(tmp_path / "images" / "a.jpg", exif=exif)
        (tmp_path / "images" / "a.txt").write_text("a")
        (item,) = scan([dataset()], "tf").items
        assert (item.size, item.bucket) == ((80, 160), (48, 80))


class TestMissingCaptions:
    @pytest.fixture
    def folder(self, tmp_path: Path, picture: Make) -> Path:
        for name in ("ant", "bee-fly", "cat_and_dog", "eel"):
            picture(tmp_path / "images" / f"{name}.png", caption=None)
        picture(tmp_path / "images" / "fox.png", caption="a fox")
        return tmp_path / "images"

    def test_error_counts_them_and_names_three(self, folder: Path, dataset: Entry) -> None:
        assert problems(dataset()) == [
            f"datasets[0]: 4 of 5 images in {folder} have no .txt file (ant.png, bee-fly.png, cat_and_dog.png, ...); "
            'write the captions, or set missing_caption = "skip", "empty" or "stem"'
        ]

    def test_skip_leaves_them_out_and_says_so(self, folder: Path, dataset: Entry) -> None:
        found = scan([dataset(missing_caption="skip")], "tf")
        assert ids(found) == ["fox"]
        assert found.notes == [
            f"datasets[0]: 4 of 5 images in {folder} have no .txt file (ant.png, bee-fly.png, cat_and_dog.png, ...); "
            'missing_caption = "skip"'
        ]

    def test_empty_gives_an_empty_text_and_says_so(self, folder: Path, dataset: Entry) -> None:
        found = scan([dataset(missing_caption="empty")], "tf")
        assert [item.caption for item in found.items] == ["", "", "", "", "a fox"]
        assert found.notes[0].endswith('missing_caption = "empty"')

    def test_stem_makes_words_of_the_file_name(self, folder: Path, dataset: Entry) -> None:
        found = scan([dataset(missing_caption="stem")], "tf")
        assert [item.caption for item in found.items] == ["ant", "bee fly", "cat and dog", "eel", "a fox"]
        assert found.notes[0].endswith('missing_caption = "stem"')

    def test_up_to_three_names_are_not_shortened(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        picture(tmp_path / "images" / "a.png", caption=None)
        assert " (a.png); write" in problems(dataset())[0]

    def test_skipping_every_image_does_not_claim_that_there_are_none(
        self, tmp_path: Path, picture: Make, dataset: Entry
    ) -> None:
        picture(tmp_path / "images" / "a.png", caption=None)
        (problem,) = problems(dataset(missing_caption="skip"))
        assert "holds no images" not in problem
        assert "caption" in problem


class TestResize:
    @pytest.mark.parametrize(
        ("size", "kept"),
        [((128, 40), "lanczos"), ((64, 64), "lanczos"), ((512, 256), "lanczos"), ((96, 48), "none")],
    )
    def test_a_squashed_image_loses_its_proportions_and_nothing_else(
        self, tmp_path: Path, picture: Make, dataset: Entry, size: tuple[int, int], kept: str
    ) -> None:
        picture(tmp_path / "images" / "a.png", size)
        sides = {"resolution": (96, 48), "enable_bucket": False}
        (cut,) = scan([dataset(**sides)], "tf").items
        (item,) = scan([dataset(**sides, resize="squash")], "tf").items
        assert not cut.squashed and item.squashed
        assert item.bucket == cut.bucket == (96, 48)
        assert item.placement == Placement((96, 48), (96, 48), (0, 0), kept)

    def test_what_a_crop_leaves_out_is_in_a_squashed_picture(self, tmp_path: Path) -> None:
        wide = Image.new("RGB", (96, 32), (0, 0, 0))
        wide.paste((255, 0, 0), (0, 0, 32, 32))
        wide.paste((0, 0, 255), (64, 0, 96, 32))
        cut = resize_crop(wide, place(wide.size, (32, 32)))
        whole = resize_crop(wide, squash(wide.size, (32, 32)))
        assert cut.getpixel((2, 16)) == cut.getpixel((29, 16)) == (0, 0, 0)
        assert (whole.getpixel((2, 16)), whole.getpixel((29, 16))) == ((255, 0, 0), (0, 0, 255))


class TestTransparency:
    def test_a_picture_with_alpha_gets_the_background_of_its_data_set(
        self, tmp_path: Path, picture: Make, dataset: Entry
    ) -> None:
        for name in ("opaque", "clear"):
            picture(tmp_path / "images" / f"{name}.png")
        Image.new("RGBA", (64, 64)).save(tmp_path / "images" / "clear.png")
        (clear, opaque) = scan([dataset(alpha_background="#204060")], "tf").items
        assert (clear.background, opaque.background) == ("#204060", "kept")

    def test_files_of_several_pictures_are_counted(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        picture(tmp_path / "images" / "still.gif")
        frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
        for name in "ab":
            picture(tmp_path / "images" / f"{name}.gif")
            frames[0].save(tmp_path / "images" / f"{name}.gif", save_all=True, append_images=frames[1:])
        (note,) = scan([dataset()], "tf").notes
        assert "2 files hold several pictures" in note and "(a.gif, b.gif)" in note


class TestFolderProblems:
    def test_a_missing_folder(self, tmp_path: Path, dataset: Entry) -> None:
        assert problems(dataset()) == [f"datasets[0].image_directory: {tmp_path / 'images'}: no such folder"]

    def test_a_folder_without_images(self, tmp_path: Path, dataset: Entry) -> None:
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "a.txt").write_text("a")
        (problem,) = problems(dataset())
        assert problem.startswith(f"datasets[0]: {tmp_path / 'images'} holds no images (.png, .jpg, ")

    def test_equal_stems_are_listed_in_pairs_and_nothing_of_them_is_used(
        self, tmp_path: Path, picture: Make, dataset: Entry
    ) -> None:
        for name in ("a.png", "a.jpg", "b.bmp", "c.png", "c.webp"):
            picture(tmp_path / "images" / name)
        folder = tmp_path / "images"
        tail = "have the same name without extension, so they would share one cache file; rename one"
        assert problems(dataset()) == [
            f"{folder / 'a.jpg'} and {folder / 'a.png'} {tail}",
            f"{folder / 'c.png'} and {folder / 'c.webp'} {tail}",
        ]

    def test_an_unreadable_image_is_named_once(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        path = picture(tmp_path / "images" / "a.png")
        path.write_bytes(b"GIF")
        assert problems(dataset()) == [f"{path}: not a readable image (unknown format)"]

    def test_an_image_too_small_for_no_upscale_is_named(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        path = picture(tmp_path / "images" / "a.png", (64, 15))
        assert problems(dataset(bucket_no_upscale=True)) == [
            f"{path}: image of 64x15 is smaller than the step of 16 pixels; remove it, or set bucket_no_upscale = false"
        ]

    def test_all_problems_of_all_datasets_come_together(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        picture(tmp_path / "one" / "a.png", caption=None)
        picture(tmp_path / "one" / "b.png").write_bytes(b"")
        picture(tmp_path / "two" / "c.png")
        picture(tmp_path / "two" / "c.jpg")
        found = problems(
            dataset(image_directory=tmp_path / "one"),
            dataset(name="datasets[1]", image_directory=tmp_path / "two"),
            dataset(name="datasets[2]", image_directory=tmp_path / "three"),
        )
        assert len(found) == 4
        for line, part in zip(found, ("a.png", "b.png: not a readable", "c.jpg and", "datasets[2].image_directory")):
            assert part in line

    def test_a_long_list_is_cut_and_counted(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        for index in range(25):
            picture(tmp_path / "images" / f"{index:02d}.png").write_bytes(b"")
        with pytest.raises(DataError) as caught:
            scan([dataset()], "tf")
        head, *lines = str(caught.value).split("\n  ")
        assert head == "data: 25 problems"
        assert len(lines) == 21
        assert lines[-1] == "... and 5 more"


class TestRecursive:
    def test_sub_folders_give_ids_and_mirrored_cache_folders(
        self, tmp_path: Path, picture: Make, dataset: Entry
    ) -> None:
        picture(tmp_path / "images" / "a.png")
        picture(tmp_path / "images" / "x" / "a.png")
        picture(tmp_path / "images" / "x" / "y" / "a.png")
        found = scan([dataset(recursive=True, cache_directory=tmp_path / "cache")], "tf")
        assert {item.id: item.cache_directory for item in found.items} == {
            "a": tmp_path / "cache",
            "x/a": tmp_path / "cache" / "x",
            "x/y/a": tmp_path / "cache" / "x" / "y",
        }

    def test_equal_stems_in_different_folders_are_fine_and_in_one_folder_are_not(
        self, tmp_path: Path, picture: Make, dataset: Entry
    ) -> None:
        picture(tmp_path / "images" / "x" / "a.png")
        picture(tmp_path / "images" / "x" / "a.jpg")
        picture(tmp_path / "images" / "a.png")
        (problem,) = problems(dataset(recursive=True))
        assert problem.startswith(f"{tmp_path / 'images' / 'x' / 'a.jpg'} and {tmp_path / 'images' / 'x' / 'a.png'} ")

    def test_a_cache_folder_inside_the_images_is_not_scanned(
        self, tmp_path: Path, picture: Make, dataset: Entry
    ) -> None:
        picture(tmp_path / "images" / "a.png")
        picture(tmp_path / "images" / "cache" / "preview.png")
        picture(tmp_path / "images" / "cache2" / "b.png")
        entry = dataset(recursive=True, cache_directory=tmp_path / "images" / "cache")
        assert ids(scan([entry], "tf")) == ["a", "cache2/b"]

    def test_images_that_are_their_own_cache_folder_are_scanned(
        self, tmp_path: Path, picture: Make, dataset: Entry
    ) -> None:
        picture(tmp_path / "images" / "a.png")
        assert ids(scan([dataset(recursive=True, cache_directory=tmp_path / "images")], "tf")) == ["a"]


class TestSeveralDatasets:
    def test_keys_carry_the_number_of_the_dataset(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        picture(tmp_path / "one" / "a.png")
        picture(tmp_path / "two" / "a.png")
        found = scan(
            [
                dataset(image_directory=tmp_path / "one", num_repeats=5),
                dataset(image_directory=tmp_path / "two", batch_size=7),
            ],
            "tf",
        )
        assert [(item.key, item.id, item.num_repeats, item.batch_size) for item in found.items] == [
            ("0:a", "a", 5, 2),
            ("1:a", "a", 1, 7),
        ]

    def test_datasets_whose_items_would_share_cache_files_are_refused(
        self, tmp_path: Path, picture: Make, dataset: Entry
    ) -> None:
        """The second dataset lies in a sub-folder that the first one scans and mirrors: both would write there."""
        picture(tmp_path / "images" / "sub" / "a.png")
        (problem,) = problems(
            dataset(recursive=True),
            dataset(name="datasets[1]", image_directory=tmp_path / "images" / "sub", resolution=(128, 128)),
        )
        assert str(tmp_path / "images" / "sub") in problem
        assert "cache" in problem


class TestJsonl:
    @pytest.fixture
    def jsonl(self, tmp_path: Path, dataset: Entry) -> Callable[..., DatasetConfig]:
        """A dataset of JSONL rows; texts are written as they are."""

        def write(*rows: Any, **changes: Any) -> DatasetConfig:
            lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
            path = tmp_path / "meta.jsonl"
            path.write_bytes("\n".join(lines).encode())
            return dataset(image_jsonl_file=path, **changes)

        return write

    def test_rows_become_items(self, tmp_path: Path, picture: Make, jsonl: Entry) -> None:
        first = picture(tmp_path / "p" / "b.png", caption=None)
        second = picture(tmp_path / "p" / "a.png", caption=None)
        entry = jsonl({"image_path": str(first), "caption": " one "}, {"image_path": str(second), "caption": "two"})
        found = scan([entry], "tf")
        assert [(item.id, item.caption, item.path) for item in found.items] == [
            ("a", "two", second),
            ("b", "one", first),
        ]
        assert all(item.cache_directory == tmp_path / "cache" for item in found.items)

    def test_image_path_0_is_another_spelling(self, tmp_path: Path, picture: Make, jsonl: Entry) -> None:
        path = picture(tmp_path / "a.png", caption=None)
        assert ids(scan([jsonl({"image_path_0": str(path), "caption": "x"})], "tf")) == ["a"]

    def test_blank_lines_and_a_byte_order_mark_are_skipped(self, tmp_path: Path, picture: Make, jsonl: Entry) -> None:
        row = {"image_path": str(picture(tmp_path / "a.png", caption=None)), "caption": "x"}
        assert ids(scan([jsonl("\ufeff", json.dumps(row), "", "   ")], "tf")) == ["a"]
        assert ids(scan([jsonl("\ufeff" + json.dumps(row))], "tf")) == ["a"]

    def test_windows_line_ends(self, tmp_path: Path, picture: Make, jsonl: Entry) -> None:
        row = json.dumps({"image_path": str(picture(tmp_path / "a.png", caption=None)), "caption": "x"})
        assert ids(scan([jsonl(row + "\r", "\r")], "tf")) == ["a"]

    @pytest.mark.parametrize("separator", ["\u2028", "\u0085"], ids=["U+2028", "U+0085"])
    def test_only_line_feeds_end_a_line(self, tmp_path: Path, picture: Make, jsonl: Entry, separator: str) -> None:
        """JSON allows line separators of Unicode unescaped inside a text; `json.dumps` writes them so."""
        row = {"image_path": str(picture(tmp_path / "a.png", caption=None)), "caption": f"one{separator}two"}
        assert scan([jsonl(row)], "tf").items[0].caption == f"one{separator}two"

    def test_paths_are_relative_to_the_working_directory_then_to_the_file(
        self, tmp_path: Path, picture: Make, jsonl: Entry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        work = tmp_path / "work"
        in_both = picture(work / "p" / "a.png", (64, 64), caption=None)
        picture(tmp_path / "p" / "a.png", (64, 64), caption=None)
        beside = picture(tmp_path / "p" / "b.png", (64, 64), caption=None)
        monkeypatch.chdir(work)
        entry = jsonl({"image_path": "p/a.png", "caption": "x"}, {"image_path": "p/b.png", "caption": "y"})
        found = {item.stem: item.path.resolve() for item in scan([entry], "tf").items}
        assert found == {"a": in_both, "b": beside}

    def test_ids_are_relative_to_the_common_parent_and_the_cache_mirrors_them(
        self, tmp_path: Path, picture: Make, jsonl: Entry
    ) -> None:
        rows = [
            {"image_path": str(picture(tmp_path / name, caption=None)), "caption": name}
            for name in ("p/x/a.png", "p/y/a.png", "p/y/z/b.png")
        ]
        found = scan([jsonl(*rows)], "tf")
        cache = tmp_path / "cache"
        assert [(item.id, item.cache_directory) for item in found.items] == [
            ("x/a", cache / "x"),
            ("y/a", cache / "y"),
            ("y/z/b", cache / "y" / "z"),
        ]

    def test_equal_stems_of_one_folder_are_refused(self, tmp_path: Path, picture: Make, jsonl: Entry) -> None:
        rows = [{"image_path": str(picture(tmp_path / n, caption=None)), "caption": n} for n in ("a.png", "a.jpg")]
        (problem,) = problems(jsonl(*rows))
        assert problem.startswith(f"{tmp_path / 'a.jpg'} and {tmp_path / 'a.png'} have the same name")

    def test_one_image_listed_twice_is_refused_as_such(self, tmp_path: Path, picture: Make, jsonl: Entry) -> None:
        path = picture(tmp_path / "a.png", caption=None)
        (problem,) = problems(jsonl(*({"image_path": str(path), "caption": caption} for caption in "xy")))
        assert str(path) in problem
        assert "rename" not in problem, "renaming cannot help an image that is listed twice"

    def test_every_bad_line_is_reported_with_its_number(self, tmp_path: Path, picture: Make, jsonl: Entry) -> None:
        good = {"image_path": str(picture(tmp_path / "a.png", caption=None)), "caption": "x"}
        entry = jsonl(
            good,
            "",
            '{"image_path": ',
            "[1, 2]",
            {"caption": "x"},
            {"image_path": 7, "caption": "x"},
            {"image_path": "nowhere.png", "caption": "x"},
            {"image_path": good["image_path"]},
            {**good, "caption": ["x"]},
            {**good, "caption": ""},
            {**good, "caption": " \t\u200b"},
            {**good, "caption": None},
            {**good, "caption": "a\0b"},
            {**good, "control_path": "c.png"},
            {**good, "image_path_1": "c.png"},
        )
        where = f"{tmp_path / 'meta.jsonl'} line"
        assert problems(entry) == [
            f"{where} 3: not JSON (Expecting value at column 16)",
            f"{where} 4: is [1, 2], expected an object with image_path and caption",
            f"{where} 5: image_path is missing",
            f"{where} 6: image_path is missing",
            f"{where} 7: image nowhere.png: no such file",
            f'{where} 8: caption is missing; write it, or set missing_caption = "skip", "empty" or "stem"',
            f"{where} 9: caption is ['x'], expected a text",
            f'{where} 10: caption is empty; write it, or set missing_caption = "skip", "empty" or "stem"',
            f'{where} 11: caption is empty; write it, or set missing_caption = "skip", "empty" or "stem"',
            f'{where} 12: caption is missing; write it, or set missing_caption = "skip", "empty" or "stem"',
            f"{where} 13: caption holds a NUL character; write plain text",
            f"{where} 14: control_path is for editing models; this architecture takes one image per line",
            f"{where} 15: image_path_1 is for editing models; this architecture takes one image per line",
        ]

    @pytest.mark.parametrize(
        ("mode", "captions"),
        [("skip", {"b": "x"}), ("empty", {"a_1": "", "b": "x"}), ("stem", {"a_1": "a 1", "b": "x"})],
    )
    def test_missing_captions(
        self, tmp_path: Path, picture: Make, jsonl: Entry, mode: str, captions: dict[str, str]
    ) -> None:
        first, second = (picture(tmp_path / f"{name}.png", caption=None) for name in ("a_1", "b"))
        for nothing in ({}, {"caption": None}, {"caption": ""}, {"caption": " \n"}):
            rows = [{"image_path": str(first), **nothing}, {"image_path": str(second), "caption": "x"}]
            found = scan([jsonl(*rows, missing_caption=mode)], "tf")
            assert {item.stem: item.caption for item in found.items} == captions

    @pytest.mark.parametrize("mode", ["skip", "empty", "stem"])
    def test_what_is_done_about_missing_captions_is_said(
        self, tmp_path: Path, picture: Make, jsonl: Entry, mode: str
    ) -> None:
        first, second = (picture(tmp_path / f"{name}.png", caption=None) for name in ("a", "b"))
        entry = jsonl({"image_path": str(first)}, {"image_path": str(second), "caption": "x"}, missing_caption=mode)
        (note,) = scan([entry], "tf").notes
        assert "1 of 2" in note
        assert f'missing_caption = "{mode}"' in note

    def test_a_missing_file(self, tmp_path: Path, dataset: Entry) -> None:
        assert problems(dataset(image_jsonl_file=tmp_path / "no.jsonl")) == [
            f"datasets[0].image_jsonl_file: {tmp_path / 'no.jsonl'}: no such file"
        ]

    def test_a_file_that_is_not_utf8(self, tmp_path: Path, dataset: Entry) -> None:
        path = tmp_path / "meta.jsonl"
        path.write_bytes(b'{"caption": "\xff"}')
        (problem,) = problems(dataset(image_jsonl_file=path))
        assert f"{path}: is not UTF-8 text: line 1 holds the byte FF" in problem

    def test_a_file_without_rows(self, tmp_path: Path, jsonl: Entry) -> None:
        (problem,) = problems(jsonl("", ""))
        assert problem.startswith(f"datasets[0]: {tmp_path / 'meta.jsonl'} holds no images")


def test_scanning_says_nothing_on_its_own(
    tmp_path: Path, picture: Make, dataset: Entry, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    picture(tmp_path / "images" / "a.png")
    with caplog.at_level(logging.DEBUG, logger="musubi_tuner"):
        scan([dataset()], "tf")
    assert capsys.readouterr() == ("", "")
    assert caplog.records == []


class TestMadeCaptions:
    def test_variants_of_a_shuffled_caption_are_the_captions_of_the_item(
        self, dataset: Entry, picture: Make, tmp_path: Path
    ) -> None:
        picture(tmp_path / "images" / "a.png", caption="a, b, c, d")
        text = CaptionSettings(shuffle_caption=True, text_variants=4, trigger_word="ohwx")
        (item,) = scan([dataset(text=text)], "tf").items
        assert len(item.captions) == 4 and len(set(item.captions)) > 1
        assert all(
            caption.startswith("ohwx, ") and sorted(caption) == sorted("ohwx, a, b, c, d") for caption in item.captions
        )

    def test_class_tokens_stand_for_missing_captions(self, dataset: Entry, picture: Make, tmp_path: Path) -> None:
        picture(tmp_path / "images" / "a.png", caption=None)
        picture(tmp_path / "images" / "b.png", caption="mine")
        found = scan([dataset(text=CaptionSettings(class_tokens="a cat"))], "tf")
        assert [item.caption for item in found.items] == ["a cat", "mine"]
        assert any("class_tokens is used instead" in note for note in found.notes)

    @pytest.mark.parametrize(("repeats", "expected"), [(1, [1, 1]), (5, [3, 2]), (10, [5, 5])])
    def test_regularisation_images_are_repeated_until_there_are_as_many(
        self, repeats: int, expected: list[int], dataset: Entry, picture: Make, tmp_path: Path
    ) -> None:
        picture(tmp_path / "images" / "a.png")
        for name in ("b", "c"):
            picture(tmp_path / "reg" / f"{name}.png")
        sets = [dataset(num_repeats=repeats), dataset(image_directory=tmp_path / "reg", is_reg=True)]
        assert [item.num_repeats for item in scan(sets, "tf").items] == [repeats, *expected]
