"""Captions of the images in a folder: a text file beside each image, a list, or the lines of ``prompts.txt``. Torch-free.

A file without visible text is no caption. If no file has exactly the right name, the only file whose name differs from it in
case or Unicode form is used (``p07.TXT`` for ``p07.png``), as on Windows and macOS.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from unicodedata import normalize

from musubi_tuner.config.datasets import DatasetConfig
from musubi_tuner.data.images import EXTENSIONS
from musubi_tuner.data.texts import Names, first_names, folded, is_blank, read_text
from musubi_tuner.errors import DataError

PROMPTS = "prompts.txt"
"""File of a folder whose lines are the captions of its images, sorted by name."""
WAY_OUT = 'set missing_caption = "skip", "empty" or "stem"'
_STRUCTURED = (".json", ".jsonl", ".yaml", ".yml", ".toml", ".xml", ".xmp", ".csv", ".html")
"""Extensions of text files that cannot be captions."""
_LARGEST = 1 << 16
"""Larger files next to an image are not considered as captions, in bytes."""


def folder_captions(
    dataset: DatasetConfig, root: Path, images: Sequence[Path], problems: list[str], notes: list[str]
) -> dict[Path, str | None]:
    """The caption of every image; None if it has none, which is a problem with ``missing_caption = "error"``, else a note."""
    if dataset.captions_file is not None:
        return _listed(dataset, dataset.captions_file, root, images, problems, notes)
    names = Names()
    files = _own_files(dataset.caption_extension, images, names)
    prompts = root / PROMPTS
    if prompts.is_file() and prompts not in files.values():
        return dict(zip(images, _lines(dataset, prompts, images, files, names, problems, notes), strict=True))
    found: dict[Path, str | None] = {}
    absent, empty = [], []
    for image in images:
        text: str | None = None
        try:
            text = read_text(files[image]).strip()
        except (KeyError, FileNotFoundError):
            absent.append(image)
        except DataError as error:
            problems.append(str(error))
            found[image] = ""
            continue
        if text is not None and is_blank(text):
            empty.append(files[image])
            text = None
        found[image] = text
    renamed = [image for image, file in files.items() if file != image.with_suffix(dataset.caption_extension)]
    if renamed:
        shown = first_names([f"{files[image].name} for {image.name}" for image in renamed])
        notes.append(
            f"{dataset.name}: captions of {len(renamed)} images are read from files whose names differ in case or Unicode form ({shown})"
        )
    _say_missing(dataset, root, images, absent, empty, names, problems, notes)
    return found


def _listed(
    dataset: DatasetConfig, path: Path, root: Path, images: Sequence[Path], problems: list[str], notes: list[str]
) -> dict[Path, str | None]:
    """Captions of the images from a list: picture, tab, caption; pictures are relative to the folder."""
    known = {normalize("NFC", image.relative_to(root).as_posix()): image for image in images}
    found: dict[Path, str | None] = dict.fromkeys(images)
    bad, absent, twice = [], [], []
    try:
        lines = read_text(path).split("\n")
    except DataError as error:
        problems.append(str(error))
        return dict.fromkeys(images, "")
    for number, line in enumerate(lines, start=1):
        if is_blank(line) or line.startswith("#"):
            continue
        name, tab, caption = line.partition("\t")
        image = known.get(normalize("NFC", name.strip()))
        if not tab:
            bad.append(f"line {number}")
        elif image is None:
            absent.append(name.strip())
        elif found[image] is not None:
            twice.append(name.strip())
        else:
            found[image] = None if is_blank(caption) else caption.strip()
    if bad:
        problems.append(f"{path}: {len(bad)} lines have no tab between picture and caption ({first_names(bad)})")
    if twice:
        problems.append(
            f"{path}: {len(twice)} pictures have two captions ({first_names(twice)}); keep one line of each"
        )
    if absent:
        notes.append(f"{dataset.name}: {len(absent)} pictures of {path} are not in {root} ({first_names(absent)})")
    without = [image for image, caption in found.items() if caption is None]
    if without:
        text = f"{dataset.name}: {len(without)} of {len(images)} images in {root} have no caption in {path} ({first_names([i.name for i in without])})"
        if dataset.text.class_tokens:
            notes.append(f"{text}; class_tokens is used instead: {dataset.text.class_tokens!r}")
        elif dataset.missing_caption == "error":
            problems.append(f"{text}; write the captions, or {WAY_OUT}")
        else:
            notes.append(f'{text}; missing_caption = "{dataset.missing_caption}"')
    return found


def _own_files(extension: str, images: Sequence[Path], names: Names) -> dict[Path, Path]:
    """The caption file of every image that has one."""
    exact = {image: image.with_suffix(extension) for image in images}
    taken = set(exact.values())
    found: dict[Path, Path] = {}
    for image, wanted in exact.items():
        alike = names.alike(wanted)
        if alike[:1] == [wanted]:
            found[image] = wanted
        elif len(others := [path for path in alike if path not in taken]) == 1:
            found[image] = others[0]
    claims = Counter(found.values())
    return {image: file for image, file in found.items() if file == exact[image] or claims[file] == 1}


def _lines(
    dataset: DatasetConfig,
    path: Path,
    images: Sequence[Path],
    files: Mapping[Path, Path],
    names: Names,
    problems: list[str],
    notes: list[str],
) -> list[str]:
    """Captions of the images in order, from a file with one line for each; a blank line is an empty caption."""
    nothing = [""] * len(images)
    beside = [found for ending, found in _beside(images, names).items() if not ending.endswith(_STRUCTURED)]
    own = list(files.values()) or [file for found in beside for file in found.values()]
    if own:
        problems.append(
            f"{path}: lists the captions by line, but {len(own)} of {len(images)} images have a caption file of their own "
            f"({first_names([file.name for file in own])}); keep one: rename {path.name} or move it out of the folder (sample "
            f"prompts belong elsewhere), or move the caption files"
        )
        return nothing
    try:
        text = read_text(path)
    except DataError as error:
        problems.append(str(error))
        return nothing
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")] if text else []
    if dataset.recursive:
        problems.append(
            f"{path}: lists the captions of one folder, but recursive is true; rename the file, or set recursive = false"
        )
    elif len(lines) != len(images):
        problems.append(
            f"{path}: has {len(lines)} lines for {len(images)} images; write one line per image, sorted by name (a blank "
            "line is an empty caption), or rename the file"
        )
    else:
        blank = sum(is_blank(line) for line in lines)
        words = dataset.text.class_tokens
        instead = f"class_tokens, {words!r}" if words else "empty captions"
        notes.append(
            f"{dataset.name}: captions are the lines of {path}{f'; {blank} of them are blank: {instead}' if blank else ''}"
        )
        return [words if is_blank(line) else line for line in lines]
    return nothing


def _say_missing(
    dataset: DatasetConfig,
    root: Path,
    images: Sequence[Path],
    absent: Sequence[Path],
    empty: Sequence[Path],
    names: Names,
    problems: list[str],
    notes: list[str],
) -> None:
    """Report images without a caption, as a problem or a note, and files that may have been meant as captions.

    Args:
        absent: images without a caption file. empty: caption files without text.
    """
    if not absent and not empty:
        return
    extension, of_all = dataset.caption_extension, f" of {len(images)} images in {root}"
    parts = []
    if absent:
        parts.append(f"{len(absent)}{of_all} have no {extension} file ({first_names([path.name for path in absent])})")
    if empty:
        parts.append(
            f"{len(empty)}{'' if absent else of_all} have an empty {extension} file ({first_names([path.name for path in empty], 10)})"
        )
    text = f"{dataset.name}: {', '.join(parts)}"
    hints = _hints(extension, root, images, absent, names) if absent else []
    if dataset.text.class_tokens:
        notes.append(f"{text}; class_tokens is used instead: {dataset.text.class_tokens!r}")
    elif dataset.missing_caption == "error":
        problems.append(". ".join([f"{text}; write the captions, or {WAY_OUT}", *hints]))
    else:
        notes.append(f'{text}; missing_caption = "{dataset.missing_caption}"')
        notes += [f"{dataset.name}: {hint}" for hint in hints]


def _hints(extension: str, root: Path, images: Sequence[Path], absent: Sequence[Path], names: Names) -> list[str]:
    """Files that may have been meant as captions."""
    found = []
    for ending, files in _beside(absent, names).items():
        image, file = next(iter(files.items()))
        more = f", and {len(files) - 1} more like it" if len(files) > 1 else ""
        lies = f"there is {file.name} next to {image.name}{more}"
        if ending.endswith(_STRUCTURED):
            found.append(f"{lies}, but captions are read from plain text; write {extension} files, or a JSONL file")
        else:
            found.append(f'{lies}; set caption_extension = "{ending}", or rename to {extension}')
    for folder in sorted({path.parent for path in absent}):
        spare = _spare(extension, folder, images, names)
        if spare:
            found.append(f"{len(spare)} {extension} files in {folder} belong to no image ({first_names(spare)})")
    wanted = [path.with_suffix(extension).name for path in absent[:3]]
    folders = sorted(root / name for alike in names.of(root).values() for name in alike if (root / name).is_dir())
    for folder in folders:
        if any((folder / caption).is_file() for caption in wanted):
            found.append(f"{folder} has files with these names; move them next to their images")
    return found


def _spare(extension: str, folder: Path, images: Sequence[Path], names: Names) -> list[str]:
    """Caption files of a folder that belong to no image."""
    stems = {folded(image.stem) for image in images if image.parent == folder}
    ending = folded(extension)
    return sorted(
        name
        for key, alike in names.of(folder).items()
        if key.endswith(ending) and not _beginnings(key, stems)
        for name in alike
    )


def _beginnings(key: str, stems: Collection[str]) -> list[str]:
    """The stems that equal the beginning of a name up to one of its dots, longest first."""
    places = [place for place, char in enumerate(key) if char == "."]
    return [key[:place] for place in reversed(places) if key[:place] in stems]


def _beside(images: Sequence[Path], names: Names) -> dict[str, dict[Path, Path]]:
    """Extension -> image -> text file whose name begins with that of the image, most frequent extension first."""
    stems: dict[Path, dict[str, Path]] = {}
    for image in images:
        stems.setdefault(image.parent, {})[folded(image.stem)] = image
    found: dict[str, dict[Path, Path]] = {}
    for folder, own in stems.items():
        for key, alike in names.of(folder).items():
            owners = _beginnings(key, own)
            if owners and not key.endswith(EXTENSIONS):
                image = own[owners[0]]
                found.setdefault(key.removeprefix(owners[0]), {})[image] = folder / sorted(alike)[0]
    texts = {ending: files for ending, files in found.items() if _is_text(next(iter(files.values())))}
    return dict(sorted(texts.items(), key=lambda pair: (-len(pair[1]), pair[0])))


def _is_text(path: Path) -> bool:
    """Whether a file may be a caption."""
    try:
        return path.stat().st_size <= _LARGEST and not is_blank(read_text(path))
    except (OSError, DataError):
        return False
