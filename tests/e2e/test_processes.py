"""Two processes train the model that one process trains with twice the accumulation, however they are started."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image
from project import (
    REPOSITORY,
    ForkServer,
    Place,
    Result,
    cache_paths,
    clean_environment,
    copy_tree,
    differing,
    final_files,
    metrics,
    run_command,
)
from safetensors.torch import load_file

from musubi_tuner.assemble import load_trainee

DATA = {"resolution": 128, "batch_size": 2, "num_repeats": 3}
"""27 presentations of 9 photographs in four buckets: 15 micro-batches, so that the eighth update of an epoch is short."""
STEP_AT_ONE = 2.0**-23
"""Between float32 numbers from 1 to 2."""
STEPS = 12
"""One and a half epochs."""
MEANS = ("loss/total", "loss/main", "loss/lune", "loss/sol", "train/grad_norm")
"""Numbers of a line that are means over the updates since the last one."""
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip


class Setting(Place):
    def new(self, name: str, **changes: Any) -> Path:
        """A run file with its caches in a new folder."""
        train = {"max_steps": STEPS, "mixed_precision": "no", **changes.pop("train", {})}
        common: dict[str, Any] = {"general": DATA, "train": train, "save": {"every_steps": 0}}
        return self.write(name, **{**common, **changes})


@pytest.fixture(scope="module")
def setting(place: Place) -> Setting:
    return Setting(**vars(place))


@pytest.fixture(scope="module")
def alone(setting: Setting, server: ForkServer) -> Path:
    """Output of one process with accumulation 2."""
    config = setting.new("alone", train={"grad_accum_steps": 2})
    plan = server.run("train", [config], config.parent).expect(0).out
    assert "epochs of 8 updates, the last one shorter" in plan
    return config.parent / "out"


def assert_same_weights(ours: Path, alone: Path) -> None:
    """Compare weights and averages of two runs.

    Sums over samples are formed in another order, so float32 rounding differs: by 1e-7 of a gradient, which twelve
    updates of AdamW, dividing by the gradient's own size, let grow to at most 1e-5 of what training moved; an average may end on
    the next number.
    """
    for name in ("photos.safetensors", "photos_ema.safetensors"):
        found, expected = load_file(ours / name), load_file(alone / name)
        start = load_start(alone)
        moved = max(float((expected[key] - start[key]).abs().max()) for key in expected)
        gap = max(float((found[key] - expected[key]).abs().max()) for key in expected)
        assert moved > 1e-3
        assert gap <= max(1e-5 * moved, STEP_AT_ONE), name


def assert_same_model(ours: Path, alone: Path) -> None:
    """Compare weights, averages and metrics of two runs."""
    assert_same_weights(ours, alone)
    rows, expected_rows = metrics(ours), metrics(alone)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-5, abs=1e-7)


def assert_same_lines(ours: Path, alone: Path) -> None:
    """Compare lines of three updates each, with one slice of the noise level, with those of the updates."""
    single = {row["step"]: row for row in metrics(alone)}
    images = {
        step: row["train/images"] - single.get(step - 1, {"train/images": 0})["train/images"]
        for step, row in single.items()
    }
    rows = metrics(ours)
    assert [row["step"] for row in rows] == list(range(3, STEPS + 1, 3))
    for row in rows:
        steps = [row["step"] - back for back in range(3)]
        for tag, last in single[row["step"]].items():
            if tag in MEANS:
                assert row[tag] == pytest.approx(sum(single[step][tag] for step in steps) / 3, rel=1e-4), tag
            elif not tag.startswith("loss/sigma_"):
                assert row[tag] == pytest.approx(last, rel=1e-5), tag
        # With one slice of the noise level, its loss is the mean over all images since the last line.
        total = sum(single[step]["loss/main"] * images[step] for step in steps)
        assert row["loss/sigma_0.500"] == pytest.approx(total / sum(images[step] for step in steps), rel=1e-4)


def load_start(alone: Path) -> dict[str, torch.Tensor]:
    """Weights before the first update."""
    from musubi_tuner.config import load_config

    config = load_config(alone.parent / "run.toml")
    return load_trainee(config, torch.device("cpu")).model.state_dict()


def test_two_processes_of_the_runner_train_the_model_of_one_with_accumulation(
    setting: Setting, alone: Path, server: ForkServer
) -> None:
    config = setting.new("runner", distributed={"num_processes": 2})
    result = server.run("train", [config], config.parent).expect(0)
    assert "update = 2 process(es) x 1 micro-batch(es)" in result.out
    assert_same_model(config.parent / "out", alone)


def test_two_processes_of_accelerate_launch_train_the_model_of_one_with_accumulation(
    setting: Setting, alone: Path, python: Callable[..., Result]
) -> None:
    config = setting.new("launched")
    command = [*LAUNCH, REPOSITORY / "train.py", config]
    result = python(*command, cwd=config.parent, ACCELERATE_USE_CPU="true").expect(0)
    assert result.out.count("update = 2 process(es) x 1 micro-batch(es)") == 1
    assert_same_model(config.parent / "out", alone)


def test_a_model_sharded_across_two_processes_trains_as_one_with_accumulation(
    setting: Setting, alone: Path, server: ForkServer, tmp_path: Path
) -> None:
    """Its files are those of one process, which goes on from them; so does the sharded run from the state of one."""
    config = setting.new("sharded", distributed={"num_processes": 2, "fsdp": True}, save={"every_steps": 7})
    result = server.run("train", [config], config.parent).expect(0)
    assert "fsdp: weights are sharded across 2 processes" in result.out
    ours = config.parent / "out"
    assert_same_model(ours, alone)
    for name in ("model", "ema", "optimizer"):
        found, expected = (load_file(out / "photos-state" / f"{name}.safetensors") for out in (ours, alone))
        assert {key: (t.shape, t.dtype) for key, t in found.items()} == {
            key: (t.shape, t.dtype) for key, t in expected.items()
        }
    begun = "photos-step00000007-state"
    for name, options in {
        "one": ["--set", "distributed.num_processes=1", "--set", "distributed.fsdp=false", "--grad_accum_steps", "2"],
        "again": [],
    }.items():
        out = tmp_path / name
        start = ["--set", f"run.output_dir={out}", "--set", f"resume.from={ours / begun}"]
        said = server.run("train", [config, *start, *options], tmp_path).expect(0).out
        assert f"continuing from {begun}: step 7 of 12" in said
        assert_same_weights(out, alone)
        if name == "again":
            assert differing(final_files(out), final_files(ours)) == []


def test_a_sharded_model_is_measured_and_drawn_whole(setting: Setting, server: ForkServer) -> None:
    """With recomputed blocks, accumulation, an optimizer that averages, pictures held out, and a sample from the first update on."""
    outputs = []
    for fsdp in (False, True):
        config = setting.new(
            f"whole {fsdp}",
            distributed={"num_processes": 2, "fsdp": fsdp},
            train={"grad_accum_steps": 2, "max_steps": 4},
            optimizer={"type": "AdamWScheduleFree"},
            memory={"gradient_checkpointing": True},
            validation={"split": 0.3, "every_steps": 2},
            sample={
                "prompts": ["a photo"],
                "every_steps": 2,
                "at_first": True,
                "steps": 2,
                "width": 128,
                "height": 128,
            },
        )
        server.run("train", [config], config.parent).expect(0)
        outputs.append(config.parent / "out")
    copied, sharded = outputs
    for row, expected in zip(metrics(sharded), metrics(copied), strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
    drawn = sorted(path.name for path in (copied / "sample").glob("*.png"))
    assert len(drawn) == 6
    for name in drawn:
        found, expected = (np.asarray(Image.open(out / "sample" / name), np.int16) for out in (sharded, copied))
        assert np.abs(found - expected).max() <= 1, name


def on_two_machines(launcher: Sequence[str], configs: Sequence[Path], home: Path, *options: str) -> list[Result]:
    """Start a launcher twice, as on two machines that find each other at a port.

    Args:
        launcher: its arguments, with RANK and PORT in them. configs: the run file of each machine. options: of train.py.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**clean_environment(home), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, *(word.replace("RANK", str(rank)).replace("PORT", port) for word in launcher),
             REPOSITORY / "train.py", config, *options],
            cwd=config.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
        )
        for rank, config in enumerate(configs)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in started]
    return [Result(process.returncode, *each) for process, each in zip(started, said, strict=True)]


