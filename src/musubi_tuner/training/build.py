"""From a config to a run that is ready to train: source, model, roles and task, resumed from a state if there is one."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from musubi_tuner.assemble import fit_to_device, load_trainee
from musubi_tuner.caching.reader import CachedDataset
from musubi_tuner.caching.status import needed_kinds
from musubi_tuner.config import RunConfig, Steps
from musubi_tuner.config.write import resolved_toml
from musubi_tuner.data.batch import Source
from musubi_tuner.data.item import Item
from musubi_tuner.data.item_table import tally
from musubi_tuner.data.length import steps_on
from musubi_tuner.data.pixels import PixelSource
from musubi_tuner.data.streams import StreamSource
from musubi_tuner.device import apply_backend_flags, has_bf16, set_threads
from musubi_tuner.errors import ConfigError
from musubi_tuner.files import write_text
from musubi_tuner.memory.block_swap import BlockSwap
from musubi_tuner.memory.compose import check_machine
from musubi_tuner.models.family import Process, Trainee
from musubi_tuner.models.spec import TaskFacts
from musubi_tuner.precision import COMPUTE_DTYPES
from musubi_tuner.training.checkpoint import (
    EPOCH_METRIC,
    Best,
    former_end,
    newest_good_state,
    read_values,
    refuse_new_start,
    refuse_second_branch,
)
from musubi_tuner.training.held_out import split_of_run
from musubi_tuner.training.identity import (
    allowed_changes,
    as_begun,
    check_state,
    data_digest,
    environment,
    fixed_settings,
    other_teachers,
)
from musubi_tuner.training.metrics import Metrics
from musubi_tuner.training.plateau import left_of
from musubi_tuner.training.ranks import Ranks
from musubi_tuner.training.release import write_configs
from musubi_tuner.training.role import Role
from musubi_tuner.training.samples import PreparedPrompts, Reconstructions, Samples, prepare_prompts
from musubi_tuner.training.saving import Saver
from musubi_tuner.training.schedulers import rate_jump, schedule_length
from musubi_tuner.training.snapshot import Snapshot
from musubi_tuner.training.task import FlowTask, Position, Task
from musubi_tuner.training.trackers import open_trackers
from musubi_tuner.training.until import UntilMetric
from musubi_tuner.training.uploads import RunUploads
from musubi_tuner.training.validation import METRIC, Validator
from musubi_tuner.training.window import EpochLoss, Window


@dataclass
class Run:
    """A run, in one of its processes.

    Attributes:
        config: with the precision of this machine and a number of swapped blocks.
        model: that predicts, without wrappers of data parallelism.
        roles: that move it, or the adapters on it.
        metrics, saver, uploads: of the main rank; None on the others, and without uploads.
        begun: when this start began, of `time.monotonic`.
        state_step: update of the newest state that this start wrote; -1 = none.
    """

    config: RunConfig
    ranks: Ranks
    source: Source
    steps: Steps
    task: Task
    roles: list[Role]
    model: nn.Module
    swap: BlockSwap | None
    snapshot: Snapshot
    samples: Samples | Reconstructions | None
    validator: Validator | None
    metrics: Metrics | None
    saver: Saver | None
    uploads: RunUploads | None
    begun: float
    state_step: int = -1

    @property
    def role(self) -> Role:
        """The one role of a denoiser."""
        return self.roles[0]

    @property
    def position(self) -> Position:
        """How far it is."""
        return self.snapshot.position

    @property
    def best(self) -> Best | None:
        """The lowest value of the metric that is followed; None if none is."""
        return self.snapshot.best

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """Of the model's products; None = that of its weights."""
        return COMPUTE_DTYPES[self.config.train.mixed_precision]


Settle = Callable[[RunConfig, Steps, Ranks], RunConfig]
"""Replaces what a config leaves to the machine, such as a number of swapped blocks; all ranks call it together."""


