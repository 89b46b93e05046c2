"""Captioned pictures of one coloured shape on a plain background, drawn by a few lines of arithmetic.

    a red circle on the left of a white background

4 shapes x 6 colours x 3 places x 3 backgrounds = 216 combinations. Some are held out of training, so that a
score on them shows whether a model composes what it learnt or only repeats it.

The pictures are easy on purpose: the shapes are large, sit at three fixed places, and neither size nor position
varies much. A model of two million parameters must learn them in a few minutes on a laptop CPU, and with more
variation it learns the colours in that time but not the shapes. A good score here shows that training works; it
says nothing about real photographs.

Everything is keyed: picture `index` of `seed` is the same whatever was drawn before it. Torch-free.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations as pairs_of
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from musubi_tuner.errors import DataError
from musubi_tuner.files import folder_lock, read_json, remove_leftovers, replace_file, sync_path, write_json

Inside = Callable[[NDArray[np.floating], NDArray[np.floating]], NDArray[np.bool_]]
"""Whether points belong to a shape. Both coordinates are in units of its radius, x to the right and y down, from its
centroid; they broadcast against each other."""


def _circle(x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.bool_]:
    return x * x + y * y <= 1


def _square(x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.bool_]:
    return (abs(x) <= 0.9) & (abs(y) <= 0.9)


def _triangle(x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.bool_]:
    # The apex is at (0, -1.2) and the base, two radii wide, at y = 0.6.
    return (y <= 0.6) & (abs(x) <= (y + 1.2) / 1.8)


def _cross(x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.bool_]:
    return ((abs(x) <= 1) & (abs(y) <= 0.36)) | ((abs(x) <= 0.36) & (abs(y) <= 1))


SHAPES: dict[str, Inside] = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (40, 180, 60),
    "blue": (40, 70, 225),
    "yellow": (240, 215, 40),
    "cyan": (40, 205, 225),
    "purple": (190, 45, 200),
}
"""RGB. Any two of them, and any of them and a background, are at least 120 apart."""
PLACES: dict[str, float] = {"left": 0.27, "middle": 0.50, "right": 0.73}
"""Centre of the shape, as a fraction of the picture's width."""
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (240, 240, 240),
    "grey": (128, 128, 128),
    "black": (16, 16, 16),
}

# How much a picture varies. Lengths are fractions of the shorter side; levels are of 255.
RADIUS = (0.225, 0.245)
JITTER_X = 1.0 / 64
JITTER_Y = 1.2 / 64
COLOUR_JITTER = 8
BACKGROUND_JITTER = 5
SUPERSAMPLING = 4

MAX_HELD_OUT = 108
"""Half of the combinations: with more held out there is too little left to learn from."""
MANIFEST = "dataset.json"
VERSION = 1
"""Of the drawing and of the manifest. Raise it when the same seed draws other pictures."""
_ORDER, _HELD_OUT = 1, 2


@dataclass(frozen=True)
class Combination:
    """What one picture shows; each field is a key of the table of its name."""

    shape: str
    colour: str
    place: str
    background: str

    @property
    def caption(self) -> str:
        """For example 'a red circle on the left of a white background'."""
        where = f"{'in' if self.place == 'middle' else 'on'} the {self.place} of"
        return f"a {self.colour} {self.shape} {where} a {self.background} background"


def combinations() -> list[Combination]:
    """All 216 combinations, in a fixed order."""
    return [Combination(*values) for values in product(SHAPES, COLOURS, PLACES, BACKGROUNDS)]


def vocabulary() -> list[str]:
    """Every word that occurs in a caption, sorted."""
    return sorted({word for combination in combinations() for word in combination.caption.split()})


def held_out(count: int, seed: int) -> list[Combination]:
    """Choose combinations to keep out of training.

    Args:
        count: 0 to 108.
        seed: of the choice; the first combinations of a larger count are those of a smaller one.

    Returns:
        ``count`` combinations. All shapes are held out equally often, give or take two, and so are all colours, places
        and backgrounds; pairs of them (a red circle, say) are spread too. All of them still occur in training.

    Raises:
        ValueError: if ``count`` is out of range.
    """
    if not 0 <= count <= MAX_HELD_OUT:
        raise ValueError(f"cannot hold out {count} of {len(combinations())} combinations; give 0 to {MAX_HELD_OUT}")
    left = combinations()
    np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_HELD_OUT,))).shuffle(left)  # type: ignore[arg-type]
    singles: Counter[tuple[str, ...]] = Counter()
    pairs: Counter[tuple[str, ...]] = Counter()
    chosen: list[Combination] = []
    for _ in range(count):
        # Spread over single values first, then over pairs; the shuffled order decides between equals.
        best = min(left, key=lambda item: (_crowding(item, singles, 1), _crowding(item, pairs, 2)))
        left.remove(best)
        chosen.append(best)
        singles.update(_parts(best, 1))
        pairs.update(_parts(best, 2))
    return chosen


def _parts(combination: Combination, size: int) -> Iterator[tuple[str, ...]]:
    """The values of a combination, alone (size 1) or in pairs (size 2)."""
    return pairs_of((combination.shape, combination.colour, combination.place, combination.background), size)


def _crowding(combination: Combination, taken: Counter[tuple[str, ...]], size: int) -> int:
    """How much of a combination is held out already, relative to how many alternatives each part has."""
    alternatives = pairs_of((len(SHAPES), len(COLOURS), len(PLACES), len(BACKGROUNDS)), size)
    return sum(
        taken[part] * prod(numbers) for part, numbers in zip(_parts(combination, size), alternatives, strict=True)
    )


