"""The musubi dataset file: `[general]` and `[[datasets]]`, alone or inside a run file. Torch-free.

Values are looked up in the dataset, then in [general], then in the family's defaults. Source keys,
`cache_directory` and `experts` are never inherited.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from musubi_tuner.config.diagnostics import Diagnostic, did_you_mean

MissingCaption = Literal["error", "skip", "empty", "stem"]
MaskSource = Literal["none", "file", "alpha", "product", "smpl", "imported"]
"""Where the loss mask of an image comes from; see data/masks.py."""
Resize = Literal["crop", "squash"]
"""How an image becomes its bucket: its centre, or all of it with other proportions."""
KEPT = "kept"
"""Instead of a background: pixels keep their stored colour, however transparent they are."""
WHITE = "#ffffff"
CAPTION_TRANSFORMS = ("object_relations", "imagenet")
"""Transforms that have a name; see data/captions.py."""

SHARED_KEYS: dict[str, str] = {
    "resolution": "resolution",
    "enable_bucket": "bool",
    "bucket_no_upscale": "bool",
    "resize": "resize",
    "caption_extension": "text",
    "batch_size": "count",
    "num_repeats": "count",
    "missing_caption": "missing_caption",
    "recursive": "bool",
    "mask_source": "mask_source",
    "alpha_mask": "bool",
    "alpha_background": "colour",
    "caption_columns": "names",
    "caption_transform": "caption_transform",
}
_DATASET_ONLY: dict[str, str] = {
    "name": "text",
    "image_directory": "text",
    "image_jsonl_file": "text",
    "cache_directory": "text",
    "mask_directory": "text",
    "experts": "experts",
}
NO_TEACHERS = {"enable_lune": False, "enable_sol": False}
"""What ``experts = false`` stands for."""
_IGNORED = {"fp_latent_window_size", "fp_1f_clean_indices", "fp_1f_target_index", "fp_1f_no_post"}
_REFUSED = {
    "control_directory": "control images are for editing models; this architecture takes none",
    "multiple_target": "layered targets are for another architecture",
    "no_resize_control": "control images are for editing models; this architecture takes none",
    "control_resolution": "control images are for editing models; this architecture takes none",
    "flux_kontext_no_resize_control": "control images are for editing models; this architecture takes none",
    "qwen_image_edit_no_resize_control": "control images are for editing models; this architecture takes none",
    "qwen_image_edit_control_resolution": "control images are for editing models; this architecture takes none",
    "mask_path": "it is a column of image_jsonl_file; a folder of masks is mask_directory",
}
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
        name: as given, or "datasets[0]"; how messages and steps call it.
        image_directory, image_jsonl_file: exactly one is set.
        cache_directory: where cache files go; the image directory if not given.
        resolution: (width, height) in pixels; the area when buckets are on.
        caption_extension: with its dot.
        batch_size: images per micro-batch and process.
        resize: how an image becomes its bucket.
        mask_source: where loss masks come from. mask_directory: files of the images' stems; set with an image_directory
            whose source is file or smpl.
        caption_columns: JSONL columns with the captions of an image; empty = caption. caption_transform: a name of
            `CAPTION_TRANSFORMS`, or package.module:function.
        experts: what its images have instead of the same keys of [experts]; see `RunConfig.experts_of`.
        alpha_background: colour (#rrggbb) that transparent pixels are laid over; `KEPT` = they keep theirs, as they do where the
            alpha channel is the loss mask, unless a colour is given.
        apart: folders that may lie below the image directory and hold none of its pictures: output_dir, masks of others.
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
    resize: Resize = "crop"
    mask_source: MaskSource = "none"
    mask_directory: Path | None = None
    caption_columns: tuple[str, ...] = ()
    caption_transform: str | None = None
    experts: Mapping[str, Any] = field(default_factory=dict)
    alpha_background: str = WHITE
    apart: tuple[Path, ...] = ()


def _check_value(kind: str, value: Any) -> str | None:
    """What is wrong with a value of that kind, or None."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    match kind:
        case "bool" if not isinstance(value, bool):
            return f"is {value!r}, expected true or false"
        case "text" if not isinstance(value, str) or not value:
            return f"is {value!r}, expected a text"
        case "count" if not is_int or value < 1:
            return f"is {value!r}, expected a whole number of at least 1"
        case "missing_caption" if value not in get_args(MissingCaption):
            return f"is {value!r}, expected one of {', '.join(get_args(MissingCaption))}"
        case "mask_source" if value not in get_args(MaskSource):
            return f"is {value!r}, expected one of {', '.join(get_args(MaskSource))}"
        case "resize" if value not in get_args(Resize):
            return f"is {value!r}, expected one of {', '.join(get_args(Resize))}"
        case "names":
            texts = isinstance(value, list) and all(isinstance(name, str) and name for name in value)
            if not texts or not value or len(set(value)) != len(value):
                return f"is {value!r}, expected a list of different names"
        case "colour" if _hex_colour(value) is None:
            return f'is {value!r}, expected an opaque colour: a name such as "white", or "#rrggbb"'
        case "experts" if value is not False and not isinstance(value, dict):
            return f"is {value!r}, expected false, for no teachers, or a table of keys that differ from [experts]"
        case "caption_transform":
            named = value in CAPTION_TRANSFORMS if isinstance(value, str) else False
            if not named and not (isinstance(value, str) and re.fullmatch(r"[\w.]+:\w+", value)):
                return f"is {value!r}, expected one of {', '.join(CAPTION_TRANSFORMS)}, or package.module:function"
        case "resolution":
            sides = [value] if is_int else value
            whole = isinstance(sides, list) and all(isinstance(s, int) and not isinstance(s, bool) for s in sides)
            if not whole or len(sides) not in (1, 2) or (isinstance(value, list) and len(value) != 2):
                return f"is {value!r}, expected one whole number or [width, height]"
            if min(sides) < 1:
                return f"is {value!r}, sides must be at least 1"
    return None


