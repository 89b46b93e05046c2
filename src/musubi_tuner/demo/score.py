"""Score a finished demo run: ``python -m musubi_tuner.demo.score CONFIG``.

Draws pictures for trained and for held-out combinations with fresh noise, lets the checker say what they show, and
writes into the run folder:

    accuracy.json       colour, background, position, shape, all, unseen_all (shares), prompts, seconds; of a run with an autoencoder of its
                        own also reconstruction: the same shares for pictures of combinations that were never trained, PSNR, and the mean
                        difference with the right latents and with those of another picture
    contact_sheet.png   every picture with its caption, what the checker found wrong in red
    reconstructions.png pairs of such pictures and what the autoencoder makes of them
    loss.png            the losses over the updates

Of such a run the score of the same pictures with other captions is given too (shuffled), and what guessing would reach (chance).
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
from musubi_tuner.demo.pictures import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    Combination,
    combinations,
    draw,
    held_out,
)
from musubi_tuner.demo.recipe import has_clip_and_t5
from musubi_tuner.device import choose_device, set_threads, with_precision
from musubi_tuner.errors import EXIT_OK, ConfigError, run_command
from musubi_tuner.files import write_json
from musubi_tuner.parent import join_parent
from musubi_tuner.randomness import keyed_random
from musubi_tuner.stopping import exit_on_terminate
from musubi_tuner.training.curves import plot_losses, read_rows
from musubi_tuner.training.metrics import FILE

NAMES = ("colour", "background", "position", "shape", "all", "unseen_all")
SHOWN = 128
"""Side of a small picture on a sheet, in pixels."""
CHANCE = {
    "colour": 1 / len(COLOURS),
    "background": 1 / len(BACKGROUNDS),
    "position": 1 / len(PLACES),
    "shape": 1 / len(SHAPES),
}


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
    found = result.get("reconstruction")
    if found:
        print(f"reconstructions of {found['pictures']} pictures that were never trained: PSNR {found['psnr']:.1f} dB,")
        print(f"difference {found['difference']:.4f}, with the latents of another picture {found['swapped']:.4f}")
        _print_scores(found)
    if "prompts" in result:
        print(f"score over {result['prompts']} prompts with fresh noise:")
        _print_scores(result)
    sheet = "contact_sheet.png" if "prompts" in result else "reconstructions.png"
    print(f"see {config.output_dir / sheet}, loss.png and accuracy.json beside it")
    return EXIT_OK


def _print_scores(result: dict[str, Any]) -> None:
    width = max(map(len, NAMES))
    for name in NAMES:
        if result.get(name) is not None:
            print(f"  {name:<{width}}  {result[name]:6.1%}")


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
    begun, folder = time.perf_counter(), config.output_dir
    facts, own = config.spec.task(config), not has_clip_and_t5(config)
    result: dict[str, Any] = _score_drawings(config) if facts.has("sample.prompts") else {}
    if own:
        result |= {"reconstruction": _score_reconstructions(config), "chance": CHANCE}
    result["seconds"] = round(time.perf_counter() - begun, 1)
    plot_losses(read_rows(folder / FILE), folder / "loss.png", config.run.name)
    write_json(folder / "accuracy.json", result)
    return result


def _score_drawings(config: RunConfig) -> dict[str, Any]:
    """Draw what the prompts ask for, and say how much of it is there."""
    from musubi_tuner.training.generate import Generator

    demo = config.demo
    assert demo is not None
    wanted, unseen = scored_prompts(config)
    generator = Generator.from_run(config)
    settings = generator.settings(seed=demo.score_seed, width=demo.size, height=demo.size)
    pictures = generator.draw([combination.caption for combination in wanted], settings, batch_size=40)
    _contact_sheet(config.output_dir / "contact_sheet.png", pictures, wanted, unseen)
    found: dict[str, Any] = dict(score(pictures, wanted, unseen))
    return found if has_clip_and_t5(config) else {**found, "shuffled": shuffled_score(pictures, wanted)}


def shuffled_score(pictures: Sequence[np.ndarray], wanted: Sequence[Combination]) -> dict[str, float]:
    """Mean scores over all ways to deal the captions to other pictures by turning their list."""
    found = [check(picture) for picture in pictures]
    scores = {}
    for name, field in (("colour", "colour"), ("background", "background"), ("position", "place"), ("shape", "shape")):
        shown, asked = [getattr(verdict, name) for verdict in found], [getattr(each, field) for each in wanted]
        turns = [asked[turn:] + asked[:turn] for turn in range(1, len(asked))]
        hits = [one == other for turned in turns for one, other in zip(shown, turned, strict=True)]
        scores[name] = sum(hits) / len(hits)
    return scores


def _score_reconstructions(config: RunConfig) -> dict[str, Any]:
    """What the trained autoencoder makes of new pictures of combinations that were never trained."""
    import torch

    demo = config.demo
    assert demo is not None
    unseen = held_out(demo.held_out, demo.seed) or combinations()
    wanted = [unseen[number % len(unseen)] for number in range(demo.score_prompts)]
    drawn = [
        draw(each, np.random.default_rng(np.random.SeedSequence([demo.score_seed, number])), demo.size, demo.size)
        for number, each in enumerate(wanted)
    ]
    set_threads(config.run.threads, 1)
    device = choose_device(config.run.device)
    vae = config.spec.encoders.open_autoencoder(with_precision(trained(config)), device)
    pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = torch.cat([vae.encode(part, None, False) for part in pixels.split(40)])
    made = torch.cat([vae.decode(part, False).cpu() for part in latents.split(40)])
    swapped = torch.cat([vae.decode(part, False).cpu() for part in latents.roll(1, 0).split(40)])
    error = (made - pixels).square().flatten(1).mean(dim=1)
    shown = [((one + 1) * 127.5).round().byte().permute(1, 2, 0).numpy() for one in made]
    _pairs(config.output_dir / "reconstructions.png", drawn, shown)
    found = score(shown, wanted, set())
    return {
        "psnr": float((10 * torch.log10(4 / error)).mean()),
        "difference": float((made - pixels).abs().mean()),
        "swapped": float((swapped - pixels).abs().mean()),
        **{name: found[name] for name in NAMES[:-1]},
        "pictures": len(wanted),
    }


def trained(config: RunConfig) -> RunConfig:
    """A config whose model is what a run has made: the average, if there is one."""
    weights = "ema" if config.ema.enabled else "model"
    own = {"init": "checkpoint", "path": str(config.output_dir), "weights": weights, "geometry": {}}
    return config.model_copy(update={"model": config.model.model_copy(update=own)})


def enlarged(picture: np.ndarray) -> int:
    """Side of a picture on a sheet: at least twice its own, and wide enough for a caption."""
    side: int = picture.shape[0]
    return side * max(2, SHOWN // side)


def _pairs(path: Path, pictures: Sequence[np.ndarray], made: Sequence[np.ndarray]) -> None:
    """Pictures with what was made of them below, 12 pairs in a row, enlarged."""
    from musubi_tuner.training.sampling import save_png

    columns, margin = 12, 8
    side, rows = enlarged(pictures[0]), -(-len(pictures) // columns)
    height = 2 * side + 2
    sheet = Image.new("RGB", (columns * (side + margin) + margin, rows * (height + margin) + margin), "white")
    for index, pair in enumerate(zip(pictures, made, strict=True)):
        left, top = margin + index % columns * (side + margin), margin + index // columns * (height + margin)
        for number, picture in enumerate(pair):
            large = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(large, (left, top + number * (side + 2)))
    save_png(path, np.asarray(sheet))


def _contact_sheet(
    path: Path, pictures: Sequence[np.ndarray], wanted: Sequence[Combination], unseen: set[Combination]
) -> None:
    """All pictures, 12 in a row, enlarged, with captions below; what the checker finds wrong is red."""
    from musubi_tuner.training.sampling import save_png

    columns, margin, text_height = 12, 8, 42
    side = enlarged(pictures[0])
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
