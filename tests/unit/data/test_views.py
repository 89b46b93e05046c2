"""Versions of a picture: where they are cropped, whether they are mirrored, and what happens to their colours."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.config.views import ViewSettings
from musubi_tuner.data.buckets import place
from musubi_tuner.data.pixels import PixelSource, read_pixels
from musubi_tuner.data.plan import MicroBatch, number_of_view
from musubi_tuner.data.sources import scan
from musubi_tuner.data.views import GAMMAS, LARGEST_SHIFT, View, views

WIDE = place((128, 64), (64, 64))  # 64 columns may be left out
PLAIN = View(WIDE.crop)


def test_a_picture_that_is_trained_as_it_is_has_one_view() -> None:
    assert views("a", WIDE, ViewSettings()) == (PLAIN,) and WIDE.crop == (32, 0)


def test_mirroring_doubles_the_views() -> None:
    assert views("a", WIDE, ViewSettings(flip_aug=True)) == (PLAIN, View(WIDE.crop, flip=True))
    both = views("a", WIDE, ViewSettings(flip_aug=True, random_crop=True, latent_variants=3))
    assert len(both) == 6 and [view.crop for view in both[:3]] == [view.crop for view in both[3:]]


def test_random_crops_lie_anywhere_and_are_keyed() -> None:
    settings = ViewSettings(random_crop=True, latent_variants=64)
    found = views("a", WIDE, settings)
    lefts = [view.crop[0] for view in found]
    assert all(0 <= left <= 64 and view.crop[1] == 0 for left, view in zip(lefts, found, strict=True))
    assert min(lefts) < 8 and max(lefts) > 56 and found == views("a", WIDE, settings) != views("b", WIDE, settings)
    assert found[:2] == views("a", WIDE, ViewSettings(random_crop=True, latent_variants=2))


def test_colours_change_in_half_of_the_views_by_hue_or_gamma() -> None:
    found = [view for n in range(160) for view in views(f"{n}", WIDE, ViewSettings(color_aug=True, latent_variants=64))]
    kinds = Counter("hue" if view.hue else "gamma" if view.gamma != 1 else "none" for view in found)
    shares = {kind: count / len(found) for kind, count in kinds.items()}
    assert shares == pytest.approx({"none": 0.5, "hue": 0.25, "gamma": 0.25}, abs=0.03)
    assert all(abs(view.hue) <= LARGEST_SHIFT and GAMMAS[0] <= view.gamma <= GAMMAS[1] for view in found)
    assert (
        all(view.crop == WIDE.crop for view in found)
        and views("a", WIDE, ViewSettings(color_aug=True, latent_variants=9))[0] == PLAIN
    )


def test_colours_of_a_view() -> None:
    red = np.full((2, 2, 3), (200, 20, 20), dtype=np.uint8)
    assert np.array_equal(PLAIN.colour(red), red)
    darker = View((0, 0), gamma=1.05).colour(red)
    assert (darker < red).all() and abs(int(darker[0, 0, 0]) - 255 * (200 / 255) ** 1.05) < 1
    turned = View((0, 0), hue=8 / 180).colour(red)
    assert turned[0, 0, 1] > 30 and abs(int(turned[0, 0, 0]) - 200) <= 2  # towards yellow, as bright as before


def test_pixels_of_a_view_are_those_of_the_picture_moved(
    dataset: Callable[..., DatasetConfig], picture: Callable[..., Path], tmp_path: Path
) -> None:
    from PIL import Image

    path = picture(tmp_path / "images" / "a.png", size=(128, 64))
    ramp = np.repeat(np.arange(128, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    Image.fromarray(ramp).save(path)
    settings = ViewSettings(flip_aug=True, random_crop=True, latent_variants=2)
    (item,) = scan([dataset(views=settings, enable_bucket=False)], "tf").items
    for view in item.views:
        columns = ((read_pixels(item, view)[0, 0] + 1) * 127.5).round().int().tolist()
        expected = list(range(view.crop[0], view.crop[0] + 64))
        assert columns == (expected[::-1] if view.flip else expected)
    source = PixelSource([item], seed=1)
    batches = [source.read(MicroBatch((0,), (n,)), epoch=0).tensors["pixels"][0] for n in range(40)]
    known = [read_pixels(item, view) for view in item.views]
    taken = {next(n for n, pixels in enumerate(known) if torch.equal(pixels, batch)) for batch in batches}
    assert taken == {0, 1, 2, 3}


def test_each_version_is_taken_as_often() -> None:
    taken = Counter(number_of_view(4, 1, 0, n) for n in range(10_000))
    assert all(count == pytest.approx(2500, rel=0.08) for count in taken.values()) and len(taken) == 4
    assert number_of_view(1, 1, 0, 5) == number_of_view(0, 1, 0, 5) == 0
