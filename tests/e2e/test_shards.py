"""Shards and data sets of Hugging Face are cached one part at a time, in the files that a folder would have, and then trained."""

import io
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from project import ForkServer, content, differing, final_files, write_run
from safetensors.torch import load_file

from musubi_tuner.headers import read_header

JOBS = ("latents", "text", "experts")
ENDINGS = {"latents": "_tf.safetensors", "text": "_te.safetensors", "experts": "_experts.safetensors"}
SPLIT = {"a": slice(0, 5), "b": slice(5, 9)}
"""Photographs of each shard."""


def pictures(photographs: Path) -> list[Path]:
    return sorted(path for path in photographs.iterdir() if path.suffix != ".txt")


def write_shards(folder: Path, photographs: Path) -> Path:
    """Two tar files of the photographs with their captions."""
    folder.mkdir(parents=True)
    for name, part in SPLIT.items():
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for path in pictures(photographs)[part]:
                archive.add(path, path.name)
                archive.add(path.with_suffix(".txt"), path.with_suffix(".txt").name)
    return folder


def data(folder: Path, root: Path, **changes: Any) -> list[dict[str, Any]]:
    return [
        {
            "shards": str(folder / "*.tar"),
            "shard_label_key": "txt",
            "cache_directory": str(root / "cache"),
            "shard_samples": 5,
            **changes,
        }
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    """The tar files. Read only."""
    return write_shards(tmp_path_factory.mktemp("shards") / "tar", photographs)


@pytest.fixture(scope="module")
def trained(
    shards: Path, tmp_path_factory: pytest.TempPathFactory, photographs: Path, encoders: Path, server: ForkServer
) -> Path:
    """The run file of a run that cached and trained the shards. Read only."""
    root = tmp_path_factory.mktemp("trained")
    config = write_run(root, photographs, encoders, datasets=data(shards, root), train={"max_steps": 4})
    result = server.run("train", [config], root).expect(0)
    assert "2 of 2 shards are not read yet; each counts as 5 pictures" in result.out
    assert "latents  0 up to date, 2 shards to read (2 x not read yet)" in result.out
    assert "latents: shard 2 of 2" in result.out
    assert "9 up to date, 0 to make" in result.out
    return config


def test_their_caches_are_those_of_a_folder(trained: Path, photographs: Path, caches: Path) -> None:
    """But for the rounding of other batches, and the shard in the id, which keys the noise that teachers see."""
    made = trained.parent / "cache"
    assert not list(made.glob(".reading*"))
    for name, part in SPLIT.items():
        for picture in pictures(photographs)[part]:
            own = sorted((made / name).glob(f"{picture.stem}_*"))
            others = sorted(caches.glob(f"{picture.stem}_*"))
            assert [path.name for path in own] == [path.name for path in others] and len(own) == 3
            for path, other in zip(own, others, strict=True):
                found, expected = load_file(path), load_file(other)
                assert found.keys() == expected.keys()
                for key in found if "_experts" not in path.name else ():
                    torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4)
                prints = [read_header(each).fingerprint or {} for each in (path, other)]
                assert prints[0].pop("item") == f"{name}/{prints[1].pop('item')}"
                images = [fingerprint.pop("image", {}) for fingerprint in prints]
                assert prints[0] == prints[1] and images[0].get("sha256") == images[1].get("sha256")


