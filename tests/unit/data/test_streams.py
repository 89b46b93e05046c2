"""Pictures from WebDataset shards: local ones, behind http, on the hub."""

import io
import json
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from musubi_tuner.config.datasets import resolve_datasets
from musubi_tuner.config.diagnostics import Diagnostic
from musubi_tuner.config.streams import StreamSettings
from musubi_tuner.data import shards as shards_module
from musubi_tuner.data.batch import load_batches
from musubi_tuner.data.plan import MicroBatch, plan_epoch, updates_of_epoch
from musubi_tuner.data.shards import is_on_disk, list_shards, read_shard, shard_names
from musubi_tuner.data.sources import scan
from musubi_tuner.data.streams import BUFFER, StreamSource
from musubi_tuner.errors import DataError
from musubi_tuner.training.ranks import Ranks

DEFAULTS: dict[str, Any] = {
    "resolution": 64, "enable_bucket": True, "bucket_no_upscale": False, "caption_extension": ".txt", "batch_size": 2, "num_repeats": 1,
    "missing_caption": "error", "recursive": False,
}  # fmt: skip


def picture(value: int, size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for key, files in samples.items():
            for ending, data in files.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def shard(path: Path, begin: int, count: int, size: tuple[int, int] = (64, 64)) -> Path:
    """Pictures whose grey value is their number, with captions that say it."""
    label = lambda n: json.dumps({"prompt": f"picture\n {n}"}).encode()  # noqa: E731
    return write_shard(
        path, {f"{n:04d}": {"png": picture(n, size), "json": label(n)} for n in range(begin, begin + count)}
    )


def numbers(captions: list[str]) -> dict[str, torch.Tensor]:
    return {"number": torch.tensor([int(text.removeprefix("picture ")) for text in captions])}


def dataset_of(**own: Any) -> Any:
    found, problems = resolve_datasets({"datasets": [own]}, DEFAULTS, 16, Path)
    assert [problem for problem in problems if problem.level == "error"] == []
    return found[0]


def source_of(dataset: Any, **ranks: int) -> StreamSource:
    item = scan([dataset], "ff").items[0]
    return StreamSource(item, dataset, 7, numbers, [dataset.text], architecture="ff", **ranks)


def planned(source: StreamSource, epoch: int = 0) -> list[MicroBatch]:
    return plan_epoch(source.plan_items(), 7, epoch)


def seen(batches: Any) -> list[int]:
    """Numbers of the pictures of batches, which must be those of their captions."""
    found = []
    for batch in batches:
        values = ((batch.tensors["pixels"][:, 0, 0, 0] + 1) * 127.5).round().long()
        assert torch.equal(values, batch.tensors["number"])
        found += values.tolist()
    return found


def test_a_pass_has_every_picture_once_with_its_caption(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"a-{number:03d}.tar", 4 * number, 4)
    dataset = dataset_of(shards=str(tmp_path / "a-{000..002}.tar"), epoch_samples=12)
    notes = scan([dataset], "ff").notes
    assert "a stream of 3 shards" in notes[0] and "12 pictures count as an epoch (epoch_samples)" in notes[0]
    source = source_of(dataset)
    first = seen(load_batches(source, planned(source), 0, 0))
    assert sorted(first) == list(range(12)) and first != list(range(12))
    assert first == seen(load_batches(source_of(dataset), planned(source), 0, 0))
    assert source.places == {"0/1": (0, 2, 4)}
    second = seen(load_batches(source, planned(source, 1), 1, 0))
    assert sorted(second) == list(range(12)) and second != first


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (1, 2)])
def test_whole_shards_are_dealt_to_ranks_and_workers(tmp_path: Path, ranks: int, workers: int) -> None:
    for number in range(4):
        shard(tmp_path / f"{number}.tar", 4 * number, 4)
    dataset = dataset_of(shards=str(tmp_path / "*.tar"), epoch_samples=16)
    found: list[int] = []
    places: dict[str, Any] = {}
    for rank in range(ranks):
        source = source_of(dataset, rank=rank, ranks=ranks, workers=workers)
        updates = updates_of_epoch(planned(source), num_processes=ranks, grad_accum_steps=1, rank=rank)
        mine = [batch for update in updates for _, batch in update.share if batch is not None]
        found += seen(load_batches(source, mine, 0, workers))
        assert source.places is not None
        places |= source.places
    assert sorted(found) == list(range(16))
    assert places == {"0/2": (0, 1, 4), "1/2": (0, 1, 4)}


