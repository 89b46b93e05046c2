"""The command behind `train.py`: check everything, print the plan, run the due stages as child processes, train.

Running it again continues: a run is resumed from its newest good state, a finished one prints that it is, and a changed config is
refused with the list of differences.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musubi_tuner.config import RunConfig, Steps, load_config
from musubi_tuner.config.command_line import (
    Parser,
    family_of,
    override_arguments,
    secret_environment,
    settings_help,
    split_overrides,
)
from musubi_tuner.config.diagnostics import Diagnostic
from musubi_tuner.config.load import STEP, load_steps
from musubi_tuner.config.paths import is_hub_id, is_published
from musubi_tuner.device import choose_device, with_precision
from musubi_tuner.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPT,
    EXIT_OK,
    CacheError,
    CheckpointError,
    ConfigError,
    Interrupted,
    mask_secrets,
    run_command,
)
from musubi_tuner.files import folder_lock, read_text, remove_leftovers
from musubi_tuner.models.registry import MODELS
from musubi_tuner.models.spec import ModelSpec
from musubi_tuner.parent import has_parent_pipe, join_parent
from musubi_tuner.run_record import (
    CONSOLE,
    CONTROL,
    EXIT_FILE,
    FAILED,
    FINISHED,
    RUN_FILE,
    STOPPED,
    begin,
    end,
    recorder,
    tell,
    was_stopped,
)
from musubi_tuner.runner.processes import launched_processes, rank_environments, run_child, run_children
from musubi_tuner.runner.steps import refuse_unfinished, root_of, run_steps
from musubi_tuner.stopping import exit_on_terminate, is_stop
from musubi_tuner.weights.hub import local_only

if TYPE_CHECKING:
    from musubi_tuner.data.item import Item
    from musubi_tuner.planning.plan import Plan
    from musubi_tuner.training.ranks import Ranks

SCHEDULE_PLOT = ".schedule.png"
"""Of the name of a plan's picture, after that of the run."""
_DESCRIPTION = """Train a model from one TOML file: encode images, captions and teacher features once, then train.
Run the same command again to continue."""


