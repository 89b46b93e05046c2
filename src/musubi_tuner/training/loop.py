"""The training loop: epochs -> updates -> what is due after them.

An update is processes x accumulation consecutive micro-batches of the epoch's plan. Order, noise and times are keyed by what they
are for, so a resumed run trains exactly what an uninterrupted one would have.
"""

import contextlib
from collections.abc import Sequence

from tqdm import tqdm

from musubi_tuner.config import RunConfig
from musubi_tuner.data.batch import load_batches
from musubi_tuner.data.item import Item
from musubi_tuner.data.plan import plan_epoch, updates_of_epoch
from musubi_tuner.data.workers import explain_workers
from musubi_tuner.errors import Interrupted, TrainingError, advise_on_memory
from musubi_tuner.files import fault_point
from musubi_tuner.memory.compose import ways_to_save
from musubi_tuner.run_record import tell
from musubi_tuner.stopping import kill_workers
from musubi_tuner.training import actions
from musubi_tuner.training.build import Run, Settle, build_run
from musubi_tuner.training.checkpoint import tidy
from musubi_tuner.training.due import due_after
from musubi_tuner.training.ranks import Ranks
from musubi_tuner.training.update import run_update, work_of


def run_epoch(run: Run) -> bool:
    """Run what is left of an epoch; true when the run is complete.

    Raises:
        Interrupted: after saving, when a signal asked to stop.
        TrainingError: when a gradient is not finite, and that ends the run.
    """
    config, at = run.config, run.position
    planned = plan_epoch(run.source.plan_items(), config.run.seed, at.epoch)
    updates = updates_of_epoch(
        planned,
        num_processes=run.ranks.count,
        grad_accum_steps=config.train.grad_accum_steps,
        rank=run.ranks.rank,
    )[at.update :][: run.steps.total_updates - at.step]
    mine = [batch for update in updates for _, batch in work_of(update, run.ranks)]
    batches = load_batches(run.source, mine, at.epoch, config.train.loader_workers)
    ends = False
    for update in updates:
        outcome = run_update(
            run.task,
            update,
            batches,
            at,
            ranks=run.ranks,
            seed=config.run.seed,
            compute_dtype=run.compute_dtype,
            bins=config.log.noise_bins,
        )
        actions.count(run, update, outcome)
        due = due_after(config, run.steps, at)
        if due.log:
            actions.log(run)
        if due.epoch_ends:
            actions.end_epoch(run)
        if due.validate:
            actions.validate(run)
        ends = actions.reached(run) or due.is_last
        if ends and not due.validate:
            actions.validate(run)
        if due.sample:
            actions.draw_samples(run)
        if not ends:
            actions.save(run, due.checkpoints)
            if due.upload and run.uploads:
                run.uploads.newest()
            fault_point("train.update")
        # After the last update a request leaves the end to the next start, which draws samples left out first.
        actions.answer_requests(run)
        if ends:
            return True
    return False


def run_to_end(run: Run) -> None:
    """Train to the end, or to the first request to stop.

    Raises:
        Interrupted, TrainingError: see `run_epoch`.
    """
    run.ranks.wait()  # all of them have read the state, which may move now
    at, total = run.position, run.steps.total_updates
    if run.saver and at.step < total:
        run.saver.keep_former_end(at)
    try:
        with run.ranks.stop:
            if run.samples and run.samples.due:
                actions.draw_samples(run)
                actions.answer_requests(run)
            while at.step < total and not actions.reached(run) and not run_epoch(run):
                at.epoch, at.update = at.epoch + 1, 0
            actions.finish(run)
    finally:
        if run.swap is not None and run.swap.recoveries:
            say = run.metrics.say if run.metrics else print
            say(f"note: {run.swap.recoveries} blocks had to be fetched on the spot instead of prefetched")
        if run.metrics:
            run.metrics.close()


def _answer_signal() -> None:
    """Tell the person at once that a signal arrived."""
    tqdm.write("stopping when this update is done and a state is saved; a second signal stops at once, without saving")


def train(config: RunConfig, items: Sequence[Item], settle: Settle | None = None) -> None:
    """Train a run whose caches are complete, alone or as one process of several. Whoever calls it holds the folder's lock.

    Args:
        settle: see `build_run`.

    Raises:
        Interrupted: when a signal asked to stop. ConfigError, CheckpointError, CacheError, TrainingError: see there.
    """
    ranks = Ranks(config, _answer_signal)
    folder = config.output_dir
    with contextlib.ExitStack() as stack:
        if ranks.main:
            folder.mkdir(parents=True, exist_ok=True)
            # What an interrupted start may still resume from is pruned at its next save, not here.
            tidy(folder, config.run.name)
        ranks.wait()
        memory = advise_on_memory(
            TrainingError,
            lambda on_device: (
                f"end other programs that use it, or: {ways_to_save(config, on_device)}. The same command continues from "
                "the newest state, if there is one"
            ),
        )
        if ranks.main:
            tell(phase="load")
        with memory, explain_workers(config.train.loader_workers):
            run = build_run(config, items, ranks, settle)
            if run.uploads:
                stack.callback(run.uploads.finish)
            stop = None
            try:
                run_to_end(run)
            except Interrupted as request:
                stop = request.with_traceback(None)  # whose frames hold the loader, which now ends its workers
            finally:
                kill_workers()
        ranks.end()
        if stop is not None:
            raise stop
