"""A user's mistakes: each has its message, its exit code, and no traceback.

0 done, 1 failed while working, 2 wrong input. `Result.expect` checks that nothing ended in a traceback.
"""

import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from project import (
    CAPTIONS,
    GEOMETRY,
    REPOSITORY,
    ForkServer,
    Result,
    autoencoder,
    cache_files,
    cache_paths,
    clean_environment,
    copy_tree,
    differing,
    flux_autoencoder,
    metrics,
    save_single,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FLUX = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}


@pytest.fixture
def images(tmp_path: Path, photographs: Path) -> Path:
    """Photographs that a test may spoil."""
    return Path(shutil.copytree(photographs, tmp_path / "images"))


@pytest.fixture
def cached_run(tmp_path: Path, new_run: Callable[..., Path], caches: Path) -> Callable[..., Path]:
    """Write a run file whose caches were made with the usual settings."""

    def write(**changes: Any) -> Path:
        if not (tmp_path / "cache").exists():
            copy_tree(caches, tmp_path / "cache")
        return new_run(**changes)

    return write


# In the run file and on the command line


def test_a_mistyped_key_is_refused_with_a_suggestion(
    new_run: Callable[..., Path], python: Callable[..., Result]
) -> None:
    config = new_run(train={"max_stepz": 5}, optimizer={"learning_rate": 1e-3})
    result = python(REPOSITORY / "train.py", config).expect(2)
    assert f"error: {config}" in result.err
    assert "train.max_stepz: unknown key. Did you mean 'max_steps'?" in result.err
    assert "optimizer.learning_rate: is 0.001, but optimizer.lr, another name of it, is" in result.err
    assert not (config.parent / "cache").exists() and not (config.parent / "out").exists()


def test_a_mistyped_option_is_refused_with_a_suggestion(
    new_run: Callable[..., Path], python: Callable[..., Result]
) -> None:
    result = python(REPOSITORY / "train.py", new_run(), "--max_stepz", "5").expect(2)
    assert "error: unknown option --max_stepz. Did you mean 'max_steps'?" in result.err


def test_wrong_types_are_listed_together_with_what_is_expected(
    new_run: Callable[..., Path], python: Callable[..., Result]
) -> None:
    config = new_run(train={"max_steps": "twenty"}, ema={"decay": 2}, general={"batch_size": 0})
    result = python(REPOSITORY / "train.py", config).expect(2)
    assert "train.max_steps: is 'twenty', expected a whole number at least 1" in result.err
    assert "ema.decay: is 2, expected a number at least 0" in result.err
    assert "general.batch_size: is 0, expected a whole number at least 1" in result.err


def test_a_missing_run_file_points_at_the_list(python: Callable[..., Result]) -> None:
    result = python(REPOSITORY / "train.py", "toml/no_such.toml").expect(2)
    assert "error: toml/no_such.toml: no such file; run `python train.py` to list the run files here" in result.err


def test_windows_paths_in_double_quotes_are_explained(tmp_path: Path, python: Callable[..., Result]) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[run]\noutput_dir = "C:\\users\\out"\n', encoding="utf-8")
    result = python(REPOSITORY / "train.py", path).expect(2)
    assert "not valid TOML" in result.err and "write Windows paths in 'single quotes'" in result.err


def test_missing_files_and_folders_are_named_by_their_keys(
    new_run: Callable[..., Path], tmp_path: Path, python: Callable[..., Result]
) -> None:
    config = new_run(images=tmp_path / "nowhere", model={"vae_path": "lost/ae.safetensors"})
    result = python(REPOSITORY / "train.py", config).expect(2)
    assert f"datasets[0].image_directory: {tmp_path / 'nowhere'}: no such folder" in result.err
    assert "model.vae_path: lost/ae.safetensors: no such file or folder" in result.err


