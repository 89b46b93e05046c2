"""The files by which a finished model is loaded: weights, average, config and a short model card.

The same files make the folder `release` of a run and the root of its repository on the hub, so that `from_pretrained`
takes either.
"""

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from musubi_tuner import __version__
from musubi_tuner.config import RunConfig
from musubi_tuner.files import replace_file, write_text
from musubi_tuner.training.checkpoint import Entry
from musubi_tuner.weights.checkpoints import CONFIG_FILES, OPTIONS_FILE, as_object, read_json_object

CARD = "README.md"
CONFIG = CONFIG_FILES[0]


def write_configs(folder: Path, geometry: str, options: Mapping[str, Any]) -> None:
    """Write the geometry as every loader takes it, and beside it the options of training.

    Args:
        geometry: text of config.json.
    """
    write_text(folder / CONFIG, geometry)
    write_text(folder / OPTIONS_FILE, _text(options))


def config_texts(folder: Path) -> dict[str, str]:
    """The files of `write_configs` of a run folder, also of one that keeps the options in its config; none for adapters.

    Raises:
        CheckpointError: if they cannot be read.
    """
    if not (folder / CONFIG).is_file():
        return {}
    geometry = read_json_object(folder / CONFIG)
    recorded = as_object(geometry.pop("_metadata", {}), f"{folder / CONFIG}: _metadata")
    beside = folder / OPTIONS_FILE
    options = read_json_object(beside) if beside.is_file() else recorded.get("options", {})
    return {CONFIG: _text(geometry), OPTIONS_FILE: _text(options)}


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def release_files(config: RunConfig, entry: Entry) -> dict[str, Path | str]:
    """Names in the release -> files of the run folder, or their text."""
    if config.adapter.type == "none":
        names, texts = ("model.safetensors", "ema.safetensors"), config_texts(config.output_dir)
    else:
        names, texts = (f"{config.run.name}.safetensors", f"{config.run.name}_ema.safetensors"), {}
    origins = {name: origin for name, origin in zip(names, (entry.model, entry.ema)) if origin}
    return {
        **{name: config.output_dir / origin for name, origin in origins.items()},
        **texts,
        CARD: model_card(config, entry),
    }


def model_card(config: RunConfig, entry: Entry) -> str:
    """Text of the card."""
    name, adapters = config.run.name, config.adapter.type != "none"
    contents = """`model.safetensors` holds the trained weights, `ema.safetensors` their moving average, `config.json` the geometry and
`options.json` the options of training, which stand in the header of the weights too."""
    if adapters:
        contents = (
            f"`{name}.safetensors` is a LoRA of rank {config.adapter.rank} under the names of musubi-tuner and sd-scripts; "
            "`python -m musubi_tuner.convert_lora` writes those of diffusers and ComfyUI."
        )
    return f"""---
library_name: musubi-tinyflux
---
# {name}

{"A LoRA on " if adapters else ""}{config.spec.title} trained for {entry.step} updates with musubi-tinyflux {__version__}.

{contents}
"""


def write_release(config: RunConfig, entry: Entry) -> Path:
    """Write the folder `release` of a run; returns it."""
    folder = config.output_dir / "release"
    folder.mkdir(exist_ok=True)
    for name, content in release_files(config, entry).items():
        if isinstance(content, str):
            write_text(folder / name, content)
        else:
            replace_file(folder / name, partial(shutil.copyfile, content))
    return folder
