"""Pictures that come in shards or in a data set of Hugging Face: settings as a value. Torch-free."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StreamSettings:
    """The keys of the same name in [[datasets]], and ``shards`` as a list.

    Attributes:
        shards: paths, http(s) addresses or hf://datasets/... patterns of tar files.
        dataset_name: folder or hub id, instead of ``shards``.
        cached: it is read once, into a cache folder; otherwise pictures are trained as they come.
        epoch_samples: None = as many as shards times ``shard_samples``.
    """

    shards: tuple[str, ...] = ()
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_split: str = "train"
    image_column: str = "image"
    caption_column: str = "text"
    cached: bool = False
    shard_image_key: str | None = None
    shard_label_key: str = "json"
    shard_caption_key: str = "prompt"
    shard_samples: int = 1000
    epoch_samples: int | None = None
    shard_retries: int = 5
    shard_retry_delay: float = 5.0
