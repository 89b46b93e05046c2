"""The frame of every cache job: what is due, in which batches, written how.

The items of a bucket, sorted, are cut into a fixed partition of batches, whatever exists already: a batch with a due
item is computed whole, and only the due files are written. So a file has the same content whether it was made in the
first run, after an interruption, or on another machine with ``--shard i/n`` (shards are made of whole batches).

A job whose networks are not to be in memory together walks over its batches twice (`Job.finish`). What the first walk
found waits in a hidden file beside each item's own, ``.{name}.half``, with the same fingerprint: a job that is killed in
between goes on from there, and removes these files as it writes the real ones.

A broken image is reported and the others go on; the job then ends with exit code 1. Files appear complete or not at
all. Nothing but halves and temporary files is ever deleted.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from musubi_tuner import __version__
from musubi_tuner.caching.contents import Contents
from musubi_tuner.caching.file_format import FORMAT_VERSION, HALF_SUFFIX, cache_path, kind_of
from musubi_tuner.caching.fingerprint import AUTO, Fingerprint, state_at
from musubi_tuner.caching.status import KindStatus, examine
from musubi_tuner.config import RunConfig
from musubi_tuner.data.item import Item
from musubi_tuner.data.sources import scan
from musubi_tuner.errors import (
    EXIT_FAILED,
    EXIT_OK,
    CacheError,
    ConfigError,
    DataError,
    Interrupted,
    UserError,
    advise_on_memory,
)
from musubi_tuner.files import fault_point, folder_lock, json_text, remove_leftovers, replace_file
from musubi_tuner.headers import read_header
from musubi_tuner.run_record import STOPPED, recorder, tell
from musubi_tuner.stamps import hashed_state, quick_state

if TYPE_CHECKING:
    from torch import Tensor

Encoded = dict[str, "Tensor"]
SMALLER = {
    "latents": "lower cache.latents_batch_size, turn on cache.vae_tiling or lower the resolution",
    "text": "lower cache.text_batch_size or turn on model.fp8_t5",
    "experts": 'lower cache.experts_batch_size, or choose experts.dtype = "float16" or a smaller experts.resolution',
}
"""What helps a job that does not fit into memory."""


@dataclass
class JobOptions:
    """What the command line of a job adds to the config.

    Attributes:
        shard: (i, n), i from 1: do the i-th of n parts. dry_run: only say what is due.
        within: sub-folder of the cache folder that the items are for, which the caller has locked; what lies beside it is none of their business.
    """

    shard: tuple[int, int] = (1, 1)
    dry_run: bool = False
    within: str = ""


@dataclass
class Outcome:
    """What a job did."""

    encoded: int = 0
    skipped: int = 0
    orphans: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    """Key of an item -> what is wrong with it."""


def parse_shard(text: str) -> tuple[int, int]:
    """Read ``i/n``.

    Raises:
        ConfigError: unless 1 <= i <= n.
    """
    first, slash, second = text.partition("/")
    if slash and first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second):
        return int(first), int(second)
    raise ConfigError(f"--shard is {text!r}, expected i/n with 1 <= i <= n, such as 2/4")


def make_batches(items: Sequence[Item], size: int, by_bucket: bool) -> list[list[Item]]:
    """The fixed partition: sorted items, cut into batches of ``size``; ``by_bucket`` keeps buckets apart."""
    groups: dict[str, list[Item]] = {}
    for item in sorted(items, key=lambda item: item.key):
        groups.setdefault(str(item.bucket) if by_bucket else "", []).append(item)
    return [group[i : i + size] for _, group in sorted(groups.items()) for i in range(0, len(group), size)]


Encoder = Callable[[list[Item], list[Any]], list[Encoded]]


@dataclass
class Job:
    """One kind of cache.

    Attributes:
        open: loads the encoders and returns the function that encodes a batch from items and what `read` returned.
        read: per item, in threads, ahead of the encoder; raises UserError for a broken file.
        metadata: header entries per item, beside the common ones.
        finish: loads other networks once those of `open` are gone, and returns the function that encodes a batch from
            items and what the first one returned for them; what it returns is written. None = one walk.
        report: lines for a person on the items that are due, before anything is encoded.
        precision: that the networks of `open` compute in, once they are open.
    """

    kind: str
    batch_size: int
    by_bucket: bool
    open: Callable[[], Encoder]
    read: Callable[[Item], Any] | None = None
    metadata: Callable[[Item], dict[str, str]] = lambda item: {}
    finish: Callable[[], Encoder] | None = None
    report: Callable[[list[Item]], list[str]] = lambda items: []
    precision: str | None = None


def run_job(config: RunConfig, job: Job, options: JobOptions, family_options: dict[str, Any]) -> int:
    """Do a job and print its summary line.

    Returns:
        0, or 1 if an item failed.

    Raises:
        CacheError: if another process writes to the same cache directory.
    """
    found = scan(config.datasets, config.spec.code)
    for note in found.notes:
        print(f"note: {note}")
    read_only: set[Path] = set()
    with ExitStack() as stack:
        if not options.dry_run and not options.within:
            for folder in sorted({dataset.cache_directory for dataset in config.datasets}):
                if not stack.enter_context(lock_for_job(folder, job.kind, options.shard, must_write=False)):
                    read_only.add(folder)
        contents = Contents(config)
        status = examine(config, found.items, job.kind, family_options, download=True, contents=contents)
        pictures = [item for item in found.items if item.content is None]
        batches = make_batches(pictures, job.batch_size, job.by_bucket)[options.shard[0] - 1 :: options.shard[1]]
        mine = [batch for batch in batches if any(item.key in status.due for item in batch)]
        due = [item for batch in mine for item in batch if item.key in status.due]
        outcome = Outcome(
            skipped=sum(item.key not in status.due for batch in batches for item in batch),
            orphans=0 if options.within else len(status.orphans),
        )
        if options.dry_run:
            print(f"{job.kind}: would encode {len(due)}, up to date {outcome.skipped}")
            for reason, count in status.reasons:
                print(f"  {count} x {reason}")
            return EXIT_OK
        contents.save()
        blocked = sorted(read_only & {config.datasets[item.dataset].cache_directory for item in due})
        if blocked:
            raise CacheError(
                f"{blocked[0]}: cannot be written to, and {job.kind} files are to be made there ({status.reasons[0][0]}); check "
                "the permissions of the folder, or give another cache_directory"
            )
        if options.shard == (1, 1):
            roots = {dataset.cache_directory / options.within for dataset in config.datasets} - read_only
            _remove_abandoned(config, job.kind, roots, mine if job.finish else [])
        if mine:
            for root in found.roots:
                root.keep()
            if status.mixture:
                print(f"warning: {status.mixture}", file=sys.stderr)
            for line in job.report(due):
                print(line, flush=True)
            if options.shard == (1, 1):
                for folder in {item.cache_directory for item in due if item.cache_directory.is_dir()}:
                    remove_leftovers(folder)
            with advise_on_memory(CacheError, f"{SMALLER[job.kind]}. What is encoded stays"):
                _encode(config, job, status, mine, outcome)
    return _summary(job.kind, outcome)


def lock_for_job(
    folder: Path, kind: str, shard: tuple[int, int] = (1, 1), *, must_write: bool = True
) -> AbstractContextManager[bool]:
    """Hold a cache folder for one writer of a kind. Shards may share a folder: each locks its own name.

    Args:
        must_write: see `folder_lock`.
    """
    return folder_lock(folder, partial(_busy, folder), f".lock_{kind}_{shard[0]}of{shard[1]}", must_write=must_write)


def _busy(folder: Path, holder: str) -> CacheError:
    return CacheError(f"{folder}: {holder} is writing caches here; wait for it, or use --shard i/n on each")


def _summary(kind: str, outcome: Outcome) -> int:
    for text in list(outcome.failed.values())[:10]:
        print(f"failed: {text}", file=sys.stderr)
    if len(outcome.failed) > 10:
        print(f"... and {len(outcome.failed) - 10} more", file=sys.stderr)
    line = f"{kind}: encoded {outcome.encoded}, up to date {outcome.skipped}, failed {len(outcome.failed)}"
    if outcome.orphans:
        line += f", {outcome.orphans} files belong to no item (python -m musubi_tuner.caching gc removes them)"
    print(line)
    return EXIT_FAILED if outcome.failed else EXIT_OK


def _encode(config: RunConfig, job: Job, status: KindStatus, batches: list[list[Item]], outcome: Outcome) -> None:
    walks = 1 if job.finish is None else 2
    total = walks * sum(_due(batch, status) for batch in batches)
    inputs = Inputs(job, status)
    with Progress(job.kind, total) as bar:
        if job.finish is None:
            for items, encoded in _walk(config, status, batches, inputs.read, job.open, outcome):
                bar.update(_write_batch(config, job, status, items, encoded, inputs.fingerprint, outcome))
        else:
            _encode_halves(config, job, status, inputs, batches, outcome, bar)
            free_memory()
            _finish_halves(config, job, status, batches, outcome, bar)
    if hasattr(os, "sync"):
        os.sync()


class Progress(tqdm):  # type: ignore[type-arg]  # generic in its stubs only
    """A bar of items that the record of the run shows too."""

    def __init__(self, kind: str, total: int) -> None:
        super().__init__(total=total, desc=kind, unit="item", disable=None, mininterval=0.5)
        self.kind, self.items, self.done = kind, total, 0  # a disabled bar keeps none of them

    def update(self, n: float | None = 1) -> bool | None:
        """Count items."""
        self.done += int(n or 0)
        tell(phase=self.kind, done=self.done, total=self.items)
        shown = super().update(n)
        current = recorder()
        if current is not None and self.done < self.items and "stop" in current.requests(("stop",)):
            current.tell(phase=STOPPED, stopped=True)
            raise Interrupted(
                0, f"stopped after {self.done} of {self.items} items; run the same command again to continue"
            )
        return shown


def _due(items: list[Item], status: KindStatus) -> int:
    return sum(item.key in status.due for item in items)


def _walk(
    config: RunConfig,
    status: KindStatus,
    batches: list[list[Item]],
    read: Callable[[Item], Any] | None,
    open_encoder: Callable[[], Encoder],
    outcome: Outcome,
) -> Iterator[tuple[list[Item], list[Encoded]]]:
    """Items of every batch that could be read, encoded; batches of which none of these is due are left out."""
    if not batches:
        return
    encode = open_encoder()
    for batch, inputs in _read_ahead(batches, read, config.cache.workers):
        good = [(item, value) for item, value in zip(batch, inputs) if not isinstance(value, UserError)]
        outcome.failed |= {item.key: str(value) for item, value in zip(batch, inputs) if isinstance(value, UserError)}
        items = [item for item, _ in good]
        if _due(items, status):
            yield items, encode(items, [value for _, value in good])


def half_path(path: Path) -> Path:
    """Where the first half of a cache file waits for the second."""
    return path.with_name(f".{path.name}{HALF_SUFFIX}")


def _half(config: RunConfig, kind: str, item: Item) -> Path:
    return half_path(cache_path(item, kind, config.spec.code))


def _remove_abandoned(config: RunConfig, kind: str, roots: set[Path], batches: list[list[Item]]) -> None:
    """Delete halves that no batch waits for: their items were finished, left the data set, or are made in one walk now."""
    wanted = {_half(config, kind, item) for batch in batches for item in batch}
    for root in roots:
        for path in root.rglob(f".*{HALF_SUFFIX}"):
            name = path.name.removeprefix(".").removesuffix(HALF_SUFFIX)
            if kind_of(name, config.spec.code) == kind and path not in wanted:
                path.unlink(missing_ok=True)


def _remove_halves(config: RunConfig, kind: str, items: Iterable[Item]) -> None:
    for item in items:
        _half(config, kind, item).unlink(missing_ok=True)


def free_memory() -> None:
    """Give back the memory of networks that nothing uses any more; their hooks are cycles, which wait for the collector."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _encode_halves(
    config: RunConfig,
    job: Job,
    status: KindStatus,
    inputs: "Inputs",
    batches: list[list[Item]],
    outcome: Outcome,
    bar: Any,
) -> None:
    """The first walk: halves of whole batches, so that the second has the same batches; complete ones are kept."""
    contents = Contents(config)

    def waits(item: Item) -> bool:
        if config.cache.run == "always":
            return False
        expected = status.expected[item.dataset]
        reason, stored = state_at(_half(config, job.kind, item), item, expected)
        return reason is None and contents.difference(item, expected, stored) is None

    open_batches = [batch for batch in batches if not all(waits(item) for item in batch)]
    bar.update(sum(_due(batch, status) for batch in batches) - sum(_due(batch, status) for batch in open_batches))
    for items, encoded in _walk(config, status, open_batches, inputs.read, job.open, outcome):
        for item, tensors in zip(items, encoded):
            write_item(_half(config, job.kind, item), config, inputs.fingerprint(item), job.metadata(item), tensors)
        fault_point(f"cache.{job.kind}.batch")
        bar.update(_due(items, status))


