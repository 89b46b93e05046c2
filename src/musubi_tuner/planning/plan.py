"""The plan: what a run would do, printed before it does anything."""

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from musubi_tuner.adapter_types import ADAPTERS
from musubi_tuner.caching.black_masks import black_masks
from musubi_tuner.caching.contents import Contents
from musubi_tuner.caching.prompts import are_known, texts_of_run
from musubi_tuner.caching.status import KindStatus, examine, needed_kinds
from musubi_tuner.caching.text_check import caption_lines, prompt_lines, token_limits
from musubi_tuner.config import RunConfig, Steps, sentence
from musubi_tuner.config.prompts import prompts_file, sample_prompts
from musubi_tuner.config.schema.experts import Sd15Teachers
from musubi_tuner.data.item import Item
from musubi_tuner.data.item_table import tally
from musubi_tuner.data.length import sources_of, steps_on
from musubi_tuner.data.remarks import black_lines, mask_lines, picture_lines
from musubi_tuner.data.sources import ScannedItems, scan
from musubi_tuner.errors import DataError
from musubi_tuner.training.plateau import left_of, measurements
from musubi_tuner.training.schedulers import rate_jump, start_left
from musubi_tuner.weights.hub import local_only


@dataclass
class Plan:
    """What there is to do.

    Attributes:
        found: items of the data sets. trained, held_out: those that are trained, and measured. status: by kind of cache, for all items.
        steps: length of the run. black_masks: items whose loss mask leaves nothing to learn.
        split_note: how the split of the run's state differs from that of a new run; None if it does not.
        losses: lines on what the text encoders lose of captions that are to be encoded, and of sample prompts.
        state: plain data of the state that it would go on from; None = it begins.
    """

    found: ScannedItems
    trained: Sequence[Item]
    held_out: list[Item]
    status: dict[str, KindStatus]
    steps: Steps
    black_masks: list[Item] = field(default_factory=list)
    split_note: str | None = None
    losses: list[str] = field(default_factory=list)
    state: dict[str, Any] | None = None

    @property
    def due(self) -> list[str]:
        """Kinds of cache with files to make, in order."""
        return [kind for kind, status in self.status.items() if status.due]

    @property
    def is_counted(self) -> bool:
        """Whether all its pictures are known; those of shards are when these are read."""
        return not any(item.is_unread for item, _ in tally(self.found.items))

    @property
    def missing(self) -> dict[str, set[str]]:
        """Kind of cache -> keys of the items whose file is to be made."""
        return {kind: set(status.due) for kind, status in self.status.items()}


def make_plan(
    config: RunConfig, processes: int, *, download: bool, encodes: bool = True, only_look: bool = False
) -> Plan:
    """Look at the data and the caches; data errors come before torch is imported.

    Args:
        download: encoders that are on the hub.
        only_look: nothing follows, so nothing is written, and the checkpoint is not downloaded either; one that is not here
            records nothing.
    """
    found = scan(config.datasets, config.spec.code, listed=config.validation.split > 0)
    trained: Sequence[Item] = found.items
    held_out, difference = list[Item](), None
    if config.validation.split and not any(item.is_unread for item, _ in tally(found.items)):
        from musubi_tuner.training.held_out import split_note, split_of_run

        trained, held_out = split_of_run(config, found.items)
        difference = split_note(config, found.items)
    steps = steps_on(config, trained, processes)
    options: dict[str, Any] = {}
    late = _late_kinds(config)
    kinds = [kind for kind in needed_kinds(config) if kind not in late]
    if "experts" in kinds:
        with local_only() if only_look else nullcontext():
            options = config.spec.family.checkpoint_options(config)
    contents = Contents(config)
    status = {
        kind: examine(config, found.items, kind, options, download=download, encodes=encodes, contents=contents)
        for kind in kinds
    }
    _refuse_missing(config, found.items, status)
    if not only_look:
        contents.save()
    losses = _losses(config, found.items, status["text"], download) if "text" in status else []
    black = black_masks(config, found.items, status["latents"]) if "latents" in status else []
    return Plan(found, trained, held_out, status, steps, black, difference, losses, _state_to_continue(config))


