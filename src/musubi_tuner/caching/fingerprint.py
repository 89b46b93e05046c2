"""What made a cache file, and whether it is what this run would make. Torch-free.

A fingerprint is a flat JSON object in the file's header. Reading names the first difference. It states the hash of the
image, and of the mask if it has a file, with what the quick check of `stamps` needs; `contents` compares these.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner.caching.file_format import FORMAT_VERSION, cache_path, plain_name
from musubi_tuner.config import RunConfig
from musubi_tuner.config.datasets import KEPT
from musubi_tuner.data.item import Item
from musubi_tuner.encoders.locate import encoder_sources, find_tokenizer, identity, tokenizer_identity
from musubi_tuner.errors import CacheError
from musubi_tuner.headers import read_header

Fingerprint = dict[str, Any]
IMPORTED = "imported"
"""Value of ``provenance`` in the fingerprint of an imported file; absent in files that the jobs made."""
STORED = {"latents": "float32", "text": "bfloat16", "experts": "float32"}
"""What ``cache.dtype = "auto"`` stores."""
AUTO = "auto"
_WORDS = {
    "format": "the cache format",
    "bucket": "the bucket",
    "resized": "the size before the crop",
    "crop": "the crop",
    "views": "the versions of the picture",
    "vae": "the autoencoder",
    "t5": "the T5 encoder",
    "clip": "the CLIP encoder",
    "t5_tokenizer": "the T5 tokenizer",
    "clip_tokenizer": "the CLIP tokenizer",
    "unet": "the teacher's U-Net",
    "lune": "the Lune weights",
    "sol": "the Sol weights",
    "expert_vae": "the teacher's autoencoder",
    "latent_mode": "cache.latent_mode",
    "seed": "the seed",
    "t5_max_tokens": "model.t5_max_tokens",
    "t5_masked": "hiding padding from T5",
    "fp8_t5": "model.fp8_t5",
    "clip_act": "model.clip_act",
    "bert": "the language model",
    "bert_tokenizer": "its tokenizer",
    "text_max_tokens": "model.text_max_tokens",
    "text_mode": "what the model sees of a text",
    "tokens": "holding tokens and no states",
    "latent_space": "the kind of latents",
    "layout": "the layout of the autoencoder",
    "text_heads": "the heads of the language model",
    "storage": "cache.dtype",
    "precision": "the encoder's precision",
    "mask": "the source of the mask",
    "captions": "the list of captions",
    "sol_source": "experts.sol_source",
    "text_padding": "the padding of the text that teachers see",
    "squashed": "squashing of the image",
    "interpolation": "resize_interpolation",
    "background": "the colour under transparent pixels",
    "mask_alpha": "transparency of the mask",
    "shard": "the shard",
}
_UNSTATED = {
    "sol_source": "extracted",
    "squashed": False,
    "interpolation": None,
    "text_padding": "hidden",
    "background": KEPT,
    "mask_alpha": False,
}
"""What files hold that were written before a key existed."""


@dataclass(frozen=True)
class Expectation:
    """What every file of one kind must state, and what is added per item.

    Attributes:
        shared: the part common to all items.
        options: resolved options of the family (expert_input and the like).
        complete: false if an encoder is not at hand, so that only imported files can be verified.
        needed: plain names that a file must hold and an imported one may lack.
    """

    kind: str
    shared: Fingerprint
    options: dict[str, Any]
    complete: bool = True
    needed: tuple[str, ...] = ()

    def of(self, item: Item) -> Fingerprint:
        """The fingerprint of an item, without the state of its files."""
        return {**self.shared, **self.of_item(item)}

    def of_item(self, item: Item) -> Fingerprint:
        """The part that is the item's own."""
        own: Fingerprint = {}
        if self.kind == "latents":
            own = {
                "bucket": list(item.bucket),
                "resized": list(item.placement.resized),
                "crop": list(item.placement.crop),
                "mask": item.mask.source if item.mask else None,
            }
            if item.mask is not None and item.mask.alpha:
                own["mask_alpha"] = True
            own["views"] = [[*view.crop, view.flip, view.hue, view.gamma] for view in item.views] or None
        else:
            own = {"caption": item.caption, "captions": list(item.captions) if item.more_captions else None}
            if self.needs_image:  # the teacher's picture has the aspect of the bucket
                own |= {"bucket": list(item.bucket), "squashed": item.squashed}
        if self.needs_image:
            own |= {"background": item.background, "interpolation": item.interpolation}
        own["item"] = item.id
        return own

    @property
    def needs_image(self) -> bool:
        """Whether the content of the image decides."""
        return self.kind == "latents" or self.options.get("expert_input") == "noised_image"

    def files(self, item: Item) -> dict[str, Path]:
        """The files of an item whose content decides, by the name of their state in the fingerprint."""
        found = {"image": item.path} if self.needs_image else {}
        if self.kind == "latents" and item.mask is not None and item.mask.path is not None:
            found["mask_image"] = item.mask.path
        return found


