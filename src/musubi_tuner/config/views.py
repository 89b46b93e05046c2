"""Which versions of a picture are trained: settings as a value. Torch-free."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ViewSettings:
    """The keys of the same name in [general] and [[datasets]]; ``latent_variants`` and ``seed`` of [cache]."""

    flip_aug: bool = False
    random_crop: bool = False
    color_aug: bool = False
    latent_variants: int = 1
    seed: int = 0

    @property
    def drawn(self) -> tuple[str, ...]:
        """Keys that make another picture each time."""
        return tuple(key for key in ("random_crop", "color_aug") if getattr(self, key))