def build_run(config: RunConfig, items: Sequence[Item], ranks: Ranks, settle: Settle | None = None) -> Run:
    """Load the model and everything around it, and go on where a state left off.

    Args:
        items: of all data sets, whose caches are complete.
        settle: absent = the config leaves nothing open.

    Raises:
        ConfigError: if this machine, the caches or a state do not go with the config.
        CheckpointError: if a file of weights cannot be read.
    """
    begun, started = time.monotonic(), time.time()
    threads = set_threads(config.run.threads, ranks.local_count)
    kernels = apply_backend_flags(config.run, ranks.device, len({item.bucket for item, _ in tally(items)}))
    trained, held_out = split_of_run(config, items)
    refuse_second_branch(config)
    facts = config.spec.task(config)
    steps = steps_on(config, trained, ranks.count)
    source, measured = _open_source(config, facts, trained, held_out, steps, ranks)
    found = _find_state(config)
    data = data_digest(trained, config.train.masked_loss, held_out, other_teachers(config))
    ranks.agree(
        {
            "state to go on from": f"{found[0].name}, update {found[1]['step']}" if found else "none",
            "number of updates": steps.total_updates,
            "data": data,
            **fixed_settings(config, ranks.count),
        }
    )
    config = as_begun(config, found[1]["config"] if found else None)
    _check_machine(config, ranks, kernels)
    config = settle(config, steps, ranks) if settle else config
    prompts = prepare_prompts(config, ranks) if facts.has("sample.prompts") else None
    ranks.wait()
    trainee = load_trainee(config, ranks.device)
    caches = [dataset for dataset in (source, measured) if isinstance(dataset, CachedDataset)]
    check_caches(config, trainee.geometry, caches)
    module, swap, lines = fit_to_device(trainee, config, ranks.device, ranks.count)
    if trainee.prepare is not None:
        lines += trainee.prepare(source.first, found is None)
    sharded = None
    if ranks.sharded:
        from musubi_tuner.training.sharded import ShardedModel

        module = sharded = ShardedModel(trainee.model, config.spec.block_lists, ranks.device, ranks.rank, ranks.count)
        lines.append(f"fsdp: weights are sharded across {ranks.count} processes")
    elif config.distributed.fsdp:
        lines.append("warning: distributed.fsdp does nothing here: this run has one process")
    if ranks.main and lines:
        print("\n".join(lines))
    scaler = torch.amp.GradScaler("cuda") if config.train.mixed_precision == "fp16" else None

    def make_role(name: str, part: nn.Module) -> Role:
        # Data parallelism wraps the model of a denoiser; other roles average their gradients themselves.
        total, wrapped = steps.total_updates, facts.denoises
        return Role(
            name, part, config, total=total, ranks=ranks, swap=swap, scaler=scaler, wrapped=wrapped, sharded=sharded
        )

    task: Task | None = None
    validator: Validator | None = None
    samples: Samples | Reconstructions | None = None
    if facts.denoises:
        process = config.spec.family.make_process(config, trainee.options)
        roles = [_denoising_role(make_role("model", module), trainee, ranks)]
        validator = _make_validator(config, process, measured, ranks)
        samples = Samples(
            config,
            ranks,
            prompts,
            model=trainee.model,
            roles=roles,
            process=process,
            use_mask=trainee.options.get("t5_attn_mask", False),
            batch_size=max(item.batch_size for item, _ in tally(trained)),
        )
    else:
        task = config.spec.task_family.make_task(config, trainee, make_role)
        if set(task.roles) != set(facts.roles):
            raise ValueError(
                f"{config.spec.code}: the task has the roles {set(task.roles)}, its facts name {facts.roles}"
            )
        roles = [task.roles[name] for name in facts.roles]
        samples = _samples_of_task(config, ranks, task, roles, source, trainee, prompts, trained)
    identity = {
        "schedule_end": schedule_length(config, steps.total_updates),
        "config": fixed_settings(config, ranks.count),
        "data": data,
        "held_out": [item.key for item in held_out],
        "base": trainee.base,
        "environment": environment(config, threads, ranks.count, ranks.device),
    }
    snapshot = Snapshot(
        roles=roles,
        position=Position(),
        window=Window(ranks, config.log.noise_bins),
        epoch_loss=EpochLoss(ranks),
        samples=samples,
        best=Best(METRIC if validator else EPOCH_METRIC) if config.keeps_best else None,
        until=UntilMetric(config.step.until) if config.step and config.step.until else None,
        remembered=task.remembered if task else {},
        places=source.places,
        ranks=ranks,
        identity=identity,
    )
    if found is not None:
        _go_on(snapshot, *found, config=config, steps=steps, ranks=ranks)
    for role in roles:
        role.refresh()
    if task is None:
        model = ranks.parallel(trainee.model, roles[0].by_hand)
        task = FlowTask(
            model, process, roles[0], config.objective, config.run.seed, config.datasets, config.train.prior_loss_weight
        )
    metrics = saver = None
    if ranks.main:
        for remark in (remark for role in roles for remark in role.remarks()):
            print(remark)
        if config.adapter.type == "none":
            write_configs(config.output_dir, trainee.geometry.to_json(), trainee.options)
        write_text(config.output_dir / f"{config.run.name}.config.toml", resolved_toml(config))
        metrics = Metrics(
            config.output_dir,
            step=snapshot.position.step,
            total=steps.total_updates,
            length=int(found[1]["metrics_bytes"]) if found else 0,
            trackers=open_trackers(config, snapshot.position.step),
        )
        saver = Saver(
            config,
            roles,
            geometry=trainee.geometry,
            options=trainee.options,
            carried=trainee.carried,
            steps=steps,
            started=started,
            say=metrics.say,
        )
    return Run(
        config=config,
        ranks=ranks,
        source=source,
        steps=steps,
        task=task,
        roles=roles,
        model=trainee.model,
        swap=swap,
        snapshot=snapshot,
        samples=samples,
        validator=validator,
        metrics=metrics,
        saver=saver,
        uploads=RunUploads(config) if ranks.main and config.hub.repo_id is not None else None,
        begun=begun,
    )


