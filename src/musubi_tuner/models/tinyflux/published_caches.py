"""Cache files of the published TinyFlux trainer, opened for the import. All are pickles, read with ``weights_only``.

    folder      encodings.pt {latents, t5_embeds, clip_pooled, prompts}, lune.pt {features, t_buckets},
                sol.pt {stats, spatial, t_buckets}
    shards      state.json, and {encodings,lune,sol}/shard_0000.pt ... of the same layouts; unfinished builds too
    progress    {encodings,lune,sol}_progress.pt {next_idx, ...} of a build that was interrupted: rows before next_idx count
    v4.1        {set}_{encodings,latents,masks,lune,sol}_{n}.pt; latents and masks are bare tensors

What made the rows is the same in all: latents are a sample of the posterior of the picture squashed to its size, times
0.3611 without the autoencoder's shift, the convention of this family; text is 128 T5 tokens (padding rows as they came out,
no mask is kept) and CLIP's pooled output; the teachers saw pure noise at UNet time ``1000 t``. Sol of v4.1 is a formula of t
and was not extracted from attention: its four columns become the three of today and are called geometric.
"""

import hashlib
import pickle
import re
import zipfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.config import RunConfig
from musubi_tuner.errors import CacheError, ConfigError
from musubi_tuner.files import read_json
from musubi_tuner.models.foreign_caches import ForeignCaches, ForeignKind, Rows
from musubi_tuner.models.tinyflux.settings import model_of

COLUMNS = {
    "encodings": {"latents": "latents", "t5_embeds": "t5_vec", "clip_pooled": "clip_l_pooler"},
    "lune": {"features": "lune_features"},
    "sol": {"stats": "sol_stats", "spatial": "sol_spatial"},
}
"""File -> its key -> our name."""
PROGRESS_KEYS = {"t5_embeds": "t5", "clip_pooled": "clip"}
"""Keys that progress files call otherwise."""
RANKS = {
    "latents": 4,
    "t5_vec": 3,
    "clip_l_pooler": 2,
    "lune_features": 3,
    "sol_stats": 3,
    "sol_spatial": 4,
    "mask_weights": 3,
}
FLAT = re.compile(r"(.+)_(encodings|latents|masks|lune|sol)_(\d+)\.pt")
SHARD = re.compile(r"shard_(\d+)\.pt")
TEACHER_RESOLUTION = 512
"""The teachers' latents were 64x64."""
_TAIL = 1 << 16


@dataclass
class _Part:
    """Tensors of one part of a cache: encodings, lune or sol.

    Attributes:
        columns: our name -> tensors, one after the other. rows: finished ones. total: of the complete build.
    """

    columns: dict[str, list[Tensor]]
    rows: int
    total: int | None
    times: Tensor | None = None
    prompts: list[str] | None = None


@dataclass
class _Found:
    """What a form of the files came to."""

    form: str
    files: list[Path]
    parts: dict[str, _Part]
    masks: Tensor | None = None
    geometric: bool = False
    notes: list[str] = field(default_factory=list)


def open_caches(config: RunConfig, sources: Sequence[Path], kinds: Collection[str]) -> ForeignCaches:
    """Open the caches of one data set.

    Args:
        sources: a folder; for the files of v4.1 also several, or one file of the set. kinds: of cache files that are wanted.

    Raises:
        CacheError: if they are of no known form, incomplete, or contradict each other.
        ConfigError: if the run needs what they do not hold.
    """
    if model_of(config).t5_attn_mask and "text" in kinds:
        raise ConfigError(
            "model.t5_attn_mask is true, but caches of the published trainer keep no attention mask; set it to false, or make "
            "the text caches with: python -m musubi_tuner.caching text"
        )
    for source in sources:
        if not source.exists():
            raise CacheError(f"{source}: no such file or folder")
    found = _open(sources)
    encodings = found.parts.get("encodings")
    held: dict[str, ForeignKind | None] = {"latents": _latents(found), "text": _text(found)}
    if "experts" in kinds:
        held["experts"] = _experts(config, found)
    return ForeignCaches(
        form=found.form,
        identity=_identity(found.files),
        kinds={kind: rows for kind, rows in held.items() if rows is not None and kind in kinds},
        masks=None if found.masks is None else Rows([found.masks]),
        prompts=encodings.prompts if encodings else None,
        notes=found.notes,
    )