def main(arguments: Sequence[str] | None = None, *, architecture: str | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        architecture: refuse run files of other families.
    """
    return run_command(lambda: _main(sys.argv[1:] if arguments is None else list(arguments), architecture))


def _parser(spec: ModelSpec | None = None) -> Parser:
    parser = Parser(
        prog="train.py",
        description=_DESCRIPTION,
        epilog="settings of the run file, which are also options:\n" + settings_help(spec),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", help="run file (TOML); without it the run files here are listed")
    parser.add_argument("--plan", "--dry_run", action="store_true", help="print the plan and stop")
    parser.add_argument("--plot", action="store_true", help="with --plan: draw the learning rate into run.output_dir")
    parser.add_argument("--fresh", action="store_true", help="start over in a new folder beside run.output_dir")
    parser.add_argument("--cache_only", action="store_true", help="stop after the cache jobs")
    parser.add_argument("--skip_cache", action="store_true", help="use the caches without checking them")
    parser.add_argument("--step", metavar="NAME", help="run one step of a file with several")
    return parser


def _main(arguments: Sequence[str], architecture: str | None) -> int:
    own = {"--plan", "--dry_run", "--plot", "--fresh", "--cache_only", "--skip_cache", "--help"}
    passed, overrides = split_overrides(arguments, own)
    parser = _parser(MODELS[architecture] if architecture else family_of(passed))
    options = parser.parse_args(passed)
    refuse_upstream()
    if options.config is None:
        return list_run_files()
    if options.plot and not options.plan:
        raise ConfigError("--plot: draws the learning rate of the plan; add --plan")
    join_parent()
    exit_on_terminate()
    if "TORCHELASTIC_RUN_ID" in os.environ and not has_parent_pipe():
        return run_beside_agent()
    launched = launched_processes()
    under_launcher = launched > 1 or "ACCELERATE_MIXED_PRECISION" in os.environ
    if under_launcher:
        return _main_launched(options, overrides, architecture, launched)
    steps = [] if STEP in overrides else load_steps(options.config, overrides)
    if steps:
        return _run_steps(steps, options, overrides, architecture)
    config = load_config(options.config, overrides)
    if config.step is not None:
        return _run_steps([config], options, overrides, architecture)
    config.require(architecture)
    report(config.remarks)
    config = _resolved(config)
    if options.fresh:
        folder = fresh_folder(config.output_dir)
        overrides["run.output_dir"] = str(folder)
        config = _resolved(load_config(options.config, overrides))
        print(f"starting over in {folder}")
    runner = Runner(config, options, overrides)
    if not options.plan and not options.cache_only:
        return run_recorded(config.output_dir, config, runner.run, overrides)
    code = runner.run()
    if options.plot:
        plot_schedule([runner], config.output_dir)
    return code


def _main_launched(
    options: argparse.Namespace, overrides: dict[str, Any], architecture: str | None, processes: int
) -> int:
    """Be one process of a launcher."""
    for option in ("plan", "fresh", "cache_only"):
        if getattr(options, option):
            raise ConfigError(
                f"--{option}: does not work under a launcher, which only trains; run python train.py {options.config} --{option}"
            )
    config = load_config(options.config, overrides)
    config.require(architecture)
    # A run of several processes that train.py started is recorded there; under another launcher its main rank does it.
    is_recorder = int(os.environ.get("RANK", "0")) == 0 and recorder() is None
    if is_recorder:
        report(config.remarks)
    config = _resolved(config)

    refuse_unfinished(config)

    def train(*_: Any) -> int:
        return train_launched(config, processes, skip_cache=options.skip_cache)

    def record(can_write: bool) -> int:
        return train() if config.step is None else run_steps([config], options, overrides, train, can_write)

    return run_recorded(config.output_dir, config, record, overrides) if is_recorder else train()


def _run_steps(
    steps: list[RunConfig], options: argparse.Namespace, overrides: dict[str, Any], architecture: str | None
) -> int:
    """Go through the steps of a file, or run the one that --step names."""
    for config in steps:
        config.require(architecture)
        report(config.remarks)
    is_single = STEP in overrides
    if options.fresh:
        first = steps[0].step
        if is_single and first is not None and first.start != "file":
            raise ConfigError(
                f"--fresh: step {first.name} starts from the previous step, which a new folder does not have; leave out --step, "
                f"or remove {steps[0].output_dir} to train this step again"
            )
        root = fresh_folder(root_of(steps[0]))
        overrides["run.output_dir"] = str(root)
        steps = [load_config(options.config, overrides)] if is_single else load_steps(options.config, overrides)
        print(f"starting over in {root}")
    # All steps are recorded in their root; one that is run alone, in its own folder.
    folder = steps[0].output_dir if is_single else root_of(steps[0])

    runners: list[Runner] = []

    def run_step(config: RunConfig, given: dict[str, Any], can_write: bool) -> int:
        is_held = config.output_dir == folder or not can_write
        runners.append(Runner(_resolved(config), options, given))
        with nullcontext() if is_held else _hold(config.output_dir):  # from a start with --step
            return runners[-1].run(can_write)

    if options.plan or options.cache_only:
        code = run_steps(steps, options, overrides, run_step, False)
        if options.plot:
            plot_schedule(runners, folder)
        return code
    return run_recorded(folder, steps[0], lambda can: run_steps(steps, options, overrides, run_step, can), overrides)


def plot_schedule(runners: "Sequence[Runner]", folder: Path) -> None:
    """Draw the planned learning rates into a folder, and print the path.

    Args:
        runners: of the run, or of the steps of a file, which have made their plans.
    """
    from musubi_tuner.planning.schedule_plot import Part, draw_schedule

    parts = [
        Part(
            runner.config.step.name if runner.config.step else "",
            runner.config,
            runner.plan.steps.total_updates,
            int(runner.plan.state["step"]) if runner.plan.state else 0,
        )
        for runner in runners
        if runner.plan is not None
    ]
    if parts:
        name = parts[0].config.run.name
        print(f"  plot     {draw_schedule(parts, folder / f'{name}{SCHEDULE_PLOT}', name)}")


def run_recorded(folder: Path, config: RunConfig, body: Callable[[bool], int], overrides: Mapping[str, Any]) -> int:
    """Hold the folder of a run, and keep the record of a start.

    Args:
        config: of the run, or of its first step.
        body: gets whether the folder can be written to, and returns the exit code.
        overrides: of the command line.

    Raises:
        ConfigError: if another start works there.
    """

    with _hold(folder) as can_write:
        if not can_write:
            return body(False)
        remove_leftovers(folder)
        begin(folder, config.path, config.run.name, override_arguments(overrides))
        code, reason, message = EXIT_FAILED, FAILED, None
        try:
            code = body(True)
            reason = STOPPED if is_stop(code) or was_stopped(folder) else FAILED if code else FINISHED
            return code
        except (Interrupted, KeyboardInterrupt) as stop:
            code, reason = getattr(stop, "exit_code", EXIT_INTERRUPT), STOPPED
            raise
        except BaseException as error:
            code, message = getattr(error, "exit_code", EXIT_FAILED), mask_secrets(str(error))
            raise
        finally:
            end(code, reason, signum=code - 128 if code > 128 else None, message=message)


def _hold(folder: Path) -> AbstractContextManager[bool]:
    """Hold the folder of a run; yields whether it can be written to."""
    return folder_lock(
        folder,
        lambda holder: ConfigError(f"run.output_dir {folder}: {holder} is training here; wait for it or stop it"),
        must_write=False,
    )


def _resolved(config: RunConfig) -> RunConfig:
    """The config with what only this machine can say; torch is imported for it."""
    if config.train.mixed_precision != "auto":
        return config
    return with_precision(config)


def report(findings: list[Diagnostic]) -> None:
    """Print warnings and notes."""
    for finding in findings:
        print(f"{'note' if finding.level == 'info' else finding.level}: {finding}", file=sys.stderr)


def refuse_upstream() -> None:
    """Stop if the upstream package of the same import name is installed beside ours.

    Raises:
        ConfigError: saying which to remove.
    """
    try:
        other = distribution("musubi-tuner")
    except PackageNotFoundError:
        return
    raise ConfigError(
        f"musubi-tuner {other.version} is installed too; both packages are imported as musubi_tuner. Use a virtual "
        "environment of its own for this one, or run: pip uninstall musubi-tuner"
    )


def list_run_files() -> int:
    """Without a run file: list the run files in ./toml, and point to the demo."""
    files = sorted(Path("toml").glob("*.toml"))
    print("usage: python train.py RUN_FILE [options]   (--help lists them)\n")
    for path in files:
        text = read_text(path, ConfigError)
        if re.search(r"^\[run\]", text, re.MULTILINE):  # data set files have none
            comments = (line for line in text.splitlines() if re.match("#[^:]", line))
            print(f"  {path.as_posix():<32} {next(comments, '').lstrip('# ')}")
    if not files:
        print("  no run files in ./toml; run this in the project's folder")
    print("\nNew here? `python train.py toml/demo.toml` trains a small model on pictures it draws itself, in minutes.")
    return EXIT_OK


def fresh_folder(folder: Path) -> Path:
    """The first of folder-2, folder-3, ... in which no run was trained; the folder itself if it is new."""
    candidate, number = folder, 1
    while _is_used(candidate):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _is_used(folder: Path) -> bool:
    """Whether something is there, other than the record of a start that came to nothing, and the picture of a plan."""
    record = {RUN_FILE, EXIT_FILE, CONSOLE.parts[0], CONTROL, ".lock"}
    if not folder.is_dir():
        return folder.exists()
    names = {path.name for path in folder.iterdir()}
    plots = {name for name in names if name.endswith(SCHEDULE_PLOT)}
    is_record = RUN_FILE in names or bool(plots)
    return not (is_record and names - plots <= record)


class Runner:
    """Plan, stages, training of one start of `train.py` that is not under a launcher.

    Attributes:
        plan: that was made last; None = there is none yet.
    """

    def __init__(self, config: RunConfig, options: argparse.Namespace, overrides: dict[str, Any]) -> None:
        self.plan: Plan | None = None
        self.config, self.options, self.overrides = config, options, overrides
        self.processes = config.distributed.num_processes

    def run(self, can_write: bool = False) -> int:
        """Returns the exit code.

        Args:
            can_write: whether the run's folder is held and can be tidied.
        """
        config, options = self.config, self.options
        if config.demo is not None:
            code = self._prepare_demo()
            if code or (options.plan and not self._demo_is_ready()):
                return code
        from musubi_tuner.planning.plan import describe, make_plan

        tell(phase="plan")
        encode = config.cache.run != "never" and not options.skip_cache
        download = encode and not options.plan
        plan = self.plan = make_plan(config, self.processes, download=download, only_look=options.plan)
        for note in plan.found.notes:
            print(f"note: {note}")
        show_plan(config, describe(config, plan, self.processes))
        newest = f"{config.output_dir}: its newest state was made with another config"
        if options.plan:
            if plan.is_counted:
                self._refuse_changes(plan, newest, plan.state)
            self._plan_memory(plan)
            return EXIT_OK
        from musubi_tuner.training.checkpoint import refuse_second_branch

        if plan.is_counted and self._finished(plan, can_write):
            return self._score_demo()
        refuse_second_branch(config)
        if plan.is_counted:
            self._refuse_changes(plan, newest, plan.state)
        if plan.due and not encode and not options.skip_cache:
            self._refuse_due(plan.due)
        settled = None if options.cache_only else self._plan_memory(plan)
        for kind in plan.due if encode else ():
            code = self._stage(["-m", "musubi_tuner.caching", kind])
            current = recorder()
            if code or (current and was_stopped(current.folder)):
                return code
        if options.cache_only:
            return EXIT_OK
        if (
            plan.due and not options.skip_cache and any(dataset.stream for dataset in config.datasets)
        ):  # whose pictures are known by now
            plan = self.plan = make_plan(config, self.processes, download=False, encodes=False)
            show_plan(config, describe(config, plan, self.processes))
            if plan.due:
                kind = plan.due[0]
                reason = plan.status[kind].reasons[0][0]
                raise CacheError(
                    f"{kind}: {len(plan.status[kind].due)} files are not right ({reason}); run the same command again"
                )
            if self._finished(plan, can_write):
                return self._score_demo()
            self._refuse_changes(plan, newest, plan.state)
            settled = None
        if settled is None:
            settled = self._plan_memory(plan, last=True)  # the checkpoint may be fetched now
        code = self._train(settled, plan.found.items)
        current = recorder()
        return code if code or (current and was_stopped(current.folder)) else self._score_demo()

    def _plan_memory(self, plan: "Plan", last: bool = False) -> RunConfig | None:
        """Print what the run needs of memory, disk and time, where the model's shape is known without a download.

        Args:
            last: training is next, so the checkpoint may be downloaded, and no cache is missing.

        Returns:
            The config with a number of swapped blocks; None if the model's shape is not known yet.

        Raises:
            ConfigError: if this machine lacks what [memory] asks for, or "auto" finds no number of blocks that fits.
        """
        from musubi_tuner.assemble import check_adapter_file
        from musubi_tuner.planning.estimate import resolve_swap
        from musubi_tuner.planning.probe import probe
        from musubi_tuner.planning.report import estimate_lines, task_lines

        several = not self.config.spec.task(self.config).denoises
        if self.config.waits_for:
            print(f"  memory   is estimated when step {self.config.waits_for.name} is finished", flush=True)
            return self.config if several else None
        device = choose_device(self.config.run.device)
        machine = probe(self.config, self.overrides, self.processes, device)
        if several:
            print("\n".join(task_lines(self.config, plan.found.items, machine.free, self.processes)), flush=True)
            return self.config
        path, items = self.config.model.path, plan.found.items
        with local_only() if not last else nullcontext():
            if not last and path is not None and (is_hub_id(path) or is_published(path)):
                try:
                    self.config.spec.family.outline_model(self.config)
                except CheckpointError:
                    teachers = self.options.plan and self.config.spec.expert_keys
                    late = ", and its recorded teacher settings are read then" if teachers else ""
                    print(f"  memory   is estimated once the checkpoint is downloaded{late}", flush=True)
                    return None
            check_adapter_file(self.config)
            config, chosen = resolve_swap(self.config, items, machine.free)
            lines = estimate_lines(
                config,
                items,
                plan.steps,
                device,
                machine.free,
                self.processes,
                machine.rates,
                {} if last else plan.missing,
            )
        print("\n".join([*lines, *([chosen] if chosen else [])]), flush=True)
        return config

    def _score_demo(self) -> int:
        """Score a finished demo that has no score yet."""
        if self.config.demo is None or (self.config.output_dir / "accuracy.json").is_file():
            return EXIT_OK
        return self._stage(["-m", "musubi_tuner.demo.score"])

    def _stage(self, arguments: list[str], environment: dict[str, str] | None = None) -> int:
        words = [*arguments, str(self.config.path), *override_arguments(self.overrides)]
        return run_child(words, {**(environment or {}), **secret_environment(self.overrides)})

    def _demo_is_ready(self) -> bool:
        from musubi_tuner.demo.recipe import is_ready

        return is_ready(self.config)

    def _prepare_demo(self) -> int:
        if self._demo_is_ready():
            return EXIT_OK
        if self.options.plan:
            print("the demo has no pictures and encoders yet; run it without --plan to make them")
            return EXIT_OK
        return self._stage(["-m", "musubi_tuner.demo.prepare"])

    def _refuse_due(self, due: list[str]) -> None:
        jobs = ", ".join(f"python -m musubi_tuner.caching {kind} {self.config.words}" for kind in due)
        raise CacheError(f'caches are not complete, but cache.run is "never"; run: {jobs}')

    def _finished(self, plan: "Plan", can_write: bool) -> bool:
        from musubi_tuner.training.checkpoint import CheckpointList, read_values

        final = CheckpointList.read(self.config.output_dir, self.config.run.name).entries.get("final")
        if (
            final is None
            or (final.step < plan.steps.total_updates and not final.ended)
            or self.config.resume.from_ != "auto"
        ):
            return False
        values = read_values(self.config.output_dir / final.state) if final.state else None
        head = f"run.output_dir {self.config.output_dir}: has a finished run with another config"
        self._refuse_changes(plan, head, values)
        if can_write:
            self._tidy()
        print(
            f"this run is finished: {self.config.output_dir / final.model} at step {final.step}. Raise train.max_steps or "
            "max_epochs to continue (--plan shows what the learning rate would be), or use --fresh to start over"
        )
        return True

    def _tidy(self) -> None:
        """Clean up after a start that was killed after its last checkpoint was listed."""
        from musubi_tuner.training.checkpoint import tidy

        folder, save = self.config.output_dir, self.config.save
        tidy(folder, self.config.run.name, save.keep_last_steps, save.keep_last_epochs, save.keep_last_states)

    def _refuse_changes(self, plan: "Plan", head: str, values: dict[str, Any] | None) -> None:
        """A state of another config or other data is refused before anything is encoded for it."""
        if values is None:
            return
        from musubi_tuner.training.identity import data_digest, other_teachers, refuse_changes

        config = self.config
        data = data_digest(plan.trained, config.train.masked_loss, plan.held_out, other_teachers(config))
        refuse_changes(config, head, values, self.processes, data)

    def _train(self, config: "RunConfig | None", items: "Sequence[Item]") -> int:
        assert config is not None
        if self.processes > 1:
            return self._launch(config)
        from musubi_tuner.training.loop import train

        train(config, items)
        return EXIT_OK

    def _launch(self, config: RunConfig) -> int:
        """Train in several processes."""
        gpu = choose_device(self.config.run.device).type == "cuda"
        ranks = rank_environments(self.processes, self.config.distributed.main_process_port, gpu)
        overrides = dict(self.overrides)
        if config.memory.blocks_to_swap != self.config.memory.blocks_to_swap:  # "auto" became a number
            overrides["memory.blocks_to_swap"] = config.memory.blocks_to_swap
        words = [str(config.path), *override_arguments(overrides)]
        secrets = secret_environment(overrides)
        return run_children(
            ["-m", "musubi_tuner.runner", "--skip_cache", *words], [{**rank, **secrets} for rank in ranks]
        )


def run_beside_agent() -> int:
    """Run the same command as a child process.

    The agent of `accelerate launch` and torchrun kills its processes 30 seconds after a signal. It then kills this one, and the
    child goes on until its state is written.
    """
    return run_child(sys.orig_argv[1:])


def show_plan(config: RunConfig, text: str, *, prints: bool = True) -> None:
    """Print a plan.

    Raises:
        ConfigError: if there are warnings in it, in a strict run.
    """
    if prints:
        print(text, flush=True)
    warnings = [line.strip() for line in text.splitlines() if line.strip().startswith("warning: ")]
    if config.run.strict and warnings:
        raise ConfigError("\n  ".join(["run.strict: the plan has warnings", *warnings]))


def train_launched(config: RunConfig, processes: int, *, skip_cache: bool) -> int:
    """Train as one process of `accelerate launch`: nothing is encoded here, a due stage is an error."""
    from musubi_tuner.data.sources import scan

    if skip_cache:
        items = scan(config.datasets, config.spec.code, listed=config.validation.split > 0).items
    else:
        from musubi_tuner.planning.plan import describe, make_plan

        plan = make_plan(config, processes, download=False, encodes=False)
        if plan.due:
            jobs = "\n  ".join(f"python -m musubi_tuner.caching {kind} {config.words}" for kind in plan.due)
            raise CacheError(f"caches are not complete, but nothing is encoded under a launcher; run:\n  {jobs}")
        show_plan(config, describe(config, plan, processes), prints=int(os.environ.get("RANK", "0")) == 0)
        items = plan.found.items
    from musubi_tuner.training.loop import train

    is_settled = skip_cache and config.memory.blocks_to_swap != "auto"
    train(config, items, None if is_settled else lambda *given: _settle(items, *given))
    return EXIT_OK


def _settle(items: "Sequence[Item]", config: RunConfig, steps: Steps, ranks: "Ranks") -> RunConfig:
    """Replace ``blocks_to_swap = "auto"`` by a number, the same on all ranks, and print what the run needs of memory."""
    import torch

    from musubi_tuner.planning.estimate import resolve_swap
    from musubi_tuner.planning.report import estimate_lines

    # The rank that has least memory decides.
    free = ranks.least(torch.cuda.mem_get_info(ranks.device)[0]) if ranks.device.type == "cuda" else None
    config, chosen = resolve_swap(config, items, free)
    if ranks.main:
        lines = estimate_lines(config, items, steps, ranks.device, free, ranks.count)
        print("\n".join([*lines, *([chosen] if chosen else [])]), flush=True)
    return config
