"""Which cache files are due. Torch-free: this is what the plan shows before anything heavy is loaded."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from musubi_tuner.caching.contents import Contents, Doubt
from musubi_tuner.caching.file_format import KINDS, cache_path, kind_of
from musubi_tuner.caching.fingerprint import AUTO, Expectation, expectation, file_state, is_imported
from musubi_tuner.caching.shard_records import Shards
from musubi_tuner.config import RunConfig
from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.data.item import Item
from musubi_tuner.data.item_table import ItemTable


def wants(config: RunConfig, dataset: DatasetConfig, kind: str) -> bool:
    """Whether the images of a dataset are trained from a kind of cache."""
    return kind != "experts" or bool(config.spec.expert_keys and config.experts_of(dataset).teachers)


def needed_kinds(config: RunConfig) -> list[str]:
    """Kinds of cache that a run trains from, for some of its datasets at least."""
    caches = config.spec.task(config).caches
    return [
        kind for kind in KINDS if kind in caches and any(wants(config, dataset, kind) for dataset in config.datasets)
    ]


def job_groups(config: RunConfig, kind: str) -> list[list[int]]:
    """Numbers of the datasets that want a kind of cache, those whose files are made alike together."""
    groups = config.dataset_groups() if kind == "experts" else [list(range(len(config.datasets)))]
    return [group for group in groups if wants(config, config.datasets[group[0]], kind)]


@dataclass
class KindStatus:
    """State of one kind of cache.

    Attributes:
        expected: by number of the dataset, for those that want such files.
        due: item -> why its file must be made. fresh: how many need nothing. imported: which of these were imported.
        unread: how many of what is due are shards that are not read yet. orphans: complete files that belong to no item of the datasets.
        hashed: how many pictures and masks had to be read, by what the plan says of them.
        precisions: in which fresh files were computed.
    """

    kind: str
    expected: dict[int, Expectation]
    due: dict[str, str] = field(default_factory=dict)
    fresh: int = 0
    imported: set[str] = field(default_factory=set)
    unread: int = 0
    orphans: list[Path] = field(default_factory=list)
    hashed: Counter[str] = field(default_factory=Counter)
    precisions: Counter[str] = field(default_factory=Counter)

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """Why files are due, most frequent first, at most three."""
        return Counter(self.due.values()).most_common(3)

    @property
    def _precisions(self) -> str | None:
        """A warning where the machine decided, and machines differed."""
        if len(self.precisions) < 2:
            return None
        shares = " and ".join(f"{count} in {name}" for name, count in self.precisions.most_common())
        return f"{self.kind}: files were computed in different precisions, {shares}; name one in the run file to make them alike"

    def of(self, items: Sequence[Item]) -> "KindStatus":
        """What it says of some of the items that want such files."""
        keys = {item.key for item in items}
        due = {key: reason for key, reason in self.due.items() if key in keys}
        return KindStatus(self.kind, self.expected, due, len(keys) - len(due), self.imported & keys)

    @property
    def mixture(self) -> str | None:
        """A warning where imported files stand beside files of this run's encoders; None if they do not."""
        own = self.fresh - len(self.imported) + len(self.due)
        if not self.imported or not own:
            return self._precisions
        return (
            f"{self.kind}: {len(self.imported)} files are imported, {own} are made by this run's encoders; they may differ in what "
            "the import does not know, such as weights, precision and crop"
        )


