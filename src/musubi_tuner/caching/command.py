"""The commands of the cache jobs: ``python cache_scripts/cache_latents.py CONFIG [options]`` and its two siblings."""

import argparse
import sys
from collections.abc import Sequence

from musubi_tuner.caching.job import JobOptions, parse_shard
from musubi_tuner.caching.status import needed_kinds
from musubi_tuner.config import load_config
from musubi_tuner.config.command_line import Parser, family_of, settings_help, split_overrides
from musubi_tuner.device import apply_backend_flags, choose_device, set_threads
from musubi_tuner.errors import EXIT_OK, ConfigError, run_command
from musubi_tuner.parent import has_parent_pipe, join_parent
from musubi_tuner.stopping import exit_on_terminate

_SUBJECT = {
    "latents": "Encode the images of a run into latents.",
    "text": "Encode the captions of a run with T5 and CLIP.",
    "experts": "Run the teachers over the items of a run and keep their features.",
}


def main(kind: str, arguments: Sequence[str] | None = None, *, architecture: str | None = None) -> int:
    """Run one cache job and return its exit code.

    Args:
        architecture: refuse run files of other families.
    """
    return run_command(lambda: _main(kind, sys.argv[1:] if arguments is None else arguments, architecture))


def _main(kind: str, arguments: Sequence[str], architecture: str | None) -> int:
    parser = Parser(
        description=f"{_SUBJECT[kind]} Files that are up to date are left alone; an interrupted job continues.",
        epilog="settings of the run file, also as options:\n" + settings_help(family_of(arguments)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="run file (TOML)")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="do part I of N, on several machines")
    parser.add_argument("--dry_run", action="store_true", help="only say what is due")
    parser.add_argument("--step", metavar="NAME", help="one step of a file that has several")
    own = {"--shard", "--dry_run", "--help"}
    passed, overrides = split_overrides(arguments, own)
    options = parser.parse_args(passed)
    is_child = has_parent_pipe()
    join_parent()
    exit_on_terminate()
    config = load_config(options.config, overrides)
    config.require(architecture)
    for finding in () if is_child else config.remarks:  # which the parent has printed
        if finding.level == "warning":
            print(f"warning: {finding}", file=sys.stderr)
    if kind not in needed_kinds(config):
        reason = (
            "experts.enable_lune and enable_sol are false"
            if config.spec.expert_keys
            else f"{config.spec.title} has none"
        )
        raise ConfigError(f"{options.config}: needs no {kind} cache ({reason})")
    job_options = JobOptions(parse_shard(options.shard), options.dry_run)
    if config.cache.run == "never" and not options.dry_run:
        print(f'{kind}: cache.run is "never", nothing is encoded')
        return EXIT_OK
    from musubi_tuner.caching.jobs import run_jobs

    set_threads(config.run.threads, 1)
    # Caches are made once and kept: in full float32.
    exact = config.run.model_copy(update={"allow_tf32": False})
    apply_backend_flags(exact, choose_device(config.run.device), sizes=2)
    family = config.spec.family.checkpoint_options(config)
    return run_jobs(config, kind, job_options, family)