def _refuse_missing(config: RunConfig, items: Sequence[Item], status: dict[str, KindStatus]) -> None:
    """Files of data sets without pictures cannot be made.

    Raises:
        DataError: naming the first of each kind.
    """
    lines = []
    for kind, own in status.items():
        due = (
            [item for item in items if item.key in own.due and item.content is not None and item.shard is None]
            if own.due
            else []
        )
        if due:
            item = due[0]
            lines.append(
                f"{config.datasets[item.dataset].name}: {len(due)} {kind} files are not there or damaged (such as {item.id}: {own.due[item.key]})"
            )
    if lines:
        raise DataError(
            "\n  ".join(
                [
                    "data: caches of data sets without pictures (precached) are not complete",
                    *lines,
                    "make them where the pictures are, and copy them",
                ]
            )
        )


def _late_kinds(config: RunConfig) -> tuple[str, ...]:
    """Kinds of cache that depend on a checkpoint which the step before still has to make."""
    return ("experts", *config.spec.encoders.of_checkpoint) if config.waits_for else ()


def _losses(config: RunConfig, items: Sequence[Item], status: KindStatus, download: bool) -> list[str]:
    """What the text encoders lose of texts that are still to be encoded."""
    due = [item for item in items if item.key in status.due] if status.due else []
    prompts = [] if are_known(config) else sample_prompts(config)
    if not due and not prompts:
        return []
    limits = token_limits(config, download=download)
    absent = " and ".join(limit.name for limit in limits if limit.tokenizer is None)
    lines = caption_lines(limits, due) + prompt_lines(limits, prompts, config.sample.negative_prompt)
    if absent:
        lines.append(f"note: texts are compared with the limits of {absent} once its tokenizer is downloaded")
    return lines


def _state_to_continue(config: RunConfig) -> dict[str, Any] | None:
    """Plain data of the state that a start would go on from; torch is only imported where there may be one."""
    if config.resume.from_ == "auto" and not any(config.output_dir.glob("*-state")):
        return None
    from musubi_tuner.training.checkpoint import peek_state

    return peek_state(config)


def _state(status: KindStatus) -> str:
    reasons = "; ".join(f"{count} x {reason}" for reason, count in status.reasons)
    imported = f" ({len(status.imported)} of them imported)" if status.imported else ""
    due = [f"{len(status.due) - status.unread} to make"] if len(status.due) > status.unread or not status.due else []
    due += [f"{status.unread} shards to read"] if status.unread else []
    return f"{status.fresh} up to date{imported}, {', '.join(due)}" + (f" ({reasons})" if reasons else "")


def _dataset_lines(config: RunConfig, plan: Plan, kind: str) -> list[str]:
    """Teachers of every dataset and the state of their features, where not all datasets have the same."""
    if kind != "experts" or len(config.dataset_groups()) == 1:
        return []
    lines = []
    for number, dataset in enumerate(config.datasets):
        own, items = config.experts_of(dataset), [item for item in plan.found.items if item.dataset == number]
        text = f"no teachers: {len(items)} image{'s are' if len(items) != 1 else ' is'} trained without"
        if isinstance(own, Sd15Teachers) and own.teachers:
            text = f"{' and '.join(own.teachers)} at {own.time_buckets} times: {_state(plan.status[kind].of(items))}"
        lines.append(f"           {dataset.name}: {text}")
    return lines


def _jump_lines(config: RunConfig, plan: Plan) -> list[str]:
    """Where the learning rate of a run that goes on leaves the curve that it followed."""
    if plan.state is None:
        return []
    from musubi_tuner.training.checkpoint import former_end

    end, step = former_end(config, plan.state), int(plan.state["step"])
    first = config.spec.task(config).roles[0]
    jump = rate_jump(config, plan.steps.total_updates, plan.state["config"], end, step, left_of(plan.state, first))
    if not jump or config.role_section(first):
        return []
    warning = f"warning: the learning rate jumps: {jump}, because"
    if jump.end == jump.former_end:
        return [f"{warning} scheduler.min_lr has changed"]
    floor = config.scheduler.min_lr
    zero = "" if floor else "; at 0 nothing is learned, so set scheduler.min_lr too"
    return [
        f"{warning} {config.scheduler.type} ended at update {jump.former_end} and ends at {jump.end} now",
        f"           scheduler.total_steps = {jump.former_end} keeps the old curve, which stays at scheduler.min_lr = {floor:g} "
        f"from there{zero}",
    ]


