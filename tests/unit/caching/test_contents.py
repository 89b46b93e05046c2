"""No exchange, restore or copy of pictures and masks may pass for what was cached; and what did not change is not read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from musubi_tuner import stamps
from musubi_tuner.caching import contents as contents_module
from musubi_tuner.caching import job as job_module
from musubi_tuner.caching.contents import Contents
from musubi_tuner.caching.file_format import cache_path
from musubi_tuner.caching.status import KindStatus, examine
from musubi_tuner.encoders.locate import file_sha256
from musubi_tuner.headers import read_header
from musubi_tuner.planning.plan import describe, make_plan
from musubi_tuner.stamps import hash_file, hashed_state

pytestmark = pytest.mark.long

ARCHIVED = 1_500_000_000_000_000_000
"""The one modification time of all files of an archive."""


def flat(path: Path, colour: int, mode: str = "RGB") -> Path:
    """A picture whose file has the same size in every colour, and the time of an archive."""
    path.parent.mkdir(exist_ok=True)
    Image.new(mode, (64, 64), (colour,) * len(mode) if mode != "L" else colour).save(path)
    os.utime(path, ns=(ARCHIVED, ARCHIVED))
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed to see whether they changed."""
    seen: list[str] = []

    def watched(path: Path) -> Any:
        seen.append(path.name)
        return hashed_state(path)

    monkeypatch.setattr(contents_module, "hashed_state", watched)
    return seen


@pytest.fixture
def archive(project: Any) -> Any:
    """Items a and b, of equal file sizes and times, with masks like that; their latents are cached."""
    for name, colour in (("a", 50), ("b", 200)):
        flat(project.root / "images" / f"{name}.bmp", colour)
        flat(project.root / "masks" / f"{name}.bmp", colour, "L")
        (project.root / "images" / f"{name}.txt").write_text(f"a {name}")
    project.tables["datasets"][0]["mask_directory"] = "masks"
    assert project.run("latents") == 0
    return project


def look(project: Any, kind: str = "latents", *, save: bool = False) -> KindStatus:
    """The status of one kind as a start would find it."""
    config = project.config()
    known = Contents(config)
    status = examine(config, project.items(config), kind, config.spec.family.checkpoint_options(config), contents=known)
    if save:
        known.save()
    return status


def due(project: Any, kind: str = "latents") -> dict[str, str]:
    return {key.partition(":")[2]: reason for key, reason in look(project, kind).due.items()}


def swap_names(a: Path, b: Path) -> None:
    spare = a.with_name("spare")
    a.rename(spare)
    b.rename(a)
    spare.rename(b)


def restore_in_place(a: Path, b: Path) -> None:
    """An older version comes back under the time of the newer, as backups and synchronisers do."""
    with a.open("r+b") as file:
        file.write(b.read_bytes())
    os.utime(a, ns=(ARCHIVED, ARCHIVED))


def copy_with_times(a: Path, b: Path) -> None:
    shutil.copy2(b, a)


def put_copy_in_place(a: Path, b: Path) -> None:
    shutil.copy2(b, a.with_name("copy"))
    a.with_name("copy").replace(a)


def hard_link(a: Path, b: Path) -> None:
    a.unlink()
    os.link(b, a)


def link(a: Path, b: Path) -> None:
    a.unlink()
    a.symlink_to(b.absolute())


EXCHANGES = [swap_names, restore_in_place, copy_with_times, put_copy_in_place, hard_link, link]


@pytest.mark.parametrize(("folder", "what"), [("images", "image"), ("masks", "mask")])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_file_of_the_same_size_and_time_is_another(
    archive: Any, exchange: Callable[[Path, Path], None], folder: str, what: str
) -> None:
    exchange(archive.root / folder / "a.bmp", archive.root / folder / "b.bmp")
    items = ("a", "b") if exchange is swap_names else ("a",)
    assert due(archive) == dict.fromkeys(items, f"the {what} has changed")


def test_features_of_another_picture_are_stale_too_and_texts_are_not(archive: Any) -> None:
    assert archive.run("text") == archive.run("experts") == 0
    swap_names(archive.root / "images" / "a.bmp", archive.root / "images" / "b.bmp")
    assert set(due(archive, "experts")) == {"a", "b"}
    assert due(archive, "text") == {}


def test_what_did_not_change_is_not_read(archive: Any, hashed: list[str]) -> None:
    assert (look(archive).due, look(archive).hashed) == ({}, {})
    assert hashed == []


def test_a_copied_data_set_is_hashed_once(archive: Any, hashed: list[str]) -> None:
    shutil.copytree(archive.root / "images", archive.root / "copy")
    archive.tables["datasets"][0]["image_directory"] = "copy"
    first = look(archive, save=True)
    assert (first.due, first.fresh) == ({}, 2)
    ((reason, count),) = first.hashed.items()
    assert count == 2
    assert "copied, moved or touched" in reason
    assert sorted(hashed) == ["a.bmp", "b.bmp"]
    assert (look(archive).due, look(archive).hashed) == ({}, {})
    assert len(hashed) == 2


