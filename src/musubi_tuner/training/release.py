"""The files by which a finished model is loaded: weights, average, config and a short model card.

The same files make the folder `release` of a run and the root of its repository on the hub, so that `from_pretrained`
takes either.
"""

import shutil
from functools import partial
from pathlib import Path

from musubi_tuner import __version__
from musubi_tuner.config import RunConfig
from musubi_tuner.files import replace_file, write_text
from musubi_tuner.training.checkpoint import Entry

CARD = "README.md"


def release_files(config: RunConfig, entry: Entry) -> dict[str, str]:
    """Names in the release -> files of the run folder."""
    if config.adapter.type == "none":
        files = {"model.safetensors": entry.model, "ema.safetensors": entry.ema, "config.json": "config.json"}
    else:
        name = config.run.name
        files = {f"{name}.safetensors": entry.model, f"{name}_ema.safetensors": entry.ema}
    return {name: origin for name, origin in files.items() if origin}


def model_card(config: RunConfig, entry: Entry) -> str:
    """Text of the card."""
    name, adapters = config.run.name, config.adapter.type != "none"
    contents = """`model.safetensors` holds the trained weights, `ema.safetensors` their moving average, `config.json` the geometry and the
options of training."""
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
    for name, origin in release_files(config, entry).items():
        replace_file(folder / name, partial(shutil.copyfile, config.output_dir / origin))
    write_text(folder / CARD, model_card(config, entry))
    return folder