def test_a_shard_that_was_read_is_left_alone_and_one_that_changed_is_read_again(
    trained: Path, shards: Path, photographs: Path, encoders: Path, server: ForkServer, tmp_path: Path
) -> None:
    shutil.copytree(trained.parent / "cache", tmp_path / "cache")
    mine = shutil.copytree(shards, tmp_path / "tar")
    config = write_run(tmp_path, photographs, encoders, datasets=data(mine, tmp_path), train={"max_steps": 2})
    # The shards lie elsewhere, so they are read again, and everything is right.
    for job in JOBS:
        first = server.run(job, [config], tmp_path).expect(0).out
        assert f"{job}: encoded 0, up to date 5, failed 0" in first and f"{job}: encoded 0, up to date 4" in first
        assert f"{job}: read 0 of 2 shards" in server.run(job, [config], tmp_path).expect(0).out
    with tarfile.open(mine / "b.tar", "a") as archive:
        path = pictures(photographs)[0]
        for file, name in ((path, f"more{path.suffix}"), (path.with_suffix(".txt"), "more.txt")):
            archive.add(file, name)
    assert "4 to make (4 x the shard was [" in server.run("train", [config, "--plan"], tmp_path).expect(0).out
    for job in JOBS:
        assert f"{job}: encoded 1, up to date 4, failed 0" in server.run(job, [config], tmp_path).expect(0).out
    assert "data     10 images" in server.run("train", [config], tmp_path).expect(0).out


@pytest.mark.parametrize(
    ("job", "point"),
    [("latents", "cache.latents.batch:3"), ("text", "file.written:7"), ("experts", "cache.experts.batch:4")],
)
def test_a_job_that_was_killed_goes_on(
    job: str,
    point: str,
    trained: Path,
    shards: Path,
    photographs: Path,
    encoders: Path,
    server: ForkServer,
    tmp_path: Path,
) -> None:
    config = write_run(tmp_path, photographs, encoders, datasets=data(shards, tmp_path))
    server.run(job, [config], tmp_path, MUSUBI_FAULT=point).expect(-signal.SIGKILL)
    again = server.run(job, [config], tmp_path).expect(0)
    assert f"{job}: shard 1 of" in again.out
    assert not list((tmp_path / "cache").glob(".reading*"))
    ours, theirs = ({path.relative_to(root): content(path)[1] for path in root.rglob(f"*{ENDINGS[job]}")}
                    for root in (tmp_path / "cache", trained.parent / "cache"))  # fmt: skip
    assert ours == {path: theirs[path] for path in ours} and len(ours) == 9


