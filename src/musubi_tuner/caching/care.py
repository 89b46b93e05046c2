"""Looking after cache folders: why a file would be made again, whether all are sound, and which belong to nothing."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from musubi_tuner.caching.contents import Contents
from musubi_tuner.caching.file_format import KINDS, cache_path
from musubi_tuner.caching.fingerprint import Expectation, differences_of, is_imported
from musubi_tuner.caching.status import KindStatus, examine, find_orphans, needed_kinds
from musubi_tuner.config import RunConfig
from musubi_tuner.config.diagnostics import did_you_mean
from musubi_tuner.data.item import Item
from musubi_tuner.data.sources import scan
from musubi_tuner.errors import EXIT_FAILED, EXIT_OK, CacheError, ConfigError
from musubi_tuner.headers import read_header

SHOWN = 10
"""Names that are listed of many."""


def orphans_of(configs: Sequence[RunConfig]) -> list[Path]:
    """Cache files that belong to no item of any of some runs, such as the steps of a file."""
    code = configs[0].spec.code
    items = [item for config in configs for item in scan(config.datasets, code).items]
    roots = [dataset.cache_directory for config in configs for dataset in config.datasets]
    return [path for kind in KINDS for path in find_orphans(items, kind, code, roots)]


def explain(config: RunConfig, name: str) -> list[str]:
    """Why the cache files of an item are up to date, or would be made again: all reasons, for a person.

    Args:
        name: of the item: its picture's name or path, its key, or a cache file of it.

    Raises:
        ConfigError: if there is no such item.
    """
    code, config = config.spec.code, _strictly(config, verify="quick")
    items = scan(config.datasets, code).items
    found = [item for item in items if name in _names(item, code)]
    if not found:
        hint = did_you_mean(name, [item.path.name for item in items])
        raise ConfigError(f"{name}: is no item of this run.{hint} Give a picture, an item's key, or a cache file of it")
    contents, options = Contents(config), _options(config)
    lines = []
    for item in found:
        (width, height), (w, h) = item.size, item.bucket
        lines.append(
            f"{item.key}: {item.path}, {width}x{height}, bucket {w}x{h}, data set {config.datasets[item.dataset].name}"
        )
        for kind in needed_kinds(config):
            status = examine(config, [item], kind, options, encodes=False, contents=contents)
            expected = status.expected.get(item.dataset)
            lines += [
                f"  {kind:<8} {line}" if not n else f"           {line}"
                for n, line in enumerate(_about(item, kind, code, expected, status))
            ]
    return lines


def _names(item: Item, code: str) -> set[str]:
    files = [cache_path(item, kind, code) for kind in KINDS]
    paths = [item.path, *files]
    return {
        item.key,
        item.id,
        item.path.stem,
        *(path.name for path in paths),
        *map(str, paths),
        *(str(path.absolute()) for path in paths),
    }


def _about(item: Item, kind: str, code: str, expected: Expectation | None, status: KindStatus) -> Iterator[str]:
    """Lines on one file of an item."""
    if expected is None:
        yield "is not wanted: its data set has no teachers"
        return
    path = cache_path(item, kind, code)
    reason = status.due.get(item.key)
    yield f"{path}: {'up to date' if reason is None else 'will be made again'}"
    try:
        header = read_header(path)
    except (FileNotFoundError, CacheError) as problem:
        yield "there is no such file" if isinstance(problem, FileNotFoundError) else str(problem)
        return
    stored = header.fingerprint or {}
    reasons = [] if reason is None else list(differences_of(item, expected, header.fingerprint))
    yield from reasons
    if reason is not None and reason not in reasons:
        yield reason
    if is_imported(stored):
        yield f"imported from {stored.get('source')}"
    version, precision = header.metadata.get("code_version", "?"), stored.get("precision", "?")
    yield f"made by version {version}, computed in {precision}, {len(header.tensors)} tensors"


def verify(config: RunConfig) -> int:
    """Read every cache file of a run to its end, compare it with what would be made now by content, and print what is found.

    Returns:
        0, or 1 if a file is due or damaged.
    """
    config = _strictly(config)
    items, contents, options, code = (
        scan(config.datasets, config.spec.code).items,
        Contents(config),
        _options(config),
        config.spec.code,
    )
    by_key = {item.key: item for item in items}
    wrong = 0
    for kind in needed_kinds(config):
        status = examine(config, items, kind, options, encodes=False, contents=contents)
        sound = [item for item in items if item.dataset in status.expected and item.key not in status.due]
        damaged = {}
        for item in tqdm(sound, f"reading {kind}", leave=False, unit="file", disable=None):
            problem = _damage(cache_path(item, kind, code))
            if problem:
                damaged[item.key] = problem
        print(
            f"{kind}: {len(sound) - len(damaged)} are right, {len(status.due)} will be made again, {len(damaged)} damaged, {len(status.orphans)} belong to no item"
        )
        for reason, count in Counter(status.due.values()).most_common(SHOWN):
            first = next(key for key, own in status.due.items() if own == reason)
            print(f"  {count} x {reason} (such as {by_key[first].path.name})")
        for key, problem in list(damaged.items())[:SHOWN]:
            print(f"  {cache_path(by_key[key], kind, code)}: {problem}; remove it, and it is made again")
        if len(damaged) > SHOWN:
            print(f"  ... and {len(damaged) - SHOWN} more")
        if status.mixture:
            print(f"warning: {status.mixture}")
        wrong += len(status.due) + len(damaged)
    contents.save()
    return EXIT_FAILED if wrong else EXIT_OK


def _strictly(config: RunConfig, verify: str = "full") -> RunConfig:
    """The config without shortcuts: files are known by what made them, not by their names."""
    return config.model_copy(
        update={"cache": config.cache.model_copy(update={"verify": verify, "skip_existing": "fingerprint"})}
    )


def _damage(path: Path) -> str | None:
    """What is wrong with the values of a file; None if nothing is."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(path.read_bytes())  # not by its name: the library takes names in UTF-8 only
    except (OSError, SafetensorError, ValueError) as problem:
        return f"cannot be read ({problem})"
    bad = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    return f"{', '.join(bad)} is not finite" if bad else None


def _options(config: RunConfig) -> dict[str, Any]:
    """Options of the checkpoint that caching obeys."""
    return config.spec.family.checkpoint_options(config) if "experts" in needed_kinds(config) else {}