def _samples_of_task(
    config: RunConfig,
    ranks: Ranks,
    task: Task,
    roles: Sequence[Role],
    source: Source,
    trainee: Trainee,
    prompts: PreparedPrompts | None,
    trained: Sequence[Item],
) -> Samples | Reconstructions | None:
    """What a task of several roles shows: what it reconstructs, or drawings; None if neither."""
    if task.reconstruct is not None:
        return Reconstructions(
            config, ranks, roles, task.reconstruct, source.first(config.get("sample.reconstructions"))
        )
    if not config.spec.task(config).has("sample.prompts"):
        return None
    process = config.spec.family.make_process(config, trainee.options)
    size = max(item.batch_size for item, _ in tally(trained))
    model = trainee.model
    return Samples(config, ranks, prompts, model=model, roles=roles, process=process, use_mask=False, batch_size=size)


def _make_validator(
    config: RunConfig, process: Process, measured: CachedDataset | None, ranks: Ranks
) -> Validator | None:
    if measured is None:
        return None
    return Validator(
        measured,
        process,
        config.validation,
        device=ranks.device,
        compute_dtype=COMPUTE_DTYPES[config.train.mixed_precision],
        rank=ranks.rank,
        processes=ranks.count,
        hidden=config.spec.expert_keys,
    )


def check_caches(config: RunConfig, geometry: Any, datasets: Sequence[CachedDataset]) -> None:
    """Compare what is cached, of every dataset, with what the model takes.

    Raises:
        ConfigError: naming the dataset where there are several.
    """
    for cached in datasets:
        for number, shapes in cached.shapes():
            try:
                config.spec.family.check_caches(config, geometry, shapes)
            except ConfigError as error:
                where = f"{config.datasets[number].name}: " if len(config.datasets) > 1 else ""
                raise ConfigError(f"{where}{error}") from error


