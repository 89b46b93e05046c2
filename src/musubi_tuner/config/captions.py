"""How captions of a data set are made from what is written: settings as a value. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class CaptionSettings:
    """The keys of the same name in [general] and [[datasets]].

    Attributes:
        text_variants, seed: of [cache].
        warmup_epochs: how long captions grow, once the length of the run is known; see `timed`.
        drop_as_empty: a dropped caption becomes an empty one, which is encoded too; else the family drops encodings itself.
    """

    class_tokens: str = ""
    caption_prefix: str = ""
    caption_suffix: str = ""
    trigger_word: str = ""
    caption_separator: str = ","
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str = ""
    enable_wildcard: bool = False
    caption_tag_dropout_rate: float = 0.0
    caption_dropout_rate: float | None = None
    caption_dropout_every_n_epochs: int = 0
    token_warmup_min: int = 1
    token_warmup_step: float = 0.0
    warmup_epochs: float = 0.0
    text_variants: int = 1
    seed: int = 0
    drop_as_empty: bool = False

    @property
    def dynamic(self) -> tuple[str, ...]:
        """Keys that make another caption each time."""
        on = (
            ("shuffle_caption", self.shuffle_caption),
            ("caption_tag_dropout_rate", self.caption_tag_dropout_rate > 0),
            ("enable_wildcard", self.enable_wildcard),
            ("token_warmup_step", self.token_warmup_step > 0),
        )
        return tuple(key for key, value in on if value)

    @property
    def drops(self) -> bool:
        """Whether some presentations have no caption."""
        return bool(self.caption_dropout_rate or self.caption_dropout_every_n_epochs)

    def timed(self, updates_per_epoch: int, total_updates: int) -> "CaptionSettings":
        """These settings in a run of that length: a step below 1 is a share of it."""
        updates = self.token_warmup_step * (total_updates if self.token_warmup_step < 1 else 1)
        return replace(self, warmup_epochs=int(updates) / updates_per_epoch)

    def is_dropped(self, epoch: int, coin: float) -> bool:
        """Whether a presentation has no caption.

        Args:
            epoch: from 0. coin: uniform in [0, 1).
        """
        every = self.caption_dropout_every_n_epochs
        return coin < (self.caption_dropout_rate or 0) or bool(every and (epoch + 1) % every == 0)


def caption_settings(values: Mapping[str, Any]) -> CaptionSettings:
    """Settings of one data set, from its keys laid over those of [general]."""
    names = {field.name for field in fields(CaptionSettings)}
    return CaptionSettings(**{key: value for key, value in values.items() if key in names and value is not None})
