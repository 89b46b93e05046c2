"""Bucket lists, selection, resize geometry and resized pixels equal the published trainer's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from musubi_tuner.data.buckets import BucketSelector, place
from musubi_tuner.data.images import resize_crop, to_array
from musubi_tuner.errors import ConfigError, DataError

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "buckets.json").read_text(encoding="utf-8"))


def case_name(case: dict[str, Any]) -> str:
    width, height = case["resolution"]
    flags = [name for name in ("enable_bucket", "bucket_no_upscale") if case[name]]
    return "-".join([f"{width}x{height}", f"step{case['step']}", *flags])


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=case_name)
def test_bucket_list_selection_and_geometry(case: dict[str, Any]) -> None:
    selector = BucketSelector(
        tuple(case["resolution"]), "tf", case["enable_bucket"], case["bucket_no_upscale"], step=case["step"]
    )
    assert [list(bucket) for bucket in selector.bucket_resolutions] == case["bucket_resolutions"]
    for item in case["items"]:
        image = tuple(item["image"])
        placement = place(image, selector.select(image))
        found = {
            "image": list(image),
            "bucket": list(placement.bucket),
            "resized": list(placement.resized),
            "crop_left_top": list(placement.crop),
            "filter": placement.filter,
        }
        assert found == item


def test_the_golden_file_reaches_every_kind_of_case() -> None:
    kinds = {(case["step"], case["enable_bucket"], case["bucket_no_upscale"]) for case in GOLDEN["cases"]}
    assert kinds == {(step, *flags) for step in (16, 32) for flags in ((True, True), (True, False), (False, False))}
    assert {item["filter"] for case in GOLDEN["cases"] for item in case["items"]} == {"none", "lanczos", "area"}


def synthetic_image(width: int, height: int) -> Image.Image:
    """The picture that ``synthetic_image`` of the golden file describes: a wave in red, ramps in green and blue."""
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]
    channels = (
        127.5 + 100 * np.sin(2 * np.pi * x / width * 3) + 0 * y,
        255 * x / max(width - 1, 1) + 0 * y,
        255 * y / max(height - 1, 1) + 0 * x,
    )
    return Image.fromarray(np.clip(np.stack(channels, axis=-1) + 0.5, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("case", GOLDEN["pixels"], ids=lambda case: f"{case['input']}-{case['image']}")
def test_resized_pixels(case: dict[str, Any]) -> None:
    image = tuple(case["image"])
    selector = BucketSelector(tuple(case["resolution"]), "tf")
    bucket = selector.select(image)
    assert list(bucket) == case["bucket"]
    pixels = to_array(resize_crop(synthetic_image(*image), place(image, bucket)))
    assert pixels.shape == (bucket[1], bucket[0], 3)
    assert pixels.dtype == np.uint8
    found = pixels[np.ix_(case["rows"], case["cols"])].astype(int)
    assert np.abs(found - np.array(case["samples"])).max() <= case["tolerance"]
    # The mean moves far less than single pixels: no resampling rule shifts the brightness of a whole picture.
    assert np.abs(pixels.mean(axis=(0, 1)) - case["mean_rgb"]).max() <= 0.5


@pytest.mark.parametrize(("step", "side"), [(16, 31), (32, 63)])
def test_a_resolution_without_a_positive_smallest_side_is_an_error(step: int, side: int) -> None:
    with pytest.raises(ConfigError, match=f"resolution {side}x{side} is too small for buckets of step {step}"):
        BucketSelector((side, side), "tf", step=step)
    assert BucketSelector((side + 1, side + 1), "tf", step=step).bucket_resolutions


def test_an_image_below_one_step_that_must_not_grow_is_an_error() -> None:
    selector = BucketSelector((512, 512), "tf", no_upscale=True)
    with pytest.raises(DataError, match="image of 15x400 is smaller than the step of 16 pixels"):
        selector.select((15, 400))
    assert selector.select((16, 400)) == (16, 400)


def test_step_and_error_of_an_architecture_code() -> None:
    assert BucketSelector((512, 512), "tf").step == BucketSelector((512, 512), "fd").step == 16
    with pytest.raises(ConfigError, match="unknown architecture code 'xx'; known: tf"):
        BucketSelector((512, 512), "xx")


def test_side_limits_filter_the_list_and_an_empty_list_is_an_error() -> None:
    everything = BucketSelector((512, 512), "tf").bucket_resolutions
    limited = BucketSelector((512, 512), "tf", min_side=320, max_side=768).bucket_resolutions
    assert limited == [bucket for bucket in everything if min(bucket) >= 320 and max(bucket) <= 768]
    assert 1 < len(limited) < len(everything)
    with pytest.raises(ConfigError, match="no bucket of 512x512 has all sides between 600 and None"):
        BucketSelector((512, 512), "tf", min_side=600)