def examine(
    config: RunConfig,
    items: Sequence[Item],
    kind: str,
    options: dict[str, Any],
    *,
    download: bool = False,
    encodes: bool = True,
    contents: Contents | None = None,
) -> KindStatus:
    """Compare the cache files of one kind with what this config would make.

    Args:
        encodes: whether the caller makes files; where nothing is encoded, ``cache.run = "always"`` makes none due.
        contents: what is known of pictures and masks already, and learns what is found out.
    """
    code = config.spec.code
    status = KindStatus(kind, {})
    for group in job_groups(config, kind):
        if all(config.datasets[number].precached for number in group):
            made = Expectation(kind, {}, {})  # whatever made them
        else:
            made = expectation(config.limited_to(group), kind, options, download=download)
        status.expected.update(dict.fromkeys(group, made))
    if isinstance(items, ItemTable):
        return _examined(status, items)
    contents = contents or Contents(config)
    by_name = config.cache.skip_existing == "name"
    shards: dict[int, Shards] = {}
    why_due: dict[tuple[int, str], str | None] = {}
    imported: dict[str, bool] = {}
    doubts: list[Doubt] = []
    for item in items:
        expected = status.expected.get(item.dataset)
        if expected is None:
            continue
        as_it_is = by_name or config.datasets[item.dataset].precached or item.shard is not None
        if encodes and config.cache.run == "always" and (item.content is None or item.shard is not None):
            status.due[item.key] = "cache.run is always"
            continue
        if item.shard is not None:
            if item.dataset not in shards:
                shards[item.dataset] = Shards(config.datasets[item.dataset], by_name)
            place = (item.dataset, item.shard)
            if place not in why_due:
                # The headers of an item's own files are read below.
                why_due[place] = shards[item.dataset].why_due(item.shard, expected, thorough=item.is_unread)
            if (why := why_due[place]) is not None:
                status.due[item.key] = why
                status.unread += item.is_unread
            if why is not None or item.is_unread:
                continue
        reason, stored = file_state(item, expected, code, by_name=as_it_is)
        if reason is None:
            imported[item.key] = is_imported(stored)
            status.precisions.update(
                [precision] if (precision := (stored or {}).get("precision", AUTO)) != AUTO else []
            )
            doubts += [] if as_it_is else contents.doubts(item, expected, stored)
        else:
            status.due[item.key] = reason
    changed = contents.settle(doubts) if doubts else {}
    status.due |= changed
    status.fresh = len(imported) - len(changed)
    status.imported = {key for key, value in imported.items() if value and key not in changed}
    status.hashed = Counter(doubt.note for doubt in doubts)
    status.orphans = find_orphans(items, kind, code, [dataset.cache_directory for dataset in config.datasets])
    return status


def _examined(status: KindStatus, table: ItemTable) -> KindStatus:
    """What the headers of a table's files said: they are taken as they are."""
    if not status.expected:
        return status
    kind = status.kind
    files = table.files.get(kind)
    missing = range(len(table)) if files is None else (files.layout < 0).nonzero()[0].tolist()
    status.due = {f"{table.prefix}{table.ids[row]}": "missing" for row in missing}
    status.fresh = len(table) - len(status.due)
    if files is not None:
        status.imported = {f"{table.prefix}{table.ids[row]}" for row in files.imported.nonzero()[0].tolist()}
        status.precisions = Counter({name: count for name, count in files.precisions.items() if name != AUTO})
    status.orphans = [
        table.root / name
        for name in table.spare
        if name.endswith("_te.safetensors") == (kind == "text") and kind != "latents"
    ]
    return status


def find_orphans(items: Sequence[Item], kind: str, code: str, roots: list[Path]) -> list[Path]:
    """Cache files of one kind that belong to no item, below the cache directories."""
    folders: dict[Path, str] = {}  # each is resolved once, not once per item
    wanted = set()
    unread = [str(item.cache_directory.resolve()) for item in items if item.is_unread]
    for item in items:
        path = cache_path(item, kind, code)
        if path.parent not in folders:
            folders[path.parent] = str(path.parent.resolve())
        wanted.add((folders[path.parent], path.name))
    found = {
        Path(folder, name)
        for root in {root.resolve() for root in roots}
        for folder, _, names in os.walk(root)
        for name in names
        if kind_of(name, code) == kind
        and not name.startswith(".")
        and (folder, name) not in wanted
        and not any(folder == own or folder.startswith(own + os.sep) for own in unread)
    }
    return sorted(found)
