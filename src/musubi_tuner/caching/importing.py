"""Caches of another program become our cache files, one per item and kind.

Such caches name no items: row n is the n-th image of what they were made from. So the rows are given to the items of one
dataset in the order of its source (a folder by file name, a JSONL file by line), and only if the numbers agree, the latents
have the size at which the run trains each item, and the prompts, where they are kept, are its captions.

A file that is written says that it was imported (``provenance`` in the fingerprint) and what is known of the rows. The
status checks that and the image or caption, but not the encoders, which nobody knows. What is imported is skipped the next
time, so that an interrupted import continues; files that were not imported from here are replaced only when asked.
"""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from musubi_tuner.caching.contents import Contents
from musubi_tuner.caching.file_format import KINDS, cache_path, caption_metadata, caption_name, latents_key, mask_key
from musubi_tuner.caching.fingerprint import (
    IMPORTED,
    Expectation,
    Fingerprint,
    difference,
    expectation,
    file_state,
)
from musubi_tuner.caching.job import Encoded, finite, lock_for_job, storage_dtype, store, write_item
from musubi_tuner.caching.jobs import latents_metadata
from musubi_tuner.caching.status import needed_kinds
from musubi_tuner.config import RunConfig
from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.data.buckets import squash
from musubi_tuner.data.item import Item
from musubi_tuner.data.masks import read_mask, to_latent
from musubi_tuner.data.roots import Root
from musubi_tuner.data.sources import in_listed_order, scan
from musubi_tuner.errors import EXIT_FAILED, EXIT_OK, CacheError, ConfigError, DataError, UserError
from musubi_tuner.files import remove_leftovers
from musubi_tuner.models.foreign_caches import ForeignCaches, ForeignKind
from musubi_tuner.stamps import hashed_state
from musubi_tuner.units import format_bytes

_SHOWN = 10


@dataclass(frozen=True)
class ImportOptions:
    """What the command line adds to the run file.

    Attributes:
        dataset: number of the [[datasets]] entry; None = the only one. kinds: of cache files to import.
        replace: write over files that were not imported from here. dry_run: only say what would be done.
    """

    dataset: int | None = None
    kinds: Sequence[str] = KINDS
    replace: bool = False
    dry_run: bool = False


@dataclass
class _Task:
    """One kind of cache file.

    Attributes:
        rows: of every item whose rows are finished, one per caption. unfinished: items whose rows are not.
        due: items to write. conflicts: files of another origin.
    """

    kind: str
    source: ForeignKind
    expected: Expectation
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unfinished: int = 0
    due: list[Item] = field(default_factory=list)
    conflicts: list[Path] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def import_caches(config: RunConfig, sources: Sequence[Path], options: ImportOptions) -> int:
    """Import the caches of one data set and print what is done.

    Returns:
        0, or 1 if a row could not be used.

    Raises:
        ConfigError: if the run does not train from such rows. CacheError: if the caches cannot be used as they are.
        DataError: if they do not belong to the items.
    """
    dataset, items, roots = _items(config, options.dataset)
    config = config.limited_to([items[0].dataset])
    foreign = _open(config, sources, options.kinds)
    family = config.spec.family.checkpoint_options(config)
    tasks = []
    for kind, rows in foreign.kinds.items():
        expected = expectation(config, kind, family, download=False)
        _check_facts(foreign, kind, rows, expected)
        task = _Task(kind, rows, expected)
        _assign(task, foreign.form, dataset, items)
        tasks.append(task)
        if kind == "latents":
            _check_latents(config, foreign, task, items)
    _check_prompts(foreign, items)
    with ExitStack() as stack:
        if not options.dry_run:
            for task in tasks:
                stack.enter_context(lock_for_job(dataset.cache_directory, task.kind))
        for task in tasks:
            _examine(config, foreign, task, items)
        _print_plan(foreign, tasks, dataset, items)
        _refuse_conflicts(tasks, options)
        if options.dry_run:
            return EXIT_OK
        for folder in {item.cache_directory for item in items if item.cache_directory.is_dir()}:
            remove_leftovers(folder)
        for root in roots:
            root.keep()
        for task in tasks:
            _write(config, foreign, task)
        if any(task.due for task in tasks) and hasattr(os, "sync"):
            os.sync()
    return _summary(config, options.kinds, tasks)


