"""The dataset tables: lookup of values, and every mistake that is refused before anything is encoded."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from musubi_tuner.config import RunConfig
from musubi_tuner.config.datasets import DatasetConfig

Load = Callable[..., RunConfig]
Problems = Callable[..., list[str]]

IMAGES = '[[datasets]]\nimage_directory = "images"\n'
LISTING = '[[datasets]]\nimage_jsonl_file = "list.jsonl"\ncache_directory = "cache"\n'


def only(config: RunConfig) -> DatasetConfig:
    (dataset,) = config.datasets
    return dataset


# Lookup


def test_dataset_takes_the_defaults_of_the_family(load: Load) -> None:
    assert only(load()) == DatasetConfig(
        name="datasets[0]",
        image_directory=Path("images"),
        image_jsonl_file=None,
        cache_directory=Path("images"),
        resolution=(512, 512),
        enable_bucket=True,
        bucket_no_upscale=False,
        caption_extension=".txt",
        batch_size=1,
        num_repeats=1,
        missing_caption="error",
        recursive=False,
        apart=(Path("out"),),
    )


def test_value_is_looked_up_in_the_dataset_then_in_general_then_in_the_defaults(load: Load) -> None:
    dataset = only(load(data=f"[general]\nresolution = [256, 512]\nbatch_size = 2\n{IMAGES}batch_size = 3\n"))
    assert (dataset.batch_size, dataset.resolution, dataset.num_repeats) == (3, (256, 512), 1)


def test_general_does_not_leak_from_one_dataset_into_another(load: Load, project: Path) -> None:
    (project / "more").mkdir()
    data = f'{IMAGES}num_repeats = 5\n[[datasets]]\nimage_directory = "more"\n'
    assert [dataset.num_repeats for dataset in load(data=data).datasets] == [5, 1]


def test_one_number_means_a_square(load: Load) -> None:
    assert only(load(data=f"{IMAGES}resolution = 640\n")).resolution == (640, 640)


def test_listing_with_a_cache_folder(load: Load, project: Path) -> None:
    (project / "list.jsonl").touch()
    dataset = only(load(data=LISTING))
    assert dataset.image_directory is None
    assert (dataset.image_jsonl_file, dataset.cache_directory) == (Path("list.jsonl"), Path("cache"))


def test_brackets_in_the_cache_path_are_kept_as_they_are(load: Load) -> None:
    dataset = only(load(data=f'{IMAGES}cache_directory = "cache [512]/*?"\n'))
    assert dataset.cache_directory == Path("cache [512]/*?")


@pytest.mark.parametrize("choice", ["error", "skip", "empty", "stem"])
def test_every_choice_for_missing_captions_is_accepted(choice: str, load: Load) -> None:
    assert only(load(data=f'{IMAGES}missing_caption = "{choice}"\n')).missing_caption == choice


def test_tables_are_kept_as_they_were_written(load: Load) -> None:
    config = load(data=f"[general]\nbatch_size = 2\n{IMAGES}")
    assert config.dataset_tables == {"general": {"batch_size": 2}, "datasets": [{"image_directory": "images"}]}


def test_every_field_of_a_dataset_comes_from_a_key(load: Load, project: Path) -> None:
    assert len(fields(DatasetConfig)) == 30
    assert only(load(data=f"{IMAGES}recursive = true\nbucket_no_upscale = true\n")).recursive
    (project / "cache").mkdir()
    assert only(load(data='[[datasets]]\nprecached = true\ncache_directory = "cache"\n')).precached


# Values


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("resolution = [1, 2, 3]", "resolution: is [1, 2, 3], expected one whole number or [width, height]"),
        ("resolution = [512]", "resolution: is [512], expected one whole number or [width, height]"),
        ("resolution = []", "resolution: is [], expected one whole number or [width, height]"),
        ('resolution = "512"', "resolution: is '512', expected one whole number or [width, height]"),
        ("resolution = 512.0", "resolution: is 512.0, expected one whole number or [width, height]"),
        ("resolution = true", "resolution: is True, expected one whole number or [width, height]"),
        ("resolution = [true, 512]", "resolution: is [True, 512], expected one whole number or [width, height]"),
        ("resolution = [-5, 0]", "resolution: is [-5, 0], sides must be from 1 to 16384"),
        ("resolution = 0", "resolution: is 0, sides must be from 1 to 16384"),
        ("batch_size = -1", "batch_size: is -1, expected a whole number at least 1 and at most 4096"),
        ("batch_size = true", "batch_size: is True, expected a whole number at least 1 and at most 4096"),
        ("batch_size = 1.0", "batch_size: is 1.0, expected a whole number at least 1 and at most 4096"),
        ("num_repeats = 0", "num_repeats: is 0, expected a whole number at least 1 and at most 1000000"),
        ("num_repeats = false", "num_repeats: is False, expected a whole number at least 1 and at most 1000000"),
        ("enable_bucket = 1", "enable_bucket: is 1, expected true or false"),
        ('bucket_no_upscale = "yes"', "bucket_no_upscale: is 'yes', expected true or false"),
        ("recursive = 0", "recursive: is 0, expected true or false"),
        ("caption_extension = 3", "caption_extension: is 3, expected a text"),
        ('caption_extension = ""', "caption_extension: is '', expected a text"),
        ('missing_caption = "skp"', "missing_caption: is 'skp', expected one of error, skip, empty, stem"),
        ("cache_directory = 3", "cache_directory: is 3, expected a text"),
    ],
)
def test_wrong_value_of_a_dataset(line: str, message: str, problems: Problems) -> None:
    assert problems(data=f"{IMAGES}{line}\n") == [f"datasets[0].{message}"]


def test_wrong_value_in_general_is_reported_there_once(problems: Problems) -> None:
    assert problems(data=f"[general]\nbatch_size = true\n{IMAGES}") == [
        "general.batch_size: is True, expected a whole number at least 1 and at most 4096"
    ]


@pytest.mark.parametrize("where", ["general", "dataset"])
def test_caption_extension_needs_its_dot(where: str, problems: Problems) -> None:
    line = 'caption_extension = "txt"\n'
    data = f"[general]\n{line}{IMAGES}" if where == "general" else f"{IMAGES}{line}"
    assert problems(data=data) == ["datasets[0].caption_extension: is 'txt', expected a dot at the start, as in '.txt'"]


# Keys


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("captoin_extension", "unknown key. Did you mean 'caption_extension'?"),
        ("image_directry", "unknown key. Did you mean 'image_directory'?"),
        ("learning_rate", "unknown key."),
    ],
)
def test_unknown_key_of_a_dataset(key: str, message: str, problems: Problems) -> None:
    assert problems(data=f"{IMAGES}{key} = 1\n") == [f"datasets[0].{key}: {message}"]


def test_unknown_key_of_general(problems: Problems) -> None:
    assert problems(data=f"[general]\nresolutoin = 512\n{IMAGES}") == [
        "general.resolutoin: unknown key. Did you mean 'resolution'?"
    ]


@pytest.mark.parametrize("key", ["image_directory", "image_jsonl_file", "cache_directory", "mask_directory"])
def test_key_that_is_not_inherited_is_refused_in_general(key: str, problems: Problems) -> None:
    assert problems(data=f'[general]\n{key} = "images"\n{IMAGES}') == [
        f"general.{key}: belongs in [[datasets]], not in [general]; move it there"
    ]


@pytest.mark.parametrize(
    "key",
    [
        "video_directory",
        "video_jsonl_file",
        "target_frames",
        "frame_extraction",
        "frame_stride",
        "frame_sample",
        "max_frames",
        "source_fps",
    ],
)
def test_video_is_refused(key: str, problems: Problems) -> None:
    assert problems(data=f"{IMAGES}{key} = 1\n") == [
        f"datasets[0].{key}: is for videos, and this architecture trains on images only; remove the key"
    ]


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("control_directory", "control images are for editing models; this architecture takes none"),
        ("no_resize_control", "control images are for editing models; this architecture takes none"),
        ("control_resolution", "control images are for editing models; this architecture takes none"),
        ("flux_kontext_no_resize_control", "control images are for editing models; this architecture takes none"),
        ("qwen_image_edit_no_resize_control", "control images are for editing models; this architecture takes none"),
        ("qwen_image_edit_control_resolution", "control images are for editing models; this architecture takes none"),
        ("multiple_target", "layered targets are for other architectures"),
        ("mask_path", "it is a column of image_jsonl_file; for a folder of masks use mask_directory"),
    ],
)
def test_key_that_is_not_supported_is_refused_with_its_reason(key: str, reason: str, problems: Problems) -> None:
    assert problems(data=f"{IMAGES}{key} = 1\n") == [f"datasets[0].{key}: is not supported: {reason}; remove the key"]


@pytest.mark.parametrize("key", ["fp_latent_window_size", "fp_1f_clean_indices", "fp_1f_target_index", "fp_1f_no_post"])
def test_key_of_another_architecture_is_ignored_with_a_warning(key: str, warnings_of: Callable[..., list[str]]) -> None:
    assert warnings_of(data=f"{IMAGES}{key} = 1\n") == [
        f"datasets[0].{key}: is for another architecture and has no effect; remove the key"
    ]


# Sources


def test_dataset_without_a_source(problems: Problems) -> None:
    assert problems(data="[[datasets]]\nresolution = 512\n") == [
        "datasets[0]: has no images; set image_directory, image_jsonl_file, shards or dataset_name (or precached, for caches without them)"
    ]


def test_dataset_with_two_sources(problems: Problems) -> None:
    data = f'{IMAGES}image_jsonl_file = "list.jsonl"\ncache_directory = "cache"\n'
    assert problems(data=data) == ["datasets[0]: has both image_directory and image_jsonl_file; keep one"]


def test_listing_without_a_cache_folder(problems: Problems) -> None:
    assert problems(data='[[datasets]]\nimage_jsonl_file = "list.jsonl"\n') == [
        "datasets[0].cache_directory: is required with image_jsonl_file; name the folder for cache files"
    ]


@pytest.mark.parametrize("data", ["", "[general]\nbatch_size = 2\n", "datasets = []\n"])
def test_no_dataset_at_all(data: str, problems: Problems) -> None:
    # The last case is written above all tables, where a bare key belongs to the top.
    changes = {"top": data, "data": ""} if data.startswith("datasets") else {"data": data}
    assert problems(**changes) == [
        "datasets: no data set given; add [[datasets]] with image_directory, image_jsonl_file, shards or dataset_name"
    ]


def test_single_brackets_are_explained(problems: Problems) -> None:
    found = problems(data='[datasets]\nimage_directory = "images"\n')
    assert found == ["datasets: is a table; write [[datasets]] with two brackets"]


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ("general = 3", "general: is 3, expected a table"),
        ('datasets = ["images"]', "datasets[0]: is 'images', expected a table"),
    ],
)
def test_table_that_is_none(top: str, message: str, problems: Problems) -> None:
    data = "" if top.startswith("datasets") else IMAGES
    assert problems(top=top, data=data)[0] == message


# Cache folders


@pytest.mark.parametrize(
    "second",
    [
        '[[datasets]]\nimage_directory = "images"\n',
        '[[datasets]]\nimage_directory = "./images/"\n',
        '[[datasets]]\nimage_directory = "images/../images"\n',
        '[[datasets]]\nimage_jsonl_file = "list.jsonl"\ncache_directory = "images"\n',
        '[[datasets]]\nimage_directory = "link"\n',
    ],
)
def test_two_datasets_may_not_share_a_cache_folder(second: str, problems: Problems, project: Path) -> None:
    (project / "list.jsonl").touch()
    (project / "link").symlink_to(project / "images")
    assert problems(data=IMAGES + second) == [
        f"datasets[1].cache_directory: is {project / 'images'}, which datasets[0] uses too; give each data set its own"
    ]


def test_one_folder_twice_with_a_cache_folder_each(load: Load) -> None:
    config = load(data=f'{IMAGES}cache_directory = "a"\n{IMAGES}cache_directory = "b"\n')
    assert [str(dataset.cache_directory) for dataset in config.datasets] == ["a", "b"]


# Resolutions


@pytest.mark.parametrize(
    ("resolution", "size", "proposal"),
    [
        ("[500, 300]", "500x300", "width 496 or 512, height 288 or 304"),
        ("1000", "1000x1000", "width 992 or 1008, height 992 or 1008"),
    ],
)
def test_single_bucket_must_be_a_multiple_of_the_step(
    resolution: str, size: str, proposal: str, problems: Problems
) -> None:
    assert problems(data=f"{IMAGES}enable_bucket = false\nresolution = {resolution}\n") == [
        f"datasets[0].resolution: is {size}; without buckets both sides must be multiples of 16: {proposal}"
    ]


def test_proposed_sides_are_never_zero_nor_said_twice_nor_given_for_a_good_side(problems: Problems) -> None:
    (message,) = problems(data=f"{IMAGES}enable_bucket = false\nresolution = [10, 512]\n")
    assert "width 0" not in message
    assert "16 or 16" not in message
    assert "528" not in message


def test_uneven_resolution_is_an_area_when_buckets_are_on(load: Load) -> None:
    assert only(load(data=f"{IMAGES}resolution = [500, 300]\n")).resolution == (500, 300)


@pytest.mark.parametrize("resolution", ["16", "31", "[1, 1000]"])
def test_resolution_without_a_single_bucket(resolution: str, problems: Problems) -> None:
    (message,) = problems(data=f"{IMAGES}resolution = {resolution}\n")
    size = {"16": "16x16", "31": "31x31", "[1, 1000]": "1x1000"}[resolution]
    assert message.startswith(f"datasets[0].resolution: is {size}")
    assert "32x32" in message and "enable_bucket = false" in message


def test_smallest_resolution_with_a_bucket_is_accepted(load: Load) -> None:
    assert only(load(data=f"{IMAGES}resolution = 32\n")).resolution == (32, 32)


@pytest.mark.parametrize(
    ("data", "key", "reason"),
    [
        (f"{IMAGES}enable_bucket = false\nbucket_no_upscale = true", "datasets[0].bucket_no_upscale", "enable_bucket"),
        (f"[general]\nenable_bucket = false\nbucket_no_upscale = true\n{IMAGES}", "general.bucket_no_upscale", "enable_bucket"),
        (f'{IMAGES}random_crop = true\nresize = "squash"', "datasets[0].random_crop", '"squash", which does not crop'),
        (f'[general]\nrandom_crop = true\nresize = "squash"\n{IMAGES}', "general.random_crop", '"squash", which does not crop'),
        (f"[general]\nnum_repeats = 2\n{IMAGES}num_repeats = 3", "general.num_repeats", "every data set has its own"),
        (f"{LISTING}recursive = true", "datasets[0].recursive", "image_jsonl_file"),
        (f'{LISTING}caption_extension = ".caption"', "datasets[0].caption_extension", "image_jsonl_file"),
    ],
)  # fmt: skip
def test_a_setting_of_items_without_effect_says_so(
    data: str, key: str, reason: str, warnings_of: Callable[..., list[str]], project: Path
) -> None:
    (project / "list.jsonl").touch()
    (message,) = warnings_of(data=f"{data}\n")
    assert message.startswith(f"{key}: has no effect because ") and reason in message


@pytest.mark.parametrize(
    ("general", "idle", "acts"),
    [
        ("random_crop = true", 'resize = "squash"', 'resize = "crop"'),
        ("bucket_no_upscale = true", "enable_bucket = false", "enable_bucket = true"),
        ("keep_tokens = 2", "shuffle_caption = false", "shuffle_caption = true"),
        ('caption_separator = ";"', "shuffle_caption = false", "caption_tag_dropout_rate = 0.1"),
    ],
)
def test_a_setting_of_all_items_is_idle_only_where_no_data_set_uses_it(
    general: str, idle: str, acts: str, load: Load, project: Path
) -> None:
    (project / "more").mkdir()
    data = f"[general]\n{general}\n{IMAGES}{idle}\n[[datasets]]\nimage_directory = 'more'\n"
    for last, count in ((acts, 0), (idle, 1)):
        config = load(data=f"{data}{last}\n", cache="text_variants = 2\nlatent_variants = 2")
        keys = [found.key for found in config.findings if found.level == "warning"]
        assert keys.count(f"general.{general.partition(' ')[0]}") == count


def test_resize_is_a_choice(load: Load, problems: Problems) -> None:
    assert only(load(data=IMAGES)).resize == "crop"
    assert only(load(data=f'{IMAGES}resize = "squash"\n')).resize == "squash"
    (message,) = problems(data=f'{IMAGES}resize = "stretch"\n')
    assert message == "datasets[0].resize: is 'stretch', expected one of crop, squash"


# Masks


@pytest.mark.parametrize(
    ("keys", "source"),
    [
        ("", "none"),
        ('mask_directory = "masks"', "file"),
        ('mask_directory = "masks"\nmask_source = "smpl"', "smpl"),
        ("alpha_mask = true", "alpha"),
        ('alpha_mask = true\nmask_source = "alpha"', "alpha"),
        ('mask_source = "product"', "product"),
        ('mask_source = "imported"', "imported"),
    ],
)
def test_mask_source_follows_from_what_is_given(keys: str, source: str, load: Load, project: Path) -> None:
    (project / "masks").mkdir()
    dataset = only(load(data=f"{IMAGES}{keys}\n"))
    assert dataset.mask_source == source
    assert dataset.mask_directory == (Path("masks") if "mask_directory" in keys else None)


def test_listing_takes_masks_from_its_lines_unless_it_says_otherwise(load: Load, project: Path) -> None:
    (project / "list.jsonl").touch()
    assert only(load(data=LISTING)).mask_source == "file"
    assert only(load(data=f'[general]\nmask_source = "product"\n{LISTING}')).mask_source == "product"
    assert only(load(data=f'{LISTING}mask_source = "none"\n')).mask_source == "none"


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            'mask_source = "file"',
            'mask_directory: is missing, but mask_source is "file"; name the folder of the mask files',
        ),
        (
            'mask_source = "smpl"',
            'mask_directory: is missing, but mask_source is "smpl"; name the folder of the mask files',
        ),
        (
            'mask_source = "product"\nmask_directory = "images2"',
            'mask_directory: is set, but mask_source is "product", which reads no mask files; keep one',
        ),
        ('alpha_mask = true\nmask_directory = "images2"', "alpha_mask: is true, but mask_directory is set; keep one"),
        ('alpha_mask = true\nmask_source = "product"', 'alpha_mask: is true, but mask_source is "product"; keep one'),
        (
            'alpha_mask = false\nmask_source = "alpha"',
            'alpha_mask: is false, but mask_source is "alpha"; write mask_source = "none"',
        ),
        (
            'mask_directory = "images"',
            "mask_directory: is the same as image_directory; put the masks into a separate folder",
        ),
        ('mask_directory = "no"', "mask_directory: no: no such folder"),
        ('mask_source = "red"', "mask_source: is 'red', expected one of none, file, alpha, product, smpl, imported"),
    ],
)
def test_masks_that_contradict_each_other_are_refused(
    keys: str, problem: str, problems: Problems, project: Path
) -> None:
    (project / "images2").mkdir()
    assert problems(data=f"{IMAGES}{keys}\n") == [f"datasets[0].{problem}"]


def test_listing_has_no_mask_folder(problems: Problems, project: Path) -> None:
    (project / "list.jsonl").touch()
    assert problems(data=f'{LISTING}mask_directory = "images"\n') == [
        "datasets[0].mask_directory: is for image_directory; in image_jsonl_file each line names its mask as mask_path"
    ]


# Transparency


@pytest.mark.parametrize(
    ("keys", "colour"),
    [
        ("", "#ffffff"),
        ('alpha_background = "Grey"', "#808080"),
        ('alpha_background = "#0aF"', "#00aaff"),
        ('alpha_background = "hsl(0, 100%, 50%)"', "#ff0000"),
        ("alpha_mask = true", "kept"),
        ('alpha_mask = true\nalpha_background = "black"', "#000000"),
    ],
)
def test_background_is_a_colour_and_alpha_that_is_the_mask_keeps_what_lies_below_it(
    keys: str, colour: str, load: Load
) -> None:
    assert only(load(data=f"{IMAGES}{keys}\n")).alpha_background == colour


@pytest.mark.parametrize("value", ['"whit"', '"#12345"', '"#ffffff80"', "255", "[0, 0, 0]", '""'])
def test_what_is_no_opaque_colour_is_refused(value: str, problems: Problems) -> None:
    (problem,) = problems(data=f"[general]\nalpha_background = {value}\n{IMAGES}")
    assert problem.startswith("general.alpha_background: is ") and "#rrggbb" in problem


def test_output_and_masks_of_every_dataset_are_apart_from_the_images_of_all(load: Load, project: Path) -> None:
    for name in ("more", "masks"):
        (project / name).mkdir()
    data = f'{IMAGES}[[datasets]]\nimage_directory = "more"\nmask_directory = "masks"\n'
    assert [dataset.apart for dataset in load(data=data).datasets] == [(Path("out"), Path("masks"))] * 2
    # What one data set takes as masks another may train on.
    data = f'{IMAGES}[[datasets]]\nimage_directory = "more"\nmask_directory = "images"\n'
    assert [dataset.apart for dataset in load(data=data).datasets] == [(Path("out"),)] * 2


# Captions


@pytest.mark.parametrize("name", ["object_relations", "package.module:function"])
def test_transform_has_a_name_or_is_a_function(name: str, load: Load) -> None:
    assert only(load(data=f'[general]\ncaption_transform = "{name}"\n{IMAGES}')).caption_transform == name


def test_columns_of_captions_belong_to_a_listing(load: Load, problems: Problems, project: Path) -> None:
    (project / "list.jsonl").touch()
    keys = 'caption_columns = ["a", "b"]\ncaption_transform = "imagenet"\n'
    dataset = only(load(data=LISTING + keys))
    assert (dataset.caption_columns, dataset.caption_transform) == (("a", "b"), "imagenet")
    assert problems(data=IMAGES + keys) == [
        "datasets[0].caption_columns: names columns of image_jsonl_file, which is not set; remove the key",
        'datasets[0].caption_transform: is "imagenet", which reads columns of image_jsonl_file; set image_jsonl_file, or remove the key',
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("caption_columns = []", "caption_columns: is [], expected a list of different names"),
        ('caption_columns = "a"', "caption_columns: is 'a', expected a list of different names"),
        ('caption_columns = ["a", "a"]', "caption_columns: is ['a', 'a'], expected a list of different names"),
        (
            'caption_transform = "imagnet"',
            "caption_transform: is 'imagnet', expected one of object_relations, imagenet, or package.module:function",
        ),
    ],
)
def test_captions_of_another_form_are_refused(line: str, message: str, problems: Problems) -> None:
    assert problems(data=f"{IMAGES}{line}\n") == [f"datasets[0].{message}"]


# Buckets


def test_buckets_take_a_step_and_sides(load: Load) -> None:
    data = IMAGES + "bucket_reso_steps = 64\nmin_bucket_reso = 256\nmax_bucket_reso = 1024\n"
    dataset = only(load(data=data))
    assert (dataset.bucket_step, dataset.bucket_sides) == (64, (256, 1024))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("bucket_reso_steps = 20", "bucket_reso_steps: is 20, expected a multiple of 8: 16 or 24"),
        ("min_bucket_reso = 1024", "min_bucket_reso: is 1024, above the resolution 512x512"),
        ("max_bucket_reso = 256", "max_bucket_reso: is 256, below the resolution 512x512"),
        ("min_bucket_reso = 512\nmax_bucket_reso = 512\nresolution = 256", "min_bucket_reso: is 512, above the resolution 256x256"),
    ],
)  # fmt: skip
def test_buckets_that_cannot_be(lines: str, message: str, problems: Problems) -> None:
    assert problems(data=f"{IMAGES}{lines}\n") == [f"datasets[0].{message}"]


def test_sides_between_multiples_of_the_step_are_rounded_and_said(load: Load) -> None:
    config = load(data=IMAGES + "min_bucket_reso = 250\nmax_bucket_reso = 1000\n")
    assert only(config).bucket_sides == (240, 1008)
    assert [(found.code, found.key) for found in config.findings] == [
        ("V51", "datasets[0].min_bucket_reso"), ("V51", "datasets[0].max_bucket_reso"),
    ]  # fmt: skip


def test_bucket_settings_without_buckets(load: Load) -> None:
    config = load(data=IMAGES + "enable_bucket = false\nbucket_reso_steps = 64\nmin_bucket_reso = 256\n")
    assert {found.code for found in config.findings} == {"V54"} and only(config).bucket_step is None