def _open_source(
    config: RunConfig, facts: TaskFacts, trained: Sequence[Item], held_out: list[Item], steps: Steps, ranks: Ranks
) -> tuple[Source, CachedDataset | None]:
    """What is trained, and what is measured."""
    texts = [dataset.text.timed(steps.updates_per_epoch, steps.total_updates) for dataset in config.datasets]
    if facts.pixels:
        tokenize = config.spec.task_family.make_tokenizer(config)
        streams = [item for item in trained if config.datasets[item.dataset].stream is not None]
        if not streams:
            return PixelSource(trained, config.run.seed, tokenize, texts), None
        stream, workers = streams[0], config.train.loader_workers
        dataset, code = config.datasets[stream.dataset], config.spec.code
        return StreamSource(stream, dataset, config.run.seed, tokenize, texts, architecture=code, rank=ranks.rank, ranks=ranks.count,
                            workers=workers), None  # fmt: skip
    kinds = needed_kinds(config)
    shown = held_out[: config.validation.max_images]
    measured = CachedDataset(config, shown, kinds, dropping=False) if shown else None
    return CachedDataset(config, trained, kinds, texts=texts), measured


def _check_machine(config: RunConfig, ranks: Ranks, kernels: str | None) -> None:
    """Check what the config asks of this machine, and say what it does not do well."""
    check_machine(config, ranks.device)
    if ranks.main and config.train.mixed_precision == "bf16" and not has_bf16(ranks.device):
        print(
            'warning: this device emulates bfloat16, which takes many times as long as float32; set train.mixed_precision = "no" '
            'or "auto"'
        )
    if ranks.main and config.ema.on_cpu and ranks.device.type == "cpu":
        print("warning: ema.on_cpu saves nothing here: this device computes in main memory")
    if ranks.main and kernels:
        print(kernels, flush=True)


def _denoising_role(role: Role, trainee: Trainee, ranks: Ranks) -> Role:
    """The one role of a denoiser, with the average of its checkpoint."""
    if role.ema and trainee.average is not None:
        report = role.start_average(trainee.average)
        if ranks.main:
            print(f"average: {report.loaded} tensors of the checkpoint, {report.initialized} copied from the model")
    return role


def _find_state(config: RunConfig) -> tuple[Path, dict[str, Any]] | None:
    """Folder and plain data of the state to go on from; None = the run begins.

    Raises:
        ConfigError: if the state that is asked for is not there, or a new start would overwrite a finished run.
    """
    wanted = config.resume.from_
    if wanted == "none":
        return None
    if wanted == "auto":
        found = newest_good_state(config.output_dir, config.run.name)
        if found is None:
            refuse_new_start(config)
        return found
    path = config.locate(wanted)
    if not path.is_dir():
        raise ConfigError(f"resume.from: {wanted}: no such state folder; give auto, none, or a folder ending in -state")
    return path, read_values(path)


def _go_on(
    snapshot: Snapshot, path: Path, values: dict[str, Any], *, config: RunConfig, steps: Steps, ranks: Ranks
) -> None:
    """Restore a state, and say so."""
    identity, total = snapshot.identity, steps.total_updates
    warning = check_state(
        config,
        path,
        values,
        processes=ranks.count,
        data=identity["data"],
        base=identity["base"],
        environment=identity["environment"],
        total=total,
    )
    snapshot.restore(path, values)
    position = snapshot.position
    changes = allowed_changes(config, values["config"], ranks.count)
    changed = [*values.get("changed", []), *([{"step": position.step, "settings": changes}] if changes else [])]
    snapshot.identity = {**identity, **({"changed": changed} if changed else {})}
    over = position.step >= total or (snapshot.until is not None and bool(snapshot.until.reason))
    if position.update >= steps.updates_per_epoch and not over:
        position.epoch, position.update = position.epoch + 1, 0
    if ranks.main:
        if not values.get("resume_exact", True):
            print(
                "note: goes on where the stream was read to, but not bit for bit: pictures that waited in it are left out (resume_exact = false)"
            )
        print(
            *([warning] if warning else []),
            f"continuing from {path.name}: step {position.step} of {total}",
            *[f"note: resume.allow: {text}" for text in changes],
            sep="\n",
        )
        left = left_of(values, snapshot.roles[0].name)
        jump = rate_jump(config, total, values["config"], former_end(config, values), position.step, left)
        if jump:
            print(f"warning: the learning rate jumps: {jump}")
