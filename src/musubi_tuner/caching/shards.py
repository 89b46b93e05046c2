"""Caching data sets of shards, one shard at a time: unpack it, do the job over its pictures as over any folder, remove them again.

    cache_directory/<shard>/  cache files of its pictures, whose ids are <shard>/<key>
                              shard_<kind>.json  what they were made from, once the shard is done
    cache_directory/.reading-<shard>-<kind>/  its pictures while the job is at work

So its files are those that a folder of the same pictures would have, and a shard that was read is not needed any more. It is read again if its
file or a setting that decides about its files changes; what is right all the same is kept then.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from musubi_tuner.caching.file_format import cache_path
from musubi_tuner.caching.fingerprint import expectation
from musubi_tuner.caching.job import Job, JobOptions, lock_for_job, run_job
from musubi_tuner.caching.shard_records import Shards
from musubi_tuner.caching.status import examine
from musubi_tuner.config import RunConfig
from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.data.buckets import BucketSelector
from musubi_tuner.data.folders import is_hidden
from musubi_tuner.data.images import Memory, open_image
from musubi_tuner.data.item import Item
from musubi_tuner.data.item_table import READING
from musubi_tuner.data.shards import read_shard
from musubi_tuner.data.sources import placement_of, scan, selector_of
from musubi_tuner.data.streams import MOST_BAD, caption_of_sample
from musubi_tuner.errors import EXIT_OK, CacheError, DataError

_LONGEST = 150
"""Bytes of a part of a sample's name."""


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
    shards = Shards(dataset, by_name=config.cache.skip_existing == "name")
    expected = expectation(config, job.kind, family_options, download=True)
    found = scan([dataset], config.spec.code)
    due = _due(config, found.items, job.kind, family_options)
    mine = [name for name in sorted(shards.shards)[options.shard[0] - 1 :: options.shard[1]] if name in due]
    if options.dry_run or not mine:
        what = "would read" if mine else "read"
        print(f"{job.kind}: {what} {len(mine)} of {len(shards.shards)} shards of {dataset.name}")
        return EXIT_OK
    failed = EXIT_OK
    with lock_for_job(dataset.cache_directory, job.kind, options.shard):
        for left in dataset.cache_directory.glob(f"{READING}*-{job.kind}") if options.shard == (1, 1) else ():
            shutil.rmtree(left, ignore_errors=True)  # by a job that was killed
        for number, name in enumerate(mine, start=1):
            shard, asked = shards.shards[name], shards.asked(name, expected)  # as it is before it is read
            print(f"{job.kind}: shard {number} of {len(mine)}, {shard}", flush=True)
            with _unpacked(dataset, config.spec.code, name, shard, job.kind) as (folder, count):
                part = replace(
                    dataset, stream=None, image_directory=folder, recursive=True, caption_extension=".txt", apart=()
                )
                code, files = EXIT_OK, list[str]()
                if count:
                    code = run_job(config.over([part]), job, JobOptions(within=name), family_options)
                    paths = [
                        cache_path(item, job.kind, config.spec.code) for item in scan([part], config.spec.code).items
                    ]
                    files = [path.relative_to(shards.folder(name)).as_posix() for path in paths]
            failed = max(failed, code)
            if code == EXIT_OK:
                shards.is_done(name, job.kind, asked, files)
    return failed


def _due(config: RunConfig, items: Sequence[Item], kind: str, family_options: dict[str, Any]) -> set[str]:
    """Names of the shards that have something to make."""
    keys = examine(config, items, kind, family_options).due
    named = {item.shard for item in items if item.key in keys}
    if config.cache.run == "always":
        named |= {item.shard for item in items}
    return {name for name in named if name is not None}


@contextmanager
def _unpacked(
    dataset: DatasetConfig, architecture: str, name: str, shard: str, kind: str
) -> Iterator[tuple[Path, int]]:
    """A folder with the pictures and captions of a shard in ``<name>/``, and how many these are; it is removed afterwards.

    Raises:
        DataError: if the shard cannot be read. CacheError: if there is no room for it.
    """
    root = dataset.cache_directory / f"{READING}{name}-{kind}"
    shutil.rmtree(root, ignore_errors=True)
    try:
        try:
            (root / name).mkdir(parents=True)
            count = _unpack(dataset, selector_of(dataset, architecture), shard, root / name)
        except OSError as problem:
            raise CacheError(f"{root}: the shard {shard} cannot be unpacked ({problem.strerror})") from problem
        yield root, count
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _unpack(dataset: DatasetConfig, selector: BucketSelector, shard: str, folder: Path) -> int:
    """Write pictures and captions; how many could be used."""
    assert dataset.stream is not None
    used, bad, left_out = set[str](), 0, 0
    for sample in read_shard(shard, dataset.stream):
        key = _place(sample.key)
        reason = f"{sample.name}: its name occurs twice" if key.lower() in used else ""
        caption = None if reason else caption_of_sample(sample, dataset)
        if not reason and caption is None:
            reason = f"{sample.name}: has no caption"
        try:
            if not reason:
                size = open_image(Memory(sample.picture, sample.name), dataset.alpha_background).size
                placement_of(size, dataset, selector)
        except DataError as problem:
            reason = str(problem)
        if reason:
            bad, left_out = bad + 1, left_out + 1
            if bad == 1:
                print(f"warning: left out: {reason}", flush=True)
            if bad >= MOST_BAD:
                raise DataError(f"{dataset.name}: {bad} samples in a row cannot be trained; the last: {reason}")
            continue
        bad = 0
        used.add(key.lower())
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + sample.ending).write_bytes(sample.picture)
        if caption:
            path.with_name(f"{path.name}.txt").write_text(caption, encoding="utf-8")
    if left_out:
        print(f"warning: {left_out} samples of {shard} are left out", flush=True)
    return len(used)


def _place(key: str) -> str:
    """Where a sample is unpacked, below its shard: its key, as far as that is a name for files; a hash in the place of other parts."""
    parts = []
    for part in key.replace("\\", "/").split("/"):
        raw = part.encode("utf-8", "surrogateescape")
        is_name = re.fullmatch(r"[^\x00-\x1f\udc80-\udcff]+", part) and len(raw) <= _LONGEST and not is_hidden(part)
        parts += [part if is_name else sha256(raw).hexdigest()[:16]] if part else []
    return "/".join(parts) or "_"
