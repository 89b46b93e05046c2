"""The command that draws pictures, shared by all families."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.config.command_line import Parser, split_overrides
from musubi_tuner.config.prompts import Prompt, as_prompts, read_prompts
from musubi_tuner.config.rules.files import prompt_problems
from musubi_tuner.errors import EXIT_OK, ConfigError, UserError, advise_on_memory, run_command
from musubi_tuner.models.registry import MODELS
from musubi_tuner.stopping import exit_on_terminate


def main(architecture: str, description: str, arguments: Sequence[str] | None = None) -> int:
    """Run the command of one family and return its exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    return run_command(lambda: _main(architecture, description, words))


def _parser(architecture: str, description: str) -> Parser:
    parser = Parser(
        prog=f"{MODELS[architecture].full_name}_generate_image",
        description=description,
        epilog="Every setting of the run file is an option too, such as --sample_steps or --set sample.guidance=3.\n"
        "A prompt may end in options of its own: --w 768 --h 512 --d SEED --s STEPS --g GUIDANCE --l CFG_SCALE --fs SHIFT\n"
        "--n NEGATIVE PROMPT --m ADAPTER_STRENGTH --name FILE_NAME_PART",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="run file (TOML)")
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be given several times")
    parser.add_argument("--from_file", metavar="FILE", help="prompt file: .txt with one per line, .toml or .json")
    parser.add_argument(
        "--checkpoint",
        help="file, folder, folder:name (final, latest, step_1000), such a name alone for the run's own, or hub id",
    )
    parser.add_argument("--raw_weights", action="store_true", help="draw with the trained weights, not their average")
    parser.add_argument("--lora_weight", nargs="+", default=[], metavar="FILE", help="adapters to draw with; a run that trains "
                        "one draws with its own unless given ('none' = without)")  # fmt: skip
    parser.add_argument(
        "--lora_multiplier", nargs="+", type=float, default=[], metavar="X", help="strength of each (default 1)"
    )
    parser.add_argument(
        "--save_path",
        default="samples",
        metavar="FOLDER",
        help="where pictures go (default: samples); none is replaced",
    )
    parser.add_argument("--images_per_prompt", type=int, default=1, metavar="N", help="pictures of each prompt")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="pictures drawn together (default: 8)")
    return parser


def _main(architecture: str, description: str, arguments: Sequence[str]) -> int:
    parser = _parser(architecture, description)
    own = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    passed, overrides = split_overrides(arguments, own)
    options = parser.parse_args(passed)
    # Rules about caching and training do not matter here: nothing is cached.
    config = load_config(options.config, {"cache.run": "never", **overrides})
    config.require(architecture)
    for name in ("images_per_prompt", "batch_size"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}, expected at least 1")
    prompts = as_prompts(options.prompt, "--prompt")
    if options.from_file:
        prompts += read_prompts(Path(options.from_file))
    if not prompts:
        raise ConfigError("nothing to draw: give --prompt or --from_file")
    adapters = _adapters(config, options)
    problems = [problem for prompt in prompts for problem in prompt_problems(prompt, config.spec, bool(adapters))]
    if problems:
        raise ConfigError("\n".join(problems))
    prompts = [_numbered(prompt, number) for prompt in prompts for number in range(options.images_per_prompt)]
    exit_on_terminate()
    from musubi_tuner.training.generate import Generator
    from musubi_tuner.training.sampling import contact_sheet, file_part, picture_text, save_new_png

    folder = Path(options.save_path)
    folder.mkdir(parents=True, exist_ok=True)
    with advise_on_memory(UserError, 'lower --batch_size, draw smaller pictures or set memory.blocks_to_swap = "auto"'):
        generator = Generator.from_run(config, options.checkpoint, ema=not options.raw_weights, adapters=adapters)
        settings = generator.settings()
        with tqdm(total=len(prompts), desc="drawing", unit="image", disable=None) as bar:
            pictures = generator.draw(prompts, settings, batch_size=options.batch_size, progress=bar.update)
    number = -1
    for index, (prompt, picture) in enumerate(zip(prompts, pictures)):
        used = settings.of(prompt, index, config.spec.pixel_step)
        stem = f"{file_part(prompt.name) if prompt.name else config.run.name}_{used.seed:010d}"
        named = partial(_numbered_png, folder, stem)
        path, taken = save_new_png(named, number + 1, picture, picture_text(prompt, used))
        if taken > number + 1:
            print(f"note: {named(number + 1)} exists already; numbering continues at {taken:02d}")
        number = taken
        print(f"{path}: {prompt.text}")
    if len(pictures) > 1:
        sheet = contact_sheet(pictures, columns=4)
        path, number = save_new_png(lambda n: folder / f"contact_sheet{f'_{n:02d}' if n else ''}.png", 0, sheet)
        if number:
            print(f"{path}: all of them")
    return EXIT_OK


def _numbered_png(folder: Path, stem: str, number: int) -> Path:
    return folder / f"{stem}_{number:02d}.png"


def _numbered(prompt: Prompt, number: int) -> Prompt:
    """The n-th picture of a prompt: a seed of its own counts on from picture to picture."""
    return prompt if prompt.seed is None else replace(prompt, seed=prompt.seed + number)


def _adapters(config: RunConfig, options: argparse.Namespace) -> list[tuple[str, float]]:
    """Adapter files with their strengths."""
    files: list[str] = options.lora_weight
    strengths: list[float] = options.lora_multiplier
    if not files and config.adapter.type != "none":
        files = [str(config.output_dir)]
    elif files == ["none"]:
        files = []
    if len(strengths) > len(files):
        raise ConfigError(f"--lora_multiplier has {len(strengths)} numbers for {len(files)} files in --lora_weight")
    return list(zip(files, [*strengths, *[1.0] * (len(files) - len(strengths))]))