def _plateau_lines(config: RunConfig, plan: Plan) -> list[str]:
    """A rate that too few measurements follow for it ever to fall."""
    lines = []
    for role in [role for role in config.spec.task(config).roles if role not in config.frozen]:
        own = config.for_role(role)
        count = measurements(own, plan.steps, bool(plan.held_out))
        needed = own.scheduler.patience + 2  # the first one always improves, and patience of the others pass
        if own.scheduler.type != "plateau" or count >= needed:
            continue
        metric, way = "the mean loss of an epoch", "set validation.split and every_steps to measure more often"
        if plan.held_out:
            metric, way = "the validation loss", "lower validation.every_steps or every_epochs"
        whose = f" of {role}" if config.role_section(role) else ""
        lines.append(
            f'warning: scheduler.type = "plateau" never lowers the learning rate{whose}: {metric} is measured {count} time(s) before '
            f"the last update, and a fall takes scheduler.patience + 2 = {needed}; lower the patience, or {way}"
        )
    return lines


def _role_lines(config: RunConfig) -> list[str]:
    """How each role moves, where a family has several."""
    lines = []
    for role in filter(config.role_section, config.spec.task(config).roles):
        own = config.for_role(role)
        average = f"average decay {own.ema.decay:g}" if own.ema.enabled else "no average"
        moves = f"{own.optimizer.type} at {own.optimizer.lr:g}, {own.scheduler.type}, {average}"
        lines.append(f"           {role}: {'is frozen (roles.freeze)' if role in config.frozen else moves}")
    return lines


LITTLE_START = 0.1
"""Share of the initial weights in an average above which the plan warns."""


def _average_lines(config: RunConfig, plan: Plan) -> list[str]:
    """How the weights are averaged, and how much of the initial weights is left in the average at the end."""
    if not config.ema.enabled or config.role_section(config.spec.task(config).roles[0]):
        return []
    done = average_updates = 0
    if plan.state is not None:
        from musubi_tuner.training.identity import as_begun

        config = as_begun(config, plan.state["config"])
        counted = plan.state["ema_updates"]  # of every role, where there are several
        done = int(plan.state["step"])
        average_updates = max(counted.values()) if isinstance(counted, dict) else int(counted)
    average, total = config.ema, plan.steps.total_updates
    left = start_left(average_updates + max(0, total - done), average.decay, config.warms_average)
    why = ' (ema.warmup = "auto")' if average.warmup == "auto" else ""
    lines = [f"  average  decay {average.decay:g}, with{'' if config.warms_average else 'out'} warm-up{why}"]
    share = f"after {total} updates, {100 * left:.1f} % of the average"
    if left <= LITTLE_START:
        return [f"{lines[0]}; {share} is still the initial weights"]
    if plan.state is not None:
        advice = "a run keeps its [ema]: sample.use_ema = false draws with the trained weights, --fresh starts over"
    elif config.warms_average:
        advice = "lower ema.decay"
    elif average.init == "checkpoint":
        advice = 'lower ema.decay, or set ema.init = "model"'
    else:
        advice = "lower ema.decay or set ema.warmup = true"
    return [*lines, f"warning: average: {share} would still be the initial weights; {advice}"]