TORCHRUN = ["-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", "RANK", "--nproc_per_node", "1", "--master_addr",
            "127.0.0.1", "--master_port", "PORT"]  # fmt: skip
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--machine_rank", "RANK",
              "--main_process_ip", "127.0.0.1", "--main_process_port", "PORT", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_machines_train_the_model_of_one_process_with_accumulation(
    launcher: list[str], setting: Setting, alone: Path, home: Path
) -> None:
    config = setting.new(f"machines {launcher[1].split('.')[0]}")
    for result in on_two_machines(launcher, [config, config], home):
        result.expect(0)
    assert_same_model(config.parent / "out", alone)


def test_two_machines_go_through_the_phases_of_fluxflow_as_one_process(home: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(4):
        Image.effect_noise((32, 32), 60 + number).convert("RGB").save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a picture")
    geometry = tomllib.loads((REPOSITORY / "toml" / "demo_fluxflow.toml").read_text(encoding="utf-8"))["model"][
        "geometry"
    ]

    def run_file(name: str, accumulation: int) -> Path:
        config = tmp_path / name / "run.toml"
        config.parent.mkdir()
        tables = {
            "run": {"name": "ff", "output_dir": str(tmp_path / name / "out"), "threads": 1},
            "model": {
                "arch": "ff",
                "init": "scratch",
                "layout": "ff-v2",
                "bert_tokenizer": "words",
                "geometry": geometry,
            },
            "objective": {"train_vae": True, "gan_training": True},
            "train": {"max_steps": 4, "mixed_precision": "no", "grad_accum_steps": accumulation},
            "log": {"every_steps": 1, "tensorboard": False},
            "general": {"resolution": 32, "batch_size": 1},
            "datasets": [{"image_directory": str(pictures)}],
        }
        config.write_text(tomli_w.dumps(tables), encoding="utf-8")
        return config

    one, two = run_file("one", 2), run_file("two", 1)
    run_command([REPOSITORY / "train.py", one], tmp_path, home).expect(0)
    for result in on_two_machines(TORCHRUN, [two, two], home):
        result.expect(0)
    for name in ("ff.safetensors", "ff_ema.safetensors"):
        found, expected = load_file(two.parent / "out" / name), load_file(one.parent / "out" / name)
        assert all(torch.allclose(found[key], expected[key], rtol=1e-4, atol=1e-5) for key in expected), name
    rows = [{key: value for key, value in row.items() if key != "clock"} for row in metrics(two.parent / "out")]
    for row, other in zip(rows, metrics(one.parent / "out"), strict=True):
        assert row == pytest.approx({key: value for key, value in other.items() if key != "clock"}, rel=1e-3, abs=1e-5)


def test_machines_with_different_states_do_not_train_together(begun_by_two: Path, home: Path, tmp_path: Path) -> None:
    """As where run.output_dir is not on a disk that they share."""
    out = copy_tree(begun_by_two.parent / "out", tmp_path / "out")
    text = begun_by_two.read_text(encoding="utf-8").replace(str(begun_by_two.parent / "out"), "OUT")
    configs = []
    for name, folder in (("here", out), ("there", tmp_path / "empty")):
        configs.append(tmp_path / f"{name}.toml")
        configs[-1].write_text(text.replace("OUT", str(folder)), encoding="utf-8")
    found = on_two_machines(TORCHRUN, configs, home)
    assert all(result.code for result in found)
    assert "do not have the same state to go on from (rank 0 on" in "".join(result.err for result in found)
    assert not (tmp_path / "empty" / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def begun_by_two(setting: Setting, python: Callable[..., Result]) -> Path:
    """A run that was killed in its second half, while `accelerate launch` trained it in two processes. Read only.

    Saved after update 5, between the lines of updates 3 and 6. Without ACCELERATE_USE_CPU the launcher starts two processes that
    accelerate itself would let train apart.
    """
    log = {"every_steps": 3, "noise_bins": 1, "tensorboard": False}
    config = setting.new("begun by two", save={"every_steps": 5}, log=log)
    command = [*LAUNCH, REPOSITORY / "train.py", config]
    killed = python(*command, cwd=config.parent, MUSUBI_FAULT="train.update:7")
    assert killed.code != 0
    assert (config.parent / "out" / "photos-step00000005-state" / "manifest.json").is_file(), killed.err
    assert not (config.parent / "out" / "photos-state").exists()
    return config


def test_a_run_of_two_processes_continues_in_one_that_accumulates(
    begun_by_two: Path, alone: Path, server: ForkServer, tmp_path: Path
) -> None:
    """With the weights of both, so they were synchronised, and with the losses of both in the line over the interruption."""
    out = copy_tree(begun_by_two.parent / "out", tmp_path / "out")
    changes = ["--set", f"run.output_dir={out}", "--grad_accum_steps", "2"]
    again = server.run("train", [begun_by_two, *changes], tmp_path).expect(0)
    assert "continuing from photos-step00000005-state: step 5 of 12" in again.out
    assert "warning: this run continues under other conditions" in again.out and "processes was 2, now 1" in again.out
    assert_same_weights(out, alone)
    assert_same_lines(out, alone)


@pytest.mark.slow
def test_a_run_of_two_processes_continues_in_two(
    begun_by_two: Path, alone: Path, python: Callable[..., Result], tmp_path: Path
) -> None:
    out = copy_tree(begun_by_two.parent / "out", tmp_path / "out")
    command = [*LAUNCH, REPOSITORY / "train.py", begun_by_two, "--set", f"run.output_dir={out}"]
    python(*command, cwd=tmp_path, ACCELERATE_USE_CPU="true").expect(0)
    assert_same_weights(out, alone)
    assert_same_lines(out, alone)


def test_continuing_with_fewer_micro_batches_per_update_is_refused(
    begun_by_two: Path, server: ForkServer, tmp_path: Path
) -> None:
    """An epoch's updates are counted in them: the position in the state would mean other images."""
    out = copy_tree(begun_by_two.parent / "out", tmp_path / "out")
    again = server.run("train", [begun_by_two, "--set", f"run.output_dir={out}"], tmp_path)
    again.expect(2)
    assert "was made with another config" in again.err


def test_a_launcher_that_starts_fewer_processes_than_it_was_asked_for_is_an_error(
    setting: Setting, python: Callable[..., Result]
) -> None:
    """`accelerate launch --cpu --num_processes 2` silently starts one."""
    config = setting.new("one of two")
    command = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no", REPOSITORY / "train.py", config]  # fmt: skip
    result = python(*command, cwd=config.parent)
    assert result.code != 0
    assert "error: MASTER_ADDR=127.0.0.1: a launcher started several processes that would train apart" in result.err
    assert not (config.parent / "out" / "metrics.jsonl").exists()


def test_due_caches_under_a_launcher_are_an_error_that_names_the_commands(setting: Setting, server: ForkServer) -> None:
    config = setting.new("due")
    for path in cache_paths(config.parent / "cache"):
        if path.name.endswith(("_te.safetensors", "_experts.safetensors")):
            path.unlink()
    before = cache_paths(config.parent / "cache")
    environment = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "ACCELERATE_MIXED_PRECISION": "no"}
    result = server.run("train", [config], config.parent, **environment).expect(1)
    assert "error: caches are not complete, but nothing is encoded under a launcher; run:" in result.err
    assert f"python -m musubi_tuner.caching text {config}" in result.err
    assert f"python -m musubi_tuner.caching experts {config}" in result.err
    assert "caching latents" not in result.err
    assert cache_paths(config.parent / "cache") == before


def test_loader_workers_change_nothing(setting: Setting, server: ForkServer) -> None:
    outputs = []
    for workers in (0, 2):
        config = setting.new(f"{workers} workers", train={"loader_workers": workers, "max_steps": 6})
        server.run("train", [config], config.parent).expect(0)
        outputs.append(config.parent / "out")
    assert differing(final_files(outputs[0]), final_files(outputs[1])) == []
    assert metrics(outputs[0]) == metrics(outputs[1])


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the workers")
def test_a_killed_loader_worker_ends_the_run_with_its_reason(setting: Setting, home: Path) -> None:
    config = setting.new("killed worker", train={"loader_workers": 1, "max_steps": 1_000_000})
    run = subprocess.Popen(
        [sys.executable, REPOSITORY / "train.py", config], cwd=config.parent, env=clean_environment(home),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines = config.parent / "out" / "metrics.jsonl"
    limit = time.monotonic() + 120
    while not (lines.exists() and lines.read_bytes().count(b"\n") > 2):
        assert run.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    killed = list[str]()
    while not killed:  # an epoch has workers of its own
        children = [
            pid for path in Path(f"/proc/{run.pid}/task").glob("*/children") for pid in path.read_text().split()
        ]
        for pid in children:
            with suppress(OSError):
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(int(pid), signal.SIGKILL)
                    killed.append(pid)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 1 and "Traceback" not in said
    # Killed between two batches, or while one was handed over; the loader does not always see the signal.
    who = "|".join(killed)
    assert re.search(
        rf"a loader worker (\(process .*\b({who})\b.*\)|ended while).* killed, as the system does when main memory is full",
        said,
    )
