"""Draw with the flags of the published FluxFlow program: every .txt file of a folder is a prompt.

    fluxflow-generate --model_checkpoint outputs/flxflow_final.safetensors --text_prompts_path prompts --output_path pictures --use_cfg --guidance_scale 3

Pictures are <stem>_gen.webp. The checkpoint is a file, a folder of the published program, or a run folder; its geometry is read from it, so flags of
widths are not needed and are compared with it. `python -m musubi_tuner.fluxflow_generate_image` draws with a run file and has more options.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from musubi_tuner.config.command_line import Parser
from musubi_tuner.config.load import load_document
from musubi_tuner.config.prompts import Prompt
from musubi_tuner.errors import EXIT_OK, ConfigError, run_command
from musubi_tuner.files import read_text, replace_file

if TYPE_CHECKING:
    from PIL.Image import Image

TOKENS = 128
"""Of the published trainer."""
WIDTHS = {"vae_dim": "vae_dim", "feature_maps_dim": "feature_maps_dim", "text_embedding_dim": "text_embedding_dim"}
"""Flag -> field of the geometry that it must agree with."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _main(arguments))


def _parser() -> Parser:
    parser = Parser(prog="fluxflow-generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_checkpoint", required=True, help="file, folder or run folder")
    parser.add_argument(
        "--text_prompts_path", required=True, metavar="FOLDER", help="folder of .txt files, one prompt each"
    )
    parser.add_argument("--output_path", required=True, metavar="FOLDER", help="where pictures go")
    parser.add_argument("--batch_size", type=int, default=1, help="pictures drawn together")
    parser.add_argument("--workers", type=int, help="not needed")
    parser.add_argument("--img_size", type=int, default=512, help="side of the pictures in pixels")
    parser.add_argument("--ddim_steps", type=int, default=50, help="solver steps")
    parser.add_argument("--solver", choices=("dpm++", "ddim"), default="dpm++")
    parser.add_argument("--seed", type=int, default=42, help="picture i is drawn from seed + i")
    parser.add_argument(
        "--tokenizer_name",
        help="folder or hub id; absent = beside the checkpoint, else that of distilbert-base-uncased",
    )
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="with --use_cfg")
    parser.add_argument("--use_cfg", action="store_true", help="classifier-free guidance")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that are there")
    for flag in WIDTHS:
        parser.add_argument(f"--{flag}", type=int, help="compared with the checkpoint")
    return parser


def _main(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    if options.batch_size < 1:
        raise ConfigError(f"--batch_size is {options.batch_size}, expected at least 1")
    if options.workers is not None:
        print("note: --workers is not needed: prompts are read at once")
    if options.guidance_scale != 1 and not options.use_cfg:
        print("note: --guidance_scale acts only with --use_cfg")
    folder, target = Path(options.text_prompts_path), Path(options.output_path)
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    if not files:
        raise ConfigError(
            f"--text_prompts_path {folder}: holds no .txt files"
            if folder.is_dir()
            else f"--text_prompts_path {folder}: no such folder"
        )
    there = [path.stem for path in files if (target / f"{path.stem}_gen.webp").exists()]
    if there and not options.overwrite:
        raise ConfigError(
            f"--output_path {target}: {there[0]}_gen.webp exists already ({len(there)} such); add --overwrite, or choose another folder"
        )
    name = options.tokenizer_name
    tokenizer = f"distilbert/{name}" if name and name.startswith("distilbert-") else name
    document = {
        "schema_version": 1,
        "run": {"name": "generate", "output_dir": str(target)},
        "model": {
            "arch": "ff",
            "path": options.model_checkpoint,
            **({"bert_tokenizer": tokenizer} if tokenizer else {}),
        },
        "objective": {"train_diff": True},
        "train": {"max_steps": 1},
        "cache": {"run": "never"},
        "sample": {
            "width": options.img_size,
            "height": options.img_size,
            "steps": options.ddim_steps,
            "solver": options.solver,
            "seed": options.seed,
            "guidance": options.guidance_scale if options.use_cfg else 1.0,
        },
        "datasets": [{"image_directory": str(folder)}],
    }
    config = load_document(document)
    prompts = [Prompt(read_text(path, ConfigError).strip()) for path in files]

    from PIL.Image import fromarray

    from musubi_tuner.models.fluxflow.checkpoint import geometry_of
    from musubi_tuner.training.generate import Generator

    geometry = geometry_of(config)
    for flag, field in WIDTHS.items():
        wanted, found = getattr(options, flag), getattr(geometry, field)
        if wanted not in (None, found):
            raise ConfigError(f"--{flag} is {wanted}, but the checkpoint has {found}; leave the flag out")
    # The checkpoint may take fewer tokens than the published one.
    config = load_document(document, {"model.text_max_tokens": min(TOKENS, geometry.text_positions)})
    generator = Generator.from_run(config, options.model_checkpoint)
    pictures = generator.draw(prompts, generator.settings(), batch_size=options.batch_size)
    target.mkdir(parents=True, exist_ok=True)
    for path, picture in zip(files, pictures, strict=True):
        out = target / f"{path.stem}_gen.webp"
        replace_file(out, partial(_save, fromarray(picture)))
        print(f"{out}: {read_text(path, ConfigError).strip()}")
    return EXIT_OK


def _save(image: "Image", path: Path) -> None:
    image.save(path, format="WEBP", lossless=True)


if __name__ == "__main__":
    sys.exit(main())
