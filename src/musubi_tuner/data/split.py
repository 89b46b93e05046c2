"""Which images are held out of training, to measure the loss on them. Torch-free.

An image is held out if its own draw, keyed by (seed, id), is below the share. So the choice depends neither on order nor
on the other images: a data set that grows keeps its members on their side. Copies of an image under one id (a folder
that is trained at several resolutions) go together. Repeats come later and apply to what is trained only.
"""

from collections.abc import Sequence

from musubi_tuner.config.schema import ValidationSection
from musubi_tuner.data.sources import Item
from musubi_tuner.errors import ConfigError
from musubi_tuner.randomness import uniform


def hold_out(items: Sequence[Item], settings: ValidationSection) -> tuple[list[Item], list[Item]]:
    """Split the items of a run.

    Each side gets at least one image: the one with the lowest draw is always held out, that with the highest never.

    Returns:
        What is trained, in the given order; what is held out, by draw, so that its beginning is a fair sample.

    Raises:
        ConfigError: if there are not two images to split.
    """
    if not settings.split:
        return list(items), []
    draws = {item.id: uniform(settings.seed, "validation split", item.id) for item in items}
    ranked = sorted(draws, key=lambda name: (draws[name], name))
    if len(ranked) < 2:
        raise ConfigError(
            f"validation.split: is {settings.split:g}, but there are only {len(ranked)} images; set it to 0, or add images"
        )
    below = sum(draw < settings.split for draw in draws.values())
    held = set(ranked[: min(max(below, 1), len(ranked) - 1)])
    measured = sorted((item for item in items if item.id in held), key=lambda item: (draws[item.id], item.key))
    return [item for item in items if item.id not in held], measured