def test_machines_with_copies_of_their_own_that_share_the_caches_hash_once_each(
    archive: Any, hashed: list[str]
) -> None:
    """Neither forgets the other's, however often they take turns."""
    machines = [f"machine{number}" for number in range(3)]
    for name in machines:
        shutil.copytree(archive.root / "images", archive.root / name)
    for _ in range(3):
        for name in machines:
            archive.tables["datasets"][0]["image_directory"] = name
            assert look(archive, save=True).due == {}
    assert len(hashed) == 2 * len(machines)


def test_what_is_remembered_of_a_file_does_not_grow_without_end(archive: Any) -> None:
    path = archive.root / "images" / "a.bmp"
    for second in range(12):
        os.utime(path, ns=(0, second * 10**9 + 1))
        assert look(archive, save=True).due == {}
    index = json.loads((archive.root / "cache" / "index_tf.json").read_text())
    assert len(index["hashes"]["image:a"]) == stamps.KEPT


def test_a_remembered_hash_does_not_excuse_another_picture(archive: Any) -> None:
    """The index knows the swapped files, by name, from an earlier start; their caches are made of others."""
    folder = archive.root / "images"
    os.utime(folder / "a.bmp", ns=(0, 1))
    assert look(archive, save=True).due == {}
    swap_names(folder / "a.bmp", folder / "b.bmp")
    assert set(due(archive)) == {"a", "b"}


def test_looking_writes_nothing(archive: Any) -> None:
    os.utime(archive.root / "images" / "a.bmp", ns=(0, 1))
    before = sorted(archive.root.rglob("*"))
    assert look(archive).hashed.total() == 1
    assert sorted(archive.root.rglob("*")) == before


def test_the_plan_says_what_is_hashed_and_only_a_start_remembers_it(archive: Any) -> None:
    for name in ("a", "b"):
        os.utime(archive.root / "images" / f"{name}.bmp", ns=(0, 1))
    config = archive.config()
    line = "2 pictures are hashed once because their times or inodes are not those that were cached"
    for only_look, said in ((True, True), (False, True), (True, False)):
        before = sorted((archive.root / "cache").iterdir())
        text = describe(config, make_plan(config, 1, download=False, only_look=only_look), 1)
        assert (line in text) == said
        assert (sorted((archive.root / "cache").iterdir()) == before) == only_look


@pytest.mark.parametrize("content", ['{"image:a": 5}', '{"image:a": [5]}', '{"image:a": [[]]}', "[]", "null"])
def test_a_damaged_memory_costs_time_only(archive: Any, content: str) -> None:
    os.utime(archive.root / "images" / "a.bmp", ns=(0, 1))
    index = archive.root / "cache" / "index_tf.json"
    index.write_text(f'{{"version": 1, "layouts": [], "files": {{}}, "hashes": {content}}}')
    assert look(archive).due == {}


class TestOlderCaches:
    @pytest.fixture
    def older(self, archive: Any) -> Any:
        """The same, but the caches were made before ctime and inode were kept."""
        assert archive.run("experts") == 0
        for item in archive.items():
            for kind in ("latents", "experts"):
                path = cache_path(item, kind, "tf")
                header, tensors = read_header(path), load_file(path)
                fingerprint = header.fingerprint
                assert fingerprint is not None
                for name in {"image", "mask_image"} & set(fingerprint):
                    del fingerprint[name]["ctime_ns"], fingerprint[name]["inode"]
                save_file(tensors, path, metadata={**header.metadata, "fingerprint": json.dumps(fingerprint)})
        return archive

    def test_their_pictures_and_masks_are_hashed_once_for_all_kinds_and_the_reason_is_known(
        self, older: Any, hashed: list[str]
    ) -> None:
        config = older.config()
        family, known = config.spec.family.checkpoint_options(config), Contents(config)
        first, second = (
            examine(config, older.items(config), kind, family, contents=known) for kind in ("latents", "experts")
        )
        assert (first.due, second.due, first.hashed.total(), second.hashed.total()) == ({}, {}, 4, 0)
        assert "their caches do not hold their change times" in next(iter(first.hashed))
        known.save()
        assert look(older).hashed == look(older, "experts").hashed == {}
        assert len(hashed) == 4

    def test_what_was_exchanged_before_the_update_is_found(self, older: Any) -> None:
        swap_names(older.root / "images" / "a.bmp", older.root / "images" / "b.bmp")
        assert set(due(older)) == set(due(older, "experts")) == {"a", "b"}


