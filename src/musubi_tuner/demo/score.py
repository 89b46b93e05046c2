"""Score a finished demo run: ``python -m musubi_tuner.demo.score CONFIG``.

Draws pictures for trained and for held-out combinations with fresh noise, lets the checker say what they show, and
writes into the run folder:

    accuracy.json       colour, background, position, shape, all, unseen_all (shares), prompts, seconds
    contact_sheet.png   every picture with its caption, what the checker found wrong in red
    loss.png            the losses over the updates
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from musubi_tuner.config import RunConfig, load_config
from musubi_tuner.config.command_line import Parser, split_overrides
from musubi_tuner.demo.checker import check, score
from musubi_tuner.demo.pictures import Combination, combinations, held_out
from musubi_tuner.errors import EXIT_OK, ConfigError, run_command
from musubi_tuner.files import write_json
from musubi_tuner.parent import join_parent
from musubi_tuner.randomness import keyed_random
from musubi_tuner.stopping import exit_on_terminate
from musubi_tuner.training.curves import plot_losses, read_rows
from musubi_tuner.training.metrics import FILE

NAMES = ("colour", "background", "position", "shape", "all", "unseen_all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _main(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m musubi_tuner.demo.score", description="Score what a finished demo run draws.")
    parser.add_argument("config", help="run file (TOML) with a [demo] table")
    passed, overrides = split_overrides(arguments, {"--help"})
    config = load_config(parser.parse_args(passed).config, overrides)
    if config.demo is None:
        raise ConfigError(f"{config.path}: has no [demo] table")
    join_parent()
    exit_on_terminate()
    result = score_run(config)
    width = max(map(len, NAMES))
    print(f"score over {result['prompts']} prompts with fresh noise:")
    for name in NAMES:
        if result[name] is not None:
            print(f"  {name:<{width}}  {result[name]:6.1%}")
    print(f"see {config.output_dir / 'contact_sheet.png'}, loss.png and accuracy.json beside it")
    return EXIT_OK


def scored_prompts(config: RunConfig) -> tuple[list[Combination], set[Combination]]:
    """What is asked for, and which combinations were never trained: as evenly as possible, half of each kind."""
    demo = config.demo
    assert demo is not None
    unseen = held_out(demo.held_out, demo.seed)
    trained = [combination for combination in combinations() if combination not in set(unseen)]
    keyed_random(demo.score_seed, "score prompts").shuffle(trained)
    share = demo.score_prompts // 2 if unseen else 0
    wanted = [unseen[i % len(unseen)] for i in range(share)]
    wanted += [trained[i % len(trained)] for i in range(demo.score_prompts - share)]
    return wanted, set(unseen)


def score_run(config: RunConfig) -> dict[str, Any]:
    """Draw, check and write the files; returns the content of accuracy.json."""
    from musubi_tuner.training.generate import Generator

    begun = time.perf_counter()
    demo = config.demo
    assert demo is not None
    wanted, unseen = scored_prompts(config)
    generator = Generator.from_run(config)
    settings = generator.settings(seed=demo.score_seed, width=demo.size, height=demo.size)
    pictures = generator.draw([combination.caption for combination in wanted], settings, batch_size=40)
    result: dict[str, Any] = dict(score(pictures, wanted, unseen))
    result["seconds"] = round(time.perf_counter() - begun, 1)
    folder = config.output_dir
    _contact_sheet(folder / "contact_sheet.png", pictures, wanted, unseen)
    plot_losses(read_rows(folder / FILE), folder / "loss.png", config.run.name)
    write_json(folder / "accuracy.json", result)
    return result


def _contact_sheet(
    path: Path, pictures: Sequence[np.ndarray], wanted: Sequence[Combination], unseen: set[Combination]
) -> None:
    """All pictures, 12 in a row, enlarged twice, with captions below; what the checker finds wrong is red."""
    from musubi_tuner.training.sampling import save_png

    columns, margin, text_height = 12, 8, 42
    side = pictures[0].shape[0] * 2
    rows = -(-len(pictures) // columns)
    sheet = Image.new(
        "RGB", (columns * (side + margin) + margin, rows * (side + text_height + margin) + margin), "white"
    )
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for index, (picture, combination) in enumerate(zip(pictures, wanted)):
        left = margin + index % columns * (side + margin)
        top = margin + index // columns * (side + text_height + margin)
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (left, top))
        verdict = check(picture)
        right = (verdict.colour, verdict.background, verdict.position, verdict.shape) == (
            combination.colour, combination.background, combination.place, combination.shape,
        )  # fmt: skip
        lines = [f"{combination.colour} {combination.shape}", f"{combination.place}, {combination.background}"]
        if combination in unseen:
            lines.append("(never trained)")
        pen.rectangle(
            (left - 2, top - 2, left + side + 1, top + side + 1), outline="#999999" if right else "#d02020", width=2
        )
        pen.multiline_text(
            (left, top + side + 3), "\n".join(lines), fill="black" if right else "#d02020", font=font, spacing=1
        )
    save_png(path, np.asarray(sheet))


if __name__ == "__main__":
    sys.exit(main())
