"""Names, keys and headers of cache files. All are safetensors; `headers` reads them without torch.

    latents  {stem}_{W:04d}x{H:04d}_{code}.safetensors      W, H: original image size
    text     {stem}_{code}_te.safetensors
    experts  {stem}_{code}_experts.safetensors

Where such a name, or that of the file's first half, would be longer than a file system takes, the stem is its beginning
with a hash: ``{160 bytes}~{16 hex digits of sha256(stem)}``.

A tensor key is ``name_{F}x{H}x{W}_{dtype}`` for latents and the loss mask beside them, ``mask_weights`` (F = 1, sizes in
latent cells), ``name_{dtype}`` otherwise; keys that end in ``_mask`` carry no dtype. Where an image has several captions,
what belongs to caption k = 1, 2, ... has ``_v{k}`` behind its name: ``t5_vec_v1_bfloat16``, ``t5_v1_mask``; the first
caption's names are those of a single one. The header holds strings only; ``fingerprint`` is JSON (see fingerprint.py).
Naming follows musubi-tuner.
"""

import re
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from musubi_tuner.files import fits, name_bytes
from musubi_tuner.headers import DTYPES

if TYPE_CHECKING:
    from musubi_tuner.data.item import Item

FORMAT_VERSION = "1.0.1"
TIMES = "t_buckets"
"""Tensor of an experts file with the ascending times [T] at which the teachers were run; the others there are tables [T, ...]."""
KINDS = ("latents", "text", "experts")
HALF_SUFFIX = ".half"
"""Ending of the first half of a cache file, hidden beside it, which waits for the second."""
_SHORT_BYTES = 160


def cache_path(item: "Item", kind: str, code: str) -> Path:
    """Where the cache file of an item lies."""
    width, height = item.size
    ending = {
        "latents": f"_{width:04d}x{height:04d}_{code}.safetensors",
        "text": f"_{code}_te.safetensors",
        "experts": f"_{code}_experts.safetensors",
    }[kind]
    stem = item.stem if fits(f".{item.stem}{ending}{HALF_SUFFIX}") else short_stem(item.stem)
    return item.cache_directory / (stem + ending)


def short_stem(stem: str) -> str:
    """What stands for a stem that is too long: its beginning, cut between characters, and its hash."""
    raw = name_bytes(stem)
    return f"{raw[:_SHORT_BYTES].decode('utf-8', 'ignore')}~{sha256(raw).hexdigest()[:16]}"


def kind_of(name: str, code: str) -> str | None:
    """Which kind of cache file a name is for this architecture; None if it is not one."""
    if not name.endswith(".safetensors"):
        return None
    stem = name.removesuffix(".safetensors")
    if stem.endswith(f"_{code}_te"):
        return "text"
    if stem.endswith(f"_{code}_experts"):
        return "experts"
    return "latents" if re.fullmatch(rf".+_\d{{4,}}x\d{{4,}}_{re.escape(code)}", stem) else None


def plain_name(key: str) -> str:
    """Name of a tensor without its suffixes: ``latents_1x96x64_float32`` -> ``latents``."""
    key = key.removeprefix("varlen_")
    if key.endswith("_mask"):
        return key
    for dtype in sorted(DTYPES.values(), key=len, reverse=True):
        if key.endswith(f"_{dtype}"):
            key = key.removesuffix(f"_{dtype}")
            break
    else:
        return key
    if key.startswith(("latents_", "mask_weights_")):
        key = re.sub(r"_(\d+x)?\d+x\d+$", "", key)
    return key


def latents_key(shape: tuple[int, ...], dtype: str, view: int = 0) -> str:
    """Key of image latents [C, H, W], of a version of the picture."""
    return f"{caption_name('latents', view)}_1x{shape[-2]}x{shape[-1]}_{dtype}"


def mask_key(shape: tuple[int, ...], view: int = 0) -> str:
    """Key of a loss mask [H, W], always float32, of a version of the picture."""
    return f"{caption_name('mask_weights', view)}_1x{shape[-2]}x{shape[-1]}_float32"


def caption_name(name: str, caption: int) -> str:
    """Plain name of a tensor that belongs to a caption, or to a version of a picture: ``t5_vec`` -> ``t5_vec_v1``, ``t5_mask`` -> ``t5_v1_mask``."""
    if not caption:
        return name
    stem, mask = (name.removesuffix("_mask"), "_mask") if name.endswith("_mask") else (name, "")
    return f"{stem}_v{caption}{mask}"


def caption_metadata(item: "Item") -> dict[str, str]:
    """Header entries of an item's captions: ``caption1``, ``caption2``, ..."""
    return {f"caption{number}": caption for number, caption in enumerate(item.captions, start=1)}


@cache
def split_caption(name: str) -> tuple[str, int]:
    """The opposite of `caption_name`: plain name of the first caption's tensor, and the caption's number."""
    found = re.fullmatch(r"(.+)_v([1-9]\d*)(_mask)?", name)
    return (found[1] + (found[3] or ""), int(found[2])) if found else (name, 0)
