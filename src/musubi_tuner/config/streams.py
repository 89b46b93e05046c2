"""Pictures that come in shards: settings as a value. Torch-free."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StreamSettings:
    """The keys of the same name in [[datasets]], and ``shards`` as a list.

    Attributes:
        shards: paths, http(s) addresses or hf://datasets/... patterns of tar files.
        epoch_samples: None = as many as shards times ``shard_samples``.
    """

    shards: tuple[str, ...]
    shard_image_key: str | None = None
    shard_label_key: str = "json"
    shard_caption_key: str = "prompt"
    shard_samples: int = 1000
    epoch_samples: int | None = None
    shard_retries: int = 5
    shard_retry_delay: float = 5.0