def describe(config: RunConfig, plan: Plan, processes: int) -> str:
    """The plan as text."""
    steps, train = plan.steps, config.train
    alike = tally(plan.found.items)
    buckets = Counter[tuple[int, int]]()
    for item, count in alike:
        buckets[item.bucket] += count
    shown = ", ".join(f"{w}x{h}: {count}" for (w, h), count in sorted(buckets.items())[:6])
    more = f", and {len(buckets) - 6} more" if len(buckets) > 6 else ""
    start = f"from {config.model.path}" if config.model.init == "checkpoint" else "from random weights"
    counted = f"{len(plan.found.items)} images, {steps.images_per_epoch} per epoch with repeats; buckets {shown}{more}"
    if any(dataset.stream and not dataset.stream.cached for dataset in config.datasets):
        counted = f"a stream, {steps.images_per_epoch} images per epoch; buckets around {shown.partition(':')[0]}"
    elif not plan.is_counted:
        counted = f"about {steps.images_per_epoch} images per epoch, counted when all shards are read"
    lines = [f"{config.run.name}: {config.spec.title} {start}, seed {config.run.seed}", f"  data     {counted}"]
    if plan.held_out:
        count = min(len(plan.held_out), config.validation.max_images or len(plan.held_out))
        measured = "" if count == len(plan.held_out) else f", {count} of them measured"
        lines.append(
            f"  validate {len(plan.held_out)} image(s) held out{measured}, at {config.validation.times} noise levels; "
            f"{len(plan.found.items) - len(plan.held_out)} are trained"
        )
    if plan.split_note:
        lines.append(plan.split_note)
    several = sum(count for item, count in alike if len(item.captions) > 1)
    if several:
        lines.append(f"  captions {several} images have several; each presentation draws one")
    lines += picture_lines(plan.found.items, config.cache.workers)
    lines += mask_lines(config, plan.found.items)
    lines += black_lines(config, plan.black_masks)
    for kind, status in plan.status.items():
        lines.append(f"  {kind:<8} {_state(status)}")
        lines += _dataset_lines(config, plan, kind)
        lines += [f"           {count} {note}" for note, count in status.hashed.items()]
        if status.mixture:
            lines.append(f"warning: {status.mixture}")
        if status.orphans:
            lines.append(f"           {len(status.orphans)} files belong to no item; caching gc removes them")
    if config.waits_for:
        lines += [
            f"  {kind:<8} are planned and cached when step {config.waits_for.name} is finished"
            for kind in needed_kinds(config)
            if kind in _late_kinds(config)
        ]
    if (texts := texts_of_run(config)) and prompts_file(config) is not None and "text" not in _late_kinds(config):
        known = are_known(config)
        lines.append(
            f"  prompts  {len(texts)} texts {'are kept, no text encoder is needed' if known else 'to encode, for which the text encoders are needed'}"
        )
    lines += plan.losses
    correction = "" if steps.micro_batches % (processes * train.grad_accum_steps) == 0 else ", the last one shorter"
    lines += [
        f"  train    {steps.total_updates} updates, {steps.epochs} epochs of {steps.updates_per_epoch} updates{correction}",
        f"           {sentence(steps, sources_of(plan.trained))}",
        f"           update = {processes} process(es) x {train.grad_accum_steps} micro-batch(es), "
        f"{config.optimizer.type} at {config.optimizer.lr:g}, precision {train.mixed_precision}, one device sync per "
        f"{'update' if config.spec.task(config).denoises else 'phase'}"
        + (", more for swapped blocks" if config.memory.blocks_to_swap and config.adapter.type == "none" else ""),
    ]
    lines += _role_lines(config)
    lines += _jump_lines(config, plan)
    lines += _plateau_lines(config, plan)
    lines += _average_lines(config, plan)
    adapter = config.adapter
    if adapter.type != "none":
        alpha = adapter.alpha if adapter.alpha is not None else adapter.rank / 2
        size = (
            f"sizes of {adapter.init_from}"
            if adapter.rank_from_weights
            else ", ".join(
                text
                for name, text in (("rank", f"rank {adapter.rank}"), ("alpha", f"alpha {alpha or adapter.rank:g}"))
                if name in ADAPTERS[adapter.type].uses
            )
        )
        if not adapter.rank_from_weights:
            size += f", preset {adapter.preset}" if adapter.preset else ""
            size += f", {len(adapter.targets)} targets" if adapter.targets else ""
            kinds = config.spec.adapters.usual if adapter.kinds is None else adapter.kinds
            size += f" on {', '.join(kinds)}" if kinds else ""
        merged = f", on top of {len(adapter.merge)} merged file(s)" if adapter.merge else ""
        size = size.removeprefix(", ").removeprefix(" ")
        lines.append(f"  adapter  {', '.join(filter(None, [adapter.type, size]))}{merged}; the model stays frozen")
    saves = []
    if config.save.every_steps:
        saves.append(f"every {config.save.every_steps} updates (newest {config.save.keep_last_steps or 'all'} kept)")
    if config.save.every_epochs:
        saves.append(f"every {config.save.every_epochs} epoch(s) (newest {config.save.keep_last_epochs or 'all'} kept)")
    if config.keeps_best:
        saves.append(
            "the best by " + ("validation loss" if config.validation.split else "mean training loss of an epoch")
        )
    lines.append(f"  save     {', '.join([*saves, 'at the end'])} into {config.output_dir}")
    return "\n".join(lines)
