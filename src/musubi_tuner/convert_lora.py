"""Rewrite an adapter under the names of another program; the weight changes stay the same.

    python -m musubi_tuner.convert_lora --input cat.safetensors --output cat_comfy.safetensors --target comfyui
    python -m musubi_tuner.convert_lora --input peft.safetensors --output cat.safetensors --target musubi

Targets: musubi (the same as kohya, sd-scripts; musubi-tuner calls it "default"), comfyui (musubi-tuner: "other"), diffusers, and
published: the form of a family's own trainer (TinyFlux v4.2), whose alphas stand in the header. comfyui and diffusers files hold
no alpha: it is in the matrices, exactly, for which a layer may be written in float32.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

from musubi_tuner.config.command_line import Parser, weights_to_write
from musubi_tuner.errors import EXIT_OK, ConfigError, run_command
from musubi_tuner.models.registry import MODELS
from musubi_tuner.stopping import exit_on_terminate

TARGETS: dict[str, Literal["musubi", "comfyui", "diffusers", "published"]] = {"musubi": "musubi", "kohya": "musubi", "default": "musubi", "comfyui": "comfyui", "other": "comfyui",
           "diffusers": "diffusers", "published": "published"}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="convert_lora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="adapter file of any naming, or a folder of peft or diffusers")
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument("--target", required=True, choices=sorted(TARGETS), help="names to write")
    parser.add_argument("--arch", help="model family (fd, tf); absent = as the file says, or as its names fit")
    parser.add_argument("--diffusers_prefix", default="diffusion_model", help="first word of comfyui names")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    options = parser.parse_args(arguments)
    output = weights_to_write("--output ", options.output, options.overwrite)
    exit_on_terminate()
    from musubi_tuner.adapters.convert import convert, to_published
    from musubi_tuner.adapters.files import named_for_files, read_adapter, save_adapter, why_skipped

    if options.arch is not None and options.arch not in MODELS:
        raise ConfigError(f"--arch {options.arch}: is not a model family; known: {', '.join(MODELS)}")
    file = read_adapter(options.input, MODELS[options.arch] if options.arch else None)
    if file.alphas:
        print(f"{file.path}: {file.alphas}")
    for reason, keys in groupby(sorted(file.skipped, key=why_skipped), why_skipped):
        first, *others = keys
        print(f"left out: {1 + len(others)} keys of {reason or 'no layer'}s ({first}{', ...' if others else ''})")
    target = TARGETS[options.target]
    header: dict[str, str] = {}
    metadata = {"ss_base_model_version": file.spec.full_name, **file.metadata}
    if target == "published":
        tensors, header = to_published(file.tensors, file.spec)
    else:
        tensors = convert(file.tensors, target, arch=file.spec.code, prefix=f"{options.diffusers_prefix}.")
        tensors = named_for_files(tensors) if target == "musubi" else tensors
        if target != "musubi" and "ss_network_dim" in metadata:
            metadata["ss_network_alpha"] = metadata["ss_network_dim"]  # alpha is in the matrices
    save_adapter(output, tensors, {**metadata, **header})
    print(f"{output}: {len(tensors)} tensors under {target} names, for {file.spec.title}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
