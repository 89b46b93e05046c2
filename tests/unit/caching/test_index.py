"""The index of a cache folder: derived from headers, believed only as long as files did not change."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from musubi_tuner.caching.file_format import KINDS, cache_path, plain_name
from musubi_tuner.caching.index import CachedFile, CacheIndex, index_path, open_items
from musubi_tuner.errors import CacheError
from musubi_tuner.headers import read_header

pytestmark = pytest.mark.long

KINDS_LIST = list(KINDS)


def roots(project: Any) -> list[Path]:
    return [dataset.cache_directory for dataset in project.config().datasets]


def open_all(project: Any) -> list[dict[str, CachedFile]]:
    return open_items(project.items(), roots(project), [KINDS_LIST], "tf")


def from_headers(project: Any) -> list[dict[str, CachedFile]]:
    """What the index must say, read from every header."""
    return [
        {
            kind: CachedFile(path, {plain_name(key): entry for key, entry in read_header(path).tensors.items()})
            for kind in KINDS
            for path in [cache_path(item, kind, "tf")]
        }
        for item in project.items()
    ]


def stored(project: Any) -> dict[str, Any]:
    return json.loads((project.root / "cache" / "index_tf.json").read_text())


@pytest.fixture
def headers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose headers are read."""
    seen: list[str] = []

    def read(path: Path) -> Any:
        seen.append(path.name)
        return read_header(path)

    monkeypatch.setattr("musubi_tuner.caching.index.read_header", read)
    return seen


def test_the_index_lies_in_the_cache_folder_and_carries_the_code() -> None:
    assert index_path(Path("cache"), "tf") == Path("cache/index_tf.json")


def test_the_first_start_reads_headers_and_writes_the_index(cached: Any) -> None:
    assert not (cached.root / "cache" / "index_tf.json").exists()
    assert open_all(cached) == from_headers(cached)
    assert set(stored(cached)["files"]) == set(cached.files())


def test_the_second_start_opens_no_headers(cached: Any, headers: list[str]) -> None:
    expected = open_all(cached)
    assert len(headers) == 6
    assert open_all(cached) == expected
    assert len(headers) == 6


def test_a_deleted_index_is_built_again(cached: Any) -> None:
    expected = open_all(cached)
    before = stored(cached)
    (cached.root / "cache" / "index_tf.json").unlink()
    assert open_all(cached) == expected
    assert stored(cached) == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\0" * 100,
        b"\xff\xfe",
        b'{"version": 0, "layouts": [], "files": {}}',
        b'{"version": 1}',
        b'{"version": 1, "layouts": [], "files": []}',
    ],
    ids=repr,
)
def test_a_broken_index_is_built_again(cached: Any, content: bytes) -> None:
    expected = open_all(cached)
    (cached.root / "cache" / "index_tf.json").write_bytes(content)
    assert open_all(cached) == expected
    assert stored(cached)["version"] == 1
    assert set(stored(cached)["files"]) == set(cached.files())


def test_an_entry_that_points_nowhere_is_read_again(cached: Any) -> None:
    """A damaged index must cost time, not the run: its layouts are gone, its files are still listed."""
    expected = open_all(cached)
    path = cached.root / "cache" / "index_tf.json"
    path.write_text(json.dumps(stored(cached) | {"layouts": []}))
    assert open_all(cached) == expected


def test_a_rewritten_file_is_read_again(cached: Any) -> None:
    open_all(cached)
    path = cached.root / "cache" / "a_tf_te.safetensors"
    save_file({"t5_vec_float32": torch.ones(7, 5)}, path, metadata={"long": "x" * 1000})
    found = open_all(cached)
    assert found == from_headers(cached)
    assert found[0]["text"].tensors["t5_vec"].shape == (7, 5)


def test_a_rewritten_file_of_the_same_size_is_read_again(cached: Any) -> None:
    """Same keys and size, other order of the tensors: only the time tells."""
    open_all(cached)
    path = cached.root / "cache" / "a_tf_te.safetensors"
    save_file({"a_float32": torch.zeros(2, 3), "b_float32": torch.ones(6)}, path)
    open_all(cached)
    size, time = path.stat().st_size, path.stat().st_mtime_ns
    save_file({"a_float32": torch.zeros(6), "b_float32": torch.ones(3, 2)}, path)
    assert path.stat().st_size == size
    os.utime(path, ns=(time + 10, time + 10))
    assert open_all(cached)[0]["text"].tensors["b"].shape == (3, 2)


def test_layouts_are_stored_once_for_files_alike(project: Any) -> None:
    for index in range(6):
        project.picture(f"p{index}", caption="red " * (index + 1))
    project.picture("wide", (128, 64))
    for kind in KINDS:
        assert project.run(kind) == 0
    assert open_all(project) == from_headers(project)
    index = stored(project)
    assert len(index["files"]) == 7 * 3
    # Latents of two sizes, text, experts: captions and headers of different length share a layout.
    assert len(index["layouts"]) == 4