def _items(config: RunConfig, number: int | None) -> tuple[DatasetConfig, list[Item], list[Root]]:
    """The dataset that the rows belong to, its items in the order of its source, and the root of a list."""
    count = len(config.datasets)
    if number is None and count > 1:
        raise ConfigError(
            f"the run file has {count} datasets; say with --dataset 0 to {count - 1} whose caches these are"
        )
    if not 0 <= (number or 0) < count:
        raise ConfigError(f"--dataset is {number}, the run file has datasets 0 to {count - 1}")
    number = number or 0
    dataset = config.datasets[number]
    try:
        found = scan(config.datasets, config.spec.code)
    except DataError as error:
        raise DataError(
            f"{error}\nan import gives the rows of a cache to images; caches alone cannot be trained from, because sizes, "
            "captions and names of items come from the images. Put them where the dataset looks, in the order of the cache"
        ) from error
    items = in_listed_order([item for item in found.items if item.dataset == number], dataset)
    return dataset, items, [root for root in found.roots if root.cache_directory == dataset.cache_directory]


def _open(config: RunConfig, sources: Sequence[Path], kinds: Sequence[str]) -> ForeignCaches:
    if config.spec.published is None:
        raise ConfigError(f"{config.spec.title} has no published trainer with caches of its own")
    foreign = config.spec.published.open_caches(config, sources, kinds)
    if not foreign.kinds:
        raise CacheError(f"{foreign.form}: holds nothing that this run trains from ({', '.join(kinds)})")
    return foreign


# Do the rows belong to the items?