def expectation(config: RunConfig, kind: str, options: dict[str, Any], *, download: bool) -> Expectation:
    """Fingerprint of one kind under a config.

    Args:
        options: of the family, with ``auto`` resolved.
        download: fetch encoders from the hub; otherwise a missing one leaves it not `Expectation.complete`.
    """
    paths = encoder_sources(config, kind).paths(download=download)
    extracted = config.experts.extracted
    own = options if kind == "experts" and extracted else {}
    complete = all(path is not None for path in paths.values())
    shared: Fingerprint = {"format": FORMAT_VERSION, "architecture": config.spec.full_name}
    if kind == "experts" and own.get("expert_input") != "noised_image":
        paths.pop("expert_vae", None)
    full = config.cache.verify == "full"
    here = {role: path for role, path in paths.items() if path is not None}
    if kind == "experts":
        shared.update({role: identity(path, full=full) for role, path in here.items()})
    else:
        shared.update(config.spec.encoders.identities(config, kind, here, full))
    shared.update(_tokenizers(config, paths))
    cache = config.cache
    shared["storage"] = STORED[kind] if cache.dtype == AUTO else cache.dtype
    if kind == "latents":
        shared |= {
            "latent_mode": cache.latent_mode,
            "seed": cache.seed if cache.latent_mode == "sample" else None,
            "precision": config.model.vae_dtype,
            "tiling": cache.vae_tiling,
            **config.spec.encoders.settings(config, kind),
        }
    elif kind == "text":
        shared |= {"precision": config.model.text_dtype, **config.spec.encoders.settings(config, kind)}
    else:
        experts = config.sd15
        shared |= {
            "lune_enabled": experts.enable_lune,
            "sol_enabled": experts.enable_sol,
            "sol_source": experts.sol_source if experts.enable_sol else "extracted",
            "time_buckets": experts.time_buckets,
        }
        if extracted:
            shared |= {
                "expert_input": own["expert_input"],
                "expert_time": own["expert_time"],
                "resolution": experts.resolution,
                "seed": experts.seed,
                "precision": experts.dtype,
                "text_padding": "visible",
            }
    needed = ("t5_mask",) if kind == "text" and config.get("model.t5_attn_mask") else ()
    return Expectation(kind, shared, own, complete, needed)


def _tokenizers(config: RunConfig, paths: dict[str, Path | None]) -> Fingerprint:
    """What the text encoders use as tokenizers, wherever they find them."""
    fallbacks = config.spec.encoders.tokenizers(config)
    full = config.cache.verify == "full"
    found: Fingerprint = {}
    for role, fallback in fallbacks.items():
        encoder = paths.get(role)
        if encoder is not None:
            place = find_tokenizer(encoder, paths.get(f"{role}_tokenizer"), fallback)
            found[f"{role}_tokenizer"] = tokenizer_identity(place, full=full) if isinstance(place, Path) else place
    return found


def differences(stored: Fingerprint, expected: Fingerprint) -> Iterator[str]:
    """All in which a cached fingerprint differs from the expected one, in words.

    A precision that is left to the machine ("auto") takes what the machine was that made the file.
    """
    for key, value in expected.items():
        found = stored.get(key, _UNSTATED.get(key))
        if found != value and not (key == "precision" and value == AUTO):
            name = _WORDS.get(key, key)
            yield f"{name} was {_short(found)}, now {_short(value)}"


def difference(stored: Fingerprint, expected: Fingerprint) -> str | None:
    """The first of `differences`; None if there is none."""
    return next(differences(stored, expected), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_imported(stored: Fingerprint | None) -> bool:
    """Whether a fingerprint is of a file that was imported from another program's caches."""
    return stored is not None and stored.get("provenance") == IMPORTED


def file_state(
    item: Item, expected: Expectation, code: str, *, by_name: bool = False
) -> tuple[str | None, Fingerprint | None]:
    """Why the cache file of an item must be made again, None if it is fresh; and the fingerprint that it holds.

    What its image and mask hold now is left to `contents`.

    Args:
        by_name: accept any complete file of the right name, whatever made it.
    """
    return state_at(cache_path(item, expected.kind, code), item, expected, by_name=by_name)


def state_at(
    path: Path, item: Item, expected: Expectation, *, by_name: bool = False
) -> tuple[str | None, Fingerprint | None]:
    """As `file_state`, for a file anywhere."""
    try:
        header = read_header(path)
    except FileNotFoundError:
        return "missing", None
    except CacheError as error:
        return str(error), None
    stored = header.fingerprint
    reason = None if by_name else _verify(item, expected, stored)
    if expected.needed and not by_name and reason is None:
        held = {plain_name(key) for key in header.tensors}
        reason = next((f"it holds no {name}" for name in expected.needed if name not in held), None)
    return reason, stored


def _verify(item: Item, expected: Expectation, stored: Fingerprint | None) -> str | None:
    if not expected.complete and not is_imported(stored):
        return "its encoder is not downloaded yet, so it cannot be checked"
    return next(differences_of(item, expected, stored), None)


def differences_of(item: Item, expected: Expectation, stored: Fingerprint | None) -> Iterator[str]:
    """All in which a file differs from what would be made for an item, except the content of its picture and mask."""
    if stored is None:
        yield "it does not say what made it (no fingerprint)"
        return
    wanted = expected.of(item)
    if is_imported(stored):  # it does not know its encoders; what it does say must agree
        wanted = {key: value for key, value in wanted.items() if key in stored}
    elif stored.get("storage") == AUTO:  # written by earlier versions
        stored = {**stored, "storage": STORED[expected.kind]}
    yield from differences(stored, wanted)