def _open(sources: Sequence[Path]) -> _Found:
    """Recognise the form and open every file of it."""
    if len(sources) == 1 and sources[0].is_dir():
        folder = sources[0]
        if (folder / "state.json").is_file():
            return _shards(folder)
        if any((folder / f"{part}{end}.pt").is_file() for part in COLUMNS for end in ("", "_progress")):
            return _folder(folder)
    flat = _flat(sources)
    if flat is not None:
        return flat
    raise CacheError(
        f"{', '.join(map(str, sources))}: is no cache of the published trainer; expected a folder with encodings.pt, with "
        "state.json and encodings/shard_0000.pt, or with encodings_progress.pt, or files such as SET_encodings_1000.pt"
    )


# Forms


def _folder(folder: Path) -> _Found:
    """encodings.pt, lune.pt, sol.pt; where one is not there yet, what an interrupted build of it had finished."""
    found = _Found(f"folder {folder}", [], {})
    for part in COLUMNS:
        whole, begun = folder / f"{part}.pt", folder / f"{part}_progress.pt"
        if whole.is_file():
            found.parts[part] = _read(part, [whole])
            found.parts[part].total = found.parts[part].rows
            found.files.append(whole)
            if begun.is_file():
                found.notes.append(f"{begun.name} left out: the build beside it is complete")
        elif begun.is_file():
            found.parts[part] = _progress(part, begun)
            found.files.append(begun)
            found.form = f"unfinished build {folder}"
            found.notes.append(f"{part}: {found.parts[part].rows} rows were finished")
    return found


def _progress(part: str, path: Path) -> _Part:
    """What an interrupted build had finished."""
    columns, content = COLUMNS[part], _load(path)
    keys = {key: PROGRESS_KEYS.get(key, key) for key in columns}
    if not isinstance(content, dict) or not isinstance(content.get("next_idx"), int):
        raise CacheError(f"{path}: holds no next_idx, so nothing says how many rows are finished")
    tensors = {columns[key]: _tensors(content.get(own), f"{path}: {own}") for key, own in keys.items()}
    for name, batches in tensors.items():
        for batch in batches:
            _check_rank(name, batch, path)
    # Teachers are kept as one tensor of all rows, zero where nothing is done yet; encodings grow batch by batch.
    total = None if part == "encodings" else sum(map(len, next(iter(tensors.values()))))
    return _Part(tensors, content["next_idx"], total)