def _hex_colour(value: Any) -> str | None:
    """A colour by its name or code as "#rrggbb"; None if it is none, or not opaque."""
    from PIL import ImageColor

    try:
        red, green, blue, *alpha = ImageColor.getrgb(value)
    except (ValueError, TypeError, AttributeError):
        return None
    return None if alpha and alpha != [255] else f"#{red:02x}{green:02x}{blue:02x}"


def _check_table(table: Any, where: str, allowed: Mapping[str, str], problems: list[Diagnostic]) -> dict[str, Any]:
    """Collect the usable values of one table; everything else becomes a diagnostic."""
    if not isinstance(table, dict):
        problems.append(Diagnostic("error", where, f"is {table!r}, expected a table"))
        return {}
    values: dict[str, Any] = {}
    for key, value in table.items():
        place = f"{where}.{key}"
        if key in allowed:
            wrong = _check_value(allowed[key], value)
            if wrong:
                problems.append(Diagnostic("error", place, wrong))
            else:
                values[key] = value
        elif key in _DATASET_ONLY:
            problems.append(Diagnostic("error", place, "belongs in [[datasets]]; it is not inherited"))
        elif key in _IGNORED:
            problems.append(Diagnostic("warning", place, "belongs to another architecture and has no effect"))
        elif key in _VIDEO:
            problems.append(Diagnostic("error", place, "this architecture trains on images only"))
        elif key in _REFUSED:
            problems.append(Diagnostic("error", place, f"is not supported: {_REFUSED[key]}; remove the key"))
        else:
            problems.append(Diagnostic("error", place, f"unknown key.{did_you_mean(key, allowed)}"))
    return values


def resolve_datasets(
    tables: Mapping[str, Any], defaults: Mapping[str, Any], step: int, locate: Any, output_dir: Path | None = None
) -> tuple[list[DatasetConfig], list[Diagnostic]]:
    """Check and resolve the two tables.

    Args:
        tables: may hold ``general`` and ``datasets``.
        defaults: the family's defaults for the shared keys.
        step: sides of a single bucket must be multiples of this many pixels.
        locate: turns a path of the file into a `Path`.
        output_dir: where the run writes, if that is known.

    Returns:
        The usable datasets and all findings.
    """
    problems: list[Diagnostic] = []
    general = _check_table(tables.get("general", {}), "general", SHARED_KEYS, problems)
    entries = tables.get("datasets", [])
    if isinstance(entries, dict):
        problems.append(Diagnostic("error", "datasets", "is a table; write [[datasets]] with two brackets"))
        entries = []
    elif not isinstance(entries, list) or not entries:
        problems.append(
            Diagnostic(
                "error", "datasets", "no dataset given; add [[datasets]] with image_directory or image_jsonl_file"
            )
        )
        entries = []
    datasets: list[DatasetConfig] = []
    for index, entry in enumerate(entries):
        where = f"datasets[{index}]"
        own = _check_table(entry, where, SHARED_KEYS | _DATASET_ONLY, problems)
        values = {**defaults, **general, **own}
        dataset = _resolve_one(where, own, values, step, locate, problems)
        if dataset:
            datasets.append(dataset)
    problems.extend(_shared_caches(datasets))
    sources = {dataset.image_directory for dataset in datasets}
    masks = [dataset.mask_directory for dataset in datasets if dataset.mask_directory not in (None, *sources)]
    apart = tuple(folder for folder in (output_dir, *masks) if folder is not None)
    return [replace(dataset, apart=apart) for dataset in datasets], problems