def test_a_rank_does_not_bring_back_old_places_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart every rank knows where all readers were, and only its own go on."""
    ranks: Any = object.__new__(Ranks)
    ranks.count, ranks._patient = 2, None

    def gather(found: list[Any], own: Any, group: Any) -> None:
        found[:] = [{"0/2": (0, 1, 4), "1/2": (0, 0, 1)}, {"0/2": (0, 0, 1), "1/2": (0, 1, 3)}]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert ranks.joined({}) == {"0/2": (0, 1, 4), "1/2": (0, 1, 3)}


def test_a_stream_goes_on_behind_what_was_read(tmp_path: Path) -> None:
    for number in range(2):
        shard(tmp_path / f"{number}.tar", 125 * number, 125)
    dataset = dataset_of(shards=str(tmp_path / "*.tar"), epoch_samples=250)
    source = source_of(dataset)
    batches = planned(source)
    early = seen(load_batches(source, batches[:20], 0, 0))
    read = 40 + BUFFER - 1
    assert source.places == {"0/1": (0, 1, read - 125)}
    later = source_of(dataset)
    assert later.places is not None
    later.places |= source.places
    rest = seen(load_batches(later, batches[20:], 0, 0))[: 250 - read]
    assert not set(early) & set(rest) and len(set(rest)) == 250 - read  # what waited in the buffer is left out
    other = source_of(dataset, workers=2)
    assert other.places is not None
    other.places |= source.places  # of another number of readers: a new pass
    assert next(iter(load_batches(other, batches[:1], 0, 0))).place == ("0/2", (1, 0, BUFFER + 1))


def test_pictures_share_a_batch_with_their_bucket_only(tmp_path: Path) -> None:
    wide, high = (
        {"png": picture(n, size), "txt": f"picture {n}".encode()} for n, size in ((1, (96, 48)), (2, (48, 96)))
    )
    write_shard(tmp_path / "a.tar", {f"{n}": (wide, high)[n % 2] for n in range(8)})
    dataset = dataset_of(shards=str(tmp_path / "a.tar"), shard_label_key="txt", epoch_samples=8)
    source = source_of(dataset)
    shapes = [tuple(batch.tensors["pixels"].shape) for batch in load_batches(source, planned(source), 0, 0)]
    assert sorted(shapes) == [(2, 3, 48, 80)] * 2 + [(2, 3, 80, 48)] * 2
    assert len(source.first(3)) == 3


def test_what_cannot_be_trained_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"png": picture(3), "json": b'{"prompt": "picture 3"}'}
    bad = {"png": b"no picture", "json": b'{"prompt": "picture 4"}'}
    silent = {"png": picture(5), "json": b'{"prompt": " "}'}
    write_shard(tmp_path / "a.tar", {"0": good, "1": bad, "2": silent, "3": good})
    with pytest.raises(DataError, match=r"a.tar: 2: has no caption .*missing_caption = .skip"):
        source_of(dataset_of(shards=str(tmp_path / "a.tar"), epoch_samples=2)).first(4)
    capsys.readouterr()
    source = source_of(dataset_of(shards=str(tmp_path / "a.tar"), epoch_samples=2, missing_caption="skip"))
    assert seen(load_batches(source, planned(source), 0, 0)) == [3, 3]
    said = capsys.readouterr().out
    assert "a.tar: 1" in said or "a.tar: 2: has no caption" in said
    write_shard(tmp_path / "b.tar", {"0": bad})
    source = source_of(dataset_of(shards=str(tmp_path / "b.tar"), epoch_samples=2))
    with pytest.raises(DataError, match=r"100 samples in a row cannot be trained; the last: .*b.tar: 0"):
        next(load_batches(source, planned(source), 0, 0))
    write_shard(tmp_path / "c.tar", {})
    with pytest.raises(DataError, match=r"c.tar: holds no samples"):
        source_of(dataset_of(shards=str(tmp_path / "c.tar"), epoch_samples=2)).first(1)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"missing_caption": "stem"}, "wide view 1"),
        ({"missing_caption": "empty"}, ""),
        ({"class_tokens": "cat"}, "cat"),
    ],
)
def test_what_stands_for_a_missing_caption(tmp_path: Path, own: dict[str, str], expected: str) -> None:
    write_shard(tmp_path / "a.tar", {"wide_view-1": {"png": picture(1)}})
    found: list[str] = []
    dataset = dataset_of(shards=str(tmp_path / "a.tar"), epoch_samples=2, **own)

    def tokens(captions: list[str]) -> dict[str, torch.Tensor]:
        found.extend(captions)
        return {"number": torch.zeros(len(captions))}

    source = StreamSource(scan([dataset], "ff").items[0], dataset, 7, tokens, [dataset.text], architecture="ff")
    next(iter(load_batches(source, planned(source), 0, 0)))
    assert found == [expected] * 2


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"shard_image_key": "jpg"}, "first sample has png, json and no jpg; set shard_image_key"),
        ({"shards": "nothing-*.tar"}, "nothing-*.tar: matches no file"),
        ({"shards": "s3://bucket/a.tar"}, "expected a path, http://"),
    ],
)
def test_shards_that_cannot_be_read_say_why(tmp_path: Path, own: dict[str, str], expected: str) -> None:
    shard(tmp_path / "a.tar", 0, 1)
    settings = StreamSettings((own.pop("shards", str(tmp_path / "a.tar")),), **own)  # type: ignore[arg-type]
    with pytest.raises(DataError) as error:
        next(read_shard(list_shards(settings)[0], settings))
    assert expected in str(error.value)


def test_a_cut_shard_and_too_many_readers_are_errors(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", 0, 4)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"a.tar: cannot be read"):
        list(read_shard(str(path), StreamSettings((str(path),))))
    with pytest.raises(DataError, match=r"1 shards are too few for 4 readers .2 processes x 2 loader workers"):
        source_of(dataset_of(shards=str(path)), ranks=2, workers=2)


def test_settings_of_folders_are_refused() -> None:
    found: list[Diagnostic] = resolve_datasets(
        {"datasets": [{"shards": ["a.tar"], "caption_columns": ["c"], "num_repeats": 3}]}, DEFAULTS, 16, Path
    )[1]
    assert {problem.key for problem in found} == {"datasets[0].caption_columns", "datasets[0].num_repeats"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[int]]]:
    """Serves files of a folder; every answer but the fourth breaks off in the middle."""
    calls: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = (tmp_path / self.path.strip("/")).read_bytes()
            calls.append(len(data))
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data if len(calls) >= 4 else data[: 3000 * len(calls)])

        def log_message(self, *_: Any) -> None:
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_address[1]}", calls
    served.shutdown()
    served.server_close()


def test_a_broken_connection_is_taken_up_again(tmp_path: Path, server: tuple[str, list[int]]) -> None:
    shard(tmp_path / "a.tar", 0, 12)
    settings = StreamSettings((f"{server[0]}/a.tar",), shard_retries=1, shard_retry_delay=0.0)
    captions = [sample.caption for sample in read_shard(list_shards(settings)[0], settings)]
    assert captions == [f"picture {n}" for n in range(12)]  # each once, though the beginning came four times
    assert len(server[1]) == 4
    server[1].clear()
    with pytest.raises(DataError, match=r"cannot be read .*; tried 1 times \(shard_retries\)"):
        list(read_shard(settings.shards[0], StreamSettings(settings.shards, shard_retries=0)))


def test_patterns_of_the_hub_are_listed_and_read_by_its_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(tmp_path / "dataset_1.tar", 0, 2)

    class FileSystem:
        def glob(self, pattern: str) -> list[str]:
            assert pattern == "datasets/user/repo/dataset_*.tar"
            return ["datasets/user/repo/dataset_1.tar"]

        def open(self, path: str, mode: str, block_size: int) -> Any:
            assert (path, mode, block_size) == ("datasets/user/repo/dataset_1.tar", "rb", 0)
            return (tmp_path / "dataset_1.tar").open("rb")

    monkeypatch.setattr("huggingface_hub.HfFileSystem", FileSystem)
    settings = StreamSettings(("hf://datasets/user/repo/dataset_*.tar",))
    found = list_shards(settings)
    assert found == ["hf://datasets/user/repo/dataset_1.tar"]
    assert len(list(read_shard(found[0], settings))) == 2

    def refuse(*_: Any) -> list[str]:
        raise PermissionError("401")

    monkeypatch.setattr(FileSystem, "glob", refuse)
    with pytest.raises(DataError, match=r"cannot be listed .*401.*HF_TOKEN"):
        list_shards(settings)


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_a_data_set_of_hugging_face_is_read_part_by_part(form: str, tmp_path: Path) -> None:
    rows = [{"image": {"bytes": picture(n), "path": None}, "text": [f"picture  {n}", "other"]} for n in range(7)]
    rows[3]["text"] = []
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    whole = datasets.Dataset.from_list(rows, features=features)
    if form == "arrow":
        whole.save_to_disk(str(tmp_path / "set"), num_shards=2)
    else:
        for part in range(2):
            whole.shard(2, part, contiguous=True).to_parquet(str(tmp_path / "set" / f"train-{part}.parquet"))
    settings = StreamSettings(dataset_name=str(tmp_path / "set"))
    parts = list_shards(settings)
    assert [part.rpartition("/")[2] for part in parts] == ["train-0", "train-1"] and all(map(is_on_disk, parts))
    found = [sample for part in parts for sample in read_shard(part, settings)]
    assert [sample.caption for sample in found] == [None if n == 3 else f"picture {n}" for n in range(7)]
    assert [sample.picture for sample in found] == [picture(n) for n in range(7)]
    assert [sample.key for sample in read_shard(parts[0], settings, skip=2)] == [s.key for s in found[2:4]]
    with pytest.raises(DataError, match=r"image_column: .* has no column 'photo', but image, text; name one of these"):
        list_shards(StreamSettings(dataset_name=str(tmp_path / "set"), image_column="photo"))
    with pytest.raises(DataError, match=r"image_column: column 'text' .* holds no pictures"):
        list_shards(StreamSettings(dataset_name=str(tmp_path / "set"), image_column="text"))
    with pytest.raises(DataError, match=r"split none: cannot be opened"):
        list_shards(StreamSettings(dataset_name=str(tmp_path / "set"), dataset_split="none"))


def test_a_data_set_of_hugging_face_is_a_live_stream(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": picture(n), "path": None}, "text": f"picture {n}"} for n in range(6)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "set"), num_shards=2)
    (dataset,), problems = resolve_datasets(
        {"datasets": [{"dataset_name": str(tmp_path / "set"), "epoch_samples": 6}]}, DEFAULTS, 16, Path
    )
    assert not problems
    item = scan([dataset], "ff").items[0]
    assert item.id == f"{tmp_path / 'set'} train"  # by which a state knows it
    source = StreamSource(item, dataset, 1, numbers, architecture="ff")
    batches = load_batches(source, plan_epoch(source.plan_items(), 1, 0), 0, 0)
    assert sorted(int(n) for batch in batches for n in batch.tensors["number"]) == list(range(6))


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["/x/a.tar", "/y/b c.tar"], ["a", "b_c"]),
        (["/x/a.tar", "/y/A.tar"], ["a-", "A-"]),
        (["hf://datasets/me/set/train-000.tar", "datasets:///x/set/train-0"], ["train-000", "train-0"]),
    ],
)
def test_shards_have_folders_of_their_own(given: list[str], names: list[str]) -> None:
    found = shard_names(given)
    assert list(found.values()) == given and len(found) == len(given)
    assert all(own.startswith(name) for own, name in zip(found, names, strict=True))


def test_a_name_that_occurs_twice_in_a_shard_is_no_traceback(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", {"x": {"png": picture(1)}})
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("x.png")
        archive.addfile(info, io.BytesIO())
    with pytest.raises(DataError, match=r"a\.tar: cannot be read \(ValueError: .*duplicate"):
        list(read_shard(str(path), StreamSettings((str(path),))))


def test_configurations_of_a_saved_folder_are_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(DataError, match="remove dataset_config_name"):
        list_shards(StreamSettings(dataset_name=str(tmp_path / "set"), dataset_config_name="other"))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "webdataset", None)
    with pytest.raises(DataError, match=r"pip install webdataset"):
        shards_module.list_shards(StreamSettings(("a.tar",)))
