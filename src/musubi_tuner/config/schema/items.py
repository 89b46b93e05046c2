"""[general] and [[datasets]]: all settings of data sets. Keys and meanings are those of the data set file of musubi-tuner."""

import re
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from musubi_tuner.config.fields import MOST, Section, param
from musubi_tuner.config.when import is_not, on

MissingCaption = Literal["error", "skip", "empty", "stem"]
MaskSource = Literal["none", "file", "alpha", "product", "smpl", "imported"]
"""Where the loss mask of an image comes from; see data/masks.py."""
LONGEST_SIDE = 16384
"""Pixels of the side of a picture that is trained."""
Interpolation = Literal["auto", "area", "lanczos", "bicubic", "bilinear", "nearest"]
Resize = Literal["crop", "squash"]
"""How an image is fitted to its bucket: cropped, or squashed to the bucket's proportions."""
CAPTION_TRANSFORMS = ("object_relations", "imagenet")
"""The built-in transforms; see data/captions.py."""


_BUCKETS = on("general.enable_bucket")
_SHARDS = on("datasets.shards")
_TABLE = on("datasets.dataset_name")
_STREAM = _SHARDS | _TABLE


class GeneralSection(Section):
    """Settings of all data sets; a data set overrides them with its own keys."""

    tab: ClassVar[str] = "dataset"

    resolution: int | list[int] | None = param(
        None,
        "Area of a picture, as the side of a square or [width, height]; without buckets, its exact size.",
        unit="pixels",
    )
    enable_bucket: bool | None = param(None, "Sort pictures by aspect ratio into buckets of about the same area.")
    bucket_no_upscale: bool | None = param(
        None, "Never enlarge a picture: a small one keeps its size, rounded down to the bucket step.", when=_BUCKETS
    )
    bucket_reso_steps: int | None = param(
        None,
        "Sides of buckets are multiples of this; absent = what the model requires.",
        ge=1,
        le=1024,
        unit="pixels",
        tab="adapter",
        when=_BUCKETS,
    )
    min_bucket_reso: int | None = param(
        None,
        "Shortest side of a bucket; rounded down to a multiple of the bucket step.",
        ge=1,
        le=LONGEST_SIDE,
        unit="pixels",
        tab="adapter",
        when=_BUCKETS,
    )
    max_bucket_reso: int | None = param(
        None,
        "Longest side of a bucket; rounded up to a multiple of the bucket step.",
        ge=1,
        le=LONGEST_SIDE,
        unit="pixels",
        tab="adapter",
        when=_BUCKETS,
    )
    resize: Resize | None = param(
        None, "How a picture is fitted to its bucket: crop it, or squash it to the bucket's aspect ratio.", expert=True
    )
    resize_interpolation: Interpolation | None = param(
        None, "How pixels are computed when a picture is resized: auto = area averaging to reduce, Lanczos to enlarge.", expert=True
    )  # fmt: skip
    caption_extension: str | None = param(None, "Extension of caption files, with the dot.", min_length=1)
    batch_size: int | None = param(None, "Images per micro-batch and process.", unit="images", ge=1, le=4096)
    num_repeats: int | None = param(None, "How often an image is seen per epoch.", ge=1, le=1_000_000)
    missing_caption: MissingCaption | None = param(
        None,
        "For images without a caption: stop with an error, skip them, or use an empty caption or the file name (stem).",
    )
    recursive: bool | None = param(None, "Include pictures in sub-folders.")
    mask_source: MaskSource | None = param(
        None,
        "Where loss masks come from: mask files, the alpha channel, the difference from the corners' colour (product photos), SMPL renderings, or imported caches.",
    )
    alpha_mask: bool | None = param(None, 'Another spelling of mask_source = "alpha".', expert=True)
    alpha_background: str | None = param(
        None, 'Colour below transparent pixels: a name such as "white", or "#rrggbb".', neutral=None
    )
    caption_columns: list[str] | None = param(
        None,
        "Columns of image_jsonl_file with the captions of an image; one is chosen each time.",
        min_length=1,
    )
    caption_transform: str | None = param(
        None,
        "Transform applied to captions: object_relations, imagenet, or module:function of a module beside the run file or installed.",
    )

    class_tokens: str | None = param(None, "Caption for images without one; overrides missing_caption.", min_length=1)
    caption_prefix: str | None = param(None, "Text added before every caption, separated by a space.", min_length=1)
    caption_suffix: str | None = param(None, "Text added after every caption, separated by a space.", min_length=1)
    trigger_word: str | None = param(
        None, "Replaces [trigger] in captions; captions without [trigger] get it at the front.", min_length=1
    )
    caption_separator: str | None = param(
        None, "Separator between the tags of a caption; tags are joined with it and a space.", min_length=1
    )
    shuffle_caption: bool | None = param(None, "Shuffle the tags of a caption; needs cache.text_variants.")
    keep_tokens: int | None = param(
        None, "Number of leading tags that are never shuffled or dropped.", ge=0, le=1000, unit="tags"
    )
    keep_tokens_separator: str | None = param(
        None,
        "Marker: tags before the first and after the second are kept in place; captions that have it ignore keep_tokens.",
        min_length=1,
    )
    secondary_separator: str | None = param(
        None,
        "Tags joined by it are shuffled and dropped as one; afterwards it is replaced by caption_separator.",
        min_length=1,
    )
    enable_wildcard: bool | None = param(
        None,
        "Replace {a|b|c} by a random choice and use one random line of a multi-line caption; {{ and }} are literal braces; needs cache.text_variants.",
    )
    caption_tag_dropout_rate: float | None = param(
        None, "Probability of dropping each tag; needs cache.text_variants.", ge=0, le=1, step=0.01
    )
    caption_dropout_rate: float | None = param(
        None,
        "Probability of training a sample without its caption; absent = the rate of the run, if the family has one.",
        ge=0,
        le=1,
        step=0.01,
    )
    caption_dropout_every_n_epochs: int | None = param(
        None, "Train every n-th epoch without captions; 0 = off.", ge=0, le=MOST, unit="epochs"
    )
    token_warmup_step: float | None = param(
        None,
        "Captions grow from token_warmup_min tags to all of them during so many updates (below 1: a share of the run); needs "
        "cache.text_variants, and caches twice as many.",
        ge=0,
        le=MOST,
        unit="updates",
    )
    token_warmup_min: int | None = param(
        None, "Tags at the beginning of token_warmup_step, beside those that are kept; absent = 1.", ge=0, le=1000, unit="tags",
        when=on("general.token_warmup_step"),
    )  # fmt: skip
    flip_aug: bool | None = param(
        None, "Also train on mirrored pictures: both versions are cached, and one is chosen each time."
    )
    random_crop: bool | None = param(
        None, "Crop at a random position instead of the centre; needs cache.latent_variants."
    )
    color_aug: bool | None = param(
        None, "Change hue or gamma a little in half of the versions; needs cache.latent_variants."
    )
    is_reg: bool | None = param(
        None,
        "Regularisation images: their loss is multiplied by train.prior_loss_weight, and they are repeated until they match the number of other images.",
    )

    @field_validator("resolution", mode="before")
    @classmethod
    def _sides(cls, value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool)
        sides = [value] if whole else value
        listed = isinstance(sides, list) and all(isinstance(s, int) and not isinstance(s, bool) for s in sides)
        if not listed or len(sides) not in (1, 2) or (isinstance(value, list) and len(value) != 2):
            raise ValueError("expected one whole number or [width, height]")
        if not 1 <= min(sides) <= max(sides) <= LONGEST_SIDE:
            raise ValueError(f"sides must be from 1 to {LONGEST_SIDE}")
        return value

    @field_validator("alpha_background", mode="before")
    @classmethod
    def _colour(cls, value: Any) -> Any:
        if hex_colour(value) is None:
            raise ValueError('expected an opaque colour: a name such as "white", or "#rrggbb"')
        return value

    @field_validator("caption_columns", mode="before")
    @classmethod
    def _columns(cls, value: Any) -> Any:
        texts = isinstance(value, list) and all(isinstance(name, str) and name for name in value)
        if not texts or not value or len(set(value)) != len(value):
            raise ValueError("expected a list of different names")
        return value

    @field_validator("caption_transform", mode="before")
    @classmethod
    def _transform(cls, value: Any) -> Any:
        named = value in CAPTION_TRANSFORMS if isinstance(value, str) else False
        if not named and not (isinstance(value, str) and re.fullmatch(r"[\w.]+:\w+", value)):
            raise ValueError(f"expected one of {', '.join(CAPTION_TRANSFORMS)}, or package.module:function")
        return value


