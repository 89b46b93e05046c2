"""How captions of a data set are made from what is written: settings as a value. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class CaptionSettings:
    """The keys of the same name in [general] and [[datasets]].

    Attributes:
        text_variants, seed: of [cache].
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
        )
        return tuple(key for key, value in on if value)

    @property
    def drops(self) -> bool:
        """Whether some presentations have no caption."""
        return bool(self.caption_dropout_rate or self.caption_dropout_every_n_epochs)

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
