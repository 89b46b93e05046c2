"""[cache]."""

from typing import Literal

from musubi_tuner.config.fields import AutoDtype, Section, param
from musubi_tuner.config.when import is_, is_not


class CacheSection(Section):
    """The separate jobs that encode images and captions once."""

    run: Literal["auto", "always", "never"] = param(
        "auto",
        "auto = encode what is missing or stale, always = encode everything, never = only report.",
        resume="free",
    )
    skip_existing: Literal["fingerprint", "name"] = param(
        "fingerprint",
        "What counts as up to date: a matching fingerprint, or (unsafe) any file of the right name.",
        flat=("skip_existing",),
        resume="free",
        when=is_not("cache.run", "always"),
    )
    verify: Literal["quick", "full"] = param(
        "quick",
        "quick trusts a picture, mask or encoder whose size, times and inode are unchanged since it was hashed; full hashes all "
        "at each start.",
        resume="free",
        when=is_("cache.skip_existing", "fingerprint"),
    )
    dtype: AutoDtype = param(
        "auto",
        "Storage precision; auto = latents float32, text bfloat16, experts float32. An overflow in float16 is an error.",
    )
    latent_mode: Literal["sample", "mean"] = param(
        "sample", "Use a seeded sample of the autoencoder's posterior, or its mean."
    )
    seed: int = param(0, "Seed of the posterior sample and of random caption and picture versions.", ge=0, lt=2**32)
    latents_batch_size: int = param(1, "Images encoded together.", ge=1, le=1024, unit="images")
    text_batch_size: int = param(16, "Captions encoded together.", ge=1, le=4096, unit="captions")
    latent_variants: int = param(
        1,
        "With random_crop or color_aug: number of versions of each picture to encode. Each time a picture is used, one is chosen.",
        ge=1,
        le=64,
    )
    text_variants: int = param(
        1,
        "With shuffle, tag dropout or wildcards: number of versions of each caption to encode. Each time an image is used, one is "
        "chosen.",
        ge=1,
        le=64,
    )
    workers: int = param(2, "Threads that read and resize images.", ge=0, le=64, resume="free", unit="threads")
    vae_tiling: bool = param(
        False, "Encode and decode large images in overlapping tiles (less memory, seams possible)."
    )
    nan_policy: Literal["error", "zero"] = param(
        "error", "For encoded values that are not finite: stop with an error, or replace them by 0."
    )
