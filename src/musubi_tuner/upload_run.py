"""Upload what the folder of a run holds to the hub: what was not uploaded while it trained, or all of it elsewhere.

    python -m musubi_tuner.upload_run RUN.toml
    python -m musubi_tuner.upload_run RUN.toml --repo_id owner/name

[hub] of the run file says where things go and what is left out; settings are options, as of train.py. All checkpoints,
samples, logs and the release are uploaded; the hub takes over nothing that it has already. A run that still trains can
be uploaded too.
"""

import argparse
import sys
from collections.abc import Sequence

from musubi_tuner.config import load_config
from musubi_tuner.config.command_line import Parser, split_overrides
from musubi_tuner.errors import EXIT_FAILED, EXIT_OK, ConfigError, run_command
from musubi_tuner.stopping import exit_on_terminate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; 1 if something was not uploaded."""
    return run_command(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))


def _main(arguments: Sequence[str]) -> int:
    passed, overrides = split_overrides(arguments, {"--help"})
    parser = Parser(prog="upload_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="RUN.toml", help="run file, or the <name>.config.toml of an output folder")
    options = parser.parse_args(passed)
    exit_on_terminate()
    config = load_config(options.config, overrides)
    if config.hub.repo_id is None:
        raise ConfigError(f"{config.path}: hub.repo_id is absent; add --repo_id owner/name")
    from musubi_tuner.training.checkpoint import LIST_FILE
    from musubi_tuner.training.uploads import RunUploads

    if not (config.output_dir / LIST_FILE).is_file():
        raise ConfigError(f"run.output_dir {config.output_dir}: holds no checkpoint yet")
    uploads = RunUploads(config, patient=True)
    uploads.everything()
    uploads.finish()
    return EXIT_FAILED if uploads.uploader.failed else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
