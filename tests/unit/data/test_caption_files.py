"""Captions that are empty, and captions and images that lie where nobody looks: what is found, and what is said."""

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.data.sources import ScannedItems, scan
from musubi_tuner.errors import DataError

Make = Callable[..., Path]
Entry = Callable[..., DatasetConfig]
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
BLANK = [b"", b" \r\n\t", b"\xef\xbb\xbf", b"\xef\xbb\xbf\xef\xbb\xbf \n", "\u200b\u00a0".encode()]


def problem(*datasets: DatasetConfig) -> str:
    """What scanning complains of, one thing."""
    with pytest.raises(DataError) as caught:
        scan(datasets, "tf")
    head, *lines = str(caught.value).split("\n  ")
    assert head == "data: 1 problem", caught.value
    return lines[0]


def captions(found: ScannedItems) -> dict[str, str]:
    return {item.id: item.caption for item in found.items}


class TestEmpty:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, picture: Make) -> Path:
        """Images a_0, a_1, ... whose caption files hold nothing, one without any, and ``good``."""
        for number, raw in enumerate(BLANK):
            picture(tmp_path / "images" / f"a_{number}.png").with_suffix(".txt").write_bytes(raw)
        picture(tmp_path / "images" / "good.png", caption="a caption")
        picture(tmp_path / "images" / "none.png", caption=None)
        return tmp_path / "images"

    def test_an_error_lists_them(self, dataset: Entry) -> None:
        text = problem(dataset())
        assert "1 of 7 images" in text and "have no .txt file (none.png)" in text
        assert "5 have an empty .txt file (a_0.txt, a_1.txt, a_2.txt, a_3.txt, a_4.txt)" in text
        assert 'missing_caption = "skip", "empty" or "stem"' in text

    def test_alone_they_are_an_error_too(self, dataset: Entry, folder: Path) -> None:
        (folder / "none.txt").write_text("a caption")
        assert "5 of 7 images" in problem(dataset())

    @pytest.mark.parametrize(
        ("mode", "expected"),
        [
            ("skip", {}),
            ("empty", dict.fromkeys(("a_0", "a_4", "none"), "")),
            ("stem", {"a_0": "a 0", "a_4": "a 4", "none": "none"}),
        ],
    )
    def test_the_other_ways_take_them_as_missing_and_say_so(
        self, dataset: Entry, mode: str, expected: dict[str, str]
    ) -> None:
        found = scan([dataset(missing_caption=mode)], "tf")
        assert captions(found).items() >= {"good": "a caption", **expected}.items()
        assert len(found.items) == (1 if mode == "skip" else 7)
        (note,) = found.notes
        assert "5 have an empty .txt file" in note and f'missing_caption = "{mode}"' in note


