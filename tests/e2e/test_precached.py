"""Caches without pictures, captions and encoders train as they do beside them."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from project import ForkServer, all_lines, copy_tree, differing, final_files, metrics, write_run


@pytest.fixture(scope="module")
def beside_pictures(
    tmp_path_factory: pytest.TempPathFactory, photographs: Path, encoders: Path, caches: Path, server: ForkServer
) -> Path:
    """The run file of a run that was trained with pictures."""
    root = tmp_path_factory.mktemp("beside")
    copy_tree(caches, root / "cache")
    config = write_run(root, photographs, encoders, train={"max_steps": 6})
    server.run("train", [config], root).expect(0)
    return config


def without_pictures(original: Path, folder: Path, **changes: dict[str, Any]) -> Path:
    """The same run with copies of its caches alone; paths to encoders lead nowhere."""
    tables = tomllib.loads(original.read_text(encoding="utf-8"))
    copy_tree(original.parent / "cache", folder / "cache")
    for path in (folder / "cache").glob("index_*"):
        path.unlink()
    tables["run"]["output_dir"] = str(folder / "out")
    tables["datasets"] = [{"precached": True, "cache_directory": str(folder / "cache")}]
    for table, keys in (("model", ("vae_path", "clip_path", "t5_path")), ("experts", ("unet", "vae", "lune", "sol"))):
        for key in keys:
            tables[table][key] = f"/nowhere/{key}"
    for name, values in changes.items():
        tables[name] = {**tables.get(name, {}), **values}
    config = folder / "run.toml"
    config.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return config


def test_the_same_bits_as_with_pictures(beside_pictures: Path, tmp_path: Path, server: ForkServer) -> None:
    config = without_pictures(beside_pictures, tmp_path)
    result = server.run("train", [config], tmp_path).expect(0)
    assert "latents  9 up to date, 0 to make" in result.out
    ours, theirs = tmp_path / "out", beside_pictures.parent / "out"
    assert differing(final_files(ours), final_files(theirs)) == []
    assert metrics(ours) == metrics(theirs)


def test_pictures_beside_them_are_cached_by_themselves(
    beside_pictures: Path, photographs: Path, encoders: Path, tmp_path: Path, server: ForkServer
) -> None:
    copy_tree(beside_pictures.parent / "cache", tmp_path / "cache")
    sets = [{"precached": True, "cache_directory": str(tmp_path / "cache")},
            {"image_directory": str(photographs), "cache_directory": str(tmp_path / "more")}]  # fmt: skip
    config = write_run(tmp_path, photographs, encoders, datasets=sets, train={"max_steps": 2})
    for job in ("latents", "text", "experts"):
        assert f"{job}: encoded 9, up to date 0, failed 0" in server.run(job, [config], tmp_path).expect(0).out
    assert "data     18 images" in server.run("train", [config], tmp_path).expect(0).out


def test_some_are_held_out(beside_pictures: Path, tmp_path: Path, server: ForkServer) -> None:
    """Which ones follows the hashes that the caches have; beside pictures it follows another hash of them."""
    config = without_pictures(beside_pictures, tmp_path, validation={"split": 0.3, "every_steps": 3})
    assert "image(s) held out" in server.run("train", [config], tmp_path).expect(0).out
    assert any("loss/val" in row for row in all_lines(tmp_path / "out"))


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("_experts.safetensors", "1 experts files are not there"),
        ("_te.safetensors", "no such file; the caches are not complete"),
    ],
)
def test_files_that_are_missing_are_named(
    ending: str, said: str, beside_pictures: Path, tmp_path: Path, server: ForkServer
) -> None:
    config = without_pictures(beside_pictures, tmp_path)
    next((tmp_path / "cache").glob(f"*{ending}")).unlink()
    result = server.run("train", [config], tmp_path)
    assert result.code != 0 and said in result.err
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_sample_prompts_need_the_encoders_and_say_so(beside_pictures: Path, tmp_path: Path, server: ForkServer) -> None:
    config = without_pictures(beside_pictures, tmp_path, sample={"prompts": ["a cup"], "every_steps": 2})
    tables = tomllib.loads(config.read_text(encoding="utf-8"))
    del tables["model"]["t5_path"]
    config.write_text(tomli_w.dumps(tables), encoding="utf-8")
    result = server.run("train", [config], tmp_path).expect(2)
    assert "model.t5_path: is needed to encode and draw sample.prompts" in result.err


SAMPLE = {"prompts": ["a cup --n a dog", "a cat"], "every_steps": 2, "steps": 2, "width": 64, "height": 64}


def test_prompts_that_were_encoded_once_need_no_text_encoder(
    photographs: Path, encoders: Path, caches: Path, server: ForkServer, tmp_path: Path
) -> None:
    """The same pictures, on a machine with the caches and the autoencoder only; another prompt is named before anything is loaded."""
    there, here = tmp_path / "there", tmp_path / "here"
    copy_tree(caches, there / "cache")
    config = write_run(there, photographs, encoders, train={"max_steps": 4}, sample=SAMPLE)
    first = server.run("train", [config], there).expect(0).out
    assert "prompts  4 texts to encode, for which the text encoders are needed" in first
    kept = (there / "cache" / "prompts_tf.safetensors").read_bytes()
    moved = without_pictures(config, here, sample=SAMPLE, model={"vae_path": str(encoders / "ae.safetensors")})
    assert "prompts  4 texts are kept, no text encoder is needed" in server.run("train", [moved], here).expect(0).out
    drawn = {path.name: path.read_bytes() for path in (there / "out" / "sample").glob("*.png")}
    assert len(drawn) == 6
    assert {path.name: path.read_bytes() for path in (here / "out" / "sample").glob("*.png")} == drawn
    assert (here / "cache" / "prompts_tf.safetensors").read_bytes() == kept
    refused = server.run("train", [moved, "--set", 'sample.prompts=["a dog in a boat"]'], here).expect(2)
    assert "model.t5_path: /nowhere/t5_path: no such file or folder" in refused.err and "experts" not in refused.err


def test_the_text_job_encodes_prompts_and_other_encoders_encode_them_again(
    photographs: Path, encoders: Path, caches: Path, server: ForkServer, tmp_path: Path
) -> None:
    copy_tree(caches, tmp_path / "cache")
    config = write_run(tmp_path, photographs, encoders, sample=SAMPLE)
    assert "encoded 0, up to date 9" in server.run("text", [config], tmp_path).expect(0).out
    path = tmp_path / "cache" / "prompts_tf.safetensors"
    before = path.stat().st_mtime_ns
    server.run("text", [config], tmp_path).expect(0)
    assert path.stat().st_mtime_ns == before
    assert (
        "prompts  4 texts are kept, no text encoder is needed"
        in server.run("train", [config, "--plan"], tmp_path).expect(0).out
    )
    assert (
        "prompts  4 texts to encode"
        in server.run("train", [config, "--plan", "--t5_max_tokens", "20"], tmp_path).expect(0).out
    )
    path.write_bytes(path.read_bytes()[:100])
    assert "prompts  4 texts to encode" in server.run("train", [config, "--plan"], tmp_path).expect(0).out


def test_keys_of_pictures_beside_precached_are_refused(
    beside_pictures: Path, tmp_path: Path, server: ForkServer
) -> None:
    config = without_pictures(beside_pictures, tmp_path)
    text = config.read_text(encoding="utf-8").replace("precached = true", 'precached = true\nimage_directory = "x"')
    config.write_text(text, encoding="utf-8")
    assert "datasets[0].image_directory: is for pictures" in server.run("train", [config], tmp_path).expect(2).err
