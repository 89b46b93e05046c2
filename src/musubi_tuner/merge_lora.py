"""Fold adapter files into a model and write it as one file.

    python -m musubi_tuner.merge_lora --arch fd --dit flux1-dev.safetensors --lora_weight a.safetensors b.safetensors \\
        --lora_multiplier 0.8 0.5 --save_merged_model merged.safetensors

Layers are changed one by one, in float32; the result is stored in the dtype of the model.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from musubi_tuner.config.command_line import Parser, weights_to_write
from musubi_tuner.errors import EXIT_OK, ConfigError, run_command
from musubi_tuner.files import replace_file
from musubi_tuner.models.registry import MODELS
from musubi_tuner.stopping import exit_on_terminate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="merge_lora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dit", required=True, help="model: a file, a folder or a hub id")
    parser.add_argument("--arch", help="model family (fd, tf); absent = that of the first LoRA")
    parser.add_argument(
        "--lora_weight",
        nargs="+",
        required=True,
        metavar="FILE",
        help="adapter files of any naming and type, or folders of peft and diffusers",
    )
    parser.add_argument(
        "--lora_multiplier", nargs="+", type=float, default=[], metavar="X", help="strength of each (default 1)"
    )
    parser.add_argument("--save_merged_model", required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument("--ignore_unmatched", action="store_true", help="leave out whole layers that the model has not")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    options = parser.parse_args(arguments)
    files, strengths = options.lora_weight, options.lora_multiplier
    if strengths and len(strengths) != len(files):
        raise ConfigError(f"--lora_multiplier has {len(strengths)} numbers for {len(files)} files in --lora_weight")
    output = weights_to_write("--save_merged_model ", options.save_merged_model, options.overwrite)
    exit_on_terminate()
    from musubi_tuner.adapters.files import read_adapter
    from musubi_tuner.adapters.merging import merge
    from musubi_tuner.tensors import save_tensors

    if options.arch is not None and options.arch not in MODELS:
        raise ConfigError(f"--arch {options.arch}: is not a model family; known: {', '.join(MODELS)}")
    family = MODELS[options.arch] if options.arch else None
    adapters = [read_adapter(file, family, ignore_unmatched=options.ignore_unmatched) for file in files]
    spec = adapters[0].spec
    base = spec.family.load_checkpoint(options.dit)
    model = spec.family.load_to_merge(base)
    for adapter, strength in zip(
        tqdm(adapters, desc="merging", unit="file", disable=None), strengths or [1.0] * len(files)
    ):
        report = merge(
            model,
            adapter.tensors,
            spec.adapters,
            strength,
            ignore_unmatched=options.ignore_unmatched,
            what=str(adapter.path),
        )
        skipped = [*adapter.skipped, *report.skipped]
        print(f"{adapter.path}: at {strength:g} into {report.layers} layers, changes {report.ratio:.2%} of their norm"
              + (f"; {adapter.alphas}" if adapter.alphas else "")
              + (f"; not used: {', '.join(skipped)}" if skipped else ""))  # fmt: skip
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    kept = {key: value for key, value in base.metadata.items() if key != "_quantization_metadata"}
    # The merged file stands alone, whatever lay beside that of the model.
    stated = dict(base.options)
    hiding = [str(adapter.path) for adapter in adapters if adapter.hides_padding]
    if hiding and not stated.get("t5_attn_mask"):
        stated["t5_attn_mask"] = True
        print(
            f"note: padding is hidden (model.t5_attn_mask = true) from now on, as in the training of {', '.join(hiding)}"
        )
    if base.config is not None:
        kept["config_json"] = json.dumps(base.config)
    if base.config is not None or stated:
        kept["options_json"] = json.dumps(stated)
    metadata = {**kept, "modelspec.merged_from": ", ".join(Path(file).name for file in files)}
    replace_file(output, partial(save_tensors, tensors, metadata=metadata))
    print(f"{output}: {spec.title} with {len(files)} adapter(s) merged, {len(tensors)} tensors")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