class TestNames:
    @pytest.mark.parametrize(
        ("image", "text"),
        [("p07.png", "p07.TXT"), ("P07.PNG", "p07.txt"), (f"{NFC}.png", f"{NFD}.txt"), (f"{NFD}.png", f"{NFC}.Txt")],
        ids=["extension", "case", "NFD", "NFC and extension"],
    )
    def test_a_file_whose_name_differs_in_form_only_is_found_and_said(
        self, tmp_path: Path, picture: Make, dataset: Entry, image: str, text: str
    ) -> None:
        picture(tmp_path / "images" / image, caption=None)
        (tmp_path / "images" / text).write_text("its caption")
        found = scan([dataset()], "tf")
        assert captions(found) == {Path(image).stem: "its caption"}
        (note,) = found.notes
        assert "1 images" in note and f"({text} for {image})" in note

    def test_an_exact_name_comes_first_and_nothing_is_said(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        picture(tmp_path / "images" / "a.png", caption="exact")
        (tmp_path / "images" / "a.TXT").write_text("other")
        found = scan([dataset()], "tf")
        assert captions(found) == {"a": "exact"} and not found.notes

    def test_the_file_of_another_image_and_one_of_several_are_not_taken(
        self, tmp_path: Path, picture: Make, dataset: Entry
    ) -> None:
        folder = tmp_path / "images"
        picture(folder / "a.png", caption="of a")
        picture(folder / "A.png", caption=None)
        assert "1 of 2 images" in problem(dataset()) and "(A.png)" in problem(dataset())
        (folder / "a.txt").unlink()
        (folder / "A.png").unlink()
        for name in ("A.txt", "a.TXT"):
            (folder / name).write_text(name)
        assert "(a.png)" in problem(dataset())

    def test_paths_and_masks_of_a_list_are_found_in_another_form(
        self, tmp_path: Path, picture: Make, dataset: Entry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for folder in ("of the file", NFD):
            path = picture(tmp_path / "list" / folder / f"{NFD}.PNG", caption=None)
            picture(tmp_path / "list" / folder / f"m{NFD}.png", caption=None)
            listing = tmp_path / "list" / "meta.jsonl"
            spelled = "of the file" if folder != NFD else NFC
            row = f'"image_path": "{spelled}/{NFC}.png", "mask_path": "{spelled}/m{NFC}.png"'
            listing.write_text(f'{{{row}, "caption": "x"}}', encoding="utf-8")
            (item,) = scan([dataset(image_jsonl_file=listing, mask_source="file")], "tf").items
            assert item.path.resolve() == path
            assert item.mask is not None and item.mask.path is not None and item.mask.path.name == f"m{NFD}.png"

    def test_masks_of_a_folder_are_found_in_another_form(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        picture(tmp_path / "images" / f"{NFC}.png")
        mask = picture(tmp_path / "masks" / f"{NFD}.png", caption=None)
        found = scan([dataset(mask_directory=tmp_path / "masks", mask_source="file")], "tf")
        assert found.items[0].mask is not None and found.items[0].mask.path == mask
        assert not found.notes


class TestHints:
    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("a.caption", 'there is a.caption next to a.png; set caption_extension = ".caption"'),
            ("a.tags", 'caption_extension = ".tags"'),
            ("a.png.txt", 'caption_extension = ".png.txt"'),
            ("a.txt.txt", 'caption_extension = ".txt.txt"'),
            ("a.json", "there is a.json next to a.png, but captions are read from plain text"),
            ("aa.txt", "1 .txt files in {folder} belong to no image (aa.txt)"),
            ("captions/a.txt", "{folder}/captions has files with these names; move them next to their images"),
        ],
    )
    def test_what_lies_there_is_named(
        self, tmp_path: Path, picture: Make, dataset: Entry, name: str, words: str
    ) -> None:
        folder = picture(tmp_path / "images" / "a.png", caption=None).parent
        picture(folder / "b.png")
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
        assert words.format(folder=folder) in problem(dataset())
        notes = scan([dataset(missing_caption="skip")], "tf").notes
        assert len(notes) == 2 and words.format(folder=folder) in notes[1]

    def test_what_is_no_text_is_not(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        folder = picture(tmp_path / "images" / "a.png", caption=None).parent
        (folder / "a.npz").write_bytes(bytes(64))
        (folder / "a.webm").write_text("x" * (1 << 17))
        (folder / "prompt.md").write_text("x")
        assert problem(dataset()).endswith('or set missing_caption = "skip", "empty" or "stem"')

    def test_images_in_sub_folders_are_counted_and_kohyas_numbers_explained(
        self, tmp_path: Path, picture: Make, dataset: Entry
    ) -> None:
        for name in ("10_sks dog/a.png", "10_sks dog/b.png", "plain/deep/c.png", "cache/d.png"):
            picture(tmp_path / "images" / name)
        entry = dataset(cache_directory=tmp_path / "images" / "cache")
        text = problem(entry)
        assert "sub-folders hold 3 (10_sks dog: 2, plain: 1): set recursive = true" in text
        assert "repeats for kohya" in text and "num_repeats = 10" in text
        (note,) = scan([dataset(cache_directory=entry.cache_directory, recursive=True)], "tf").notes
        assert "(10_sks dog)" in note and "num_repeats = 10" in note
        picture(tmp_path / "images" / "e.png")
        (note,) = scan([entry], "tf").notes
        assert "sub-folders are left out" in note and "num_repeats = 10" in note

    def test_folders_with_plain_names_are_no_hint(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        for name in ("a.png", "2024/b.png"):
            picture(tmp_path / "images" / name)
        (tmp_path / "images" / "10_without images").mkdir()
        for recursive in (False, True):
            assert not scan([dataset(recursive=recursive)], "tf").notes

    @pytest.mark.parametrize(
        ("name", "words"),
        [("images.zip", "images.zip may hold them: unpack it"), ("metadata.jsonl", "name it in image_jsonl_file")],
    )
    def test_an_archive_or_a_list_in_a_folder_without_images(
        self, tmp_path: Path, dataset: Entry, name: str, words: str
    ) -> None:
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / name).write_text("")
        assert words in problem(dataset())