def draw(combination: Combination, rng: np.random.Generator, width: int = 64, height: int = 64) -> NDArray[np.uint8]:
    """Draw one picture.

    Args:
        combination: what to draw.
        rng: supplies size, place and tones; seven numbers are drawn from it.
        width, height: in pixels. The shape's size follows the shorter side.

    Returns:
        [height, width, 3] uint8 RGB, edges smoothed by 4 x 4 samples per pixel.
    """
    side = min(width, height)
    radius = side * rng.uniform(*RADIUS)
    centre_x = width * PLACES[combination.place] + side * rng.uniform(-JITTER_X, JITTER_X)
    centre_y = height * 0.5 + side * rng.uniform(-JITTER_Y, JITTER_Y)
    colour = np.array(COLOURS[combination.colour]) + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3)
    background = np.array(BACKGROUNDS[combination.background]) + rng.uniform(-BACKGROUND_JITTER, BACKGROUND_JITTER)

    x = (np.arange(width * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    y = (np.arange(height * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    inside = SHAPES[combination.shape]((x[None, :] - centre_x) / radius, (y[:, None] - centre_y) / radius)
    coverage = inside.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING).mean(axis=(1, 3))[..., None]
    return np.rint(background + coverage * (colour - background)).astype(np.uint8)


def training_order(count: int, held: int, seed: int) -> list[Combination]:
    """The combination of each training picture: all that are not held out, shuffled anew for every round of them.

    Args:
        count: pictures.
        held: combinations held out, as for `held_out`.
        seed: of the shuffling and of the choice of the held-out ones.

    Returns:
        ``count`` combinations; any two trained ones occur equally often, or differ by one.
    """
    excluded = set(held_out(held, seed))
    trained = [combination for combination in combinations() if combination not in excluded]
    order: list[Combination] = []
    for cycle in range(-(-count // len(trained))):
        rng = np.random.default_rng(np.random.SeedSequence([seed, cycle], spawn_key=(_ORDER,)))
        order += [trained[i] for i in rng.permutation(len(trained))]
    return order[:count]


def write_dataset(folder: Path, count: int, size: int, held: int, seed: int) -> int:
    """Draw the training pictures into a folder, as ``00000.png`` with the caption in ``00000.txt``, and so on.

    Picture and caption i depend on ``seed``, ``size``, ``held`` and i alone, so an interrupted call may be repeated.
    The manifest ``dataset.json`` says what the folder holds; it is complete only when everything is there. Pictures
    of an earlier, larger set are removed.

    Args:
        folder: created if missing. It must not hold pictures or texts of another origin.
        count: pictures to draw.
        size: side of a picture, in pixels.
        held: combinations kept out of training, as for `held_out`.
        seed: of everything that is random here.

    Returns:
        Pictures drawn: ``count``, or 0 if the folder already holds exactly this set.

    Raises:
        DataError: if the folder holds pictures or texts that are not ours, or another process is writing to it.
        ValueError: if ``held`` is out of range.
    """
    manifest = {"version": VERSION, "count": count, "size": size, "held": held, "seed": seed}
    names = [f"{index:05d}" for index in range(count)]
    finished = {**manifest, "complete": True}
    if _read_manifest(folder) == finished and _holds(folder, names):
        return 0

    def busy(holder: str) -> DataError:
        return DataError(f"{folder}: {holder} is drawing the demo's pictures here; wait for it or use another folder")

    with folder_lock(folder, busy, ".dataset-lock"):
        remove_leftovers(folder)
        foreign = [*folder.glob("*.png"), *folder.glob("*.txt")]
        if foreign and _read_manifest(folder) is None:
            raise DataError(
                f"{folder}: holds {min(foreign).name} but no readable {MANIFEST}, so its files may not be the demo's "
                "and would be replaced; give demo.folder an empty folder"
            )
        order = training_order(count, held, seed)
        write_json(folder / MANIFEST, {**manifest, "complete": False})
        for path in _numbered(folder):
            if int(path.stem) >= count:
                path.unlink()
        for index, (name, combination) in enumerate(zip(names, order, strict=True)):
            rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
            picture = draw(combination, rng, size, size)
            replace_file(folder / f"{name}.png", partial(_write_picture, picture), sync=False)
            replace_file(folder / f"{name}.txt", partial(_write_caption, combination), sync=False)
        for name in names:
            sync_path(folder / f"{name}.png")
            sync_path(folder / f"{name}.txt")
        write_json(folder / MANIFEST, finished)
    return count


def _write_picture(picture: NDArray[np.uint8], path: Path) -> None:
    Image.fromarray(picture).save(path, "PNG")


def _write_caption(combination: Combination, path: Path) -> None:
    path.write_text(combination.caption + "\n", encoding="utf-8", newline="\n")


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        found = read_json(folder / MANIFEST)
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _holds(folder: Path, names: list[str]) -> bool:
    """Whether exactly these pictures, with their captions, are in the folder; nothing is read."""
    wanted = {f"{name}{suffix}" for name in names for suffix in (".png", ".txt")}
    return {path.name for path in _numbered(folder)} == wanted


def _numbered(folder: Path) -> list[Path]:
    """The files of a folder that are named like ours."""
    return [path for path in folder.iterdir() if re.fullmatch(r"\d{5,}\.(png|txt)", path.name)]