def _finish_halves(
    config: RunConfig, job: Job, status: KindStatus, batches: list[list[Item]], outcome: Outcome, bar: Any
) -> None:
    """The second walk: items whose first half failed are left out, and halves go as soon as their batch is written."""
    from safetensors.torch import load

    def read(item: Item) -> Encoded:
        # Not by its name: the library takes names in UTF-8 only.
        return load(_half(config, job.kind, item).read_bytes())

    def fingerprint(item: Item) -> Fingerprint:
        """As the first half has it: the image may have changed since."""
        found = read_header(_half(config, job.kind, item)).fingerprint
        assert found is not None
        return found

    assert job.finish is not None
    rest = [[item for item in batch if item.key not in outcome.failed] for batch in batches]
    rest = [batch for batch in rest if _due(batch, status)]
    for items, encoded in _walk(config, status, rest, read, job.finish, outcome):
        bar.update(_write_batch(config, job, status, items, encoded, fingerprint, outcome))
        _remove_halves(config, job.kind, items)
    _remove_halves(config, job.kind, (item for batch in batches for item in batch))


def _read_ahead(
    batches: list[list[Item]], read: Callable[[Item], Any] | None, workers: int
) -> Iterator[tuple[list[Item], list[Any]]]:
    """Batches with their inputs, in order; a few batches are read ahead in threads."""
    if read is None:
        yield from ((batch, [None] * len(batch)) for batch in batches)
        return

    def attempt(item: Item) -> Any:
        try:
            return read(item)
        except UserError as error:
            return error

    if workers == 0:
        yield from ((batch, [attempt(item) for item in batch]) for batch in batches)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[tuple[list[Item], list[Future[Any]]]] = []
        for batch in batches:
            waiting.append((batch, [pool.submit(attempt, item) for item in batch]))
            if len(waiting) > 2:
                first, futures = waiting.pop(0)
                yield first, [future.result() for future in futures]
        for first, futures in waiting:
            yield first, [future.result() for future in futures]