def test_config_errors_come_before_torch_is_imported(
    new_run: Callable[..., Path], python: Callable[..., Result]
) -> None:
    config = new_run(train={"max_stepz": 5})
    code = (
        "import sys; from musubi_tuner.runner.command import main; code = main([sys.argv[1]]); "
        "print(sorted({'torch', 'diffusers', 'transformers', 'accelerate'} & set(sys.modules))); sys.exit(code)"
    )
    assert "[]" in python("-c", code, config).expect(2).out


# In the data


def test_images_without_captions_are_counted(
    new_run: Callable[..., Path], images: Path, tmp_path: Path, server: ForkServer
) -> None:
    for path in images.glob("*.txt"):
        path.unlink()
    result = server.run("train", [new_run(images=images)], tmp_path).expect(2)
    assert (
        f"datasets[0]: 9 of 9 images in {images} have no .txt file (astronaut.png, camera.png, chelsea.png, ...)"
        in (result.err)
    )
    assert 'write the captions, or set missing_caption = "skip", "empty" or "stem"' in result.err


def test_a_folder_without_images_is_an_error(new_run: Callable[..., Path], tmp_path: Path, server: ForkServer) -> None:
    (tmp_path / "empty").mkdir()
    result = server.run("train", [new_run(images=tmp_path / "empty")], tmp_path).expect(2)
    assert f"datasets[0]: {tmp_path / 'empty'} holds no images (.png, .jpg" in result.err


def test_two_images_with_one_stem_are_both_named(
    new_run: Callable[..., Path], images: Path, tmp_path: Path, server: ForkServer
) -> None:
    shutil.copy(images / "coffee.jpg", images / "moon.jpg")
    result = server.run("train", [new_run(images=images)], tmp_path).expect(2)
    assert f"{images / 'moon.jpg'} and {images / 'moon.webp'} have the same name without extension" in result.err
    assert "rename one" in result.err


def test_a_file_that_is_no_image_is_named(
    new_run: Callable[..., Path], images: Path, tmp_path: Path, server: ForkServer
) -> None:
    (images / "coins.bmp").write_bytes(b"this is no picture")
    result = server.run("train", [new_run(images=images)], tmp_path).expect(2)
    assert f"{images / 'coins.bmp'}: not a readable image (unknown format)" in result.err


