"""Whatever kills a run, and wherever: the same command again ends in the very files of an undisturbed run."""

import os
import random
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from project import (
    REPOSITORY,
    SAVES,
    TRAINING_POINTS,
    CacheRehearsal,
    ForkServer,
    Place,
    Rehearsal,
    all_lines,
    cache_files,
    cache_paths,
    content,
    copy_tree,
    differing,
    final_files,
    metrics,
)

LONGER: dict[str, Any] = {"train": {"max_steps": 150}, "save": {"every_steps": 0, "every_epochs": 0}}
"""Long enough that a signal finds the run at work."""


def wait_for(happened: Callable[[], bool]) -> None:
    """Poll until something has happened.

    Raises:
        AssertionError: after a minute.
    """
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


# Cache jobs


@pytest.fixture(scope="module")
def jobs(
    tmp_path_factory: pytest.TempPathFactory, server: ForkServer, photographs: Path, encoders: Path
) -> CacheRehearsal:
    """The cache jobs, undisturbed once."""
    return CacheRehearsal(tmp_path_factory.mktemp("jobs"), server, photographs, encoders)


@pytest.mark.parametrize(
    ("job", "point", "left"),
    [
        # Batches of 2 latents or expert files, cut within a bucket, and of 4 captions; the first bucket has 3 photographs.
        ("latents", "cache.latents.batch:1", 2),
        ("latents", "file.renamed:5", 5),
        ("text", "cache.text.batch:2", 8),
        ("text", "file.written:6", 5),
        # Nine halves in six batches, then as many files.
        ("experts", "cache.experts.batch:3", 0),
        ("experts", "cache.experts.batch:9", 5),
        ("experts", "file.written:2", 0),
        ("experts", "file.written:11", 1),
    ],
)
def test_a_killed_cache_job_continues_to_the_same_files(job: str, point: str, left: int, jobs: CacheRehearsal) -> None:
    assert jobs.interrupt(f"{job} {point}", job, point) == left


def test_train_py_passes_on_that_a_cache_job_was_killed_and_continues_it(
    new_run: Callable[..., Path], server: ForkServer, caches: Path
) -> None:
    config = new_run()
    cache = copy_tree(caches, config.parent / "cache")
    for path in sorted(cache.glob("*_experts.safetensors"))[:5]:
        path.unlink()
    train = ("train", [config, "--cache_only"], config.parent)
    server.run(*train, MUSUBI_FAULT="cache.experts.batch:2").expect(128 + signal.SIGKILL)
    assert len(cache_paths(cache)) < len(cache_paths(caches))
    again = server.run(*train).expect(0)
    assert "experts: encoded" in again.out
    assert "latents: encoded" not in again.out and "text: encoded" not in again.out
    assert differing(cache_files(cache), cache_files(caches)) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_caching_ends_everything_with_its_exit_code(
    number: signal.Signals, code: int, new_run: Callable[..., Path], server: ForkServer
) -> None:
    """It comes while the job imports its libraries, the longest part of a short job."""
    config = new_run()
    pid = server.start("train", [config], config.parent)
    wait_for(lambda: any((config.parent / "cache").glob(".lock_latents*")))
    time.sleep(0.5)
    os.kill(pid, number)
    server.finish().expect(code)
    assert not list((config.parent / "cache").glob(".tmp-*"))


# Training


@pytest.fixture(scope="module")
def rehearsal(place: Place) -> Rehearsal:
    """A run that is trained undisturbed once, and then again with its plug pulled."""
    return Rehearsal(place.server, partial(place.write, save=SAVES))


def test_the_undisturbed_run_releases_its_weights(rehearsal: Rehearsal) -> None:
    """With which the interrupted ones are compared."""
    out = rehearsal.reference.parent / "out"
    names = ["README.md", "config.json", "ema.safetensors", "model.safetensors", "options.json"]
    assert sorted(path.name for path in (out / "release").iterdir()) == names
    for released, trained in (("model", "photos"), ("ema", "photos_ema")):
        assert content(out / "release" / f"{released}.safetensors") == content(out / f"{trained}.safetensors")


@pytest.mark.parametrize("point", TRAINING_POINTS)
def test_a_run_killed_at_a_seeded_point_ends_identical_to_an_undisturbed_one(point: str, rehearsal: Rehearsal) -> None:
    count = random.Random(f"{point} 1").randint(1, rehearsal.passes(point))
    config = rehearsal.new(f"killed at {point}")
    rehearsal.start(config, MUSUBI_FAULT=f"{point}:{count}").expect(-signal.SIGKILL)
    rehearsal.start(config).expect(0)
    rehearsal.assert_equal(config)


def test_a_run_killed_three_times_ends_identical_to_an_undisturbed_one(rehearsal: Rehearsal) -> None:
    config = rehearsal.new("killed three times")
    for point in ("train.update:7", "state.optimizer:1", "file.written:9"):
        rehearsal.start(config, MUSUBI_FAULT=point).expect(-signal.SIGKILL)
    again = rehearsal.start(config).expect(0)
    assert "continuing from photos-" in again.out
    rehearsal.assert_equal(config)