def _check_prompts(foreign: ForeignCaches, items: list[Item]) -> None:
    """Stored prompts must be the captions, but for white space.

    Raises:
        DataError: listing rows that differ.
    """
    if foreign.prompts is None:
        return
    captions = [(item, caption) for item in items for caption in item.captions]
    stored = [_plain(prompt) for prompt in foreign.prompts]
    wrong = [
        f"row {row}, {item.id}: {_short(prompt)} there, {_short(caption)} here"
        for row, (prompt, (item, caption)) in enumerate(zip(stored, captions, strict=False))
        if prompt != _plain(caption)
    ]
    if not wrong:
        return
    more = [f"... and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
    hint = "mend the captions, if the images are the right ones"
    if Counter(stored) == Counter(_plain(caption) for _, caption in captions):
        hint = "they are the same in another order; list the images in that order in an image_jsonl_file"
    raise DataError(
        "\n  ".join([f"{foreign.form}: {len(wrong)} of {len(stored)} prompts are no captions of their items; {hint}",
                     *wrong[:_SHOWN], *more])
    )  # fmt: skip


def _plain(text: str) -> str:
    return " ".join(text.split())


def _short(text: str) -> str:
    text = repr(_plain(text))
    return text if len(text) <= 60 else text[:57] + "..."


def _check_facts(foreign: ForeignCaches, kind: str, rows: ForeignKind, expected: Expectation) -> None:
    """What is known of the rows must be what the run asks for, else the status would call every file stale."""
    wrong = [difference(rows.facts, {key: expected.shared[key]}) for key in rows.facts if key in expected.shared]
    reasons = [reason for reason in wrong if reason]
    if reasons:
        raise ConfigError(
            f"{foreign.form}: its {kind} do not fit this run: {'; '.join(reasons)}. Set these keys to what the rows were "
            f"made with, or leave {kind} out with --only"
        )


def _assign(task: _Task, form: str, dataset: DatasetConfig, items: list[Item]) -> None:
    """Give every item its rows: one per caption, for latents also one per image.

    Raises:
        DataError: if the numbers differ.
    """
    total, finished = task.source.total, task.source.finished
    captions = sum(len(item.captions) for item in items)
    per_image = task.kind == "latents" and total == len(items)
    wanted = len(items) if per_image else captions
    if (total is not None and total != wanted) or finished > wanted:
        several = f" with {captions} captions" if captions != len(items) else ""
        raise DataError(
            f"{form}: has {finished if total is None else total} rows of {task.kind}, {dataset.name} has {len(items)} images"
            f"{several}; rows are known by their order only, so give exactly the images that the cache was made from"
        )
    begin = 0
    for item in items:
        count = 1 if per_image else len(item.captions)
        rows = tuple(range(begin, begin + count))
        begin += count
        if rows[-1] < finished:
            task.rows[item.key] = rows
        else:
            task.unfinished += 1


def _check_latents(config: RunConfig, foreign: ForeignCaches, task: _Task, items: list[Item]) -> None:
    """Latents and masks must have the size at which the run trains the items.

    Raises:
        DataError: naming the size and the keys.
    """
    spec, shape = config.spec, task.source.columns["latents"].shape
    height, width = shape[1] * spec.vae_factor, shape[2] * spec.vae_factor
    wrong = [item for item in items if item.bucket != (width, height)]
    if shape[0] != spec.latent_channels:
        raise DataError(f"{foreign.form}: latents have {shape[0]} channels, {spec.title} takes {spec.latent_channels}")
    if wrong:
        example = f", such as {wrong[0].id} at {wrong[0].bucket[0]}x{wrong[0].bucket[1]}"
        raise DataError(
            f"{foreign.form}: latents are {list(shape)}, which is {width}x{height} pixels, but this run trains {len(wrong)} of "
            f"{len(items)} images at other sizes{example}; set resolution = [{width}, {height}] and enable_bucket = false for "
            "this dataset"
        )
    if any(item.views for item in items):
        raise DataError(
            f"{foreign.form}: holds each picture once, and flip_aug, random_crop or color_aug want several versions; turn them off for "
            "this dataset"
        )
    masked = any(item.mask is not None and item.mask.source == "imported" for item in items)
    if masked and (foreign.masks is None or foreign.masks.shape != shape[1:]):
        held = "no masks" if foreign.masks is None else f"masks of {list(foreign.masks.shape)}"
        raise DataError(
            f'{foreign.form}: holds {held}, but mask_source is "imported" and latents are {list(shape[1:])}'
        )
    if task.unfinished and any(item.placement.resized != item.bucket for item in items):
        note = 'pictures were squashed there, and the rest would be cut; resize = "squash" makes them alike'
        foreign.notes = [*foreign.notes, note]
    if foreign.masks is not None and not masked:
        foreign.notes = [*foreign.notes, 'masks left out; mask_source = "imported" takes them']


# What is there already


def _examine(config: RunConfig, foreign: ForeignCaches, task: _Task, items: list[Item]) -> None:
    """Find the items whose files must be written, and files of another origin."""
    contents = Contents(config)
    for item in items:
        rows = task.rows.get(item.key)
        if rows is None:
            continue
        reason, stored = file_state(item, task.expected, config.spec.code)
        from_here = stored is not None and stored.get("source") == foreign.identity and stored.get("rows") == list(rows)
        if from_here and reason is None and contents.difference(item, task.expected, stored) is None:
            continue
        task.due.append(item)
        path = cache_path(item, task.kind, config.spec.code)
        if path.exists() and (stored is None or stored.get("source") != foreign.identity):
            task.conflicts.append(path)


def _refuse_conflicts(tasks: list[_Task], options: ImportOptions) -> None:
    found = [path for task in tasks for path in task.conflicts]
    if found and not options.replace:
        names = ", ".join(path.name for path in found[:3]) + (", ..." if len(found) > 3 else "")
        raise CacheError(
            f"{found[0].parent}: {len(found)} files were not imported from here ({names}); write over them with --replace, or "
            "import into another cache_directory"
        )


def _print_plan(foreign: ForeignCaches, tasks: list[_Task], dataset: DatasetConfig, items: list[Item]) -> None:
    order = "the lines of its listing" if dataset.image_jsonl_file else "file names"
    print(f"import   {foreign.form}")
    print(f"  into     {dataset.name}: {len(items)} images in the order of {order}, {items[0].id} to {items[-1].id}")
    if foreign.prompts is None:
        print("  prompts  are not kept there: that the order is the same cannot be checked")
    else:
        print(f"  prompts  {len(foreign.prompts)} agree with the captions")
    for task in tasks:
        columns = task.source.columns
        size = sum(rows[0].nbytes if len(rows) else 0 for rows in columns.values()) * len(task.due)
        shapes = ", ".join(f"{name} {list(rows.shape)}" for name, rows in columns.items())
        dtype = str(next(iter(columns.values())).parts[0].dtype).removeprefix("torch.")
        done = len(task.rows) - len(task.due)
        text = f"{len(task.due)} to write ({format_bytes(size)}), {done} up to date"
        if task.unfinished:
            text += f", {task.unfinished} not finished there"
        print(f"  {task.kind:<8} {text}; {shapes} in {dtype}")
    for note in foreign.notes:
        print(f"  note     {note}")


# Writing


def _write(config: RunConfig, foreign: ForeignCaches, task: _Task) -> None:
    metadata = {
        "latents": lambda item: latents_metadata(config.spec, item),
        "text": caption_metadata,
        "experts": lambda item: {**caption_metadata(item), "time_convention": "data_at_1"},
    }[task.kind]
    for item in tqdm(task.due, desc=f"import {task.kind}", unit="item", disable=None, mininterval=0.5):
        try:
            made = _fingerprint(foreign, task, item)  # before the mask is read: a later one has another hash
            tensors = finite(config, item, _tensors(config, foreign, task, item))
            write_item(cache_path(item, task.kind, config.spec.code), config, made, metadata(item), tensors)
        except UserError as error:
            task.failed.append(f"{item.id}: {error}")


def _fingerprint(foreign: ForeignCaches, task: _Task, item: Item) -> Fingerprint:
    """What is known of a file: facts of its rows, what it belongs to, and where it comes from."""
    common = {key: task.expected.shared[key] for key in ("format", "architecture")}
    own = task.expected.of_item(item)
    # Pictures were squashed, not cropped; nothing is known of their transparency and of the filter.
    for key in ("resized", "crop", "background", "interpolation"):
        own.pop(key, None)
    files = {name: hashed_state(path) for name, path in task.expected.files(item).items()}
    origin = {"provenance": IMPORTED, "source": foreign.identity, "rows": list(task.rows[item.key])}
    return {**common, **task.source.facts, **own, **origin, **files}


def _tensors(config: RunConfig, foreign: ForeignCaches, task: _Task, item: Item) -> Encoded:
    """Tensors of a file under their keys, in the precision of the rows unless cache.dtype names one."""
    rows = task.rows[item.key]
    tensors: Encoded = {f"{name}_float32": tensor for name, tensor in task.source.shared.items()}
    for name, column in task.source.columns.items():
        for number, row in enumerate(rows[:1] if task.kind == "latents" else rows):
            value = column[row]
            stored = store(value, storage_dtype(config, _name(value)))
            if task.kind == "latents":
                tensors[latents_key(tuple(stored.shape), _name(stored))] = stored
            else:
                tensors[f"{caption_name(name, number)}_{_name(stored)}"] = stored
    if task.kind == "latents" and item.mask is not None:
        mask = _mask(config, foreign, item, rows[0])
        tensors[mask_key(tuple(mask.shape))] = mask
    return tensors


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _mask(config: RunConfig, foreign: ForeignCaches, item: Item, row: int) -> Tensor:
    """The loss mask of an item [H, W]: imported, or its own, squashed as the picture was.

    Raises:
        CacheError: if an imported one is not within 0 and 1.
    """
    assert item.mask is not None
    if item.mask.source == "imported":
        assert foreign.masks is not None
        mask = foreign.masks[row].float()
        if not ((mask >= 0) & (mask <= 1)).all():
            raise CacheError(f"its mask has values from {mask.min():.4g} to {mask.max():.4g}, expected 0 to 1")
        return mask
    grey = read_mask(item.mask, item.path, item.background)
    return torch.from_numpy(to_latent(grey, squash(item.size, item.bucket), config.spec.vae_factor))


def _summary(config: RunConfig, kinds: Sequence[str], tasks: list[_Task]) -> int:
    """Say what was done and what is left to do."""
    failed = [text for task in tasks for text in task.failed]
    for text in failed[:_SHOWN]:
        print(f"failed: {text}", file=sys.stderr)
    if len(failed) > _SHOWN:
        print(f"... and {len(failed) - _SHOWN} more", file=sys.stderr)
    for task in tasks:
        written = len(task.due) - len(task.failed)
        print(
            f"{task.kind}: imported {written}, up to date {len(task.rows) - len(task.due)}, failed {len(task.failed)}"
        )
    complete = {task.kind for task in tasks if not task.unfinished}
    left = [kind for kind in needed_kinds(config) if kind in kinds and kind not in complete]
    for kind in left:
        print(f"{kind}: not complete there; the rest is made by: python -m musubi_tuner.caching {kind} {config.words}")
    return EXIT_FAILED if failed else EXIT_OK
