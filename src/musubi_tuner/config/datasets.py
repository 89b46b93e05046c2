"""The data set file of musubi-tuner: `[general]` and `[[datasets]]`, alone or inside a run file. Torch-free.

Values are looked up in the data set, then in [general], then in the family's defaults. Source keys,
`cache_directory` and `experts` are never inherited.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from musubi_tuner.config.captions import CaptionSettings, caption_settings
from musubi_tuner.config.diagnostics import Diagnostic, did_you_mean, error, info, warning
from musubi_tuner.config.fields import Parameter
from musubi_tuner.config.foreign import FOREIGN
from musubi_tuner.config.schema.items import (
    OWN_KEYS,
    DatasetSection,
    GeneralSection,
    MaskSource,
    MissingCaption,
    Resize,
    hex_colour,
)
from musubi_tuner.config.streams import StreamSettings
from musubi_tuner.config.views import ViewSettings
from musubi_tuner.config.when import describe, is_on
from musubi_tuner.errors import keep_secret

KEPT = "kept"
"""Instead of a background: pixels keep their stored colour, however transparent they are."""
WHITE = "#ffffff"
SHARED_KEYS = tuple(GeneralSection.model_fields)
"""Keys of [general]."""
NO_TEACHERS = {"enable_lune": False, "enable_sol": False}
"""What ``experts = false`` stands for."""
_IGNORED = {"fp_latent_window_size", "fp_1f_clean_indices", "fp_1f_target_index", "fp_1f_no_post"}
_REFUSED = {
    "control_directory": "control images are for editing models; this architecture takes none",
    "multiple_target": "layered targets are for other architectures",
    "no_resize_control": "control images are for editing models; this architecture takes none",
    "control_resolution": "control images are for editing models; this architecture takes none",
    "flux_kontext_no_resize_control": "control images are for editing models; this architecture takes none",
    "qwen_image_edit_no_resize_control": "control images are for editing models; this architecture takes none",
    "qwen_image_edit_control_resolution": "control images are for editing models; this architecture takes none",
    "mask_path": "it is a column of image_jsonl_file; for a folder of masks use mask_directory",
}
"""Keys of musubi-tuner for other architectures."""
_OF_PICTURES = (
    "captions_file",
    "mask_directory",
    "caption_columns",
    "caption_transform",
    "flip_aug",
    "random_crop",
    "color_aug",
)
"""Keys that act on pictures and caption files."""
_NOT_OF_A_STREAM = ("precached", "captions_file", "mask_directory", "mask_source", "alpha_mask", "recursive", "caption_columns",
                    "caption_transform", "caption_extension")  # fmt: skip
"""Keys that act on files beside pictures."""
_ACTS_ON_SHARDS = ("mask_source", "alpha_mask", "caption_columns", "caption_transform")
"""Those of them that [general] may have, and that would act on the pictures of a shard."""
_NOT_OF_LIVE_PICTURES = ("experts", "num_repeats", "is_reg")
"""Keys that act on what is cached."""
_VIDEO = {
    "video_directory",
    "video_jsonl_file",
    "target_frames",
    "frame_extraction",
    "frame_stride",
    "frame_sample",
    "max_frames",
    "source_fps",
}


@dataclass(frozen=True)
class DatasetConfig:
    """One resolved `[[datasets]]` entry.

    Attributes:
        name: as given, or "datasets[0]"; used in messages and steps.
        image_directory, image_jsonl_file: one is set, or ``stream``, or ``precached``.
        captions_file: list of the captions of a folder; None = a caption file beside each image.
        cache_directory: where cache files go; the image directory if not given.
        resolution: (width, height) in pixels; the area when buckets are on.
        caption_extension: with its dot.
        batch_size: images per micro-batch and process.
        interpolation: filter of the resize; None = by whether it reduces or enlarges. resize: how an image is fitted to its bucket.
        mask_source: where loss masks come from. mask_directory: mask files named like the images; set with an image_directory
            whose source is file or smpl.
        caption_columns: JSONL columns with the captions of an image; empty = caption. caption_transform: a name of
            `CAPTION_TRANSFORMS`, or package.module:function.
        experts: keys that replace those of [experts] for its images; see `RunConfig.experts_of`.
        alpha_background: colour (#rrggbb) that transparent pixels are laid over; `KEPT` = they keep theirs, as they do where the
            alpha channel is the loss mask, unless a colour is given.
        bucket_step: step of the sides of its buckets; None = the family's. bucket_sides: shortest and longest side; None = any.
        text: how its captions are made. views: which versions of its pictures are trained. is_reg: regularisation images.
        stream: shards that its pictures come from, or a data set of Hugging Face, instead of a folder or list.
        precached: its items are those of its cache files; there are no pictures.
        beside: folder of the run file, in which functions of the user may lie.
        apart: folders that may lie below the image directory but hold none of its images: output_dir, masks of other data sets.
    """

    name: str
    image_directory: Path | None
    image_jsonl_file: Path | None
    cache_directory: Path
    resolution: tuple[int, int]
    enable_bucket: bool
    bucket_no_upscale: bool
    caption_extension: str
    batch_size: int
    num_repeats: int
    missing_caption: MissingCaption
    recursive: bool
    captions_file: Path | None = None
    resize: Resize = "crop"
    interpolation: str | None = None
    mask_source: MaskSource = "none"
    mask_directory: Path | None = None
    caption_columns: tuple[str, ...] = ()
    caption_transform: str | None = None
    experts: Mapping[str, Any] = field(default_factory=dict)
    alpha_background: str = WHITE
    apart: tuple[Path, ...] = ()
    beside: Path = field(default=Path(), compare=False)
    text: CaptionSettings = field(default_factory=CaptionSettings)
    stream: StreamSettings | None = None
    precached: bool = False
    is_reg: bool = False
    views: ViewSettings = field(default_factory=ViewSettings)
    bucket_step: int | None = None
    bucket_sides: tuple[int | None, int | None] = (None, None)


def _check_table(table: Any, where: str, section: type[GeneralSection], problems: list[Diagnostic]) -> dict[str, Any]:
    """Collect the usable values of one table; everything else becomes a diagnostic."""
    if not isinstance(table, dict):
        problems.append(error("U02", where, f"is {table!r}, expected a table"))
        return {}
    values: dict[str, Any] = {}
    for key, value in table.items():
        place = f"{where}.{key}"
        if key in section.model_fields:
            values |= {key: value} if value is not None else {}  # null of a JSON document
        elif key in OWN_KEYS:
            problems.append(error("U01", place, "belongs in [[datasets]], not in [general]; move it there"))
        elif key in _IGNORED:
            problems.append(warning("NA01", place, "is for another architecture and has no effect; remove the key"))
        elif key in _VIDEO:
            problems.append(
                error("NA01", place, "is for videos, and this architecture trains on images only; remove the key")
            )
        elif key in _REFUSED and is_on(value):
            problems.append(error("NA01", place, f"is not supported: {_REFUSED[key]}; remove the key"))
        elif key not in _REFUSED:
            _other_name(key, value, place, section, values, table, problems)
    try:
        section.model_validate(values)
    except ValidationError as wrong:
        own = {name: Parameter(where, name, field, section) for name, field in section.model_fields.items()}
        for item in wrong.errors(include_url=False):
            name = str(item["loc"][0])
            if name in values:
                problems.append(_explain(own[name], values.pop(name), item))
    return values


def _explain(parameter: Parameter, value: Any, item: Any) -> Diagnostic:
    """What is wrong with a value, as a message."""
    said = item.get("ctx", {}).get("error")
    text = str(said) if said is not None else f"expected {parameter.expected}"
    return error("U04" if parameter.choices else "U02", parameter.key, f"is {value!r}, {text}")


def _other_name(
    key: str, value: Any, place: str, section: type[GeneralSection], values: dict[str, Any], table: dict[str, Any],
    problems: list[Diagnostic],
) -> None:  # fmt: skip
    """A key that is not ours: a name of another trainer, or unknown."""
    entry = FOREIGN.get(key)
    if entry is None:
        problems.append(error("U01", place, f"unknown key.{did_you_mean(key, section.model_fields)}"))
        return
    owner, _, name = entry.key.partition(".")  # entries for data sets convert nothing
    if entry.secret:
        keep_secret(value)
    if entry.refused and not entry.is_neutral(value):
        seen = "***" if entry.secret else describe(value)
        problems.append(error("NA01", place, f"is {seen}, which {entry.refused}"))
    elif owner in ("general", "datasets") and name in section.model_fields:
        if name in table or name in values:
            problems.append(error("U05", place, f"is another name of {name}, which is set too; keep one"))
            return
        values[name] = value
        problems.append(info("NA04", place, f"is read as {name} = {describe(value)}"))
    elif entry.key:
        problems.append(error("U01", place, f"is a setting of the run: write {entry.key} outside the data sets"))
    else:
        problems.append(info("NA04", place, f"is left out: {entry.harmless or 'it is off'}"))


def resolve_datasets(
    tables: Mapping[str, Any],
    defaults: Mapping[str, Any],
    step: int,
    locate: Any,
    output_dir: Path | None = None,
    finest: int | None = None,
) -> tuple[list[DatasetConfig], list[Diagnostic]]:
    """Check and resolve the two tables.

    Args:
        tables: may hold ``general`` and ``datasets``.
        defaults: the family's defaults for the shared keys.
        step: sides of a single bucket must be multiples of this many pixels.
        locate: turns a path of the file into a `Path`.
        output_dir: where the run writes, if that is known.
        finest: bucket steps must be multiples of this; None = ``step``.

    Returns:
        The usable data sets and all findings.
    """
    problems: list[Diagnostic] = []
    general = _check_table(tables.get("general", {}), "general", GeneralSection, problems)
    once, entries = set(problems), tables.get("datasets", [])
    if isinstance(entries, dict):
        problems.append(error("U02", "datasets", "is a table; write [[datasets]] with two brackets"))
        entries = []
    elif not isinstance(entries, list) or not entries:
        problems.append(
            error(
                "U07",
                "datasets",
                "no data set given; add [[datasets]] with image_directory, image_jsonl_file, shards or dataset_name",
            )
        )
        entries = []
    datasets: list[DatasetConfig] = []
    for index, entry in enumerate(entries):
        where = f"datasets[{index}]"
        own = _check_table(entry, where, DatasetSection, problems)
        values = {**defaults, **general, **own}
        dataset = _resolve_one(where, own, values, step, finest or step, locate, problems)
        if dataset:
            datasets.append(dataset)
    # What does nothing in one data set may act in another.
    idle = Counter(found for found in problems if found.level == "warning" and found.key.startswith("general."))
    problems = [found for found in dict.fromkeys(problems) if idle[found] in (0, len(entries)) or found in once]
    problems.extend(_shared_caches(datasets))
    sources = {dataset.image_directory for dataset in datasets}
    masks = [dataset.mask_directory for dataset in datasets if dataset.mask_directory not in (None, *sources)]
    apart = tuple(folder for folder in (output_dir, *masks) if folder is not None)
    return [replace(dataset, apart=apart) for dataset in datasets], problems


def _resolve_one(
    where: str,
    own: dict[str, Any],
    values: dict[str, Any],
    step: int,
    finest: int,
    locate: Any,
    problems: list[Diagnostic],
) -> DatasetConfig | None:
    sources = [key for key in ("image_directory", "image_jsonl_file", "shards", "dataset_name") if key in own]
    before = sum(problem.level == "error" for problem in problems)
    if own.get("precached"):
        for key in [key for key in (*sources, *_OF_PICTURES) if is_on(own.get(key))]:
            problems.append(
                error(
                    "V90",
                    f"{where}.{key}",
                    "is for pictures, and precached = true takes items from cache files; remove one of them",
                )
            )
        if "cache_directory" not in own:
            problems.append(
                error(
                    "U07", f"{where}.cache_directory", "is required with precached; name the folder of the cache files"
                )
            )
    elif not sources:
        problems.append(
            error(
                "U07",
                where,
                "has no images; set image_directory, image_jsonl_file, shards or dataset_name (or precached, for caches without them)",
            )
        )
    elif len(sources) > 1:
        problems.append(error("V90", where, f"has both {sources[0]} and {sources[1]}; keep one"))
    stream = _stream(own, locate) if "shards" in own or "dataset_name" in own else None
    if stream is not None:
        for key in [key for key in _NOT_OF_A_STREAM if is_on(own.get(key))]:
            problems.append(
                error("V90", f"{where}.{key}", "is for pictures in a folder or list, not in shards; remove the key")
            )
        general = [
            key for key in _NOT_OF_A_STREAM if key not in own and is_on(values.get(key)) and key in _ACTS_ON_SHARDS
        ]
        for key in general:
            text = f"has no effect on {where}, because its pictures come in shards"
            problems.append(warning("NA03", f"general.{key}", text))
        values = {key: value for key, value in values.items() if key not in general}
        if stream.cached and "epoch_samples" in own:
            text = "has no effect because pictures that are cached are counted"
            problems.append(warning("NA03", f"{where}.epoch_samples", text))
        for key in [key for key in _NOT_OF_LIVE_PICTURES if is_on(own.get(key)) and not stream.cached]:
            text = "is for pictures in a folder or list, or in shards that are cached; set cache_directory, or remove the key"
            problems.append(error("V90", f"{where}.{key}", text))
    if "image_jsonl_file" in own and "captions_file" in own:
        text = "lists captions of a folder, but image_jsonl_file has its own; remove the key"
        problems.append(error("V90", f"{where}.captions_file", text))
    if "image_jsonl_file" in own and "cache_directory" not in own:
        problems.append(
            error(
                "U07", f"{where}.cache_directory", "is required with image_jsonl_file; name the folder for cache files"
            )
        )
    if not str(values["caption_extension"]).startswith("."):
        problems.append(
            error(
                "U03",
                f"{where}.caption_extension",
                f"is {values['caption_extension']!r}, expected a dot at the start, as in '.txt'",
            )
        )
    given = values.get("bucket_reso_steps")
    if given is not None and values["enable_bucket"]:
        if given % finest:
            near = _near("", given, finest).strip()
            problems.append(
                error("V53", f"{where}.bucket_reso_steps", f"is {given}, expected a multiple of {finest}: {near}")
            )
        step = given
    resolution = values["resolution"]
    width, height = (resolution, resolution) if isinstance(resolution, int) else resolution
    if not values["enable_bucket"] and (width % step or height % step):
        near = ", ".join(
            _near(name, side, step) for name, side in (("width", width), ("height", height)) if side % step
        )
        problems.append(
            error(
                "V55",
                f"{where}.resolution",
                f"is {width}x{height}; without buckets both sides must be multiples of {step}: {near}",
            )
        )
    low, high = _bucket_sides(values, step)
    if values["enable_bucket"] and low is not None and (low > min(width, height) or (high is not None and low > high)):
        above = f"max_bucket_reso = {high}" if high is not None and low > high else f"the resolution {width}x{height}"
        problems.append(error("V52", f"{where}.min_bucket_reso", f"is {low}, above {above}"))
    if values["enable_bucket"] and high is not None and high < max(width, height):
        text = f"is {high}, below the resolution {width}x{height}"
        problems.append(error("V52", f"{where}.max_bucket_reso", text))
    for key, side in (("min_bucket_reso", low), ("max_bucket_reso", high)):
        if values.get(key) is not None and values["enable_bucket"] and side != values[key]:
            text = f"is {values[key]}, which is not a multiple of {step}; {side} is used"
            problems.append(warning("V51", f"{where}.{key}", text, fix=[(f"{where}.{key}", side)]))

    def idle(code: str, key: str, reason: str) -> None:
        problems.append(warning(code, f"{where if key in own else 'general'}.{key}", f"has no effect because {reason}"))

    for name, field_info in DatasetSection.model_fields.items():
        when = Parameter("datasets", name, field_info, DatasetSection).when
        if name in own and name in StreamSettings.__dataclass_fields__ and when is not None:
            get = lambda key: own.get(key.partition(".")[2])  # noqa: E731
            if not when.holds(get):
                idle("NA03", name, when.reason(get))
    for key in ("bucket_reso_steps", "min_bucket_reso", "max_bucket_reso", "bucket_no_upscale"):
        if values.get(key) and not values["enable_bucket"]:
            idle("V54", key, "enable_bucket is false")
    if values.get("random_crop") and values.get("resize") == "squash":
        idle("NA03", "random_crop", 'resize is "squash", which does not crop')
        values = {**values, "random_crop": False}
    if values["enable_bucket"]:
        smallest = int((width * height) ** 0.5) // 2
        if smallest < step:
            problems.append(
                error(
                    "V55",
                    f"{where}.resolution",
                    f"is {width}x{height}; the smallest bucket side would be 0. "
                    f"Use at least {2 * step}x{2 * step}, or enable_bucket = false",
                )
            )
    if "image_jsonl_file" not in own:
        if "caption_columns" in own:
            problems.append(
                error(
                    "V90",
                    f"{where}.caption_columns",
                    "names columns of image_jsonl_file, which is not set; remove the key",
                )
            )
        if values.get("caption_transform") == "imagenet":
            problems.append(
                error(
                    "V90",
                    f"{where}.caption_transform",
                    'is "imagenet", which reads columns of image_jsonl_file; set image_jsonl_file, or remove the key',
                )
            )
    else:
        for key in [key for key in ("recursive", "caption_extension") if own.get(key)]:
            idle("NA03", key, "image_jsonl_file lists the images and captions")
    mask_source = _mask_source(where, own, values, problems)
    if sum(problem.level == "error" for problem in problems) > before:
        return None
    directory: Path | None = locate(own["image_directory"]) if "image_directory" in own else None
    cache: Path | None = locate(own["cache_directory"]) if "cache_directory" in own else directory
    if stream is not None and not stream.cached:
        cache = locate(".")  # nothing is cached
    assert cache is not None  # a JSONL source without cache_directory was refused above
    return DatasetConfig(
        name=own.get("name", where),
        image_directory=directory,
        image_jsonl_file=locate(own["image_jsonl_file"]) if "image_jsonl_file" in own else None,
        captions_file=locate(own["captions_file"]) if "captions_file" in own else None,
        cache_directory=cache,
        resolution=(width, height),
        enable_bucket=values["enable_bucket"],
        bucket_no_upscale=values["bucket_no_upscale"],
        caption_extension=values["caption_extension"],
        batch_size=values["batch_size"],
        num_repeats=values["num_repeats"],
        missing_caption=values["missing_caption"],
        recursive=values["recursive"],
        resize=values.get("resize", "crop"),
        interpolation=None if values.get("resize_interpolation") == "auto" else values.get("resize_interpolation"),
        mask_source=mask_source,
        mask_directory=locate(own["mask_directory"]) if "mask_directory" in own else None,
        caption_columns=tuple(values.get("caption_columns", ())),
        caption_transform=values.get("caption_transform"),
        experts=NO_TEACHERS if own.get("experts") is False else own.get("experts", {}),
        alpha_background=_background(values.get("alpha_background"), mask_source),
        text=caption_settings(values),
        stream=stream,
        precached=bool(own.get("precached")),
        is_reg=bool(values.get("is_reg")),
        views=ViewSettings(*(bool(values.get(key)) for key in ("flip_aug", "random_crop", "color_aug"))),
        bucket_step=values.get("bucket_reso_steps") if values["enable_bucket"] else None,
        bucket_sides=_bucket_sides(values, step),
    )


def _stream(own: Mapping[str, Any], locate: Any) -> StreamSettings:
    """Where shards are, and how they are read."""
    given = own.get("shards", [])
    texts = [given] if isinstance(given, str) else given
    shards = tuple(text if "://" in text else str(locate(text)) for text in texts)
    values = {name: own[name] for name in StreamSettings.__dataclass_fields__ if own.get(name) is not None}
    name = values.get("dataset_name")
    if name is not None and locate(name).exists():
        values["dataset_name"] = str(locate(name))
    return StreamSettings(**{**values, "shards": shards, "cached": "cache_directory" in own})


def _background(given: str | None, mask_source: MaskSource) -> str:
    """The colour below transparent pixels. Where alpha is the loss mask, colours are kept unless a background is given."""
    if given is None:
        return KEPT if mask_source == "alpha" else WHITE
    return hex_colour(given) or WHITE  # a value that is not a colour was refused before


def _bucket_sides(values: Mapping[str, Any], step: int) -> tuple[int | None, int | None]:
    """The shortest side, rounded down to the step, and the longest, rounded up; None = any."""
    if not values["enable_bucket"]:
        return None, None
    low, high = values.get("min_bucket_reso"), values.get("max_bucket_reso")
    return low and max(step, low - low % step), high and -(-high // step) * step


def _mask_source(where: str, own: dict[str, Any], values: dict[str, Any], problems: list[Diagnostic]) -> MaskSource:
    """Where the masks of a data set come from: as set, else from files if mask files are named."""

    def refuse(key: str, message: str) -> None:
        problems.append(error("V91", f"{where}.{key}", message))

    directory, listing = "mask_directory" in own, "image_jsonl_file" in own
    source: MaskSource = values.get("mask_source") or ("file" if directory or listing else "none")
    if own.get("alpha_mask") is False and source == "alpha":
        refuse("alpha_mask", 'is false, but mask_source is "alpha"; write mask_source = "none"')
    if values.get("alpha_mask"):
        if values.get("mask_source", "alpha") != "alpha":
            refuse("alpha_mask", f'is true, but mask_source is "{source}"; keep one')
        elif directory:
            refuse("alpha_mask", "is true, but mask_directory is set; keep one")
        source = "alpha"
    elif directory and source not in ("file", "smpl"):
        refuse("mask_directory", f'is set, but mask_source is "{source}", which reads no mask files; keep one')
    if directory and listing:
        refuse("mask_directory", "is for image_directory; in image_jsonl_file each line names its mask as mask_path")
    if directory and own["mask_directory"] == own.get("image_directory"):
        refuse("mask_directory", "is the same as image_directory; put the masks into a separate folder")
    if source in ("file", "smpl") and not directory and not listing:
        refuse("mask_directory", f'is missing, but mask_source is "{source}"; name the folder of the mask files')
    return source


def _near(name: str, side: int, step: int) -> str:
    """The multiples of the step next to a side, in words."""
    below, above = side - side % step, side - side % step + step
    return f"{name} {below} or {above}" if below else f"{name} {above}"


def _shared_caches(datasets: list[DatasetConfig]) -> list[Diagnostic]:
    seen: dict[Path, str] = {}
    problems = []
    for dataset in datasets:
        folder = dataset.cache_directory.resolve()
        if dataset.stream is not None and not dataset.stream.cached:
            continue
        if folder in seen:
            problems.append(
                error(
                    "V73",
                    f"{dataset.name}.cache_directory",
                    f"is {folder}, which {seen[folder]} uses too; give each data set its own",
                )
            )
        seen.setdefault(folder, dataset.name)
    return problems