class DatasetSection(GeneralSection):
    """One source of pictures with its captions and caches."""

    name: str | None = param(
        None, "Name used in messages and [[steps]]; absent = datasets[0], datasets[1] and so on.",
        pattern=r"^[^\x00-\x1f\x7f]+$", accepts="at least one letter, without line ends and control characters"
    )  # fmt: skip
    image_directory: str | None = param(None, "Folder of pictures with caption files next to them.", path=True)
    image_jsonl_file: str | None = param(
        None,
        'File with one {"image_path": ..., "caption": ...} per line, instead of a folder.',
        path=True,
    )
    captions_file: str | None = param(
        None,
        "File with one picture and its caption per line, a tab between them, instead of caption files; blank lines and lines with # are "
        "skipped.",
        path=True,
    )
    cache_directory: str | None = param(None, "Folder for cache files; absent = image_directory.", path=True)
    precached: bool | None = param(
        None,
        "There are no pictures: items are those of the cache files in cache_directory, which are taken as they are. Needs no encoders, except for "
        "sample prompts.",
    )
    mask_directory: str | None = param(
        None, "Folder of masks with the names of the pictures.", path=True,
        when=is_not("datasets.mask_source", "alpha", "none", "imported", "product"),
    )  # fmt: skip
    shards: str | list[str] | None = param(
        None,
        "WebDataset shards instead of a folder: tar files, http addresses or hf://datasets/owner/name/*.tar; {000..010} counts. With "
        "cache_directory they are cached one by one, without it their pictures are trained as they come.",
    )
    shard_image_key: str | None = param(
        None, "Ending of the pictures in a shard; absent = the first that is a picture's.", when=_SHARDS
    )
    shard_label_key: str = param("json", "Ending of the captions in a shard.", when=_SHARDS)
    shard_caption_key: str = param("prompt", "Field with the caption, where that ending is json.", when=_SHARDS)
    dataset_name: str | None = param(
        None,
        "Data set of Hugging Face instead of a folder: a folder (arrow, parquet or pictures) or a hub id, which is read as a stream. Needs the package datasets.",
    )
    dataset_config_name: str | None = param(None, "Configuration of dataset_name, if it has several.", when=_TABLE)
    dataset_split: str = param("train", "Split of dataset_name.", min_length=1, when=_TABLE)
    image_column: str = param("image", "Column of dataset_name with the pictures.", min_length=1, when=_TABLE)
    caption_column: str = param(
        "text",
        "Column of dataset_name with the captions; the first one is used where it holds a list.",
        min_length=1,
        when=_TABLE,
    )
    shard_samples: int = param(
        1000, "Pictures that a shard is taken to hold.", ge=1, le=10**9, unit="pictures", when=_STREAM
    )
    epoch_samples: int | None = param(
        None,
        "Pictures that count as an epoch; absent = shards times shard_samples.",
        ge=1,
        le=10**12,
        unit="pictures",
        when=_STREAM,
    )
    shard_retries: int = param(
        5, "Times that a shard is opened again after a connection broke.", ge=0, le=1000, when=_STREAM, expert=True
    )
    shard_retry_delay: float = param(
        5.0,
        "Wait before the first of them; each further one is twice as long.",
        ge=0,
        le=3600,
        unit="seconds",
        when=_STREAM,
        expert=True,
    )
    experts: dict[str, Any] | Literal[False] | None = param(
        None, "Keys of [experts] that differ for these pictures; false = no teachers.", expert=True
    )

    @field_validator("experts", mode="before")
    @classmethod
    def _teachers(cls, value: Any) -> Any:
        if value is not False and not isinstance(value, dict):
            raise ValueError("expected false, for no teachers, or a table of keys that differ from [experts]")
        return value


def hex_colour(value: Any) -> str | None:
    """A colour, given by name or code, as "#rrggbb"; None if it is not a colour, or not opaque."""
    from PIL import ImageColor

    try:
        red, green, blue, *alpha = ImageColor.getrgb(value)
    except (ValueError, TypeError, AttributeError):
        return None
    return None if alpha and alpha != [255] else f"#{red:02x}{green:02x}{blue:02x}"


OWN_KEYS = tuple(name for name in DatasetSection.model_fields if name not in GeneralSection.model_fields)
"""Keys of [[datasets]] that [general] cannot have."""
