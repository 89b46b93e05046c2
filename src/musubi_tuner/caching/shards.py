"""Caching data sets of shards, one shard at a time: unpack it, do the job over its pictures as over any folder, remove them again.

    cache_directory/<shard>/  cache files of its pictures, whose ids are <shard>/<key>
                              shard_<kind>.json  what they were made from, once the shard is done
    cache_directory/.reading-<shard>-<kind>/  its pictures while the job is at work

So its files are those that a folder of the same pictures would have, and a shard that was read is not needed any more. It is read again if its
file or a setting that decides about its files changes; what is right all the same is kept then.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from musubi_tuner.caching.fingerprint import expectation
from musubi_tuner.caching.job import Job, JobOptions, lock_for_job, run_job
from musubi_tuner.caching.shard_records import Shards
from musubi_tuner.config import RunConfig
from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.data.buckets import BucketSelector
from musubi_tuner.data.images import Memory, read_picture_header
from musubi_tuner.data.shards import read_shard
from musubi_tuner.data.sources import placement_of, selector_of
from musubi_tuner.data.streams import MOST_BAD
from musubi_tuner.errors import EXIT_OK, CacheError, DataError


def run_with_shards(config: RunConfig, job: Job, options: JobOptions, family_options: dict[str, Any]) -> int:
    """Do a job over the folders and lists of some data sets, and over their shards one by one; see `job.run_job`.

    Returns:
        0, or 1 if an item failed.
    """
    streamed = [dataset for dataset in config.datasets if dataset.stream is not None]
    plain = [dataset for dataset in config.datasets if dataset.stream is None]
    codes = [run_job(config.over(plain), job, options, family_options)] if plain else []
    if job.finish is None and not options.dry_run:
        job.open = cache(job.open)  # the networks stay for the next shard
    for dataset in streamed:
        codes.append(_run_shards(config.over([dataset]), job, options, family_options))
    return max(codes)


def _run_shards(config: RunConfig, job: Job, options: JobOptions, family_options: dict[str, Any]) -> int:
    (dataset,) = config.datasets
    shards = Shards(dataset)
    expected = expectation(config, job.kind, family_options, download=True)
    always = config.cache.run == "always"
    due = [name for name in shards.shards if always or shards.why_due(name, expected)]
    mine = sorted(due)[options.shard[0] - 1 :: options.shard[1]]
    if options.dry_run or not mine:
        print(
            f"{job.kind}: {'would read' if mine else 'read'} {len(mine)} of {len(shards.shards)} shards of {dataset.name}"
        )
        return EXIT_OK
    failed = EXIT_OK
    with lock_for_job(dataset.cache_directory, job.kind, options.shard):
        for left in dataset.cache_directory.glob(f".reading-*-{job.kind}") if options.shard == (1, 1) else ():
            shutil.rmtree(left, ignore_errors=True)  # by a job that was killed
        for number, name in enumerate(mine, start=1):
            shard = shards.shards[name]
            print(f"{job.kind}: shard {number} of {len(mine)}, {shard}", flush=True)
            with _unpacked(dataset, config.spec.code, name, shard, job.kind) as folder:
                part = replace(
                    dataset, stream=None, image_directory=folder, recursive=True, caption_extension=".txt", apart=()
                )
                code = run_job(config.over([part]), job, JobOptions(within=name), family_options)
            failed = max(failed, code)
            if code == EXIT_OK:
                shards.is_done(name, expected)
    return failed


@contextmanager
def _unpacked(dataset: DatasetConfig, architecture: str, name: str, shard: str, kind: str) -> Iterator[Path]:
    """A folder with the pictures and captions of a shard in ``<name>/``; it is removed afterwards.

    Raises:
        DataError: if the shard cannot be read. CacheError: if there is no room for it.
    """
    root = dataset.cache_directory / f".reading-{name}-{kind}"
    shutil.rmtree(root, ignore_errors=True)
    try:
        try:
            (root / name).mkdir(parents=True)
            _unpack(dataset, selector_of(dataset, architecture), shard, root / name)
        except OSError as problem:
            raise CacheError(f"{root}: the shard {shard} cannot be unpacked ({problem.strerror})") from problem
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _unpack(dataset: DatasetConfig, selector: BucketSelector, shard: str, folder: Path) -> None:
    assert dataset.stream is not None
    bad = left_out = 0
    for sample in read_shard(shard, dataset.stream):
        try:
            placement_of(read_picture_header(Memory(sample.picture, sample.name)).size, dataset, selector)
        except DataError as problem:
            bad, left_out = bad + 1, left_out + 1
            if bad == 1:
                print(f"warning: left out: {problem}", flush=True)
            if bad >= MOST_BAD:
                raise DataError(
                    f"{dataset.name}: {bad} samples in a row cannot be trained; the last: {problem}"
                ) from problem
            continue
        bad = 0
        path = _place(folder, sample.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + sample.ending).write_bytes(sample.picture)
        if sample.caption is not None:
            path.with_name(f"{path.name}.txt").write_text(sample.caption, encoding="utf-8")
    if left_out:
        print(f"warning: {left_out} samples of {shard} cannot be read, or are too small; they are left out", flush=True)


def _place(folder: Path, key: str) -> Path:
    """Where a sample is unpacked; keys lead out of the folder in no way."""
    parts = [part.lstrip(".") or "_" for part in key.replace("\\", "/").split("/") if part]
    return folder.joinpath(*parts)
