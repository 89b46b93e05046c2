"""Draw the curves of a run as PNG files.

    python -m musubi_tuner.plot_metrics RUN

RUN is an output folder, or the run file (TOML) that names it. The files go into RUN/plots: losses.png, learning_rate.png,
gradient_norm.png, training_by_noise.png, loss_by_noise.png (with [validation]) and step_time.png. A run that still trains
can be drawn too. Of a file with steps, or their common folder, steps.png shows all of them; the folder of a step is drawn as a run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from musubi_tuner.config import load_config
from musubi_tuner.config.command_line import Parser
from musubi_tuner.config.load import load_steps
from musubi_tuner.errors import EXIT_OK, ConfigError, run_command
from musubi_tuner.files import encodable
from musubi_tuner.runner.steps import root_of, trained_steps
from musubi_tuner.stopping import exit_on_terminate
from musubi_tuner.training.metrics import FILE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="plot_metrics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="output folder of a run, or its run file")
    parser.add_argument("--output", metavar="FOLDER", help="where the pictures go (default: RUN/plots)")
    options = parser.parse_args(arguments)
    folder = Path(options.run)
    if folder.suffix == ".toml":
        steps = load_steps(folder)
        folder = root_of(steps[0]) if steps else load_config(folder).output_dir
    elif folder.is_file():
        raise ConfigError(f"{folder}: is a file; give the output folder of a run, or its run file (.toml)")
    elif not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give the output folder of a run, or its run file (.toml)")
    exit_on_terminate()
    from musubi_tuner.training.curves import plot_run, plot_steps

    output = Path(options.output) if options.output else folder / "plots"
    trained = trained_steps(folder)
    if trained:
        found = [(name, path / FILE) for name, path in trained if (path / FILE).is_file()]
        if not found:
            raise ConfigError(f"{folder}: none of its steps has logged anything yet")
        print(plot_steps(found, output / "steps.png", encodable(folder.resolve().name)))
        return EXIT_OK

    # A run folder holds the resolved config under the run's name.
    names = [path.name.removesuffix(".config.toml") for path in folder.glob("*.config.toml")]
    title = names[0] if len(names) == 1 else encodable(folder.resolve().name)
    made, missing = plot_run(folder / FILE, output, title)
    for path in made:
        print(path)
    if missing:
        print(f"not drawn, since the run has not logged such values: {', '.join(missing)}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