def _shards(folder: Path) -> _Found:
    """A build in shards, finished or not, checked against its state.json."""
    path = folder / "state.json"
    try:
        state = read_json(path)
        size = state.get("shard_size", state.get("chunk_size"))
        total = state.get("n_samples")
        if not isinstance(size, int) or size < 1 or not (total is None or (isinstance(total, int) and total > 0)):
            raise ValueError
    except (ValueError, AttributeError) as error:
        raise CacheError(f"{path}: is no state of a build (n_samples, and shard_size or chunk_size)") from error
    found = _Found(f"shards {folder}", [path], {})
    built = {"encodings": True, "lune": bool(state.get("build_lune")), "sol": bool(state.get("build_sol"))}
    for part, key in {"encodings": "enc_done", "lune": "lune_done", "sol": "sol_done"}.items():
        if not built[part]:
            continue
        key = next((name for name in ("completed_shards", "completed_chunks", key) if name in state), key)
        count = _finished_shards(state.get(key, []), f"{path}: {key}", total, size)
        files, unlisted = _shard_files(folder / part, count, None if total is None else -(-total // size), key)
        if unlisted:
            found.notes.append(
                f"{part}: {', '.join(unlisted[:3])}{', ...' * (len(unlisted) > 3)} left out: not in {key}"
            )
        if not files:
            continue
        sizes = [size if total is None else min(size, total - index * size) for index in range(count)]
        found.parts[part] = _read(part, files, sizes, exact=total is not None)
        found.parts[part].total = total
        found.files += files
    if not found.parts:
        raise CacheError(f"{path}: no shard of this build is finished")
    return found


def _finished_shards(listed: Any, where: str, total: int | None, size: int) -> int:
    """How many shards are finished; they must be the first ones.

    Raises:
        CacheError: for gaps, and for shards beyond the end.
    """
    if not isinstance(listed, list) or not all(isinstance(index, int) and index >= 0 for index in listed):
        raise CacheError(f"{where} is {listed!r}, expected a list of shard numbers")
    done = set(listed)
    gaps = sorted(set(range(max(done, default=-1) + 1)) - done)
    if gaps:
        shown = ", ".join(map(str, gaps[:10])) + (", ..." if len(gaps) > 10 else "")
        raise CacheError(
            f"{where} has no {shown} before {max(done)}; rows behind a gap belong to other items in some builds. Let the "
            "published trainer finish the build"
        )
    if total is not None and len(done) > -(-total // size):
        raise CacheError(
            f"{where} lists {len(done)} shards, but {total} rows in shards of {size} are {-(-total // size)}"
        )
    return len(done)


def _shard_files(folder: Path, count: int, possible: int | None, key: str) -> tuple[list[Path], list[str]]:
    """The files of the finished shards in order, and the names of unfinished ones.

    Args:
        count: finished shards. possible: shards of the complete build.
    """
    by_number: dict[int, Path] = {}
    for path in sorted(folder.glob("*.pt")):
        match = SHARD.fullmatch(path.name)
        number = int(match[1]) if match else -1
        if number < 0 or (possible is not None and number >= possible) or number in by_number:
            has = "" if possible is None else f", which has {possible}"
            raise CacheError(
                f"{path}: is no shard of this build{has}; it is left from another one, and would be read as rows. Move it away"
            )
        by_number[number] = path
    missing = [index for index in range(count) if index not in by_number]
    if missing:
        raise CacheError(
            f"{folder / f'shard_{missing[0]:04d}.pt'}: is missing ({len(missing)} in all), but {key} of state.json lists it"
        )
    return [by_number[index] for index in range(count)], [p.name for n, p in sorted(by_number.items()) if n >= count]


def _flat(sources: Sequence[Path]) -> _Found | None:
    """Files of v4.1 that belong to one set; None if there are none."""
    named = [source for source in sources if source.is_file()]
    chosen: dict[tuple[str, str], list[Path]] = {}
    for path in named + [path for folder in sources if folder.is_dir() for path in sorted(folder.glob("*.pt"))]:
        match = FLAT.fullmatch(path.name)
        if match:
            others = chosen.setdefault((match[1], match[2]), [])
            if path not in others and not (others and others[0] in named):
                others.append(path)
    sets = sorted({name for name, _ in chosen})
    wanted = sorted({match[1] for path in named if (match := FLAT.fullmatch(path.name))}) or sets
    if not wanted:
        return None
    if len(wanted) > 1:
        raise CacheError(
            f"{', '.join(map(str, sources))}: holds the sets {', '.join(wanted)}; import one at a time, by naming its files"
        )
    found = _Found("", [], {}, geometric=True)
    latents: _Part | None = None
    for (name, part), paths in sorted(chosen.items()):
        if name != wanted[0]:
            continue
        if len(paths) > 1:
            raise CacheError(f"{' and '.join(map(str, paths))}: are both {part} of {name}; name the one that is meant")
        path = paths[0]
        found.files.append(path)
        rows = int(path.stem.rpartition("_")[2])
        if part in ("latents", "masks"):
            tensor = _tensors(_load(path), str(path))[0]
            column = "latents" if part == "latents" else "mask_weights"
            _check_rank(column, tensor, path)
            if len(tensor) != rows:
                raise CacheError(f"{path}: holds {len(tensor)} rows, its name says {rows}")
            if part == "masks":
                found.masks = tensor
            else:
                latents = _Part({"latents": [tensor]}, rows, rows)
            continue
        found.parts[part] = _read(part, [path], [rows], without=("latents",))
        found.parts[part].total = rows
    found.form = f"v4.1 files of {wanted[0]} in {', '.join(sorted({str(path.parent) for path in found.files}))}"
    if latents is not None:
        found.parts["latents"] = latents
    if found.masks is not None and (latents is None or len(found.masks) != latents.rows):
        held = "none" if latents is None else str(latents.rows)
        raise CacheError(f"{found.form}: {len(found.masks)} masks for {held} latents; expected as many")
    return found


# Reading


def _read(
    part: str, files: list[Path], sizes: Sequence[int] = (), *, exact: bool = True, without: Sequence[str] = ()
) -> _Part:
    """Join the files of one part.

    Args:
        sizes: rows that each must have; without ``exact`` the last may have fewer. without: keys that may be absent.
    """
    columns: dict[str, list[Tensor]] = {}
    times: Tensor | None = None
    prompts: list[str] | None = []
    for index, path in enumerate(files):
        content = _load(path)
        if not isinstance(content, dict):
            raise CacheError(f"{path}: holds a {type(content).__name__}, expected {', '.join(COLUMNS[part])}")
        counts = {}
        for key, name in COLUMNS[part].items():
            if key in without and key not in content:
                continue
            tensor = _tensors(content.get(key), f"{path}: {key}")[0]
            _check_rank(name, tensor, path)
            columns.setdefault(name, []).append(tensor)
            counts[key] = len(tensor)
        if len(set(counts.values())) != 1:
            raise CacheError(
                f"{path}: has {', '.join(f'{n} {key}' for key, n in counts.items())}; expected as many of each"
            )
        held = next(iter(counts.values()))
        if sizes and held != sizes[index] and (exact or index + 1 < len(files) or held > sizes[index]):
            raise CacheError(f"{path}: holds {held} rows, expected {sizes[index]}")
        times = _times(content, path, times) if part != "encodings" else None
        own = content.get("prompts")
        if prompts is not None and isinstance(own, list) and len(own) == held:
            prompts += [str(text) for text in own]
        else:
            prompts = None
    rows = sum(len(tensor) for tensor in next(iter(columns.values())))
    return _Part(columns, rows, None, times, prompts)


def _times(content: dict[str, Any], path: Path, before: Tensor | None) -> Tensor:
    """Times of the teachers' features, equal in all files."""
    times = _tensors(content.get("t_buckets"), f"{path}: t_buckets")[0].float()
    if times.ndim != 1 or (times.diff() <= 0).any():
        raise CacheError(f"{path}: t_buckets are {times.tolist()}, expected rising times")
    if before is not None and (before.shape != times.shape or not torch.allclose(before, times)):
        raise CacheError(f"{path}: t_buckets are {times.tolist()}, in the files before {before.tolist()}")
    return times


def _load(path: Path) -> Any:
    """Content of a torch file; tensors stay in the mapped file where its format allows it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CacheError(
            f"{path}: holds more than tensors, numbers and texts, or is no torch file. Files that need code to unpickle are "
            "not opened"
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, KeyError, IndexError, ValueError) as error:
        raise CacheError(f"{path}: cannot be read, it is no complete torch file ({error})") from error


def _tensors(value: Any, where: str) -> list[Tensor]:
    """A tensor, or a list of batches, as a list of tensors of floats."""
    found = value if isinstance(value, list) and value else [value]
    for tensor in found:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.ndim:
            held = "missing" if tensor is None else f"a {type(tensor).__name__}"
            raise CacheError(f"{where} is {held}, expected a tensor of floats")
    return list(found)


def _check_rank(name: str, tensor: Tensor, path: Path) -> None:
    if tensor.ndim != RANKS[name]:
        raise CacheError(f"{path}: {name} is {list(tensor.shape)}, expected {RANKS[name]} dimensions")


def _identity(files: Sequence[Path]) -> str:
    """16 hex digits that change with the files: name, size and end of each, where a torch file lists its checksums."""
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - _TAIL))
            digest.update(f"{path.name}\0{size}\0".encode("utf-8", "surrogateescape") + file.read())
    return digest.hexdigest()[:16]


# Kinds


def _latents(found: _Found) -> ForeignKind | None:
    part = found.parts.get("latents") or found.parts.get("encodings")
    if part is None or "latents" not in part.columns:
        return None
    return ForeignKind(
        {"latents": _rows("latents", part)}, part.total, {"latent_mode": "sample", "latent_shift": False}
    )


def _text(found: _Found) -> ForeignKind | None:
    part = found.parts.get("encodings")
    if part is None:
        return None
    columns = {name: _rows(name, part) for name in ("t5_vec", "clip_l_pooler")}
    return ForeignKind(columns, part.total, {"t5_max_tokens": columns["t5_vec"].shape[0], "t5_masked": True})


def _rows(name: str, part: _Part) -> Rows:
    try:
        return Rows(part.columns[name], part.rows)
    except ValueError as error:
        raise CacheError(f"{name}: {error}") from error


def _experts(config: RunConfig, found: _Found) -> ForeignKind | None:
    """Features of the teachers that the run uses; None if there are none."""
    wanted = {"lune": config.sd15.enable_lune, "sol": config.sd15.enable_sol}
    held = [name for name in wanted if name in found.parts]
    unused = [name for name in held if not wanted[name]]
    if unused:
        found.notes.append(f"{' and '.join(unused)} left out: experts.enable_{unused[0]} is false")
    used = {name: found.parts[name] for name in held if wanted[name]}
    if not used:
        return None
    lacking = [name for name in wanted if wanted[name] and name not in used]
    if lacking:
        raise ConfigError(
            f"{found.form}: holds {next(iter(used)).capitalize()} and no {lacking[0].capitalize()}, which one file holds together; "
            f"set experts.enable_{lacking[0]} = false, or import the rest with --only latents,text and make these with: python "
            "-m musubi_tuner.caching experts"
        )
    columns = {name: _rows(name, part) for part in used.values() for name in part.columns}
    times = {name: part.times for name, part in used.items()}
    if any(grid is None for grid in times.values()):  # progress files do not say; builds divide [0, 1] evenly
        count = next(iter(columns.values())).shape[0]
        times = dict.fromkeys(times, (torch.arange(count, dtype=torch.float64) + 0.5).div(count).float())
    grid = next(iter(times.values()))
    assert grid is not None
    for name, other in times.items():
        assert other is not None
        if other.shape != grid.shape or not torch.allclose(other, grid):
            raise CacheError(
                f"{found.form}: {name} has the times {other.tolist()}, lune {grid.tolist()}; expected the same"
            )
    for name, rows in columns.items():
        if rows.shape[0] != len(grid):
            raise CacheError(f"{found.form}: {name} has {rows.shape[0]} times per row, t_buckets {len(grid)}")
    facts: dict[str, Any] = {f"{name}_enabled": wanted[name] for name in wanted}
    facts |= {
        "expert_input": "random",
        "expert_time": "reference",
        "text_padding": "visible",
        "resolution": TEACHER_RESOLUTION,
        "time_buckets": len(grid),
    }
    if "sol" in used:
        facts["sol_source"] = _three_statistics(columns, found)
        if facts["sol_source"] == "geometric":
            found.notes.append(
                "Sol is geometric: a formula of the time, equal for all items, not extracted from attention"
            )
    totals = {part.total for part in used.values()}
    if len(totals) > 1:
        raise CacheError(f"{found.form}: Lune is of {used['lune'].total} rows, Sol of {used['sol'].total}")
    return ForeignKind(columns, totals.pop(), facts, {"t_buckets": grid})


def _three_statistics(columns: dict[str, Rows], found: _Found) -> str:
    """Leave out the fourth statistic of v4.1, and say where Sol comes from."""
    stats = columns["sol_stats"]
    width = stats.shape[-1]
    if width not in (3, 4) or columns["sol_spatial"].shape[-1] != columns["sol_spatial"].shape[-2]:
        raise CacheError(
            f"{found.form}: a row of Sol is {list(stats.shape)} and {list(columns['sol_spatial'].shape)}, expected 3 or 4 "
            "statistics and a square map per time"
        )
    if width == 4:
        columns["sol_stats"] = Rows([part[..., :3] for part in stats.parts], len(stats))
    return "geometric" if found.geometric or width == 4 else "extracted"
