"""What the plan says of pictures that are trained otherwise than they look in a viewer, and of their masks. Torch-free."""

from collections import Counter
from collections.abc import Callable, Sequence

from musubi_tuner.config import RunConfig
from musubi_tuner.config.datasets import KEPT
from musubi_tuner.data.item import Item
from musubi_tuner.data.item_table import tally

LEAST_KEPT = 0.5
"""Share of the area of a picture that a crop should leave."""
MOST_ENLARGED = 2.0
"""Factor by which a side may grow."""
LARGE = 100_000_000
"""Pixels of a picture whose decoding takes memory worth a line."""


def kept_share(item: Item) -> float:
    """Share of the area that the crop leaves."""
    (width, height), (resized_width, resized_height) = item.bucket, item.placement.resized
    return width * height / (resized_width * resized_height)


def enlargement(item: Item) -> float:
    """Factor by which the side grows that grows most."""
    return max(new / old for new, old in zip(item.placement.resized, item.size, strict=True))


def picture_lines(items: Sequence[Item], readers: int) -> list[str]:
    """Lines on transparency and on very large pictures, and warnings of crops and enlargements.

    Args:
        readers: pictures that a cache job reads at a time.
    """
    lines, alike, colours = [], tally(items), Counter[str]()
    for item, count in alike:
        colours[item.background] += count
    for colour, count in sorted(colours.items()):
        if colour == KEPT:
            continue
        lines.append(
            f"  alpha    {count} of {len(items)} images have an alpha channel; transparent pixels become {colour} (alpha_background)"
        )
    kept = sum(
        count
        for item, count in alike
        if item.background == KEPT and item.mask is not None and item.mask.source == "alpha"
    )
    if kept:
        lines.append(
            f"  alpha    {kept} of {len(items)} images have their mask in the alpha channel and keep the colours below it; "
            "alpha_background lays them over one"
        )
    large = sorted(_such(items, alike, lambda item: _pixels(item) > LARGE), key=_pixels, reverse=True)
    if large:
        lines.append(
            f"  large    {len(large)} of {len(items)} images have more than {LARGE // 10**6} megapixels "
            f"({_named(large, lambda item: f'{_pixels(item) / 1e6:.0f} MP')}); decoding one takes up to "
            f"{12 * _pixels(large[0]) / 2**30:.1f} GiB, and cache.workers reads {readers} at a time"
        )
    cut = sorted(_such(items, alike, lambda item: kept_share(item) < LEAST_KEPT), key=kept_share)
    if cut:
        lines.append(
            f"warning: {len(cut)} of {len(items)} images lose more than half of their area to the crop "
            f"({_named(cut, lambda item: f'keeps {kept_share(item):.0%}')}); crop them yourself, turn enable_bucket on, or set "
            'resize = "squash"'
        )
    enlarged = sorted(
        _such(items, alike, lambda item: enlargement(item) > MOST_ENLARGED), key=enlargement, reverse=True
    )
    if enlarged:
        lines.append(
            f"warning: {len(enlarged)} of {len(items)} images are enlarged more than {MOST_ENLARGED:g} times "
            f"({_named(enlarged, lambda item: f'{enlargement(item):.1f}x')}); remove them, lower the resolution, or set "
            "bucket_no_upscale = true"
        )
    return lines


def _such(items: Sequence[Item], alike: Sequence[tuple[Item, int]], test: Callable[[Item], bool]) -> list[Item]:
    """The items that pass a test of their size; all are looked at only if one of those that are alike does."""
    return [item for item in items if test(item)] if any(test(item) for item, _ in alike) else []


def _pixels(item: Item) -> int:
    return item.size[0] * item.size[1]


def _named(items: Sequence[Item], say: Callable[[Item], str]) -> str:
    """The first three by name."""
    return ", ".join(f"{item.path.name} {say(item)}" for item in items[:3]) + (", ..." if len(items) > 3 else "")


def mask_lines(config: RunConfig, items: Sequence[Item]) -> list[str]:
    """What the plan says about masks: how many there are, and a warning where they and the loss do not agree."""
    count, settings = sum(count for item, count in tally(items) if item.mask is not None), config.train
    if settings.masked_loss and not count:
        return [
            f"warning: train.masked_loss is on, 0 of {len(items)} images have a mask; give mask_directory, mask_path or "
            "alpha_mask, or turn it off"
        ]
    if count and not settings.masked_loss:
        return [
            f"warning: {count} of {len(items)} images have a mask, which is not used because train.masked_loss is false"
        ]
    if not count:
        return []
    scale = ", divided by their mean" if settings.mask_normalize else ""
    return [
        f"  masks    {count} of {len(items)} images, weights {settings.mask_background:g} to "
        f"{settings.mask_foreground:g}{scale}; the others have weight 1"
    ]


def black_lines(config: RunConfig, items: Sequence[Item]) -> list[str]:
    """A warning that names images whose mask is black in all that is trained of them."""
    if not items:
        return []
    names = ", ".join(item.path.name for item in items[:3]) + (", ..." if len(items) > 3 else "")
    weight = config.train.mask_background
    effect = f"they have weight {weight:g} everywhere" if weight else "nothing is learned from them"
    hint = "; transparent parts of a mask are background, and its paint must be white" * any(
        item.mask is not None and item.mask.alpha for item in items
    )
    return [f"warning: the masks of {len(items)} images are black all over ({names}): {effect}{hint}"]
