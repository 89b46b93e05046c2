"""Which images are held out of training, to measure the loss on them. Torch-free.

A picture is its content: files of equal bytes are one picture, whatever they are called and whichever data sets they come
from (copies, links, a folder and a JSONL file, several resolutions), and are on one side together. It is held out if its own
draw, keyed by (seed, content), is below the share. So the choice depends neither on names and order nor on the other
pictures: data sets that grow, move or are renamed keep their members on their side. Repeats come later and apply to what is
trained only.

A run that goes on keeps the split it began with; its state lists what is held out (`training.held_out`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from musubi_tuner.config.schema.validation import ValidationSection
from musubi_tuner.data.item import Item
from musubi_tuner.errors import ConfigError, DataError
from musubi_tuner.randomness import uniform

PARTS, PART_BYTES = 4, 1 << 14
"""What is read of a large file: so many parts of it, evenly spread."""


def content_key(path: Path) -> str:
    """32 hex digits that are equal for equal files.

    They come from the size and at most 64 KiB of the content, so that a large set is not read whole. Pictures that agree in
    all of that share their side, which does no harm.

    Raises:
        DataError: if the file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            digest.update(f"{size}\0".encode())
            for part in range(PARTS):
                # The last part ends with the file; parts of a small file touch or overlap.
                file.seek(max(size - PART_BYTES, 0) * part // (PARTS - 1))
                digest.update(file.read(PART_BYTES))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def pictures_of(items: Sequence[Item]) -> dict[str, str]:
    """Key of every item -> its picture, which copies share. Each file is read once."""
    by_path: dict[Path, str] = {}
    for item in items:
        if item.path not in by_path:
            by_path[item.path] = item.content or content_key(item.path)
    return {item.key: by_path[item.path] for item in items}


def hold_out(
    items: Sequence[Item], settings: ValidationSection, pictures: Mapping[str, str] | None = None
) -> tuple[list[Item], list[Item]]:
    """Split the items of a run that begins.

    Each side gets at least one picture: the one with the lowest draw is always held out, that with the highest never.

    Args:
        pictures: key of every item -> its picture; absent = `pictures_of` them.

    Returns:
        What is trained, in the given order; what is held out, by draw, so that its beginning is a fair sample.

    Raises:
        ConfigError: if there are not two pictures to split.
        DataError: if a file cannot be read.
    """
    if not settings.split:
        return list(items), []
    if pictures is None:
        pictures = pictures_of(items)
    draws = {name: uniform(settings.seed, "validation split", name) for name in set(pictures.values())}
    ranked = sorted(draws, key=lambda name: (draws[name], name))
    if len(ranked) < 2:
        copies = f" ({len(items)} files of equal content)" if len(items) > 1 else ""
        raise ConfigError(
            f"validation.split: is {settings.split:g}, but there are only {len(ranked)} images{copies}; set it to 0, or add images"
        )
    below = sum(draw < settings.split for draw in draws.values())
    held = set(ranked[: min(max(below, 1), len(ranked) - 1)])
    measured = sorted(
        (item for item in items if pictures[item.key] in held), key=lambda item: (draws[pictures[item.key]], item.key)
    )
    return [item for item in items if pictures[item.key] not in held], measured


def hold_out_by_id(items: Sequence[Item], settings: ValidationSection) -> tuple[list[Item], list[Item]]:
    """The split of runs whose state does not list it: one id was one picture, and copies had draws of their own."""
    return hold_out(items, settings, {item.key: item.id for item in items})


def hold_out_again(items: Sequence[Item], keys: Sequence[str]) -> tuple[list[Item], list[Item]]:
    """The split that a state lists; keys that no item has any more are left out."""
    by_key = {item.key: item for item in items}
    held = set(keys)
    return [item for item in items if item.key not in held], [by_key[key] for key in keys if key in by_key]
