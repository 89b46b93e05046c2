"""Draw pictures from a TinyFlux checkpoint.

    python -m musubi_tuner.tinyflux_generate_image toml/demo.toml --prompt "a red circle on the left of a white background"
    python -m musubi_tuner.tinyflux_generate_image toml/tinyflux.toml --from_file prompts.txt --checkpoint run:step_5000

The run file names the encoders, the objective (its shift bends the sampling times too) and the defaults of [sample].
Without --checkpoint the run's own output folder is used.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from musubi_tuner.config import load_config
from musubi_tuner.config.command_line import Parser, split_overrides
from musubi_tuner.errors import EXIT_OK, ConfigError, exit_on_terminate, run_command

ARCHITECTURE = "tf"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))


def _parser() -> Parser:
    parser = Parser(
        prog="tinyflux_generate_image",
        description=__doc__,
        epilog="Every setting of the run file is an option too, such as --sample_steps or --set sample.guidance=3.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="run file (TOML)")
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be given several times")
    parser.add_argument("--from_file", metavar="FILE", help="text file with one prompt per line")
    parser.add_argument("--checkpoint", help="file, folder, folder:name (final, step_1000) or hub id")
    parser.add_argument("--raw_weights", action="store_true", help="draw with the trained weights, not their average")
    parser.add_argument("--save_path", default="samples", metavar="FOLDER", help="where pictures go (default: samples)")
    parser.add_argument("--images_per_prompt", type=int, default=1, metavar="N", help="pictures of each prompt")
    return parser


def _main(arguments: Sequence[str]) -> int:
    own = {"--prompt", "--from_file", "--checkpoint", "--raw_weights", "--save_path", "--images_per_prompt", "--help"}
    passed, overrides = split_overrides(arguments, own)
    options = _parser().parse_args(passed)
    # Rules about caching and training do not matter here: nothing is cached.
    config = load_config(options.config, {"cache.run": "never", **overrides})
    if config.spec.code != ARCHITECTURE:
        raise ConfigError(f"{options.config}: model.arch is {config.spec.full_name}, this command draws with TinyFlux")
    if options.images_per_prompt < 1:
        raise ConfigError(f"--images_per_prompt is {options.images_per_prompt}, expected at least 1")
    prompts = list(options.prompt)
    if options.from_file:
        from musubi_tuner.training.sampling import read_prompts

        prompts += read_prompts(Path(options.from_file))
    if not prompts:
        raise ConfigError("nothing to draw: give --prompt or --from_file")
    prompts = [prompt for prompt in prompts for _ in range(options.images_per_prompt)]
    exit_on_terminate()
    from tqdm import tqdm

    from musubi_tuner.training.generate import Generator
    from musubi_tuner.training.sampling import contact_sheet, save_png

    generator = Generator.from_run(config, options.checkpoint, ema=not options.raw_weights)
    settings = generator.settings()
    with tqdm(total=len(prompts), desc="drawing", unit="image", disable=None) as bar:
        pictures = generator.draw(prompts, settings, progress=bar.update)
    folder = Path(options.save_path)
    folder.mkdir(parents=True, exist_ok=True)
    for index, (prompt, picture) in enumerate(zip(prompts, pictures)):
        text = {"prompt": prompt, **vars(settings), "seed": settings.seed + index}
        path = folder / f"{config.run.name}_{settings.seed + index:010d}_{index:02d}.png"
        save_png(path, picture, text)
        print(f"{path}: {prompt}")
    if len(pictures) > 1:
        save_png(folder / "contact_sheet.png", contact_sheet(pictures, columns=4))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
