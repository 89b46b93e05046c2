"""The checker names what a good picture shows, forgives what a decoder adds, and rejects everything else."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from musubi_tuner.demo.checker import Verdict, check, largest_component, score
from musubi_tuner.demo.pictures import BACKGROUNDS, COLOURS, PLACES, SHAPES, Combination, combinations, draw, held_out

pytestmark = pytest.mark.long

Picture = NDArray[np.uint8]
ALL = combinations()
PROPERTIES = ("colour", "background", "position", "shape", "all")
RED, BLUE = COLOURS["red"], COLOURS["blue"]


@cache
def real(repeats: int = 1, width: int = 64, height: int = 64) -> list[Picture]:
    rng = np.random.default_rng(0)
    return [draw(combination, rng, width, height) for _ in range(repeats) for combination in ALL]


def to_picture(pixels: NDArray[np.floating]) -> Picture:
    return np.rint(pixels).clip(0, 255).astype(np.uint8)


def blurred(picture: Picture, radius: float) -> Picture:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def noisy(picture: Picture, sigma: float, rng: np.random.Generator) -> Picture:
    return to_picture(picture + rng.normal(0, sigma, picture.shape))


def paint(
    *marks: tuple[Callable[..., NDArray[np.bool_]], float, float, float, tuple[int, int, int]],
    background: str = "black",
    width: int = 64,
    height: int = 64,
) -> Picture:
    """Marks (function, centre x, centre y, radius, colour) on a background, drawn with 4 x 4 samples per pixel."""
    picture = np.full((height * 4, width * 4, 3), BACKGROUNDS[background], float)
    x, y = (np.arange(width * 4)[None, :] + 0.5) / 4, (np.arange(height * 4)[:, None] + 0.5) / 4
    for inside, centre_x, centre_y, radius, colour in marks:
        picture[inside((x - centre_x) / radius, (y - centre_y) / radius)] = colour
    return to_picture(picture.reshape(height, 4, width, 4, 3).mean(axis=(1, 3)))


def turned(inside: Callable[..., NDArray[np.bool_]], degrees: float) -> Callable[..., NDArray[np.bool_]]:
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return lambda x, y: inside(cosine * x - sine * y, sine * x + cosine * y)


@pytest.mark.parametrize(
    ("width", "height", "repeats"),
    [(64, 64, 2), (96, 64, 1), (64, 96, 1), (32, 32, 1), (96, 96, 1)],
)
def test_all_real_pictures_are_read_right(width: int, height: int, repeats: int) -> None:
    result = score(real(repeats, width, height), ALL * repeats, set())
    assert result == {**dict.fromkeys(PROPERTIES, 1.0), "unseen_all": None, "prompts": 216 * repeats}


def test_a_verdict_names_the_keys_of_the_tables() -> None:
    picture = draw(Combination("cross", "cyan", "right", "grey"), np.random.default_rng(0))
    assert check(picture) == Verdict(colour="cyan", background="grey", position="right", shape="cross")


def test_shuffled_captions_score_no_better_than_chance() -> None:
    wanted = [(ALL * 2)[i] for i in np.random.default_rng(1).permutation(2 * 216)]
    result = score(real(2), wanted, set())
    chance = {
        "colour": 1 / len(COLOURS),
        "background": 1 / len(BACKGROUNDS),
        "position": 1 / len(PLACES),
        "shape": 1 / len(SHAPES),
        "all": 1 / 216,
    }
    # The standard deviation is at most 2.3 % with 432 pictures; the permutation is fixed.
    assert {name: result[name] for name in chance} == pytest.approx(chance, abs=0.05)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda picture, rng: noisy(picture, 20, rng), id="noise"),
        pytest.param(lambda picture, rng: blurred(picture, 1.5), id="blur"),
        pytest.param(lambda picture, rng: noisy(blurred(picture, 1.0), 10, rng), id="noise and blur"),
        pytest.param(lambda picture, rng: to_picture(picture + rng.uniform(-20, 20, 3)), id="colour drift"),
        pytest.param(
            lambda picture, rng: np.asarray(Image.fromarray(picture).resize((32, 32)).resize((64, 64))),
            id="half the resolution",
        ),
    ],
)
def test_faults_of_a_good_decoder_are_forgiven(spoil: Callable[[Picture, np.random.Generator], Picture]) -> None:
    rng = np.random.default_rng(2)
    result = score([spoil(picture, rng) for picture in real()], ALL, set())
    assert all(result[name] >= 0.98 for name in PROPERTIES), result


def test_patchwise_projection_to_16_channels_is_forgiven() -> None:
    # Pictures as an 8 x 8 patch projection fitted to them gives them back: about 29 dB, with seams and soft corners.
    pictures = np.stack(real(2)).astype(float)
    patches = pictures.reshape(-1, 8, 8, 8, 8, 3).swapaxes(2, 3).reshape(-1, 192)
    mean = patches.mean(0)
    basis = np.linalg.eigh(np.cov((patches - mean).T))[1][:, -16:]
    restored = ((patches - mean) @ basis @ basis.T + mean).reshape(-1, 8, 8, 8, 8, 3).swapaxes(2, 3)
    result = score([to_picture(picture) for picture in restored.reshape(-1, 64, 64, 3)], ALL * 2, set())
    assert {name: result[name] for name in PROPERTIES} == dict.fromkeys(PROPERTIES, 1.0)


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_a_blank_picture_shows_a_background_only(name: str) -> None:
    assert check(to_picture(np.full((64, 64, 3), BACKGROUNDS[name], float))) == Verdict(background=name)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda rng: rng.uniform(0, 255, (64, 64, 3)), id="uniform"),
        pytest.param(lambda rng: rng.uniform(0, 255, (64, 64, 1)).repeat(3, 2), id="uniform grey"),
        pytest.param(lambda rng: 128 + rng.normal(0, 64, (64, 64, 3)), id="gaussian 64"),
        pytest.param(lambda rng: 128 + rng.normal(0, 25, (64, 64, 3)), id="gaussian 25"),
        pytest.param(lambda rng: 240 + rng.normal(0, 40, (64, 64, 3)), id="gaussian 40 on white"),
        pytest.param(lambda rng: rng.uniform(0, 255, (8, 8, 3)).repeat(8, 0).repeat(8, 1), id="random patches"),
        pytest.param(
            lambda rng: blurred(to_picture(128 + rng.normal(0, 500, (64, 64, 3))), 4).astype(float), id="clouds"
        ),
    ],
)
def test_noise_shows_nothing(make: Callable[[np.random.Generator], NDArray[np.floating]], seed: int) -> None:
    verdict = check(to_picture(make(np.random.default_rng(seed))))
    assert (verdict.colour, verdict.position, verdict.shape) == (None, None, None)


@pytest.mark.parametrize("first", SHAPES)
@pytest.mark.parametrize("second", SHAPES)
@pytest.mark.parametrize("colour", [RED, BLUE])
def test_two_separate_shapes_show_a_background_only(first: str, second: str, colour: tuple[int, int, int]) -> None:
    picture = paint((SHAPES[first], 20, 32, 15, RED), (SHAPES[second], 76, 32, 15, colour), width=96)
    assert check(picture) == Verdict(background="black")


def test_a_small_second_shape_is_not_overlooked() -> None:
    # A third of the radius: an eighth of the area.
    picture = paint((SHAPES["circle"], 17, 32, 15, RED), (SHAPES["square"], 50, 50, 6, BLUE))
    assert check(picture) == Verdict(background="black")


def test_a_speck_is_overlooked() -> None:
    picture = paint((SHAPES["circle"], 17, 32, 15, RED), (SHAPES["square"], 50, 50, 2, BLUE))
    assert check(picture) == Verdict(colour="red", background="black", position="left", shape="circle")


@pytest.mark.parametrize("places", [("left", "middle"), ("left", "right"), ("middle", "right")])
@pytest.mark.parametrize("first", SHAPES)
@pytest.mark.parametrize("second", SHAPES)
def test_two_shapes_that_touch_are_no_shape(first: str, second: str, places: tuple[str, str]) -> None:
    marks = [(SHAPES[name], 64 * PLACES[place], 32, 15, RED) for name, place in zip((first, second), places)]
    assert check(paint(*marks)).shape is None


def test_a_shape_of_two_colours_has_no_colour() -> None:
    def left_half(x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.bool_]:
        return SHAPES["circle"](x, y) & (x < 0)

    verdict = check(paint((SHAPES["circle"], 32, 32, 15, RED), (left_half, 32, 32, 15, BLUE)))
    assert verdict == Verdict(colour=None, background="black", position="middle", shape="circle")


# Coordinates are in radii, as for the functions of the right shapes.
WRONG_SHAPES: dict[str, Callable[..., NDArray[np.bool_]]] = {
    "diamond": turned(SHAPES["square"], 45),
    "square turned by 15 degrees": turned(SHAPES["square"], 15),
    "rectangle": lambda x, y: (abs(x) <= 0.75) & (abs(y) <= 1.1),
    "notched square": lambda x, y: SHAPES["square"](x, y) & ~((x > 0.4) & (abs(y) < 0.25)),
    "square without a corner": lambda x, y: SHAPES["square"](x, y) & ~((x > 0.3) & (y > 0.3)),
    "frame": lambda x, y: SHAPES["square"](x, y) & ~((abs(x) < 0.45) & (abs(y) < 0.45)),
    "ellipse": lambda x, y: (1.25 * x) ** 2 + y**2 <= 1,
    "ring": lambda x, y: SHAPES["circle"](x, y) & (x**2 + y**2 > 0.1),
    "half circle": lambda x, y: (x**2 + y**2 <= 1.3) & (y <= 0.2),
    "triangle upside down": lambda x, y: SHAPES["triangle"](x, -y),
    "triangle on its side": turned(SHAPES["triangle"], 90),
    "trapezium": lambda x, y: (abs(y) <= 0.9) & (abs(x) <= 0.65 + 0.39 * y),
    "drop": lambda x, y: (x**2 + (y - 0.2) ** 2 <= 0.64) | ((abs(x) <= (y + 1.2) / 1.75) & (y < 0.2)),
    "diagonal cross": turned(SHAPES["cross"], 45),
    "cross turned by 10 degrees": turned(SHAPES["cross"], 10),
    "thin cross": lambda x, y: (abs(x) <= 1.1) & (abs(y) <= 0.2) | (abs(x) <= 0.2) & (abs(y) <= 1.1),
    "fat cross": lambda x, y: (abs(x) <= 1) & (abs(y) <= 0.55) | (abs(x) <= 0.55) & (abs(y) <= 1),
    "cross with three arms": lambda x, y: SHAPES["cross"](x, y) & ~(x > 0.4),
    "bar": lambda x, y: (abs(x) <= 1.1) & (abs(y) <= 0.5),
    "L": lambda x, y: (abs(x) <= 1) & (abs(y - 0.6) <= 0.4) | (abs(x + 0.6) <= 0.4) & (abs(y) <= 1),
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_other_shapes_are_no_shape(name: str, background: str) -> None:
    for centre_x, centre_y, radius in ((31.4, 32.7, 14.4), (32.8, 31.5, 15.7)):
        verdict = check(paint((WRONG_SHAPES[name], centre_x, centre_y, radius, BLUE), background=background))
        assert verdict.shape is None
        assert verdict.colour == "blue"


@pytest.mark.parametrize("power", [3, 4])
def test_a_rounded_square_is_neither_a_square_nor_a_circle(power: int) -> None:
    def rounded(x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.bool_]:
        return abs(x) ** power + abs(y) ** power <= 0.9**power

    rng = np.random.default_rng(0)
    for _ in range(15):
        x, y, radius = rng.uniform([31, 31, 14.4], [33, 33, 15.7])
        assert check(paint((rounded, x, y, radius, BLUE))).shape is None


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_far_from_every_place_has_no_position(name: str) -> None:
    for x, y in ((24.7, 32), (39.3, 32), (32, 20), (32, 45)):
        verdict = check(paint((SHAPES[name], x, y, 14, RED)))
        assert verdict == Verdict(colour="red", background="black", position=None, shape=name)


def test_a_tone_between_two_colours_has_no_name() -> None:
    between = tuple(int(tone) for tone in np.mean([RED, COLOURS["yellow"]], axis=0))
    verdict = check(paint((SHAPES["square"], 32, 32, 15, between)))  # type: ignore[arg-type]
    assert verdict == Verdict(colour=None, background="black", position="middle", shape="square")


@pytest.mark.parametrize("name", SHAPES)
def test_a_faint_shape_keeps_its_outline(name: str) -> None:
    faint = (16 + 40, 16 + 40, 16 + 32)  # 65 above black: hardly more than what counts as drawn
    verdict = check(paint((SHAPES[name], 32, 32, 15, faint)))
    assert verdict == Verdict(colour=None, background="black", position="middle", shape=name)


def test_an_unknown_background_has_no_name_and_does_not_hide_the_shape() -> None:
    picture = paint((SHAPES["circle"], 32, 32, 15, COLOURS["yellow"]))
    picture[(picture == BACKGROUNDS["black"]).all(-1)] = (120, 0, 60)
    assert check(picture) == Verdict(colour="yellow", background=None, position="middle", shape="circle")


def test_a_background_of_two_tones_shows_nothing() -> None:
    picture = paint((SHAPES["circle"], 32, 32, 15, RED))
    picture[:, :20] = BACKGROUNDS["white"]
    assert check(picture) == Verdict()


@pytest.mark.parametrize("radius", [5, 22])
def test_a_shape_of_a_wrong_size_does_not_count(radius: float) -> None:
    assert check(paint((SHAPES["circle"], 32, 32, radius, RED))) == Verdict(background="black")


@pytest.mark.parametrize(
    "image",
    [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 4), np.uint8), np.zeros((64, 64, 3), np.float32)],
    ids=["grey", "alpha", "float"],
)
def test_another_layout_is_refused(image: NDArray) -> None:
    with pytest.raises(ValueError, match=r"picture is \w+ of shape \(64, 64.*; expected uint8 \[height, width, 3\]"):
        check(image)


def test_score_counts_each_property_and_unseen_combinations_alone() -> None:
    shown = [
        Combination("circle", "red", "left", "white"),
        Combination("square", "red", "left", "white"),
        Combination("circle", "blue", "right", "white"),
        Combination("cross", "green", "middle", "black"),
    ]
    wanted = [shown[0], shown[0], shown[0], shown[3]]
    pictures = [draw(combination, np.random.default_rng(0)) for combination in shown]
    assert score(pictures, wanted, {shown[0]}) == {
        "colour": 0.75,
        "background": 1.0,
        "position": 0.75,
        "shape": 0.75,
        "all": 0.5,
        "unseen_all": pytest.approx(1 / 3),
        "prompts": 4,
    }


def test_score_without_unseen_prompts_has_no_unseen_fraction() -> None:
    unseen = set(held_out(24, 0))
    seen = [combination for combination in ALL if combination not in unseen][:5]
    pictures = [draw(combination, np.random.default_rng(0)) for combination in seen]
    assert score(pictures, seen, unseen)["unseen_all"] is None


@pytest.mark.parametrize("pictures", [0, 2])
def test_score_needs_one_combination_per_picture(pictures: int) -> None:
    images = real()[:pictures]
    with pytest.raises(
        ValueError, match=rf"got {pictures} pictures and {3 * (pictures > 0)} combinations; expected one"
    ):
        score(images, ALL[: 3 * (pictures > 0)], set())


def plain_components(mask: NDArray[np.bool_]) -> list[set[tuple[int, int]]]:
    """Components by flood fill, one pixel at a time."""
    left = {(int(row), int(column)) for row, column in zip(*np.nonzero(mask))}
    found = []
    while left:
        stack = [left.pop()]
        component = set(stack)
        while stack:
            row, column = stack.pop()
            for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if near in left:
                    left.remove(near)
                    component.add(near)
                    stack.append(near)
        found.append(component)
    return found


@pytest.mark.parametrize("density", [0.1, 0.4, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (5, 9), (40, 31)])
def test_largest_component_equals_flood_fill(density: float, size: tuple[int, int]) -> None:
    for seed in range(5):
        mask = np.random.default_rng(seed).random(size) < density
        found = {(int(row), int(column)) for row, column in zip(*np.nonzero(largest_component(mask)))}
        components = plain_components(mask)
        assert len(found) == max(map(len, components), default=0)
        assert not found or found in components


def test_a_winding_component_stays_whole() -> None:
    mask = np.zeros((41, 41), bool)
    mask[::2] = True
    mask[1::4, -1] = True
    mask[3::4, 0] = True
    np.testing.assert_array_equal(largest_component(mask), mask)


def test_an_empty_mask_has_no_component() -> None:
    assert not largest_component(np.zeros((8, 8), bool)).any()