class Inputs:
    """Reads what the encoder of a job takes, and knows of which pictures and masks that was.

    A file is hashed before it is read. So what replaces it in between is found by the next start: the hash is not its own.
    """

    def __init__(self, job: Job, status: KindStatus) -> None:
        self._job, self._status = job, status
        self._states: dict[str, Fingerprint] = {}

    @property
    def read(self) -> Callable[[Item], Any] | None:
        """`Job.read`, if the job reads anything."""
        return None if self._job.read is None else self._read

    def _read(self, item: Item) -> Any:
        assert self._job.read is not None
        # A batch is computed whole, but only its due files are written.
        files = self._status.expected[item.dataset].files(item) if item.key in self._status.due else {}
        try:
            before = {name: quick_state(path) for name, path in files.items()}
            self._states[item.key] = {name: hashed_state(path) for name, path in files.items()}
            value = self._job.read(item)
            changed = [path for name, path in files.items() if quick_state(path) != before[name]]
        except OSError as error:
            raise DataError(f"{item.path}: cannot be read ({error.strerror})") from error
        if changed:
            raise DataError(f"{changed[0]}: was written while it was read; run the job again when it is complete")
        return value

    def fingerprint(self, item: Item) -> Fingerprint:
        """What makes the file of an item; to be asked for once."""
        expected = self._status.expected[item.dataset]
        states = self._states.pop(item.key, None)
        if states is None:  # a job that reads no files
            states = {name: hashed_state(path) for name, path in expected.files(item).items()}
        made = expected.of(item) | states
        return (
            made | {"precision": self._job.precision} if made.get("precision") == AUTO and self._job.precision else made
        )