class TestWithoutChangeTimes:
    """A file system that tells nothing of a file but its size and modification time."""

    @pytest.fixture
    def poor(self, archive: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setattr(stamps, "stamps_of", lambda status: (status.st_size, status.st_mtime_ns, 0, 0))
        assert archive.run("latents", archive.config(cache={"run": "always"})) == 0
        restore_in_place(archive.root / "images" / "a.bmp", archive.root / "images" / "b.bmp")
        return archive

    def test_full_verification_reads_everything(self, poor: Any) -> None:
        assert due(poor) == {}
        poor.tables["cache"]["verify"] = "full"
        assert due(poor) == {"a": "the image has changed"}
        because = 'are hashed because cache.verify is "full"'
        assert look(poor).hashed == {f"pictures {because}": 2, f"masks {because}": 2}

    def test_it_reads_the_encoders_too(
        self, poor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hash_memory: Path
    ) -> None:
        path = tmp_path / "big.safetensors"
        path.write_bytes(b"x" * (1 << 20))
        os.utime(path, ns=(ARCHIVED, ARCHIVED))
        first = file_sha256(path)
        path.write_bytes(b"y" * (1 << 20))
        os.utime(path, ns=(ARCHIVED, ARCHIVED))
        assert file_sha256(path) == first
        assert file_sha256(path, full=True) == hash_file(path) != first


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_encoder_weights_of_the_same_size_and_time_are_others(
    tmp_path: Path, exchange: Callable[[Path, Path], None]
) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path, byte in ((a, b"x"), (b, b"y")):
        path.write_bytes(byte * (1 << 20))
        os.utime(path, ns=(ARCHIVED, ARCHIVED))
    wanted = file_sha256(b)
    assert file_sha256(a) != wanted
    exchange(a, b)
    assert file_sha256(a) == wanted


class TestWhileTheJobReads:
    """The hash in the header must be that of the picture that was encoded, not of what came after it."""

    def replacing(self, project: Any, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
        """Picture a becomes another, before or after it is decoded."""
        real = job_module.hashed_state
        path = project.picture("a")
        new = project.picture("z").read_bytes()

        def change() -> None:
            if path.read_bytes() != new:
                path.write_bytes(new)

        def hashed(file: Path) -> Any:
            state = real(file)
            if file.name == "a.png" and when == "before":
                change()
            return state

        monkeypatch.setattr(job_module, "hashed_state", hashed)

    def test_a_picture_that_is_replaced_before_it_is_decoded_fails(
        self, project: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.replacing(project, monkeypatch, "before")
        assert project.run("latents") == 1
        assert "a.png: was written while it was read; run the job again" in capsys.readouterr().err
        assert due(project) == {"a": "missing"}
        assert project.run("latents") == 0
        assert due(project) == {}

    def test_a_picture_that_is_replaced_after_it_was_decoded_is_stale_at_the_next_start(
        self, project: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, new = project.picture("a"), project.picture("z").read_bytes()
        real = job_module.write_item

        def write(*arguments: Any) -> None:
            path.write_bytes(new)
            real(*arguments)

        monkeypatch.setattr(job_module, "write_item", write)
        assert project.run("latents") == 0
        assert due(project) == {"a": "the image has changed"}


class TestTicks:
    """A clock with ticks gives two writes within one tick the same time; which is why hashing waits."""

    @pytest.mark.parametrize(
        ("age_ns", "coarse", "waits_ns"),
        [
            (0, False, stamps.TICK_NS),
            (stamps.TICK_NS, False, 0),
            (10**18, False, 0),
            (0, True, stamps.COARSE_TICK_NS),
            (10**9, True, 10**9),
            (2 * 10**9, True, 0),
            (-(10**12), False, 0),
        ],
    )
    def test_a_fresh_file_is_hashed_when_its_tick_is_over(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, age_ns: int, coarse: bool, waits_ns: int
    ) -> None:
        now = 2 * 10**18 if coarse else 2 * 10**18 + 1
        slept: list[float] = []
        monkeypatch.setattr(stamps.time, "time_ns", lambda: now)
        monkeypatch.setattr(stamps.time, "sleep", slept.append)
        monkeypatch.setattr(stamps, "stamps_of", lambda status: (1, now - age_ns, 1, 7))
        path = tmp_path / "file"
        path.write_bytes(b"x")
        state = hashed_state(path)
        assert slept == [waits_ns / 1e9]
        assert state == {"size": 1, "mtime_ns": now - age_ns, "ctime_ns": 1, "inode": 7, "sha256": hash_file(path)}

    def test_a_file_that_does_not_stop_changing_is_never_believed(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"x")
        times = iter(range(100))
        monkeypatch.setattr(stamps, "stamps_of", lambda status: (1, next(times), 1, 1))
        assert set(hashed_state(path)) == {"sha256"}
