"""Says what a picture shows: so 'the model draws what you ask' is a number and not an impression.

    border median -> background        largest connected component -> colour
    centroid -> position               overlap with the four templates -> shape

The templates are the functions that drew the training pictures, placed at the component's centroid and scaled to its
area. Each property is decided alone and is None when in doubt, which counts as wrong: a picture between a circle and a
square is neither. With a border of several tones everything is None; with no shape, or with two apart from each other,
everything but the background. Soft edges, faint noise and a small drift of the tones are accepted, because a model's
decoder adds them.

The limits below separate the pictures of `musubi_tuner.demo.pictures`, from 32 pixels a side on, from everything else
that the tests try. Numpy only; nothing here is random.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from musubi_tuner.demo.pictures import BACKGROUNDS, COLOURS, PLACES, SHAPES, Combination

SAME_TONE = 60.0
"""Largest distance, Euclidean in RGB, between two tones that count as one. All tones of the pictures are at least twice
as far apart, so none has two names, and a pixel further than this from the background belongs to something drawn."""
MIN_EVENNESS = 0.8
"""Share of the border, or of the shape's inside, that must have its median tone."""

# Areas are fractions of the squared shorter side. The real ones are 0.09 (a small triangle) to 0.20 (a large square).
MIN_AREA = 0.05
MAX_AREA = 0.30
MAX_STRAY = 0.10
"""What is drawn outside the largest component, as a fraction of it."""

MAX_OFFSET_X = 0.08
MAX_OFFSET_Y = 0.12
"""How far the centroid may be from its place, as fractions of width and height."""

FINE_SIDE = 256
"""Shapes are compared on a grid of about this many cells a side, finer than the pixels of a small picture: rounding the
outline of a cross of 30 pixels to whole pixels costs up to 5 % of overlap."""
MIN_OVERLAP = {"circle": 0.91, "square": 0.90, "triangle": 0.88, "cross": 0.85}
"""Intersection over union with a template. Soft edges cost a shape in proportion to the length of its outline. Two
different templates of equal area reach at most 0.84."""
MIN_MARGIN = 0.05
"""By which the best template must beat the next one."""


@dataclass(frozen=True)
class Verdict:
    """What a picture shows; None where the checker cannot decide."""

    colour: str | None = None
    background: str | None = None
    position: str | None = None
    shape: str | None = None


def check(image: NDArray[np.uint8]) -> Verdict:
    """Say what a picture shows.

    Args:
        image: [height, width, 3] uint8 RGB.

    Returns:
        The four properties, each a key of its table in `musubi_tuner.demo.pictures`, or None.

    Raises:
        ValueError: for another dtype or layout.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"picture is {image.dtype} of shape {image.shape}; expected uint8 [height, width, 3]")
    pixels = image.astype(np.float32)
    height, width = pixels.shape[:2]
    side = min(height, width)

    border = _border(pixels, max(1, side // 32))
    background_tone = np.median(border, axis=0)
    if _evenness(border, background_tone) < MIN_EVENNESS:
        return Verdict()
    background = _nearest(background_tone, BACKGROUNDS)

    contrast = pixels - background_tone
    drawn = np.linalg.norm(_smooth(contrast), axis=-1) > SAME_TONE
    component = largest_component(drawn)
    if component.sum() < MIN_AREA * side**2 or drawn.sum() - component.sum() > MAX_STRAY * component.sum():
        return Verdict(background=background)

    # The edge lies where the contrast is half of that inside, however soft it is. Smoothing has blunted the corners, so
    # pixels next to the component are looked at too.
    strength = np.where(_with_neighbours(component).any(axis=0), np.linalg.norm(contrast, axis=-1), 0)
    edge = 0.5 * np.median(strength[component])
    inside = pixels[_with_neighbours(strength > edge).all(axis=0)]
    if len(inside) == 0:
        return Verdict(background=background)
    tone = np.median(inside, axis=0)
    colour = _nearest(tone, COLOURS) if _evenness(inside, tone) >= MIN_EVENNESS else None

    fine = max(1, FINE_SIDE // side)
    mask = _interpolation(height, fine) @ strength @ _interpolation(width, fine).T > edge
    if not MIN_AREA * side**2 <= mask.sum() / fine**2 <= MAX_AREA * side**2:
        return Verdict(background=background)
    rows, columns = np.nonzero(mask)
    centre_x, centre_y = columns.mean() + 0.5, rows.mean() + 0.5
    return Verdict(
        colour=colour,
        background=background,
        position=_position(centre_x / fine / width, centre_y / fine / height),
        shape=_shape(mask, centre_x, centre_y),
    )


def score(
    images: Sequence[NDArray[np.uint8]], wanted: Sequence[Combination], unseen: set[Combination]
) -> dict[str, float | int | None]:
    """Compare what pictures show with what was asked for.

    Args:
        images: each [height, width, 3] uint8 RGB.
        wanted: what each picture should show, in the same order.
        unseen: combinations that were held out of training.

    Returns:
        Fractions of the pictures that are right in ``colour``, ``background``, ``position``, ``shape`` and in ``all``
        four; ``unseen_all``, the fraction that is right in all four among the pictures of unseen combinations, or
        None if there are none; and ``prompts``, the number of pictures.

    Raises:
        ValueError: if there are no pictures, or not one wanted combination per picture.
    """
    if not images or len(images) != len(wanted):
        raise ValueError(f"got {len(images)} pictures and {len(wanted)} combinations; expected one for each, and some")
    right: dict[str, list[bool]] = {name: [] for name in ("colour", "background", "position", "shape", "all")}
    for image, combination in zip(images, wanted, strict=True):
        found = check(image)
        right["colour"].append(found.colour == combination.colour)
        right["background"].append(found.background == combination.background)
        right["position"].append(found.position == combination.place)
        right["shape"].append(found.shape == combination.shape)
        right["all"].append(all(answers[-1] for name, answers in right.items() if name != "all"))
    new = [is_right for is_right, combination in zip(right["all"], wanted, strict=True) if combination in unseen]
    fractions: dict[str, float | int | None] = {name: sum(answers) / len(images) for name, answers in right.items()}
    return {**fractions, "unseen_all": sum(new) / len(new) if new else None, "prompts": len(images)}


def largest_component(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest set of true pixels that hang together by their edges.

    Args:
        mask: [height, width].

    Returns:
        A mask of the same shape; all false if ``mask`` is.
    """
    index = np.arange(mask.size).reshape(mask.shape)
    across, down = mask[:, 1:] & mask[:, :-1], mask[1:] & mask[:-1]
    first = np.concatenate([index[:, :-1][across], index[:-1][down]])
    second = np.concatenate([index[:, 1:][across], index[1:][down]])

    # Every pixel points at a pixel of its component with a smaller index; a root points at itself. Each round joins
    # the roots of neighbours and then lets all pixels point at their root.
    root = np.arange(mask.size)
    while True:
        low, high = np.minimum(root[first], root[second]), np.maximum(root[first], root[second])
        if np.array_equal(low, high):
            break
        np.minimum.at(root, high, low)
        while not np.array_equal(root, root[root]):
            root = root[root]
    sizes = np.bincount(root[mask.ravel()], minlength=1)
    return (root == sizes.argmax()).reshape(mask.shape) & mask