def _write_batch(
    config: RunConfig,
    job: Job,
    status: KindStatus,
    items: list[Item],
    encoded: Iterable[Encoded],
    fingerprint: Callable[[Item], Fingerprint],
    outcome: Outcome,
) -> int:
    """Write the due files of a batch and return how many."""
    written = 0
    for item, tensors in zip(items, encoded):
        if item.key not in status.due:
            continue
        try:
            tensors = finite(config, item, tensors)
        except CacheError as error:
            outcome.failed[item.key] = str(error)
            continue
        write_item(cache_path(item, job.kind, config.spec.code), config, fingerprint(item), job.metadata(item), tensors)
        written += 1
    outcome.encoded += written
    fault_point(f"cache.{job.kind}.batch")
    return written


def finite(config: RunConfig, item: Item, tensors: Encoded) -> Encoded:
    """The tensors, in which values that are not finite are 0 if cache.nan_policy says so.

    Raises:
        CacheError: naming such tensors, if it does not.
    """
    import torch

    bad = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if not bad:
        return tensors
    if config.cache.nan_policy == "error":
        raise CacheError(
            f"{item.path}: {', '.join(bad)} is not finite; a wider precision for the encoder or cache.dtype may help"
        )
    print(f"warning: {item.path}: values that are not finite in {', '.join(bad)} were set to 0", file=sys.stderr)
    return {key: torch.nan_to_num(t, 0, 0, 0) if key in bad else t for key, t in tensors.items()}