def cached(server: ForkServer, config: Path, *options: str) -> str:
    """What the jobs of latents and texts say."""
    return "".join(server.run(job, [config, *options], config.parent).expect(0).out for job in JOBS[:2])


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def project(photographs: Path, encoders: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a run file without teachers on three shards of drawn pictures, in tar/."""
    tar = tmp_path / "tar"
    tar.mkdir()
    for name in "abc":
        write_drawn(tar / f"{name}.tar", [f"{name}{n}" for n in range(3)])

    def write(**changes: Any) -> Path:
        own = {"experts": {"enable_lune": False, "enable_sol": False}, "train": {"max_steps": 2}, **changes}
        return write_run(tmp_path, photographs, encoders, datasets=data(tar, tmp_path), **own)

    return write


def write_drawn(path: Path, names: list[str], side: int = 96, **more: bytes) -> None:
    """A shard of pictures with captions, and further files."""
    with tarfile.open(path, "w") as archive:
        for name in names:
            picture = io.BytesIO()
            Image.new("RGB", (side, side), (sum(name.encode()) % 256, 80, 90)).save(picture, "PNG")
            add(archive, f"{name}.png", picture.getvalue())
            add(archive, f"{name}.txt", f"a picture of {name}".encode())
        for name, content in more.items():
            add(archive, name.replace("_DOT_", "."), content)


def trained_on(server: ForkServer, config: Path) -> str:
    """The plan's line on the data, and on the latents."""
    plan = server.run("train", [config, "--plan"], config.parent).expect(0).out.splitlines()
    return " ".join(line.strip() for line in plan if line.strip().startswith(("data", "latents", "text")))


def test_what_is_trained_is_what_the_shards_hold(
    project: Callable[..., Path], server: ForkServer, tmp_path: Path
) -> None:
    """Whatever happens to shards and caches, and however the work is dealt."""
    config, tar, cache = project(), tmp_path / "tar", tmp_path / "cache"
    for part in ("2/2", "1/2"):
        cached(server, config, "--shard", part)
    assert "9 images" in trained_on(server, config) and "latents  9 up to date, 0 to make" in trained_on(server, config)
    next((cache / "a").glob("a1_*_te.safetensors")).unlink()
    next((cache / "b").glob("b1_*x*_tf.safetensors")).unlink()
    (cut,) = (cache / "c").glob("c1_*x*_tf.safetensors")
    cut.write_bytes(cut.read_bytes()[:-9])
    said = cached(server, config)
    assert said.count("encoded 1, up to date 2") == 3 and "9 images" in trained_on(server, config)
    write_drawn(tar / "a.tar", ["a0", "a2"], side=128)  # one fewer, and larger
    assert "latents: encoded 2" in cached(server, config)
    assert "8 images" in trained_on(server, config)
    (tar / "b.tar").rename(tmp_path / "b.tar")
    assert "5 images" in trained_on(server, config)
    shutil.rmtree(cache / "b")
    (tmp_path / "b.tar").rename(tar / "b.tar")
    assert "3 files" not in cached(server, config) and "8 images" in trained_on(server, config)


def test_samples_that_cannot_be_trained_are_left_out_and_counted(
    project: Callable[..., Path], server: ForkServer, tmp_path: Path
) -> None:
    config, tar = project(), tmp_path / "tar"
    write_drawn(
        tar / "a.tar",
        ["good", "n" * 240, "recycled/x", "twice", "Twice"],
        broken_DOT_png=b"no picture",
        broken_DOT_txt=b"x",
    )
    write_drawn(tar / "b.tar", [], broken_DOT_png=b"no picture", broken_DOT_txt=b"x")
    said = cached(server, config)
    assert "2 samples of" in said and "its name occurs twice" in said and "1 samples of" in said
    plan = trained_on(server, config)
    assert "7 images" in plan and "latents  7 up to date, 0 to make" in plan
    assert "encoded" not in cached(server, config)
    write_drawn(tar / "c.tar", ["c0"], alone_DOT_png=(tar / "c.tar").read_bytes())
    refused = server.run("text", [config, "--set", "cache.workers=0"], tmp_path)
    refused.expect(2)
    assert "has no caption (shard_label_key 'txt'" in refused.err


def test_settings_that_make_other_files_are_noticed_and_others_are_not(
    project: Callable[..., Path], server: ForkServer, tmp_path: Path
) -> None:
    config = project()
    cached(server, config)
    other = {"general": {"resolution": 64, "caption_dropout_rate": 0.1, "batch_size": 4}}
    plan = trained_on(server, project(**other))
    assert "latents  0 up to date, 9 to make (9 x datasets.resolution was [128, 128], now [64, 64])" in plan
    assert "text     9 up to date" in plan
    named = project(**other, cache={"skip_existing": "name"})
    assert "latents  9 up to date, 0 to make" in trained_on(server, named) and "encoded" not in cached(server, named)
    assert "latents  0 up to date, 9 to make" in trained_on(server, project(**other))
    assert "latents: encoded 3" in cached(server, config)
    (tmp_path / "tar" / "a.tar").touch()
    assert "3 to make" in trained_on(server, config)
    server.run("train", [config, "--skip_cache"], tmp_path).expect(0)
    shutil.rmtree(tmp_path / "out")
    split = project(validation={"split": 0.4}, general={"mask_source": "product"})
    result = server.run("train", [split], tmp_path).expect(0)
    assert "held out" in result.out and "general.mask_source: has no effect on datasets[0]" in result.err


def test_a_changed_data_set_of_hugging_face_is_read_again(
    photographs: Path, encoders: Path, server: ForkServer, tmp_path: Path
) -> None:
    source = table(tmp_path / "set", photographs, "parquet")
    given = [
        {
            "dataset_name": str(source),
            "caption_column": "words",
            "image_column": "picture",
            "cache_directory": str(tmp_path / "cache"),
        }
    ]
    config = write_run(
        tmp_path, photographs, encoders, datasets=given, experts={"enable_lune": False, "enable_sol": False}
    )
    cached(server, config)
    shutil.rmtree(source)
    table(source, photographs, "parquet", said="another text")
    assert "text: encoded 5" in cached(server, config)
    made = {read_header(path).metadata["caption1"] for path in (tmp_path / "cache").rglob("*_te.safetensors")}
    assert made == {"another text"}


def test_they_train_without_the_shards_as_precached(
    trained: Path, photographs: Path, encoders: Path, server: ForkServer, tmp_path: Path
) -> None:
    shutil.copytree(trained.parent / "cache", tmp_path / "cache")
    only = [{"precached": True, "cache_directory": str(tmp_path / "cache")}]
    config = write_run(tmp_path, photographs, encoders, datasets=only, train={"max_steps": 4})
    server.run("train", [config], tmp_path).expect(0)
    assert differing(final_files(tmp_path / "out"), final_files(trained.parent / "out")) == []


def table(folder: Path, photographs: Path, form: str, said: str = "") -> Path:
    """The photographs as a data set of Hugging Face in two parts."""
    rows = [
        {
            "picture": {"bytes": path.read_bytes(), "path": path.name},
            "words": said or path.with_suffix(".txt").read_text(),
        }
        for path in pictures(photographs)
    ]
    features = datasets.Features({"picture": datasets.Image(), "words": datasets.Value("string")})
    whole = datasets.Dataset.from_list(rows, features=features)
    if form == "arrow":
        whole.save_to_disk(str(folder), num_shards=2)
    elif form == "parquet":
        for number, part in enumerate(SPLIT.values()):
            whole.select(range(*part.indices(9))).to_parquet(str(folder / f"train-{number:05d}-of-00002.parquet"))
    else:
        folder.mkdir()
        lines = ["file_name,words"]
        for path in pictures(photographs):
            shutil.copy(path, folder / path.name)
            lines.append(f'{path.name},"{path.with_suffix(".txt").read_text().strip()}"')
        (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("form", ["arrow", "parquet", "pictures"])
def test_a_data_set_of_hugging_face_is_cached_and_trained(
    form: str, photographs: Path, encoders: Path, caches: Path, server: ForkServer, tmp_path: Path
) -> None:
    source = table(tmp_path / form, photographs, form)
    given = [{"dataset_name": str(source), "caption_column": "words", "cache_directory": str(tmp_path / "cache"),
              "image_column": "image" if form == "pictures" else "picture"}]  # fmt: skip
    config = write_run(tmp_path, photographs, encoders, datasets=given, train={"max_steps": 2},
                       experts={"enable_lune": False, "enable_sol": False})  # fmt: skip
    environment = {"HF_HOME": str(tmp_path / "hf")}
    for job in ("latents", "text"):
        server.run(job, [config], tmp_path, **environment).expect(0)
    assert "data     9 images" in server.run("train", [config], tmp_path, **environment).expect(0).out
    made = {read_header(path).metadata["caption1"] for path in (tmp_path / "cache").rglob("*_te.safetensors")}
    assert made == {read_header(path).metadata["caption1"] for path in caches.glob("*_te.safetensors")}


def test_what_a_stream_lacks_is_said(
    shards: Path, photographs: Path, encoders: Path, server: ForkServer, tmp_path: Path
) -> None:
    def said(**changes: Any) -> str:
        (given,) = data(shards, tmp_path, **changes)
        given = {key: value for key, value in given.items() if value is not None}
        config = write_run(tmp_path, photographs, encoders, datasets=[given])
        result = server.run("train", [config, "--plan"], tmp_path)
        assert result.code == 2 or result.code == 1, result.out
        return result.err

    assert "is read once, since this run of TinyFlux-Deep trains from cached latents; set cache_directory" in said(
        cache_directory=None
    )
    assert "matches no file" in said(shards=str(tmp_path / "none*.tar"))
    assert "has both shards and dataset_name" in said(dataset_name="me/pictures")
    table = {"shards": None, "shard_label_key": None}
    assert "cannot be opened" in said(dataset_name="me/pictures", **table)
    assert "caption_column: has no effect because datasets.dataset_name is absent" in said(
        caption_column="words", shards=str(tmp_path / "none*.tar")
    )
