"""Which files of a folder are pictures of a data set, and what is said of the others."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.data import images
from musubi_tuner.data.folders import list_pictures
from musubi_tuner.data.images import EXTENSIONS, PLUGINS
from musubi_tuner.data.sources import scan
from musubi_tuner.errors import DataError

Make = Callable[..., Path]
Entry = Callable[..., DatasetConfig]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links need a right there")


def names(root: Path, recursive: bool = True, **folders: list[Path]) -> list[str]:
    return [path.relative_to(root).as_posix() for path in list_pictures(root, recursive, **folders).pictures]


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


class TestLinks:
    def test_folders_behind_links_are_entered_once_and_by_their_own_path(self, tmp_path: Path) -> None:
        root = tmp_path / "set"
        touch(root / "b" / "x.png", tmp_path / "far" / "y.png", tmp_path / "far" / "deep" / "z.png")
        for link, target in (("a", root / "b"), ("c", tmp_path / "far"), ("d", tmp_path / "far"), ("e", root / "c")):
            (root / link).symlink_to(target)
        (root / "b" / "f").symlink_to(tmp_path / "far" / "deep")
        assert names(root) == ["b/f/z.png", "b/x.png", "c/y.png"]

    def test_circles_end(self, tmp_path: Path) -> None:
        root = tmp_path / "set"
        touch(root / "sub" / "x.png")
        (root / "sub" / "self").symlink_to(root / "sub")
        (root / "sub" / "up").symlink_to(root)
        (root / "sub" / "round").symlink_to(tmp_path / "other")
        touch(tmp_path / "other" / "y.png")
        (tmp_path / "other" / "back").symlink_to(root / "sub")
        (root / "nothing").symlink_to(root / "nothing")
        assert names(root) == ["sub/round/y.png", "sub/x.png"]

    def test_the_folder_itself_and_files_may_be_links(self, tmp_path: Path) -> None:
        touch(tmp_path / "real" / "x.png", tmp_path / "elsewhere" / "y.jpg")
        (tmp_path / "real" / "y.png").symlink_to(tmp_path / "elsewhere" / "y.jpg")
        (tmp_path / "set").symlink_to(tmp_path / "real")
        assert names(tmp_path / "set", recursive=False) == ["x.png", "y.png"]

    def test_without_recursion_no_folder_is_entered(self, tmp_path: Path) -> None:
        touch(tmp_path / "set" / "x.png", tmp_path / "far" / "y.png")
        (tmp_path / "set" / "link").symlink_to(tmp_path / "far")
        assert names(tmp_path / "set", recursive=False) == ["x.png"]

    def test_links_that_lead_nowhere_are_counted(self, tmp_path: Path) -> None:
        touch(tmp_path / "x.png")
        (tmp_path / "lost.png").symlink_to(tmp_path / "gone.png")
        listing = list_pictures(tmp_path, False)
        assert [path.name for path in listing.pictures] == ["x.png"]
        assert "1 image is left out" in listing.notes[0] and "broken links (lost.png)" in listing.notes[0]

    def test_items_of_a_linked_folder_are_cached_below_the_link(
        self, tmp_path: Path, picture: Make, dataset: Entry
    ) -> None:
        picture(tmp_path / "images" / "a.png")
        picture(tmp_path / "far" / "b.png")
        (tmp_path / "images" / "link").symlink_to(tmp_path / "far")
        found = scan([dataset(recursive=True, cache_directory=tmp_path / "cache")], "tf")
        assert [(item.id, item.cache_directory.relative_to(tmp_path).as_posix()) for item in found.items] == [
            ("a", "cache"),
            ("link/b", "cache/link"),
        ]


class TestHidden:
    RUBBISH = (".ipynb_checkpoints", ".Trash-1000/files", ".thumbnails", "@eaDir/p.png", "__MACOSX", "$RECYCLE.BIN/S-1",
               "System Volume Information", "lost+found", "#recycle", ".hidden")  # fmt: skip

    def test_hidden_and_system_folders_and_hidden_files_are_left_out_in_one_note(self, tmp_path: Path) -> None:
        root = tmp_path / "set"
        touch(*(root / folder / "q.png" for folder in self.RUBBISH), root / "sub" / "@EADIR" / "q.png")
        touch(root / "._p.png", root / "sub" / ".p.png", root / "sub" / "p.png", root / ".git" / "config")
        listing = list_pictures(root, True)
        assert [path.relative_to(root).as_posix() for path in listing.pictures] == ["sub/p.png"]
        (note,) = listing.notes
        assert f"{len(self.RUBBISH) + 3} images are left out" in note and ".git" not in note

    def test_a_folder_that_lies_below_a_hidden_one_is_a_data_set(self, tmp_path: Path) -> None:
        root = tmp_path / ".data" / "__MACOSX"
        touch(root / "p.png")
        assert (names(root), list_pictures(root, True).notes) == (["p.png"], [])

    def test_nothing_left_is_explained(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        touch(tmp_path / "images" / "._a.png", tmp_path / "images" / "b.heic")
        with pytest.raises(DataError, match=r"holds no images .*\n.*hidden.*\n.*1 \.heic"):
            scan([dataset()], "tf")


class TestOutput:
    def test_nothing_that_a_run_writes_is_a_picture(self, tmp_path: Path) -> None:
        root = tmp_path / "set"
        touch(root / "p.png", root / "run" / "sample" / "t_00000000_00.png", root / "masks" / "p.png")
        (root / "drawn").symlink_to(root / "run" / "sample")
        listing = list_pictures(root, True, apart=[root / "run"], silently=[root / "masks"])
        assert [path.name for path in listing.pictures] == ["p.png"]
        (note,) = listing.notes
        assert "output folders" in note and "(drawn, run)" in note

    def test_a_data_set_is_listed_without_output_cache_and_masks(
        self, tmp_path: Path, picture: Make, dataset: Entry
    ) -> None:
        root = tmp_path / "images"
        for place in ("p", "run/sample/s", "others_masks/p", "cache/c", "masks/p"):
            picture(root / f"{place}.png")
        entry = dataset(
            recursive=True,
            apart=(root / "run", root / "others_masks", root / "masks"),
            cache_directory=root / "cache",
            mask_source="file",
            mask_directory=root / "masks",
        )
        found = scan([entry], "tf")
        assert [(item.id, item.mask is not None) for item in found.items] == [("p", True)]
        (note,) = found.notes
        assert "2 images are left out" in note

    @pytest.mark.parametrize("marks", [["checkpoints.json"], ["metrics.jsonl", "t.config.toml"]])
    def test_output_of_other_runs_is_known_by_its_files(self, tmp_path: Path, marks: list[str]) -> None:
        touch(tmp_path / "sub" / "p.png", tmp_path / "old" / "sample" / "s.png", *(tmp_path / "old" / m for m in marks))
        assert names(tmp_path) == ["sub/p.png"]
        # The folder that somebody names as the data set is taken at the word, but for what runs draw there.
        touch(tmp_path / "old" / "p.png")
        assert names(tmp_path / "old") == ["p.png"]

    def test_metrics_alone_make_no_output_folder(self, tmp_path: Path) -> None:
        touch(tmp_path / "sub" / "p.png", tmp_path / "sub" / "metrics.jsonl")
        assert names(tmp_path) == ["sub/p.png"]

    def test_a_data_set_may_lie_in_or_be_the_output_folder(self, tmp_path: Path) -> None:
        touch(tmp_path / "out" / "images" / "sub" / "p.png", tmp_path / "out" / "sample" / "s.png")
        assert names(tmp_path / "out" / "images", apart=[tmp_path / "out"]) == ["sub/p.png"]
        assert names(tmp_path / "out", apart=[tmp_path / "out"]) == ["images/sub/p.png"]


class TestFormats:
    @pytest.fixture
    def modules(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType | None]:
        """Plug-ins as they are found: none is installed; a test may add one."""
        found: dict[str, ModuleType | None] = dict.fromkeys((module for module, _ in PLUGINS.values()), None)
        for module in found:
            monkeypatch.setitem(sys.modules, module, None)  # importing it fails
        images._registered.cache_clear()
        yield found
        images._registered.cache_clear()

    def test_every_ending_is_read_or_counted(self, tmp_path: Path, modules: dict[str, ModuleType | None]) -> None:
        touch(*(tmp_path / f"a{ending}" for ending in EXTENSIONS))
        touch(*(tmp_path / f"b{n}.{end}" for n, end in enumerate(["HEIC", "heic", "jxl", "psd", "CR2", "svg", "tga"])))
        touch(tmp_path / "a.txt", tmp_path / "notes.md", tmp_path / "Thumbs.db")
        listing = list_pictures(tmp_path, False)
        assert {path.suffix for path in listing.pictures} == set(EXTENSIONS)
        (note,) = listing.notes
        assert "7 images are left out" in note
        assert "(1 .cr2, 2 .heic, 1 .jxl, 1 .psd, 1 .svg, 1 .tga)" in note
        assert "pip install pillow-heif pillow-jxl-plugin" in note

    def test_a_plug_in_makes_its_formats_readable(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: dict[str, ModuleType | None]
    ) -> None:
        calls = []
        plugin = ModuleType("pillow_heif")
        plugin.register_heif_opener = lambda: calls.append(1)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
        touch(tmp_path / "a.heic", tmp_path / "b.hif", tmp_path / "c.jxl")
        listing = list_pictures(tmp_path, False)
        assert [path.name for path in listing.pictures] == ["a.heic", "b.hif"]
        assert calls == [1]
        assert "(1 .jxl)" in listing.notes[0]

    def test_pictures_of_one_name_are_listed_together(self, tmp_path: Path, picture: Make, dataset: Entry) -> None:
        for ending in ("png", "gif", "tif"):
            picture(tmp_path / "images" / f"a.{ending}")
        with pytest.raises(DataError, match=r"a\.gif and .*a\.png have the same name .*\n.*a\.tif have the same name"):
            scan([dataset()], "tf")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may look everywhere")
def test_a_folder_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    touch(tmp_path / "closed" / "p.png")
    (tmp_path / "closed").chmod(0)
    try:
        assert "closed: cannot be read" in list_pictures(tmp_path, True).problems[0]
    finally:
        (tmp_path / "closed").chmod(0o700)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_text_is_a_problem(tmp_path: Path) -> None:
    touch(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")))
    (problem,) = list_pictures(tmp_path, False).problems
    assert r"caf\xe9.png" in problem and "not UTF-8" in problem
