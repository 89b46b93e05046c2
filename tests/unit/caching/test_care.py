"""Looking after caches: every cause makes exactly the files that it concerns due, and `explain` and `verify` say so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from musubi_tuner.caching.__main__ import main
from musubi_tuner.caching.file_format import KINDS, cache_path
from musubi_tuner.caching.status import examine
from musubi_tuner.config import RunConfig
from musubi_tuner.errors import Interrupted
from musubi_tuner.headers import read_header
from musubi_tuner.run_record import begin, end, was_stopped

pytestmark = pytest.mark.long

ALL = "abc"
NOBODY: dict[str, str] = {}
Change = Callable[[Any], RunConfig]


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, encoders: Path, monkeypatch_module: pytest.MonkeyPatch, project_class: Any
) -> Path:
    """A project of three pictures with complete caches and encoders of its own. Read only."""
    root = tmp_path_factory.mktemp("care")
    monkeypatch_module.chdir(root)
    own = shutil.copytree(encoders, root / "encoders")
    project = project_class(root, own)
    project.tables["general"] |= {"flip_aug": False}
    project.picture("a", (64, 64), "a red circle")
    project.picture("b", (96, 64), "a blue square")
    project.picture("c", (80, 64), "a green triangle")
    for kind in KINDS:
        assert project.run(kind) == 0
    return root


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
def copied(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project_class: Any) -> Any:
    """A copy of it, which may be changed."""
    root = tmp_path / "project"
    shutil.copytree(made, root)
    monkeypatch.chdir(root)
    shutil.rmtree(root / "images")  # `Project` makes it
    project = project_class(root, root / "encoders")
    shutil.copytree(made / "images", root / "images", dirs_exist_ok=True)
    return project


def due(project: Any, config: RunConfig) -> dict[str, str]:
    """Kind -> ids of the items whose file is due."""
    family = config.spec.family.checkpoint_options(config)
    found = {}
    for kind in KINDS:
        status = examine(config, project.items(config), kind, family)
        ids = "".join(sorted(key.partition(":")[2] for key in status.due))
        found |= {kind: ids} if ids else {}
    return found


def with_settings(**tables: dict[str, Any]) -> Change:
    return lambda project: project.config(**tables)


def pixels(project: Any) -> RunConfig:
    path = project.root / "images" / "b.png"
    Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
    return project.config()


def exif(project: Any) -> RunConfig:
    path = project.root / "images" / "a.png"
    image = Image.open(path)
    image.getexif()[0x0112] = 3
    image.save(path, exif=image.getexif())
    return project.config()


def caption(project: Any) -> RunConfig:
    (project.root / "images" / "c.txt").write_text("a red square")
    return project.config()


def other_size(project: Any) -> RunConfig:
    path = project.root / "images" / "b.png"
    Image.open(path).resize((92, 64)).save(path)
    return project.config()


def mask(project: Any) -> RunConfig:
    (project.root / "masks").mkdir()
    Image.new("L", (64, 64), 200).save(project.root / "masks" / "a.png")
    project.tables["datasets"][0]["mask_directory"] = "masks"
    return project.config(general={"mask_source": "file"}, train={"masked_loss": True})


def weights_of(name: str) -> Change:
    def change(project: Any) -> RunConfig:
        path = next((project.root / "encoders" / name).glob("*.safetensors"))
        tensors = load_file(path)
        save_file({key: value * 1.01 if value.is_floating_point() else value for key, value in tensors.items()}, path,
                  metadata=read_header(path).metadata or {"format": "pt"})  # fmt: skip
        return project.config()

    return change


SEEN = {"latents": ALL, "experts": ALL}
CAUSES: dict[str, tuple[Change, dict[str, str]]] = {
    "nothing": (with_settings(), NOBODY),
    "image bytes": (pixels, {"latents": "b", "experts": "b"}),
    "EXIF": (exif, {"latents": "a", "experts": "a"}),
    "caption": (caption, {"text": "c", "experts": "c"}),
    "another size": (other_size, {"latents": "b", "experts": "b"}),
    "resolution": (with_settings(general={"resolution": 128}), SEEN),
    "bucket step": (with_settings(general={"bucket_reso_steps": 32}), {"latents": "b", "experts": "b"}),
    "flip, for teachers that see noise": (
        with_settings(general={"flip_aug": True}, cache={"latent_variants": 2}, experts={"expert_input": "random"}), SEEN,
    ),
    "autoencoder": (weights_of("vae"), {"latents": ALL}),
    "T5": (weights_of("t5"), {"text": ALL}),
    "CLIP": (weights_of("clip"), {"text": ALL, "experts": ALL}),
    "token limit": (with_settings(model={"t5_max_tokens": 6}), {"text": ALL}),
    "teacher": (weights_of("unet"), {"experts": ALL}),
    "teacher's autoencoder": (weights_of("expert_vae"), {"experts": ALL}),
    "expert mode": (with_settings(experts={"expert_time": "reference"}), {"experts": ALL}),
    "noise instead of pictures": (with_settings(experts={"expert_input": "random"}), {"experts": ALL}),
    "precision of the autoencoder": (with_settings(model={"vae_dtype": "bfloat16"}), {"latents": ALL}),
    "the precision that was computed in, by name": (
        with_settings(model={"vae_dtype": "float32", "text_dtype": "float32"}, experts={"dtype": "float32"}), NOBODY,
    ),
    "stored precision": (with_settings(cache={"dtype": "float16"}), dict.fromkeys(KINDS, ALL)),
    "stored precision, by name": (with_settings(cache={"dtype": "float32"}), {"text": ALL}),
    "seed of the posterior": (with_settings(cache={"seed": 3}), {"latents": ALL}),
    "seed of the teachers": (with_settings(experts={"seed": 3}), {"experts": ALL}),
    "mask": (mask, {"latents": "a"}),
}  # fmt: skip


@pytest.mark.parametrize("cause", CAUSES)
def test_a_cause_makes_exactly_the_files_due_that_it_concerns(cause: str, copied: Any) -> None:
    change, expected = CAUSES[cause]
    assert due(copied, change(copied)) == expected


def test_files_that_leave_their_precision_open_are_taken_as_they_are(copied: Any) -> None:
    """Earlier versions wrote "auto" for both; what is named now was not known then."""
    for item in copied.items():
        path = cache_path(item, "latents", "tf")
        header = read_header(path)
        assert header.fingerprint is not None
        made = json.dumps(header.fingerprint | {"precision": "auto", "storage": "auto"})
        save_file(load_file(path), path, metadata={**header.metadata, "fingerprint": made})
    assert due(copied, copied.config()) == NOBODY
    assert due(copied, copied.config(model={"vae_dtype": "float32"})) == {"latents": ALL}


def test_files_of_machines_that_computed_differently_are_a_mixture(copied: Any) -> None:
    path = cache_path(copied.items()[0], "text", "tf")
    header = read_header(path)
    assert header.fingerprint is not None
    save_file(
        load_file(path),
        path,
        metadata={**header.metadata, "fingerprint": json.dumps(header.fingerprint | {"precision": "bfloat16"})},
    )
    config = copied.config()
    status = examine(config, copied.items(config), "text", {})
    assert status.due == {}
    assert status.mixture is not None and "2 in float32 and 1 in bfloat16" in status.mixture


def test_explain_gives_every_reason(copied: Any, capsys: pytest.CaptureFixture[str]) -> None:
    caption(copied)
    copied.config(model={"t5_max_tokens": 6}, cache={"seed": 3})
    for name in ("c.png", "c", str(copied.root / "images" / "c.png"), "c_0080x0064_tf.safetensors"):
        assert main(["explain", "run.toml", name]) == 0
        said = capsys.readouterr().out
        assert "c_tf_te.safetensors: will be made again" in said
        assert "caption was 'a green triangle', now 'a red square'" in said
        assert "model.t5_max_tokens was 8, now 6" in said
        assert "the seed was 0, now 3" in said
        assert "computed in float32" in said
    pixels(copied)
    assert main(["explain", "run.toml", "b.png"]) == 0
    assert "the image has changed" in capsys.readouterr().out
    assert main(["explain", "run.toml", "d.png"]) == 2
    assert "d.png: is no item of this run." in capsys.readouterr().err
    assert main(["explain", "run.toml"]) == 2


def test_verify_reads_everything_and_counts(copied: Any, capsys: pytest.CaptureFixture[str]) -> None:
    copied.config()
    assert main(["verify", "run.toml"]) == 0
    assert "latents: 3 are right, 0 will be made again, 0 damaged" in capsys.readouterr().out
    path = cache_path(copied.items()[1], "latents", "tf")
    tensors = load_file(path)
    key = next(iter(tensors))
    tensors[key][0, 0, 0] = float("nan")
    save_file(tensors, path, metadata=read_header(path).metadata)
    (copied.root / "cache" / "a_tf_te.safetensors").unlink()
    assert main(["verify", "run.toml"]) == 1
    said = capsys.readouterr().out
    assert "latents: 2 are right, 0 will be made again, 1 damaged" in said and "is not finite" in said
    assert "text: 2 are right, 1 will be made again" in said and "1 x missing (such as a.png)" in said


def test_gc_takes_all_steps_of_a_file(copied: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import tomli_w

    entries = [
        {"name": "one", "image_directory": "images", "cache_directory": "cache"},
        {"name": "two", "image_directory": "more", "cache_directory": "cache"},
    ]
    (copied.root / "more").mkdir()
    Image.new("RGB", (64, 64)).save(copied.root / "more" / "d.png")
    (copied.root / "more" / "d.txt").write_text("a red circle")
    tables = {
        **copied.tables,
        "datasets": entries,
        "steps": [{"name": "s1", "use": ["one"]}, {"name": "s2", "use": ["two"], "start": "file"}],
    }
    (copied.root / "run.toml").write_text(tomli_w.dumps({"schema_version": 1, **tables}))
    for options in ([], ["--step", "s1"]):
        assert main(["gc", "run.toml", *options]) == 0
        assert "nothing to remove" in capsys.readouterr().out


def test_a_job_of_a_run_stops_between_batches_when_it_is_asked_to(project: Any, tmp_path: Path) -> None:
    """What is made stays, and requests that only training can answer wait for it."""
    for name in "abc":
        project.picture(name)
    folder = tmp_path / "run"
    folder.mkdir()
    begin(folder, tmp_path / "run.toml", "run")
    try:
        for name in ("stop", "save"):
            (folder / "control" / name).touch()
        with pytest.raises(Interrupted, match="stopped after 1 of 3 items"):
            project.run("latents", project.config(cache={"latents_batch_size": 1}))
        assert was_stopped(folder) and [path.name for path in (folder / "control").iterdir()] == ["save"]
    finally:
        end(0, "stopped")
    assert len(list((project.root / "cache").glob("*_tf.safetensors"))) == 1


def test_verify_and_explain_take_no_shortcuts(copied: Any, capsys: pytest.CaptureFixture[str]) -> None:
    caption(copied)
    copied.config(cache={"skip_existing": "name", "run": "always"})
    assert main(["verify", "run.toml"]) == 1
    said = capsys.readouterr().out
    assert "latents: 3 are right" in said and "text: 2 are right, 1 will be made again" in said
    assert main(["explain", "run.toml", "c.png"]) == 0
    assert "caption was 'a green triangle'" in capsys.readouterr().out