def test_a_broken_image_fails_the_job_after_the_others_were_cached_and_can_be_mended(
    new_run: Callable[..., Path], images: Path, photographs: Path, server: ForkServer
) -> None:
    whole = (images / "coffee.jpg").read_bytes()
    (images / "coffee.jpg").write_bytes(whole[: len(whole) // 2])
    config = new_run(images=images)
    result = server.run("train", [config], config.parent).expect(1)
    assert f"failed: {images / 'coffee.jpg'}: broken image (" in result.err
    assert "replace or remove it" in result.err
    assert "latents: encoded 8, up to date 0, failed 1" in result.out
    assert "text:" not in result.out and not (config.parent / "out" / "metrics.jsonl").exists()
    assert len(cache_paths(config.parent / "cache")) == 8
    shutil.copy2(photographs / "coffee.jpg", images / "coffee.jpg")
    mended = server.run("latents", [config], config.parent).expect(0)
    assert "latents: encoded 1, up to date 8, failed 0" in mended.out


# In the caches


def other_autoencoder(folder: Path) -> Path:
    """An autoencoder of the right shape with other weights."""
    model = flux_autoencoder()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    save_single(model, folder / "other.safetensors")
    return folder / "other.safetensors"


def test_a_cache_made_with_another_encoder_is_made_again(
    cached_run: Callable[..., Path], tmp_path: Path, server: ForkServer
) -> None:
    config = cached_run(model={"vae_path": str(other_autoencoder(tmp_path))})
    plan = server.run("train", [config, "--plan"], tmp_path).expect(0).out
    assert "latents  0 up to date, 9 to make (9 x the autoencoder was '" in plan
    assert "text     9 up to date, 0 to make" in plan
    before = cache_files(tmp_path / "cache")
    assert "latents: encoded 9, up to date 0" in server.run("latents", [config], tmp_path).expect(0).out
    changed = differing(cache_files(tmp_path / "cache"), before)
    assert len(changed) == 9 and all(name.endswith("_tf.safetensors") for name in changed)


def test_a_cache_made_with_another_encoder_is_refused_by_name_where_nothing_may_be_encoded(
    cached_run: Callable[..., Path], tmp_path: Path, server: ForkServer
) -> None:
    config = cached_run(model={"vae_path": str(other_autoencoder(tmp_path))}, cache={"run": "never"})
    before = cache_files(tmp_path / "cache")
    result = server.run("train", [config], tmp_path).expect(1)
    assert "9 x the autoencoder was '" in result.out
    assert (
        f'caches are not complete, but cache.run is "never"; run: python -m musubi_tuner.caching latents {config}'
        in (result.err)
    )
    assert differing(cache_files(tmp_path / "cache"), before) == []
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_cache_made_at_another_resolution_is_made_again(
    cached_run: Callable[..., Path], tmp_path: Path, server: ForkServer
) -> None:
    config = cached_run(general={"resolution": 64})
    plan = server.run("train", [config, "--plan"], tmp_path).expect(0).out
    assert "latents  0 up to date, 9 to make (" in plan and "x the bucket was [128, 128], now [64, 64]" in plan
    server.run("latents", [config], tmp_path).expect(0)
    with safe_open(tmp_path / "cache" / "moon_0512x0512_tf.safetensors", "pt") as file:
        assert list(file.keys()) == ["latents_1x8x8_float32"]


def test_a_cache_made_at_another_resolution_is_refused_by_name_where_nothing_may_be_encoded(
    cached_run: Callable[..., Path], tmp_path: Path, server: ForkServer
) -> None:
    config = cached_run(general={"resolution": 64}, cache={"run": "never"})
    result = server.run("train", [config], tmp_path).expect(1)
    assert "x the bucket was [128, 128], now [64, 64]" in result.out
    assert 'caches are not complete, but cache.run is "never"' in result.err


def test_skipping_the_check_of_caches_does_not_train_on_another_resolution(
    cached_run: Callable[..., Path], tmp_path: Path, server: ForkServer
) -> None:
    result = server.run("train", [cached_run(general={"resolution": 64}), "--skip_cache"], tmp_path).expect(1)
    assert "latents were cached with other settings; run the latents job again" in result.err
    assert "moon: latents [16, 16, 16], this run needs [16, 8, 8]" in result.err


def test_a_cache_file_cut_short_is_made_again(
    cached_run: Callable[..., Path], caches: Path, tmp_path: Path, server: ForkServer
) -> None:
    config = cached_run()
    path = tmp_path / "cache" / "moon_tf_te.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    plan = server.run("train", [config, "--plan"], tmp_path).expect(0).out
    assert "text     8 up to date, 1 to make" in plan
    assert "text: encoded 1, up to date 8" in server.run("text", [config], tmp_path).expect(0).out
    assert differing(cache_files(tmp_path / "cache"), cache_files(caches)) == []


def test_a_second_job_of_one_kind_in_one_cache_folder_is_refused(
    new_run: Callable[..., Path], home: Path, server: ForkServer
) -> None:
    config = new_run()
    first = subprocess.Popen(
        [sys.executable, REPOSITORY / "cache_scripts" / "cache_experts.py", config],
        cwd=config.parent,
        env=clean_environment(home),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        lock = config.parent / "cache" / ".lock_experts_1of1"
        wait_for(lambda: lock.exists() and lock.stat().st_size > 0)
        second = server.run("experts", [config], config.parent).expect(1)
        assert (
            f"process {first.pid} on {platform.node()} is writing caches here" in second.err
            and "--shard i/n" in second.err
        )
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait(timeout=60)


def wait_for(happened: Callable[[], bool]) -> None:
    """Poll for at most a minute."""
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


# In the models


@pytest.mark.parametrize(
    "name",
    [
        "lune.safetensors",  # without a config
        "ae.safetensors",  # with a json beside it
        "unet/diffusion_pytorch_model.safetensors",  # with a config.json beside it
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    name: str, cached_run: Callable[..., Path], encoders: Path, tmp_path: Path, server: ForkServer
) -> None:
    config = cached_run(model={"init": None, "init_scheme": None, "geometry": None, "path": str(encoders / name)})
    result = server.run("train", [config, "--skip_cache"], tmp_path).expect(1)
    assert f"error: {encoders / name}: is not a TinyFlux-Deep v4.2 checkpoint" in result.err
    assert not (tmp_path / "out" / "photos.safetensors").exists()


def test_a_checkpoint_that_was_cut_short_is_refused(
    cached_run: Callable[..., Path], encoders: Path, tmp_path: Path, server: ForkServer
) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes((encoders / "ae.safetensors").read_bytes()[:5000])
    config = cached_run(model={"init": None, "init_scheme": None, "geometry": None, "path": str(path)})
    result = server.run("train", [config], tmp_path).expect(2)
    assert f"model.path: {path}: is a truncated safetensors file" in result.err


@pytest.mark.parametrize(
    ("changes", "job", "message"),
    [
        (
            {"clip_path": "t5/t5_base.safetensors"},
            "text",
            "is a T5 encoder, expected CLIP-L; are clip_path and t5_path",
        ),
        (
            {"t5_path": "clip/clip_l.safetensors"},
            "text",
            "is a CLIP text model, expected T5; are clip_path and t5_path",
        ),
        ({"vae_path": "sd_vae.safetensors"}, "latents", "has 4 latent channels, expected 16 (4 channels is an SD1.5"),
        (
            {"vae_path": "lune.safetensors"},
            "latents",
            "has no config in its header or beside it, and is not the published",
        ),
    ],
)
def test_an_encoder_of_another_kind_is_refused_by_its_key(
    changes: dict[str, str], job: str, message: str, new_run: Callable[..., Path], encoders: Path, server: ForkServer
) -> None:
    (key, name), *_ = changes.items()
    config = new_run(model={key: str(encoders / name)})
    result = server.run(job, [config], config.parent).expect(1)
    assert f"error: model.{key}: {encoders / name}: {message}" in result.err


@pytest.mark.parametrize(
    ("key", "value"), [("joint_attention_dim", 48), ("pooled_projection_dim", 48), ("lune_expert_dim", 24)]
)
def test_a_model_that_does_not_fit_the_cached_encoders_is_refused_by_name(
    key: str, value: int, cached_run: Callable[..., Path], tmp_path: Path, server: ForkServer
) -> None:
    config = cached_run(model={"geometry": {**GEOMETRY, key: value}})
    result = server.run("train", [config], tmp_path)
    assert key in result.err and str(value) in result.err and str(GEOMETRY[key]) in result.err
    assert result.expect(result.code).code in (1, 2)


# Disks and folders


def test_an_output_folder_that_is_a_file_is_refused(
    new_run: Callable[..., Path], tmp_path: Path, python: Callable[..., Result]
) -> None:
    (tmp_path / "out").write_text("in the way", encoding="utf-8")
    result = python(REPOSITORY / "train.py", new_run()).expect(2)
    assert f"run.output_dir: {tmp_path / 'out'} is a file, expected a folder" in result.err


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_an_output_folder_without_permission_is_refused(
    new_run: Callable[..., Path], tmp_path: Path, python: Callable[..., Result]
) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    result = python(REPOSITORY / "train.py", new_run()).expect(2)
    assert f"run.output_dir: {tmp_path / 'out'}: no permission to write" in result.err


def test_a_cache_folder_that_cannot_be_made_is_an_error_with_its_name(
    new_run: Callable[..., Path], photographs: Path, tmp_path: Path, server: ForkServer
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    datasets = [{"image_directory": str(photographs), "cache_directory": str(tmp_path / "file" / "cache")}]
    result = server.run("latents", [new_run(datasets=datasets)], tmp_path)
    assert str(tmp_path / "file") in result.expect(result.code).err
    assert result.code in (1, 2)


SMALL_DISK = """
mount -t tmpfs -o size={size} none "$DISK" || exit 77
"$@" > "$LOGS/out1" 2> "$LOGS/err1"; echo $? > "$LOGS/code1"
mount -o remount,size=64m "$DISK" || exit 77
"$@" > "$LOGS/out2" 2> "$LOGS/err2"; echo $? > "$LOGS/code2"
cp -r "$DISK" "$LOGS/disk"
"""


@dataclass
class SmallDisk:
    """What happened on a disk that was too small, and again when it was not; and a copy of it at the end."""

    full: Result
    again: Result
    content: Path


def on_a_small_disk(
    command: list[str | Path], disk: Path, size: str, longest: int, home: Path, logs: Path
) -> SmallDisk:
    """Run a command with ``disk`` on a file system of its own, then give it more space and run it again.

    Args:
        size: of the file system at first, such as 60k.
        longest: where no file system may be mounted, files are limited to this many bytes instead.
    """
    disk.mkdir()
    logs.mkdir()
    words = [sys.executable, *map(str, command)]
    environment = {**clean_environment(home), "DISK": str(disk), "LOGS": str(logs)}
    if shutil.which("unshare"):
        shell = ["unshare", "--mount", "sh", "-c", SMALL_DISK.format(size=size), "sh", *words]
        subprocess.run(shell, env=environment, cwd=logs, capture_output=True, timeout=300)
    if (logs / "disk").exists():
        texts = {name: (logs / name).read_text(encoding="utf-8") for name in ("out1", "err1", "out2", "err2")}
        codes = [int((logs / f"code{i}").read_text(encoding="utf-8")) for i in (1, 2)]
        results = [Result(codes[i - 1], texts[f"out{i}"], texts[f"err{i}"]) for i in (1, 2)]
        return SmallDisk(*results, logs / "disk")
    results = []
    for limit in (longest, resource.RLIM_INFINITY):
        done = subprocess.run(
            ["sh", "-c", f'ulimit -f {limit // 512 if limit > 0 else "unlimited"}; exec "$@"', "sh", *words],
            env=environment, cwd=logs, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        results.append(Result(done.returncode, done.stdout, done.stderr))
    return SmallDisk(*results, disk)


def assert_no_space(result: Result) -> None:
    """Check that a command failed for want of space, and said so in one line."""
    result.expect(1)
    (line,) = (line for line in result.err.splitlines() if line.startswith("error: "))
    if "File too large" not in line:
        assert "No space left on device" in line
        assert "free some space or point the key at another disk, then run the same command again" in line


def test_a_cache_job_on_a_full_disk_says_so_and_continues_when_there_is_space(
    new_run: Callable[..., Path], caches: Path, home: Path, tmp_path: Path
) -> None:
    config = new_run()
    job: list[str | Path] = [REPOSITORY / "cache_scripts" / "cache_latents.py", config]
    # Nine files of about 17 kB: the fourth does not fit.
    found = on_a_small_disk(job, tmp_path / "cache", "60k", 8192, home, tmp_path / "logs")
    assert_no_space(found.full)
    found.again.expect(0)
    expected = {name: file for name, file in cache_files(caches).items() if name.endswith("_tf.safetensors")}
    assert differing(cache_files(found.content), expected) == []
    assert not list(found.content.glob(".tmp-*"))


def test_training_on_a_full_disk_says_so_and_continues_when_there_is_space(
    cached_run: Callable[..., Path], home: Path, tmp_path: Path
) -> None:
    config = cached_run(log={"every_steps": 1, "tensorboard": False})
    # A checkpoint with its state takes about 1.7 MB: the second does not fit.
    command: list[str | Path] = [REPOSITORY / "train.py", config]
    found = on_a_small_disk(command, tmp_path / "out", "2500k", 100_000, home, tmp_path / "logs")
    assert_no_space(found.full)
    found.again.expect(0)
    if "saved photos-step00000005" in found.full.out:
        assert "continuing from photos-step00000005-state: step 5 of 20" in found.again.out
    assert [row["step"] for row in metrics(found.content)] == list(range(1, 21))
    assert not list(found.content.rglob(".tmp-*"))


# While training


def spoil_latents(cache: Path, value: float) -> None:
    """Put a value that is not finite into one cached photograph."""
    path = cache / "moon_0512x0512_tf.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for tensor in tensors.values():
        tensor[0, 3, 3] = value
    save_file(tensors, path, metadata)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_items(
    cached_run: Callable[..., Path], tmp_path: Path, server: ForkServer
) -> None:
    config = cached_run()
    spoil_latents(tmp_path / "cache", float("inf"))
    result = server.run("train", [config], tmp_path).expect(1)
    assert "the gradient is not finite (items " in result.err and "moon" in result.err
    assert 'set train.on_nonfinite = "skip"' in result.err
    step = int(result.err.split("error: step ")[1].split(":")[0])
    assert [row["step"] for row in metrics(tmp_path / "out")] == list(range(1, step))


def test_updates_that_are_not_finite_can_be_skipped_and_are_counted(
    cached_run: Callable[..., Path], tmp_path: Path, server: ForkServer
) -> None:
    config = cached_run(train={"on_nonfinite": "skip", "max_steps": 18})
    spoil_latents(tmp_path / "cache", float("nan"))
    result = server.run("train", [config], tmp_path).expect(0)
    assert result.out.count("the update is skipped") == 3  # three epochs of six updates, one of which holds the moon
    assert metrics(tmp_path / "out")[-1]["train/skipped"] == 3
    for name in ("photos.safetensors", "photos_ema.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "out" / name).values())


FULL = """
import sys, torch
from musubi_tuner.runner.command import main
from musubi_tuner.training.task import FlowPhase

losses, calls = FlowPhase.losses, []

def full(*values, **named):
    calls.append(1)
    if len(calls) > 7:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has too little.")
    return losses(*values, **named)

FlowPhase.losses = full
sys.exit(main(sys.argv[1:]))
"""


def test_a_step_that_does_not_fit_into_memory_names_the_ways_out_and_the_run_goes_on(
    cached_run: Callable[..., Path], python: Callable[..., Result], tmp_path: Path, server: ForkServer
) -> None:
    config = cached_run()
    result = python("-c", FULL, config).expect(1)
    assert result.err.count("error: ") == 1 and "Traceback" not in result.err
    assert (
        "error: the device's memory is full (2.00 GiB more were wanted); end other programs that use it, or: turn on "
        'memory.gradient_checkpointing, set memory.blocks_to_swap = "auto", lower the resolution or the batch size of the '
        "data sets. The same command continues from the newest state" in result.err
    )
    again = server.run("train", [config, "--gradient_checkpointing"], tmp_path).expect(0)
    assert "continuing from photos-step00000005-state: step 5 of" in again.out


def test_an_encoder_that_gives_values_that_are_not_finite_fails_the_job(
    new_run: Callable[..., Path], tmp_path: Path, server: ForkServer
) -> None:
    model = autoencoder(16, **FLUX)
    with torch.no_grad():
        model.encoder.conv_out.bias[0] = float("nan")
    save_single(model, tmp_path / "nan.safetensors")
    config = new_run(model={"vae_path": str(tmp_path / "nan.safetensors")})
    result = server.run("latents", [config], tmp_path).expect(1)
    assert "moon.webp: latents_1x16x16_float32 is not finite" in result.err
    assert "latents: encoded 0, up to date 0, failed 9" in result.out
    assert cache_paths(tmp_path / "cache") == []


def test_another_config_lists_the_differences_and_fresh_starts_beside(
    cached_run: Callable[..., Path], tmp_path: Path, server: ForkServer
) -> None:
    server.run("train", [cached_run()], tmp_path, MUSUBI_FAULT="train.update:7").expect(-signal.SIGKILL)
    config = cached_run(optimizer={"lr": 1e-3}, run={"seed": 8})
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.suffix == ".safetensors"}
    result = server.run("train", [config], tmp_path).expect(2)
    assert (
        "was made with another config. Use --fresh to start over in a new folder, or undo the changes; " in result.err
    )
    assert "\n  optimizer.lr was 0.003, now 0.001" in result.err and "\n  run.seed was 7, now 8" in result.err
    assert result.err.count(" was ") == 3  # the sentence, and one line for each change
    assert {path: path.stat().st_mtime_ns for path in before} == before
    fresh = server.run("train", [config, "--fresh"], tmp_path).expect(0)
    assert f"starting over in {tmp_path / 'out-2'}" in fresh.out
    assert (tmp_path / "out-2" / "photos.safetensors").is_file()
    assert not (tmp_path / "out" / "photos.safetensors").exists()
    assert '; resume.allow = ["optimizer.lr"] goes on with the new value:' in result.err
    refused = server.run("train", [cached_run(resume={"allow": ["run.seed"]})], tmp_path).expect(2)
    assert "resume.allow: 'run.seed' cannot change within a run" in refused.err
    config = cached_run(optimizer={"lr": 1e-3}, resume={"allow": ["optimizer.lr"]})
    result = server.run("train", [config], tmp_path).expect(0)
    assert (
        "note: resume.allow: optimizer.lr was 0.003, now 0.001" in result.out
        and "the learning rate jumps" in result.out
    )
    state = json.loads((tmp_path / "out" / "photos-state" / "state.json").read_text(encoding="utf-8"))
    (change,) = state["changed"]
    assert change["settings"] == ["optimizer.lr was 0.003, now 0.001"] and 0 < change["step"] < state["step"]
    rates = [metrics(tmp_path / folder)[-1]["train/lr"] for folder in ("out", "out-2")]
    assert rates[0] == rates[1]  # that of a run with the new value from its start


def test_a_second_branch_in_one_folder_is_refused_before_anything_is_encoded(
    cached_run: Callable[..., Path], tmp_path: Path, server: ForkServer
) -> None:
    config = cached_run(train={"max_steps": 2})
    server.run("train", [config], tmp_path).expect(0)
    result = server.run("train", [config, "--set", "resume.from=none"], tmp_path).expect(2)
    assert 'resume.from: "none" begins at step 0' in result.err and "holds later checkpoints (" in result.err
    assert "choose another run.output_dir (--fresh does)" in result.err
    assert "  memory   " not in result.out  # which is planned right before the caches are made


def test_another_caption_since_the_run_began_is_named(
    new_run: Callable[..., Path], images: Path, caches: Path, tmp_path: Path, server: ForkServer
) -> None:
    copy_tree(caches, tmp_path / "cache")
    config = new_run(images=images)
    server.run("train", [config], tmp_path, MUSUBI_FAULT="train.update:7").expect(-signal.SIGKILL)
    (images / "moon.txt").write_text("something else", encoding="utf-8")
    result = server.run("train", [config], tmp_path).expect(2)
    assert "the data set has other images, captions, masks, buckets, batch sizes or teachers" in result.err
    assert f'begins from its weights with model.path = "{tmp_path / "out"}:latest"' in result.err
    assert (
        "encoded" not in result.out
    )  # what is due for the new caption waits until it is clear that there is a use for it


def test_a_finished_run_with_another_config_is_refused_too(
    cached_run: Callable[..., Path], tmp_path: Path, server: ForkServer
) -> None:
    server.run("train", [cached_run(train={"max_steps": 2})], tmp_path).expect(0)
    config = cached_run(train={"max_steps": 2}, optimizer={"weight_decay": 0.5})
    result = server.run("train", [config], tmp_path).expect(2)
    assert "has a finished run with another config. Use --fresh" in result.err
    assert "optimizer.weight_decay was 0.01, now 0.5" in result.err


def test_a_folder_of_another_run_is_refused(
    cached_run: Callable[..., Path], tmp_path: Path, server: ForkServer
) -> None:
    server.run("train", [cached_run(train={"max_steps": 2})], tmp_path).expect(0)
    config = cached_run(train={"max_steps": 2}, run={"name": "other"})
    result = server.run("train", [config], tmp_path).expect(2)
    assert f"run.output_dir {tmp_path / 'out'}: holds the run 'photos', this run is called 'other'" in result.err


def test_fewer_steps_than_were_trained_are_an_error(
    cached_run: Callable[..., Path], tmp_path: Path, server: ForkServer
) -> None:
    server.run("train", [cached_run()], tmp_path, MUSUBI_FAULT="train.update:7").expect(-signal.SIGKILL)
    result = server.run("train", [cached_run(train={"max_steps": 3})], tmp_path).expect(2)
    assert "is at step 5, but train.max_steps is 3" in result.err


def test_two_trainers_in_one_folder_are_refused_until_the_first_is_dead(
    cached_run: Callable[..., Path], tmp_path: Path, server: ForkServer, home: Path
) -> None:
    config = cached_run()
    first = subprocess.Popen(
        [sys.executable, REPOSITORY / "train.py", config, "--max_steps", "1000000"],
        cwd=tmp_path,
        env=clean_environment(home),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        lines = tmp_path / "out" / "metrics.jsonl"
        wait_for(lambda: lines.exists() and lines.stat().st_size > 0)
        second = server.run("train", [config], tmp_path).expect(2)
        assert (
            f"run.output_dir {tmp_path / 'out'}: process {first.pid} on {platform.node()} is training here"
            in second.err
        )
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait(timeout=60)
    server.run("train", [config, "--fresh"], tmp_path).expect(0)
    last = metrics(tmp_path / "out")[-1]["step"]
    server.run("train", [config, "--max_steps", str(last + 2)], tmp_path).expect(0)


def test_a_launcher_that_would_wrap_the_model_is_refused(
    cached_run: Callable[..., Path], tmp_path: Path, server: ForkServer
) -> None:
    result = server.run("train", [cached_run()], tmp_path, ACCELERATE_USE_FSDP="true").expect(2)
    assert "ACCELERATE_USE_FSDP=true" in result.err and "set distributed.fsdp = true" in result.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is right on a GPU")
@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_fp16_on_a_cpu_is_refused(
    device: str, cached_run: Callable[..., Path], tmp_path: Path, server: ForkServer
) -> None:
    config = cached_run(run={"device": device}, train={"mixed_precision": "fp16"})
    result = server.run("train", [config], tmp_path).expect(2)
    assert "train.mixed_precision" in result.err and '"fp16" needs a' in result.err
    assert 'use "bf16" or "no"' in result.err
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_cuda_device_that_is_not_there_is_refused(
    cached_run: Callable[..., Path], tmp_path: Path, server: ForkServer
) -> None:
    result = server.run("train", [cached_run(run={"device": "cuda"})], tmp_path, CUDA_VISIBLE_DEVICES="").expect(2)
    assert 'run.device is "cuda", but this torch sees no GPU' in result.err


def test_sigterm_is_not_swallowed_by_code_that_catches_exceptions(python: Callable[..., Result]) -> None:
    """Libraries guard their imports with `except Exception`; a signal that arrives there must still end the command."""
    code = (
        "import os, signal\n"
        "from musubi_tuner.errors import run_command\n"
        "from musubi_tuner.stopping import exit_on_terminate\n"
        "def body():\n"
        "    exit_on_terminate()\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except Exception:\n"
        "        pass\n"
        "    return 0\n"
        "raise SystemExit(run_command(body))\n"
    )
    result = python("-c", code).expect(143)
    assert "terminated; run the same command again to continue" in result.err


def test_every_photograph_has_a_caption_of_its_own() -> None:
    """What the swaps and counts of this file and its neighbours rely on."""
    assert len(set(CAPTIONS.values())) == len(CAPTIONS) == 9