def test_an_unchanged_index_is_not_written_again(cached: Any) -> None:
    open_all(cached)
    path = cached.root / "cache" / "index_tf.json"
    os.utime(path, ns=(5, 5))
    open_all(cached)
    assert path.stat().st_mtime_ns == 5


def test_a_folder_that_cannot_be_written_only_warns(cached: Any, caplog: pytest.LogCaptureFixture) -> None:
    expected = from_headers(cached)
    (cached.root / "cache" / "index_tf.json").mkdir()  # nothing can be renamed onto a folder, whoever the user is
    with caplog.at_level(logging.WARNING):
        assert open_all(cached) == expected
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("cannot write cache/index_tf.json (")
    assert record.getMessage().endswith("); what it would hold is found out at each start")
    assert [path.name for path in (cached.root / "cache").glob(".tmp-*")] == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not stop this user")
def test_a_read_only_folder_only_warns(cached: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder = cached.root / "cache"
    folder.chmod(0o555)
    try:
        with caplog.at_level(logging.WARNING):
            assert open_all(cached) == from_headers(cached)
    finally:
        folder.chmod(0o755)
    assert len(caplog.records) == 1
    assert not (folder / "index_tf.json").exists()


def test_sub_folders_are_part_of_the_names(project: Any) -> None:
    project.tables["datasets"][0]["recursive"] = True
    project.picture("x/a")
    project.picture("y/a")
    assert project.run("text") == 0
    found = open_items(project.items(), roots(project), [["text"]], "tf")
    assert [files["text"].path.as_posix() for files in found] == [
        "cache/x/a_tf_te.safetensors",
        "cache/y/a_tf_te.safetensors",
    ]
    assert set(stored(project)["files"]) == {"x/a_tf_te.safetensors", "y/a_tf_te.safetensors"}


def test_a_moved_cache_folder_keeps_its_index_and_a_copy_reads_headers_once(cached: Any, headers: list[str]) -> None:
    open_all(cached)
    headers.clear()
    (cached.root / "cache").rename(cached.root / "moved")
    cached.tables["datasets"][0]["cache_directory"] = "moved"
    found = open_all(cached)
    assert found[0]["text"].path == Path("moved/a_tf_te.safetensors")
    assert headers == []
    shutil.copytree(cached.root / "moved", cached.root / "copy")
    cached.tables["datasets"][0]["cache_directory"] = "copy"
    for _ in range(2):
        open_all(cached)
        assert len(headers) == 6


def test_files_that_swap_their_names_are_read_again(project: Any) -> None:
    """Two layouts in one size: only inode and ctime tell that the files are others."""
    for name, size in (("a", (64, 128)), ("b", (128, 64))):
        project.picture(name, size)
    assert project.run("text") == 0
    paths = [cache_path(item, "text", "tf") for item in project.items()]
    for path, shape in zip(paths, ((2, 3), (3, 2)), strict=True):
        save_file({"t5_vec_float32": torch.ones(shape)}, path)
        os.utime(path, ns=(10**18, 10**18))
    assert len({path.stat().st_size for path in paths}) == 1

    def shapes() -> list[tuple[int, ...]]:
        opened = open_items(project.items(), roots(project), [["text"]], "tf")
        return [files["text"].tensors["t5_vec"].shape for files in opened]

    assert shapes() == [(2, 3), (3, 2)]
    spare = paths[0].with_name("spare")
    paths[0].rename(spare)
    paths[1].rename(paths[0])
    spare.rename(paths[1])
    assert shapes() == [(3, 2), (2, 3)]


def test_missing_files_are_listed_with_the_job_and_at_most_ten(project: Any) -> None:
    for index in range(6):
        project.picture(f"p{index}")
    with pytest.raises(CacheError) as caught:
        open_items(project.items(), roots(project), [["latents", "text"]], "tf")
    head, *lines = str(caught.value).split("\n  ")
    assert head == "caches are not complete; run the cache jobs first"
    assert lines[:2] == [
        "p0: no latents cache (p0_0064x0064_tf.safetensors)",
        "p0: no text cache (p0_tf_te.safetensors)",
    ]
    assert len(lines) == 11
    assert lines[-1] == "... and 2 more"
    assert not (project.root / "cache" / "index_tf.json").exists()


def test_a_file_that_disappeared_is_missing_although_the_index_knows_it(cached: Any) -> None:
    open_all(cached)
    (cached.root / "cache" / "b_tf_te.safetensors").unlink()
    with pytest.raises(CacheError, match=r"b: no text cache \(b_tf_te\.safetensors\)"):
        open_all(cached)


def test_lookup_of_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CacheIndex(tmp_path, "tf").lookup(tmp_path / "a_tf_te.safetensors")