def test_a_run_killed_after_its_last_checkpoint_still_gets_its_release_folder(rehearsal: Rehearsal) -> None:
    config = rehearsal.new("killed before the release")
    point = f"checkpoint.listed:{rehearsal.passes('checkpoint.listed')}"
    rehearsal.start(config, MUSUBI_FAULT=point).expect(-signal.SIGKILL)
    rehearsal.start(config).expect(0)
    assert (config.parent / "out" / "release").is_dir()
    rehearsal.assert_equal(config)


def test_a_run_killed_inside_its_release_folder_leaves_no_half_file_there(rehearsal: Rehearsal) -> None:
    config = rehearsal.new("killed in the release")
    release = config.parent / "out" / "release"
    # The last files of a run: model, average, config and card of the release, then the list of checkpoints.
    point = f"file.written:{rehearsal.passes('file.written') - 3}"
    rehearsal.start(config, MUSUBI_FAULT=point).expect(-signal.SIGKILL)
    assert any(release.glob(".tmp-*")), "the plug was not pulled in the release folder"
    rehearsal.start(config).expect(0)
    assert not any(release.glob(".tmp-*"))
    rehearsal.assert_equal(config)


def test_a_run_killed_while_a_state_takes_the_place_of_an_older_one_keeps_either(rehearsal: Rehearsal) -> None:
    config = rehearsal.new("killed over a state")
    # The last state is there and not listed, so the next start goes on from it and writes it again.
    for fault in (f"state.renamed:{rehearsal.passes('state.renamed')}", "state.aside:1", "state.renamed:1"):
        rehearsal.start(config, MUSUBI_FAULT=fault).expect(-signal.SIGKILL)
    rehearsal.start(config).expect(0)
    rehearsal.assert_equal(config)


def test_every_fault_point_of_the_source_is_pulled_here() -> None:
    """But for those of other runs: `test_held_out`, `test_toy_family` and `test_steps` pull them."""
    source = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "src").rglob("*.py"))
    names = {name.replace("{job.kind}", "text") for name in re.findall(r'fault_point\(f?"([^"]+)"\)', source)}
    names |= {f"state.{part}" for part in ("model", "ema", "optimizer")}
    assert names - {"state.{name}"} == {
        *TRAINING_POINTS, "state.aside", "cache.text.batch", "best.listed", "train.phase", "step.finished",
    }  # fmt: skip


@pytest.fixture(scope="module")
def longer(rehearsal: Rehearsal) -> Path:
    """Output of an undisturbed longer run."""
    config = rehearsal.new("longer", **LONGER)
    rehearsal.start(config).expect(0)
    return config.parent / "out"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_update_finish_and_be_saved(
    number: signal.Signals, code: int, rehearsal: Rehearsal, longer: Path
) -> None:
    config = rehearsal.new(f"signal {number.name}", **LONGER)
    out = config.parent / "out"
    lines = out / "metrics.jsonl"
    pid = rehearsal.server.start("train", [config], config.parent)
    wait_for(lambda: lines.exists() and lines.read_bytes().count(b"\n") >= 3)
    os.kill(pid, number)
    stopped = rehearsal.server.finish().expect(code)
    step = metrics(out)[-1]["step"]
    assert f"stopped after step {step}; run the same command again to continue" in stopped.err
    assert (out / f"photos-step{step:08d}-state" / "manifest.json").is_file()
    again = rehearsal.start(config).expect(0)
    assert f"continuing from photos-step{step:08d}-state: step {step} of 150" in again.out
    assert differing(final_files(out), final_files(longer)) == []
    assert all_lines(out) == all_lines(longer)


def flip_a_byte(state: Path) -> None:
    path = state / "optimizer.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def lose_a_file(state: Path) -> None:
    (state / "ema.safetensors").unlink()


def cut_the_values(state: Path) -> None:
    path = state / "state.json"
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, "optimizer.safetensors does not match its manifest; trying an older state"),
        (lose_a_file, "is not a complete state (FileNotFoundError"),
        (cut_the_values, "is not a readable state"),
    ],
)
def test_a_damaged_newest_state_is_named_and_the_one_before_is_used(
    damage: Callable[[Path], None], message: str, rehearsal: Rehearsal
) -> None:
    config = rehearsal.new(f"damaged by {damage.__name__}")
    rehearsal.start(config, MUSUBI_FAULT="train.update:11").expect(-signal.SIGKILL)
    damage(config.parent / "out" / "photos-step00000010-state")
    again = rehearsal.start(config).expect(0)
    assert "photos-step00000010-state" in again.err and message in again.err
    assert "continuing from photos-step00000005-state: step 5 of 20" in again.out
    rehearsal.assert_equal(config)


def test_without_a_good_state_the_run_starts_over(rehearsal: Rehearsal) -> None:
    config = rehearsal.new("no good state")
    rehearsal.start(config, MUSUBI_FAULT="train.update:7").expect(-signal.SIGKILL)
    flip_a_byte(config.parent / "out" / "photos-step00000005-state")
    again = rehearsal.start(config).expect(0)
    assert "does not match its manifest" in again.err
    assert "continuing" not in again.out
    rehearsal.assert_equal(config)