def _resolve_one(
    where: str, own: dict[str, Any], values: dict[str, Any], step: int, locate: Any, problems: list[Diagnostic]
) -> DatasetConfig | None:
    sources = [key for key in ("image_directory", "image_jsonl_file") if key in own]
    before = sum(problem.level == "error" for problem in problems)
    if not sources:
        problems.append(Diagnostic("error", where, "needs image_directory or image_jsonl_file"))
    elif len(sources) == 2:
        problems.append(Diagnostic("error", where, "has image_directory and image_jsonl_file; keep one"))
    if "image_jsonl_file" in own and "cache_directory" not in own:
        problems.append(Diagnostic("error", f"{where}.cache_directory", "is required with image_jsonl_file"))
    if not str(values["caption_extension"]).startswith("."):
        problems.append(
            Diagnostic(
                "error", f"{where}.caption_extension", f"is {values['caption_extension']!r}, it must begin with a dot"
            )
        )
    resolution = values["resolution"]
    width, height = (resolution, resolution) if isinstance(resolution, int) else resolution
    if not values["enable_bucket"] and (width % step or height % step):
        near = ", ".join(
            _near(name, side, step) for name, side in (("width", width), ("height", height)) if side % step
        )
        problems.append(
            Diagnostic(
                "error",
                f"{where}.resolution",
                f"is {width}x{height}; without buckets both sides must be multiples of {step}: {near}",
            )
        )
    if own.get("bucket_no_upscale") and not values["enable_bucket"]:
        problems.append(
            Diagnostic("warning", f"{where}.bucket_no_upscale", "has no effect because enable_bucket is false")
        )
    if values["enable_bucket"]:
        smallest = int((width * height) ** 0.5) // 2
        if smallest < step:
            problems.append(
                Diagnostic(
                    "error",
                    f"{where}.resolution",
                    f"is {width}x{height}; the smallest bucket side would be 0. "
                    f"Use at least {2 * step}x{2 * step}, or enable_bucket = false",
                )
            )
    if "image_jsonl_file" not in own:
        if "caption_columns" in own:
            problems.append(
                Diagnostic("error", f"{where}.caption_columns", "names columns of image_jsonl_file; remove the key")
            )
        if values.get("caption_transform") == "imagenet":
            problems.append(
                Diagnostic("error", f"{where}.caption_transform", '"imagenet" reads columns of image_jsonl_file')
            )
    mask_source = _mask_source(where, own, values, problems)
    if sum(problem.level == "error" for problem in problems) > before:
        return None
    directory: Path | None = locate(own["image_directory"]) if "image_directory" in own else None
    cache: Path | None = locate(own["cache_directory"]) if "cache_directory" in own else directory
    assert cache is not None  # a JSONL source without cache_directory was refused above
    return DatasetConfig(
        name=own.get("name", where),
        image_directory=directory,
        image_jsonl_file=locate(own["image_jsonl_file"]) if "image_jsonl_file" in own else None,
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
        mask_source=mask_source,
        mask_directory=locate(own["mask_directory"]) if "mask_directory" in own else None,
        caption_columns=tuple(values.get("caption_columns", ())),
        caption_transform=values.get("caption_transform"),
        experts=NO_TEACHERS if own.get("experts") is False else own.get("experts", {}),
        alpha_background=_background(values.get("alpha_background"), mask_source),
    )


def _background(given: str | None, mask_source: MaskSource) -> str:
    """What lies below transparent pixels. Alpha that says where the loss looks says nothing of colours, unless asked to."""
    if given is None:
        return KEPT if mask_source == "alpha" else WHITE
    return _hex_colour(given) or WHITE  # what is no colour was refused before


def _mask_source(where: str, own: dict[str, Any], values: dict[str, Any], problems: list[Diagnostic]) -> MaskSource:
    """Where the masks of a dataset come from: as said, else from files where files are named."""

    def error(key: str, message: str) -> None:
        problems.append(Diagnostic("error", f"{where}.{key}", message))

    directory, listing = "mask_directory" in own, "image_jsonl_file" in own
    source: MaskSource = values.get("mask_source") or ("file" if directory or listing else "none")
    if values.get("alpha_mask"):
        if values.get("mask_source", "alpha") != "alpha":
            error("alpha_mask", f'is true, but mask_source is "{source}"; keep one')
        elif directory:
            error("alpha_mask", "is true, and mask_directory is given; keep one")
        source = "alpha"
    elif directory and source not in ("file", "smpl"):
        error("mask_directory", f'is given, but mask_source is "{source}", which reads no mask files; keep one')
    if directory and listing:
        error("mask_directory", "belongs to image_directory; lines of image_jsonl_file name their mask in mask_path")
    if directory and own["mask_directory"] == own.get("image_directory"):
        error("mask_directory", "is the image_directory; put the masks into a folder of their own")
    if source in ("file", "smpl") and not directory and not listing:
        error("mask_directory", f'is missing, and mask_source is "{source}"; name the folder of the files')
    return source


def _near(name: str, side: int, step: int) -> str:
    """The multiples of the step around a side, in words."""
    below, above = side - side % step, side - side % step + step
    return f"{name} {below} or {above}" if below else f"{name} {above}"


def _shared_caches(datasets: list[DatasetConfig]) -> list[Diagnostic]:
    seen: dict[Path, str] = {}
    problems = []
    for dataset in datasets:
        folder = dataset.cache_directory.resolve()
        if folder in seen:
            problems.append(
                Diagnostic(
                    "error",
                    f"{dataset.name}.cache_directory",
                    f"is {folder}, which {seen[folder]} uses too; give each dataset its own",
                )
            )
        seen.setdefault(folder, dataset.name)
    return problems
