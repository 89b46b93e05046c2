"""Choosing a path: nothing outside of the folders that may be seen."""

import random
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from musubi_tuner.errors import ConfigError
from musubi_tuner.ui.folders import Folders


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """A project and another folder, with links that lead out, and something outside."""
    for name in ("project/data", "project/.git", "more/deep", "outside"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "outside" / "secret.txt").write_text("secret")
    (tmp_path / "project" / "a.safetensors").write_bytes(b"12")
    (tmp_path / "project" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "project" / "to_more").symlink_to(tmp_path / "more")
    (tmp_path / "project" / "loop").symlink_to("loop")
    return Folders((tmp_path / "project", tmp_path / "more"))


def test_a_folder_is_listed_as_a_run_file_would_have_it(folders: Folders, tmp_path: Path) -> None:
    found = folders.listing("")
    assert [(e["name"], e["path"], e["folder"]) for e in found["entries"]] == [
        ("data", "data", True), ("to_more", "to_more", True), ("a.safetensors", "a.safetensors", False),
    ]  # fmt: skip
    assert found["parent"] is None and found["roots"] == [".", str(tmp_path / "more")]
    assert folders.listing("data")["parent"] == "."
    assert folders.listing(str(tmp_path / "more"))["entries"][0]["path"] == str(tmp_path / "more" / "deep")


def test_no_path_leads_out(folders: Folders, tmp_path: Path) -> None:
    pieces = [
        "..",
        ".",
        "",
        "link",
        "data",
        "~",
        "\\",
        "\0",
        "/",
        "outside",
        ".git",
        "C:",
        str(tmp_path),
        "%2e%2e",
        "ü" * 300,
    ]
    draw = random.Random(0)
    for _ in range(2000):
        text = draw.choice(["", "/"]) + "/".join(draw.choices(pieces, k=draw.randint(1, 6)))
        try:
            found = folders.listing(text)
        except ConfigError:
            continue
        assert "secret.txt" not in str(found) and ".git" not in str(found), text
    for text in ("link", "..", ".git", "/", str(tmp_path / "outside")):
        with pytest.raises(ConfigError, match="--root"):
            folders.listing(text)


def test_a_hidden_folder_may_be_a_root(tmp_path: Path) -> None:
    (tmp_path / ".hidden" / "a").mkdir(parents=True)
    found = Folders((tmp_path, tmp_path / ".hidden")).listing(str(tmp_path / ".hidden"))
    assert [entry["name"] for entry in found["entries"]] == ["a"]
