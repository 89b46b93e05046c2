"""Cache files as the published TinyFlux trainer writes them, from random tensors: one row per item."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Columns = dict[str, Tensor]


def make_columns(
    rows: int, *, latents: tuple[int, ...], text: tuple[int, int], clip: int, times: Sequence[float], lune: int,
    dtype: torch.dtype = torch.float16, seed: int = 0,
) -> Columns:  # fmt: skip
    """Rows of every column under the trainer's own keys; Sol's maps sum to 1.

    Args:
        latents: (channels, height, width). text: (tokens, width).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator)

    spatial = normal(len(times), 64).softmax(-1).unflatten(-1, (8, 8))
    columns = {
        "latents": normal(*latents),
        "t5_embeds": normal(*text),
        "clip_pooled": normal(clip),
        "features": normal(len(times), lune),
        "stats": normal(len(times), 3).sigmoid(),
        "spatial": spatial,
    }
    return {**{name: tensor.to(dtype) for name, tensor in columns.items()}, "t_buckets": torch.tensor(times)}


def some(columns: Columns, rows: slice, *names: str) -> Columns:
    """A few columns, a few rows."""
    return {name: columns[name][rows].clone() for name in names}


def save(content: Any, path: Path) -> Path:
    """torch.save, into a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def part(columns: Columns, name: str, rows: slice, prompts: list[str] | None) -> dict[str, Any]:
    """Content of one file: encodings, lune or sol."""
    dtype = columns["latents"].dtype
    if name == "encodings":
        kept = some(columns, rows, "latents", "t5_embeds", "clip_pooled")
        return {**kept, "prompts": prompts and prompts[rows], "dtype": dtype}
    keys = {"lune": ("features",), "sol": ("stats", "spatial")}[name]
    return {**some(columns, rows, *keys), "t_buckets": columns["t_buckets"], "dtype": dtype}


PARTS = ("encodings", "lune", "sol")


def write_folder(folder: Path, columns: Columns, prompts: list[str] | None, parts: Sequence[str] = PARTS) -> Path:
    """encodings.pt, lune.pt, sol.pt and meta.pt."""
    for name in parts:
        save(part(columns, name, slice(None), prompts), folder / f"{name}.pt")
    save({"name": "dataset"}, folder / "meta.pt")
    return folder


def write_shards(
    folder: Path,
    columns: Columns,
    prompts: list[str] | None,
    size: int,
    done: Sequence[int] | None = None,
    **state: Any,
) -> Path:
    """A build in shards with its state.json; ``done`` lists the finished ones, None = all."""
    total = len(columns["latents"])
    count = -(-total // size)
    for index in range(count) if done is None else done:
        for name in PARTS:
            rows = slice(index * size, (index + 1) * size)
            save(part(columns, name, rows, prompts), folder / name / f"shard_{index:04d}.pt")
    written = {
        "name": "dataset", "n_samples": total, "build_lune": True, "build_sol": True, "shard_size": size,
        "completed_shards": list(range(count) if done is None else done), **state,
    }  # fmt: skip
    (folder / "state.json").write_text(json.dumps({key: value for key, value in written.items() if value is not None}))
    return folder


def write_encodings_progress(folder: Path, columns: Columns, finished: int, batch: int) -> Path:
    """Encodings grow batch by batch, as lists."""
    batches = [slice(start, min(start + batch, finished)) for start in range(0, finished, batch)]
    keys = {"latents": "latents", "t5": "t5_embeds", "clip": "clip_pooled"}
    content = {key: [columns[name][rows].clone() for rows in batches] for key, name in keys.items()}
    save({"next_idx": finished, **content}, folder / "encodings_progress.pt")
    return folder


def write_teacher_progress(folder: Path, columns: Columns, finished: int, name: str) -> Path:
    """Features of all rows, zero where nothing is finished."""
    keys = {"lune": ("features",), "sol": ("stats", "spatial")}[name]
    content = {key: columns[key].clone() for key in keys}
    for tensor in content.values():
        tensor[finished:] = 0
    save({"next_idx": finished, **content}, folder / f"{name}_progress.pt")
    return folder


def write_flat(folder: Path, columns: Columns, name: str, masks: Tensor | None = None) -> Path:
    """Files of v4.1: four statistics of Sol, latents and masks as bare tensors."""
    count, images = len(columns["t5_embeds"]), len(columns["latents"])
    save(some(columns, slice(None), "t5_embeds", "clip_pooled"), folder / f"{name}_encodings_{count}.pt")
    save(columns["latents"].clone(), folder / f"{name}_latents_{images}.pt")
    if masks is not None:
        save(masks.clone(), folder / f"{name}_masks_{images}.pt")
    times = columns["t_buckets"]
    save({"features": columns["features"].clone(), "t_buckets": times}, folder / f"{name}_lune_{count}.pt")
    fourth = torch.full_like(columns["stats"][..., :1], 7)
    stats = torch.cat([columns["stats"], fourth], dim=-1)
    save({"stats": stats, "spatial": columns["spatial"].clone(), "t_buckets": times}, folder / f"{name}_sol_{count}.pt")
    return folder
