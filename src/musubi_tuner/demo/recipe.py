"""Where the demo's files are, and whether they are there. Torch-free."""

from pathlib import Path
from typing import Any

from musubi_tuner.config import RunConfig
from musubi_tuner.config.schema.model import ClipAndT5
from musubi_tuner.demo.pictures import MANIFEST as PICTURES_MANIFEST
from musubi_tuner.demo.pictures import VERSION as PICTURES_VERSION
from musubi_tuner.errors import ConfigError
from musubi_tuner.files import read_json

VERSION = 1
"""Of the encoders that `prepare` makes. Raise it when the same config makes others."""
MANIFEST = "encoders.json"
ENCODERS = (
    "model.vae_path",
    "model.clip_path",
    "model.t5_path",
    "model.bert_tokenizer",
    "experts.unet",
    "experts.vae",
    "experts.lune",
    "experts.sol",
)
"""Config keys whose files the demo makes."""
REQUIRED = {True: ("model.vae_path", "model.clip_path", "model.t5_path"), False: ("model.bert_tokenizer",)}
"""Those that must be given: for families with CLIP and T5, and for the others."""


def demo_folder(config: RunConfig) -> Path:
    """Where the demo's files lie."""
    assert config.demo is not None
    return config.locate(config.demo.folder)


def has_clip_and_t5(config: RunConfig) -> bool:
    """Whether its texts go through CLIP and T5."""
    return isinstance(config.model, ClipAndT5)


def made_paths(config: RunConfig) -> dict[str, Path]:
    """Config key -> file or folder that the demo makes for it.

    Raises:
        ConfigError: if a key points outside the demo's folder, where nothing may be written.
    """
    folder, required = demo_folder(config).resolve(), REQUIRED[has_clip_and_t5(config)]
    made = {}
    for key in ENCODERS:
        text = config.get(key)
        if text is None:
            if key in required:
                raise ConfigError(f"{key}: is needed by the demo; give a path inside {folder}")
            continue
        path = config.locate(text)
        if not path.resolve().is_relative_to(folder):
            raise ConfigError(f"{key}: {text}: lies outside demo.folder {folder}, where the demo makes its encoders")
        made[key] = path
    return made


def pictures_folder(config: RunConfig) -> Path:
    """Folder of the training pictures: the image directory of the only dataset.

    Raises:
        ConfigError: if there is not exactly one folder of images, inside the demo's folder.
    """
    folders = [dataset.image_directory for dataset in config.datasets]
    inside = demo_folder(config).resolve()
    if len(folders) != 1 or folders[0] is None or not folders[0].resolve().is_relative_to(inside):
        raise ConfigError(f"datasets: the demo needs exactly one image_directory, inside demo.folder {inside}")
    return folders[0]


def expected_manifest(config: RunConfig) -> dict[str, Any]:
    """What decides the content of the encoders."""
    assert config.demo is not None
    geometry = config.get("model.geometry")
    names = ("joint_attention_dim", "pooled_projection_dim", "lune_expert_dim", "in_channels")
    tokens = {"t5_max_tokens": config.clip_and_t5.t5_max_tokens} if has_clip_and_t5(config) else {}
    return {
        "version": VERSION,
        "pictures": config.demo.pictures,
        "size": config.demo.size,
        "held_out": config.demo.held_out,
        "seed": config.demo.seed,
        **tokens,
        "widths": {name: geometry.get(name) for name in names},
        "paths": {key: str(path) for key, path in made_paths(config).items()},
    }


def is_ready(config: RunConfig) -> bool:
    """Whether pictures and encoders are there and were made for this config."""
    folder = demo_folder(config)
    assert config.demo is not None
    try:
        encoders = read_json(folder / MANIFEST)
        pictures = read_json(pictures_folder(config) / PICTURES_MANIFEST)
    except (OSError, ValueError):
        return False
    wanted = {"version": PICTURES_VERSION, "count": config.demo.pictures, "size": config.demo.size, "held": config.demo.held_out,
              "seed": config.demo.seed, "complete": True}  # fmt: skip
    made = encoders == expected_manifest(config) and all(path.exists() for path in made_paths(config).values())
    return made and {key: pictures.get(key) for key in wanted} == wanted