def write_item(
    path: Path, config: RunConfig, fingerprint: Fingerprint, metadata: dict[str, str], tensors: Encoded
) -> None:
    """Write one file; readers recognise a file that a power cut shortened by its length.

    Args:
        metadata: header entries beside the common ones.
    """
    from musubi_tuner.tensors import save_tensors

    header = {
        "architecture": config.spec.full_name,
        "format_version": FORMAT_VERSION,
        "code_version": __version__,
        "fingerprint": json_text(fingerprint),
        **metadata,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    replace_file(path, partial(save_tensors, contiguous, metadata=header), sync=False)


def name_of(dtype: "Any") -> str:
    """A dtype without the name of its package."""
    return str(dtype).removeprefix("torch.")


def storage_dtype(config: RunConfig, default: str) -> "Any":
    """Precision in which a kind is stored; ``default`` where that is left open."""
    import torch

    return getattr(torch, default if config.cache.dtype == "auto" else config.cache.dtype)


def store(tensor: "Tensor", dtype: "Any") -> "Tensor":
    """Cast to the storage precision.

    Raises:
        CacheError: if a finite value overflows.
    """
    import torch

    cast = tensor.to(dtype)
    if torch.isfinite(tensor).all() and not torch.isfinite(cast).all():
        raise CacheError(
            f'a value of {tensor.abs().max().item():.4g} does not fit into {dtype}; use cache.dtype = "float32" or "bfloat16"'
        )
    return cast