def _border(pixels: NDArray[np.float32], thickness: int) -> NDArray[np.float32]:
    """The outermost pixels [N, 3]."""
    is_border = np.ones(pixels.shape[:2], bool)
    is_border[thickness:-thickness, thickness:-thickness] = False
    return pixels[is_border]


def _smooth(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of 3 x 3 pixels, which calms noise; [height, width, 3] in and out, edges repeated."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:height] + padded[1 : height + 1] + padded[2:]
    return (rows[:, :width] + rows[:, 1 : width + 1] + rows[:, 2:]) / 9


def _with_neighbours(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A mask and its four shifts by one pixel [5, height, width]; outside the picture nothing is set."""
    padded = np.pad(mask, 1)
    return np.stack([mask, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])


def _evenness(pixels: NDArray[np.float32], tone: NDArray[np.float32]) -> float:
    """Share of the pixels [N, 3] that have this tone."""
    return float((np.linalg.norm(pixels - tone, axis=-1) <= SAME_TONE).mean())


def _nearest(tone: NDArray[np.float32], table: dict[str, tuple[int, int, int]]) -> str | None:
    distance = {name: float(np.linalg.norm(tone - np.array(rgb))) for name, rgb in table.items()}
    best = min(distance, key=distance.__getitem__)
    return best if distance[best] <= SAME_TONE else None


def _position(x: float, y: float) -> str | None:
    best = min(PLACES, key=lambda name: abs(PLACES[name] - x))
    return best if abs(PLACES[best] - x) <= MAX_OFFSET_X and abs(y - 0.5) <= MAX_OFFSET_Y else None


def _shape(mask: NDArray[np.bool_], centre_x: float, centre_y: float) -> str | None:
    """The template that covers a mask best when it has the mask's area and centroid (in cells of the mask)."""
    height, width = mask.shape
    x, y = np.arange(width)[None, :] + 0.5 - centre_x, np.arange(height)[:, None] + 0.5 - centre_y
    overlap: dict[str, float] = {}
    for name, inside in SHAPES.items():
        radius = np.sqrt(mask.sum() / _unit_area(name))
        template = inside(x / radius, y / radius)
        overlap[name] = float((template & mask).sum() / (template | mask).sum())
    best, second = sorted(overlap, key=overlap.__getitem__, reverse=True)[:2]
    return best if overlap[best] >= MIN_OVERLAP[best] and overlap[best] - overlap[second] >= MIN_MARGIN else None


@lru_cache
def _interpolation(count: int, factor: int) -> NDArray[np.float32]:
    """Matrix [count * factor, count] that interpolates linearly between the centres of pixels."""
    position = ((np.arange(count * factor) + 0.5) / factor - 0.5).clip(0, count - 1)
    return (1 - abs(position[:, None] - np.arange(count)[None, :])).clip(0, 1).astype(np.float32)


@lru_cache
def _unit_area(shape: str) -> float:
    """Area of a shape of radius 1, by counting."""
    points = (np.arange(1000) + 0.5) / 1000 * 3 - 1.5
    return float(SHAPES[shape](points[None, :], points[:, None]).mean() * 9)
