"""The training loop.

    for every update: forward and backward its micro-batches -> clip -> check finite -> step -> EMA -> count
                      -> log / validate / sample / save if due

An update is processes x accumulation consecutive micro-batches of the epoch's plan; its loss is the sum over its samples
divided by their number. Randomness is keyed by what it is for, so nothing random has to be saved: a state holds
weights, averages, optimizer tensors and a position.

A micro-batch waits for nothing that the device computes, but for gradients of blocks that train in main memory. An update waits once, to see whether its gradient is finite; several
processes wait once more, to agree on a signal to stop.

The model goes through accelerate for data parallelism; order, schedule and precision stay ours.
"""

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from musubi_tuner import __version__
from musubi_tuner.adapters.attach import AdapterSet
from musubi_tuner.adapters.files import save_adapter
from musubi_tuner.caching.status import needed_kinds
from musubi_tuner.config import RunConfig, calculate_steps
from musubi_tuner.config.prompts import sample_prompts
from musubi_tuner.config.write import resolved_toml
from musubi_tuner.data.dataset import Batch, CachedDataset, PlannedBatches, raise_errors
from musubi_tuner.data.plan import Update, plan_epoch, updates_of_epoch
from musubi_tuner.data.sources import Item
from musubi_tuner.data.workers import explain_workers, to_shared_memory
from musubi_tuner.device import apply_backend_flags, has_bf16, set_threads
from musubi_tuner.errors import CheckpointError, ConfigError, Interrupted, TrainingError, UserError, advise_on_memory
from musubi_tuner.files import fault_point, folder_lock, link_file, write_text
from musubi_tuner.memory.compose import check_machine, compose_memory, ways_to_save
from musubi_tuner.memory.estimate import resolve_swap
from musubi_tuner.memory.report import estimate_lines
from musubi_tuner.precision import COMPUTE_DTYPES
from musubi_tuner.stopping import kill_workers, signals_blocked
from musubi_tuner.training.adapting import adapter_metadata, prepare_adapters
from musubi_tuner.training.checkpoint import (
    EPOCH_METRIC,
    Best,
    CheckpointList,
    Entry,
    TrainingState,
    former_end,
    newest_good_state,
    read_tensors,
    read_values,
    refuse_new_start,
    refuse_second_branch,
    save_weights,
    stem_on_the_way,
    tidy,
    write_state,
)
from musubi_tuner.training.ema import unwrap
from musubi_tuner.training.held_out import split_of_run
from musubi_tuner.training.identity import (
    as_begun,
    check_state,
    data_digest,
    environment,
    fixed_settings,
    other_teachers,
)
from musubi_tuner.training.metrics import Metrics
from musubi_tuner.training.ranks import Ranks
from musubi_tuner.training.release import write_configs, write_release
from musubi_tuner.training.role import Role, RoleState
from musubi_tuner.training.sampling import (
    EncodedPrompts,
    decode_images,
    draw,
    encode_prompts,
    sample_settings,
    save_samples,
)  # fmt: skip
from musubi_tuner.training.schedulers import rate_jump, schedule_length
from musubi_tuner.training.task import FlowTask, Position
from musubi_tuner.training.update import run_update, work_of
from musubi_tuner.training.uploads import RunUploads
from musubi_tuner.training.validation import METRIC, Validator
from musubi_tuner.training.window import EpochLoss, Window
from musubi_tuner.units import format_bytes, format_seconds

Listing = Callable[[Entry], None]


def check_caches(config: RunConfig, geometry: Any, datasets: Sequence[CachedDataset]) -> None:
    """Compare what is cached, of every dataset, with what the model takes.

    Raises:
        ConfigError: naming the dataset where there are several.
    """
    for cached in datasets:
        for number, shapes in cached.shapes():
            try:
                config.spec.load("check_caches")(config, geometry, shapes)
            except ConfigError as error:
                where = f"{config.datasets[number].name}: " if len(config.datasets) > 1 else ""
                raise ConfigError(f"{where}{error}") from error


class DrawingLeft(Exception):
    """Samples were given up because the run was asked to stop."""


class Trainer:
    """One run in one process of it.

    Args:
        planned: number of swapped blocks with which the plan of memory and disk was printed already; None = it was not.
    """

    def __init__(self, config: RunConfig, items: list[Item], planned: int | None = None) -> None:
        self.config, self.begun, self.started, self.planned = config, time.monotonic(), time.time(), planned
        self.ranks = Ranks(config, self._answer_signal)
        self.device, self.main, self.processes = self.ranks.device, self.ranks.main, self.ranks.count
        threads = set_threads(config.run.threads, self.ranks.local_count)
        sizes = len({item.bucket for item in items})
        self.kernels = apply_backend_flags(config.run, self.device, sizes)
        self.environment = environment(config, threads, self.processes, self.device)
        self.items = items
        trained, held_out = split_of_run(config, items)
        self.held_out = [item.key for item in held_out]
        self.data_digest = data_digest(trained, config.train.masked_loss, held_out, other_teachers(config))
        self.folder, self.name = config.output_dir, config.run.name
        refuse_second_branch(config)
        kinds = needed_kinds(config)
        self.dataset = CachedDataset(config, trained, kinds)
        self.measured = CachedDataset(config, held_out[: config.validation.max_images], kinds) if held_out else None
        self.plan_items = self.dataset.plan_items()
        self.steps = count_steps(config, trained, self.processes)
        self.total = self.steps.total_updates
        self.position = Position()
        self.state_step = -1  # of the newest state that this start wrote
        self.samples_due = config.sample.at_first
        self.uploads: RunUploads | None = None

    # -- building ------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Load the model and everything around it, and continue where a state left off."""
        check_machine(self.config, self.device)
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None
        # All ranks must choose the same number of blocks: the one that has least memory decides.
        free = None if free is None else self.ranks.least(free)
        slow = self.config.train.mixed_precision == "bf16" and not has_bf16(self.device)
        if self.main and slow:
            print('warning: this device emulates bfloat16, which takes many times as long as float32; set train.mixed_precision = "no" '
                  'or "auto"')  # fmt: skip
        if self.main and self.config.ema.on_cpu and self.device.type == "cpu":
            print("warning: ema.on_cpu saves nothing here: this device computes in main memory")
        self.config, chosen = resolve_swap(self.config, self.items, free)
        config = self.config
        if self.main:
            lines = [self.kernels] if self.kernels else []
            if config.memory.blocks_to_swap != self.planned:
                plan = estimate_lines(config, self.items, self.steps, self.device, free, self.processes)
                lines = [*plan, *([chosen] if chosen else []), *lines]
            if lines:
                print("\n".join(lines), flush=True)
        self.prompts, self.vae = self._prepare_samples()
        self.ranks.wait()
        trainee = config.spec.load("load_for_training")(config)
        self.geometry, self.options, self.base = trainee.geometry, trainee.options, trainee.base
        check_caches(config, self.geometry, [dataset for dataset in (self.dataset, self.measured) if dataset])
        self.process = config.spec.load("make_process")(config, self.options)
        bare, self.trained = self._prepare_model(trainee.model, trainee.notes)
        self.role = Role(
            "model",
            self.trained,
            config,
            total=self.total,
            ranks=self.ranks,
            swap=self.swap,
            scaler=torch.amp.GradScaler("cuda") if config.train.mixed_precision == "fp16" else None,
        )
        if self.role.ema and trainee.average is not None:
            report = self.role.ema.load_shadow(trainee.average, self.trained)
            if self.main:
                print(f"average: {report.loaded} tensors of the checkpoint, {report.initialized} copied from the model")
        self.compute_dtype = COMPUTE_DTYPES[config.train.mixed_precision]
        self.validator = None
        if self.measured is not None:
            self.validator = Validator(
                self.measured,
                self.process,
                config.validation,
                device=self.device,
                compute_dtype=self.compute_dtype,
                rank=self.ranks.rank,
                processes=self.processes,
                hidden=config.spec.expert_keys,
            )
        self.best = Best(METRIC if self.validator else EPOCH_METRIC) if config.keeps_best else None
        self.best_step = 0
        self.window = Window(self.ranks, config.log.noise_bins)
        self.epoch_loss = EpochLoss(self.ranks)
        self.term_weights: dict[str, float] = {}
        metrics_length = self._resume()
        self.role.refresh()
        self.model = self.ranks.parallel(bare, self.role.by_hand)
        self.task = FlowTask(self.model, self.process, self.role, config.objective, config.run.seed)
        self.metrics = None
        if self.main:
            if not self.adapters:
                write_configs(self.folder, self.geometry.to_json(), self.options)
            write_text(self.folder / f"{self.name}.config.toml", resolved_toml(self.config))
            self.metrics = Metrics(
                self.folder,
                step=self.position.step,
                total=self.total,
                length=metrics_length,
                tensorboard=config.log.tensorboard,
            )
        if self.main and config.hub.repo_id is not None:
            self.uploads = RunUploads(config)

    @property
    def adapters(self) -> bool:
        """Whether adapters are trained, and the model is frozen."""
        return self.config.adapter.type != "none"

    def _prepare_model(self, model: torch.nn.Module, notes: list[str]) -> tuple[torch.nn.Module, torch.nn.Module]:
        """The model on the device, and the module that trains: the model itself, or its adapters."""
        memory, spec = self.config.memory, self.config.spec
        trained, report = (model, notes) if not self.adapters else prepare_adapters(model, self.config)
        if self.adapters:
            report = [*notes, *report]
            model.eval()
        self.swap, lines = compose_memory(model, memory, spec, self.device)
        report = [*report, *lines]
        if self.swap is not None:
            lists = Counter(block.name.partition(".")[0] for block in self.swap.streamed)
            of_lists = ", ".join(f"{count} of {len(getattr(model, name))} {name}" for name, count in lists.items())
            report.append(
                f"swap: {len(self.swap.streamed)} blocks stay in main memory ({of_lists}; {format_bytes(self.swap.host_bytes)}"
                f"{' per process' if self.processes > 1 else ''}) and pass through {format_bytes(self.swap.device_bytes)} "
                "of device memory"
            )
        if self.main and report:
            print("\n".join(report))
        trained.train()
        for module in trained.modules():
            # What is frozen computes as it will when it draws; only what trains drops anything out.
            if not any(parameter.requires_grad for parameter in module.parameters()) and list(module.parameters()):
                module.eval()
        return model, trained

    def _prepare_samples(self) -> tuple[EncodedPrompts | None, Any]:
        """Encode the sample prompts, before the model needs the memory, and load the autoencoder into main memory."""
        settings = self.config.sample
        if settings.prompts is None or not self.main:
            return None, None
        from musubi_tuner.caching.jobs import TextEncoders

        texts = sample_prompts(self.config)
        if not texts:
            raise ConfigError("sample.prompts is an empty list; give prompts, or remove the key")
        encoders = TextEncoders(self.config, self.device)
        encoded = encode_prompts(encoders.encode, texts, settings.negative_prompt)
        del encoders
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what T5 had goes back to the device
        return encoded, load_vae(self.config, self.device, torch.device("cpu"))

    # -- states --------------------------------------------------------------------------------------------------

    def _resume(self) -> int:
        """Restore a state if there is one; returns the length of metrics.jsonl that belongs to it."""
        found = self._find_state()
        self.config = as_begun(self.config, found[1]["config"] if found else None)
        if found is None:
            return 0
        path, values = found
        warning = check_state(
            self.config,
            path,
            values,
            processes=self.processes,
            data=self.data_digest,
            base=self.base,
            environment=self.environment,
            total=self.total,
        )
        if warning and self.main:
            print(warning)
        tensors = (read_tensors(path, part) for part in ("model", "ema", "optimizer"))
        other = self.role.load_state(RoleState(*tensors, values["optimizer"], values["ema_updates"]))
        if other:
            raise CheckpointError(f"{path}: belongs to another model ({other[0]})")
        if self.role.ema:
            self.role.ema.warmup = self.config.warms_average
        if self.role.scaler and values["scaler"]:
            self.role.scaler.load_state_dict(values["scaler"])
        self.position = Position(**values["position"])
        self.samples_due = values.get("samples_due", self.samples_due and self.position.step == 0)
        if self.position.update >= self.steps.updates_per_epoch and self.position.step < self.total:
            self.position.epoch, self.position.update = self.position.epoch + 1, 0
        self.window.load_state(values)
        self.epoch_loss.load_state(values)
        if self.best:
            self.best.load_state(values.get("best"))
        if self.main:
            print(f"continuing from {path.name}: step {self.position.step} of {self.total}")
            end = former_end(self.config, values)
            jump = rate_jump(self.config, self.total, values["config"], end, self.position.step)
            if jump:
                print(f"warning: the learning rate jumps: {jump}")
        return int(values["metrics_bytes"])

    def _find_state(self) -> tuple[Path, dict[str, Any]] | None:
        wanted = self.config.resume.from_
        if wanted == "none":
            return None
        if wanted == "auto":
            found = newest_good_state(self.folder, self.name)
            if found is None:
                refuse_new_start(self.config)
            return found
        path = self.config.locate(wanted)
        if not path.is_dir():
            raise ConfigError(
                f"resume.from: {wanted}: no such state folder; give auto, none, or a folder ending in -state"
            )
        return path, read_values(path)

    def _state(self) -> TrainingState:
        role = self.role.state()
        assert self.metrics is not None
        self.metrics.flush()
        return TrainingState(
            model=role.model,
            ema=role.ema,
            optimizer=role.optimizer,
            values={
                "step": self.position.step,
                "position": vars(self.position),
                "samples_due": self.samples_due,
                "optimizer": role.scalars,
                "ema_updates": role.average_updates,
                "scaler": self.role.scaler.state_dict() if self.role.scaler else None,
                **self.window.state(),
                **self.epoch_loss.state(),
                "best": self.best.state() if self.best else None,
                "metrics_bytes": self.metrics.length,
                "schedule_end": schedule_length(self.config, self.total),
                "config": fixed_settings(self.config, self.processes),
                "data": self.data_digest,
                "held_out": self.held_out,
                "base": self.base,
                "environment": self.environment,
                "code_version": __version__,
            },
        )

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end, or to the first stop signal.

        Raises:
            Interrupted: after saving, when a signal asked to stop.
            TrainingError: when a loss or gradient is not finite.
        """
        self.ranks.wait()  # all ranks have read the state, which may move now
        if self.metrics and self.position.step < self.total:
            self._keep_former_end(self.metrics)
        try:
            with self.ranks.stop:
                if self.samples_due:
                    self._sample()
                    self._save_and_stop()
                while self.position.step < self.total and not self._epoch():
                    self.position.epoch, self.position.update = self.position.epoch + 1, 0
                self._finish()
                if stopping := self.ranks.stop_signal():
                    raise Interrupted(stopping, "")  # the run is complete all the same, and has said so
        finally:
            if self.swap is not None and self.swap.recoveries:
                say = self.metrics.say if self.metrics else print
                say(f"note: {self.swap.recoveries} blocks had to be fetched on the spot instead of ahead")
            if self.metrics:
                self.metrics.close()

    def _epoch(self) -> bool:
        """Run what is left of an epoch; true when the run is complete."""
        config, position = self.config, self.position
        planned = plan_epoch(self.plan_items, config.run.seed, position.epoch)
        updates = updates_of_epoch(
            planned,
            num_processes=self.processes,
            grad_accum_steps=config.train.grad_accum_steps,
            rank=self.ranks.rank,
        )[position.update :]
        updates = updates[: self.total - position.step]
        batches = self._batches(updates, self.position.epoch)
        for update in updates:
            self._update(update, batches)
            is_last = position.step >= self.total
            epoch_ends = position.update == self.steps.updates_per_epoch
            if self._log_due(is_last):
                self._log()
            if epoch_ends:
                self._end_epoch()
            validation = config.validation
            if is_last or self._due(validation.every_steps, validation.every_epochs, epoch_ends):
                self._validate()
            if self._due(config.sample.every_steps, config.sample.every_epochs, epoch_ends):
                self._sample()
            if is_last:
                # A request that comes now leaves the rest to the next start, so that samples left out are still drawn.
                self._save_and_stop()
                return True
            self._save_if_due()
            if self.uploads and self._due(config.hub.every_steps, config.hub.every_epochs, epoch_ends):
                self.uploads.newest()
            fault_point("train.update")
            self._save_and_stop()
        return False

    def _batches(self, updates: list[Update], epoch: int) -> Iterator[Batch]:
        """This rank's micro-batches in order, read ahead by loader workers if there are any."""
        mine = [batch for update in updates for _, batch in work_of(update, self.ranks)]
        source = PlannedBatches(self.dataset, mine, epoch)
        workers = self.config.train.loader_workers
        if workers == 0:
            return raise_errors(source[index] for index in range(len(source)))
        from torch.utils.data import DataLoader

        loader: DataLoader[Batch | UserError] = DataLoader(
            source,
            batch_size=None,
            shuffle=False,
            num_workers=workers,
            multiprocessing_context="spawn",
            collate_fn=to_shared_memory,  # type: ignore[arg-type]  # of one batch, because batch_size is None
        )
        with signals_blocked():
            return raise_errors(iter(loader))

    def _update(self, update: Update, batches: Iterator[Batch]) -> None:
        """Run an update, and count it."""
        position = self.position
        outcome = run_update(
            self.task,
            update,
            batches,
            position,
            ranks=self.ranks,
            seed=self.config.run.seed,
            compute_dtype=self.compute_dtype,
            bins=self.window.bins.count,
        )
        self.term_weights |= outcome.weights
        if outcome.not_finite is None:
            position.skipped_in_a_row = 0
            self.epoch_loss.add(outcome.sums["total"] / update.samples)
            for name, value in outcome.sums.items():
                self.window.add(f"loss/{name}", value.to(self.ranks.sum_device, torch.float64) / update.samples)
            self.window.bins.add(outcome.bins)
            for tag, value in outcome.measured.items():
                self.window.add(tag, value)
            self.window.updates += 1
        else:
            self._not_finite(outcome.items)
        position.step += 1
        position.update += 1
        position.images += update.samples
        if self.metrics:
            self.metrics.advance(update.samples)

    def _not_finite(self, seen: list[str]) -> None:
        """A gradient that is not finite: stop, or skip the update.

        fp16 finds its loss scale by overflowing now and then, so a few such updates in a row are normal there.
        """
        position, train = self.position, self.config.train
        position.skipped += 1
        position.skipped_in_a_row += 1
        where = f"step {position.step + 1}: the gradient is not finite (items {', '.join(seen[:8])})"
        if self.role.scaler is None and train.on_nonfinite == "stop":
            raise TrainingError(
                f"{where}. Nothing was changed by it. Lower optimizer.lr, look at these items, or set "
                'train.on_nonfinite = "skip"'
            )
        if position.skipped_in_a_row >= train.max_skipped_updates:
            raise TrainingError(f"{where}; {position.skipped_in_a_row} updates in a row were skipped, giving up")
        if self.main and self.metrics:
            self.metrics.say(f"warning: {where}; the update is skipped")

    def _answer_signal(self) -> None:
        """Tell the person at once that a signal arrived."""
        tqdm.write(
            "stopping when this update is done and a state is saved; a second signal stops at once, without saving"
        )

    def _leave_drawing(self) -> None:
        if self.ranks.stop.signum:
            raise DrawingLeft

    # -- what happens between updates ----------------------------------------------------------------------------

    def _due(self, every_steps: int | None, every_epochs: int | None, epoch_ends: bool) -> bool:
        by_step = bool(every_steps) and self.position.step % (every_steps or 1) == 0
        by_epoch = bool(every_epochs) and epoch_ends and (self.position.epoch + 1) % (every_epochs or 1) == 0
        return by_step or by_epoch

    def _log_due(self, is_last: bool) -> bool:
        return is_last or self.position.step % self.config.log.every_steps == 0

    def _log(self) -> None:
        """Reduce the window over ranks and write it."""
        if self.window.updates == 0:
            return
        means, by_noise = self.window.means()
        if self.metrics:
            ordered = {tag: means[tag] for tag in ("loss/total", "loss/main")}
            ordered |= {tag: value for tag, value in means.items() if tag.startswith("loss/") and tag not in ordered}
            lr = self.role.rate(self.position.step - 1)
            scales = {group["lr_scale"] for group in self.role.optimizer.param_groups} - {1.0}
            values = {
                **ordered,
                **{f"loss/{name}_weight": weight for name, weight in self.term_weights.items()},
                **by_noise,
                "train/lr": lr,
                "train/grad_norm": means["train/grad_norm"],
                "train/epoch": self.position.epoch + self.position.update / self.steps.updates_per_epoch,
                "train/images": self.position.images,
                "train/skipped": self.position.skipped,
                **{tag: value for tag, value in means.items() if tag.startswith("max_norm/")},
            }
            values |= {f"train/lr_x{scale:g}": lr * scale for scale in sorted(scales)}
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None
            self.metrics.log(self.position.step, values, peak_gib=peak)

    @property
    def _follows_epochs(self) -> bool:
        """Whether the best epoch by training loss is kept."""
        return self.best is not None and self.validator is None

    def _end_epoch(self) -> None:
        """Write the mean loss of an epoch, and keep its weights if it is the lowest and there is no validation."""
        if not self.epoch_loss.updates:
            return
        step, mean = self.position.step, self.epoch_loss.mean()
        if self.metrics:
            place = self.position.epoch + 1
            self.metrics.measured(step, {EPOCH_METRIC: mean, "epoch/step": step}, 0.0, place=place)
        if self.best and self._follows_epochs and self.best.improve(mean):
            self._save_best()

    def _validate(self) -> None:
        """Measure the held-out images, on all processes together, and keep the weights if they are the best."""
        if self.validator is None or self.measured is None:
            return
        begun = time.perf_counter()
        averaged = self.config.validation.weights == "ema" and self.role.ema is not None and self.role.ema.updates > 0
        with self.role.averaged(averaged):
            values = self.validator.measure(unwrap(self.model), self.position.step)
        value = values[METRIC]
        better = self.best is not None and self.best.improve(value)
        if self.metrics:
            seconds = time.perf_counter() - begun
            self.metrics.measured(self.position.step, values, seconds)
            self.metrics.say(
                f"step {self.position.step}: validation loss {value:.4f}{', the lowest so far' if better else ''} "
                f"({'averaged' if averaged else 'trained'} weights, {len(self.measured)} image(s) at "
                f"{len(self.validator.times)} noise levels, {format_seconds(seconds)})"
            )
            if not math.isfinite(value):
                self.metrics.say(f"warning: step {self.position.step}: the validation loss is not finite")
        if better:
            self._save_best()

    def _save_best(self) -> None:
        """Write weights and averages as `best`; a run continues from its states, so there is none here."""
        if self.main:
            assert self.best is not None
            entry = Entry(self.position.step, self.position.epoch + 1, "best", model="best.safetensors")
            entry.metric, entry.value = self.best.metric, self.best.value
            self._save_weights(entry.model, self.trained.state_dict(), "model")
            if self.role.ema:
                entry.ema = "best_ema.safetensors"
                self._save_weights(entry.ema, self.role.ema.shadow, "ema")
            checkpoints = CheckpointList.read(self.folder, self.name)
            checkpoints.add("best", entry)
            fault_point("best.listed")
            if self.uploads and self.config.hub.release == "best":
                self.uploads.release(entry)
            self.best_step = entry.step
        self.ranks.wait()

    def _sample(self) -> None:
        """Draw the sample prompts on the main process; the others wait. A request to stop leaves them to the next start."""
        self.samples_due = True
        try:
            self._draw_samples()
            self.samples_due = False
        except DrawingLeft:
            assert self.metrics is not None
            self.metrics.say(f"step {self.position.step}: samples are drawn when the run continues")
        self.ranks.wait()

    def _draw_samples(self) -> None:
        if self.prompts is not None and self.metrics is not None:
            settings = sample_settings(self.config)
            bare = unwrap(self.model)
            ema = self.role.ema
            begun = ema is not None and (ema.updates > 0 or self.config.ema.init == "checkpoint")
            with self.role.averaged(self.config.sample.use_ema and begun):
                latents = draw(
                    bare,
                    self.process,
                    self.config.spec,
                    self.prompts,
                    settings,
                    use_mask=self.options.get("t5_attn_mask", False),
                    device=self.device,
                    compute_dtype=self.compute_dtype,
                    batch_size=max(item.batch_size for item in self.dataset.items),
                    check=self._leave_drawing,
                )
            shift = self.config.spec.latent_shift
            pictures = decode_images(self.vae, latents, shift, self.device, check=self._leave_drawing)
            folder = self.folder / "sample"
            sheet = save_samples(
                folder,
                self.name,
                self.position.step,
                self.prompts.prompts,
                pictures,
                settings,
                self.config.spec.pixel_step,
            )
            self.metrics.image("samples", sheet, self.position.step)
            self.metrics.say(f"step {self.position.step}: drew {len(pictures)} samples into {folder}")
            if self.uploads:
                self.uploads.samples(self.position.step)

    def _due_checkpoints(self, stopping: int = 0) -> dict[str, str]:
        """Names of the checkpoints on the way that are due now, with their kinds."""
        save, step, epoch = self.config.save, self.position.step, self.position.epoch + 1
        epoch_ends = self.position.update == self.steps.updates_per_epoch
        found = {}
        if stopping or self._due(save.every_steps, None, epoch_ends):
            found[f"step_{step}"] = "step"
        if self._due(None, save.every_epochs, epoch_ends):
            found[f"epoch_{epoch}"] = "epoch"
        return found

    def _save_if_due(self, stopping: int = 0) -> None:
        due = self._due_checkpoints(stopping)
        if not due:
            return
        self.window.gather()
        if self.main:
            for name, kind in due.items():
                stem = stem_on_the_way(self.name, kind, self.position.step, self.position.epoch + 1)
                self._save(name, kind, stem, force_state=bool(stopping) and kind == "step")
        if self.config.save.state or stopping:
            self.state_step = self.position.step
        self.ranks.wait()

    def _save_and_stop(self) -> None:
        """Stop if a signal asked for it; if there is no state of this very update yet, write one first.

        Raises:
            Interrupted: with a message on the main process.
        """
        stopping = self.ranks.stop_signal()
        if not stopping:
            return
        if self.state_step != self.position.step:
            self._save_if_due(stopping)
        text = f"stopped after step {self.position.step}; run the same command again to continue"
        raise Interrupted(stopping, text if self.main else "")

    def _keep_former_end(self, metrics: Metrics) -> None:
        """The final checkpoint of a run that was made longer becomes one on the way."""
        names = CheckpointList.read(self.folder, self.name).keep_former_end(self.position.step)
        if names:
            metrics.say(f"{self.name}.safetensors of step {self.position.step} is kept as {', '.join(names)}")

    def _save(
        self,
        entry_name: str,
        kind: str,
        stem: str,
        force_state: bool = False,
        before_listing: Listing = lambda entry: None,
        names: Mapping[str, str] | None = None,
    ) -> Entry:
        """Write weights, averages and state under one stem, and list them; what is not listed is made again.

        Args:
            names: under which it is listed too, with their kinds.
        """
        config, position = self.config, self.position
        entry = Entry(position.step, position.epoch + 1, kind, model=f"{stem}.safetensors")
        # What was kept as the best at this very step is not written a second time.
        is_best = self.best_step == position.step
        self._save_weights(entry.model, self.trained.state_dict(), "model", "best.safetensors" if is_best else "")
        if self.role.ema:
            entry.ema = f"{stem}_ema.safetensors"
            self._save_weights(entry.ema, self.role.ema.shadow, "ema", "best_ema.safetensors" if is_best else "")
        if config.save.state or force_state:
            entry.state = f"{stem}-state"
            write_state(self.folder / entry.state, self._state())
        before_listing(entry)
        checkpoints = CheckpointList.read(self.folder, self.name)
        checkpoints.add(entry_name, entry, names)
        fault_point("checkpoint.listed")
        checkpoints.prune("step", config.save.keep_last_steps, entry_name)
        checkpoints.prune("epoch", config.save.keep_last_epochs, entry_name)
        checkpoints.prune_states(config.save.keep_last_states, entry_name)
        if self.metrics:
            self.metrics.say(f"step {position.step}: saved {entry.model}")
        if self.uploads:
            self.uploads.saved(entry)
        return entry

    def _save_weights(self, name: str, tensors: dict[str, Tensor], weights: str, same: str = "") -> None:
        """Write one file of weights, of the model or of its adapters; ``same`` is a file that holds them already."""
        if same and link_file(self.folder / same, self.folder / name):
            return
        dtype = self.config.save.dtype
        if self.adapters:
            save_adapter(self.folder / name, tensors, self._metadata(weights), getattr(torch, dtype))
        else:
            # Buffers are constants of the model, which rounding would change.
            exact = {key for key, _ in self.trained.named_buffers()}
            save_weights(self.folder / name, tensors, dtype, self._metadata(weights), exact)

    def _metadata(self, weights: str) -> dict[str, str]:
        """Header of a weight file."""
        spec = self.config.spec
        if self.adapters:
            assert isinstance(self.trained, AdapterSet)
            return adapter_metadata(
                self.config,
                self.trained,
                started=self.started,
                steps=self.steps,
                step=self.position.step,
                epoch=self.position.epoch + 1,
                optimizer=self.role.optimizer,
                weights=weights,
                options=self.options,
            )
        return {
            "format": "pt",
            "architecture": spec.full_name,
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": spec.modelspec_architecture,
            "modelspec.title": self.name,
            "config_json": json.dumps(self.geometry.to_dict()),
            "options_json": json.dumps(self.options),
            "weights": weights,
            "step": str(self.position.step),
            "epoch": str(self.position.epoch + 1),
            "code_version": __version__,
        }

    def _finish(self) -> None:
        """The final checkpoint and the release folder."""
        if self.main:
            self._save("final", "final", self.name, before_listing=self._release, names=self._due_checkpoints())
            assert self.metrics is not None
            if self._follows_epochs and self.best and self.best.value == math.inf:
                self.metrics.say("note: no epoch was trained to its end, so save.best kept nothing")
            taken = format_seconds(time.monotonic() - self.begun)
            self.metrics.say(
                f"finished: {self.position.step} updates, {self.position.images} images, {taken} in this start; "
                f"{self.position.skipped} updates skipped; see {self.folder}"
            )
        self.ranks.wait()

    def finish_uploads(self) -> None:
        """Upload the logs and wait for all uploads, however the run ended."""
        if self.uploads:
            self.uploads.finish()

    def _release(self, entry: Entry) -> None:
        if self.config.save.release:
            write_release(self.config, entry)


def load_vae(config: RunConfig, device: torch.device, home: torch.device | None = None) -> Any:
    """The run's autoencoder, for decoding.

    Args:
        device: where it decodes, which decides its precision. home: where it lies; absent = there too.
    """
    from musubi_tuner.caching.fingerprint import encoder_sources
    from musubi_tuner.device import encoder_dtype
    from musubi_tuner.encoders.autoencoder import load_autoencoder

    path = encoder_sources(config, "latents").paths(download=True).get("vae")
    if path is None:
        raise ConfigError("model.vae_path: is needed to decode samples")
    dtype = encoder_dtype(config.model.vae_dtype, device, gpu="float32")
    spec = config.spec
    vae = load_autoencoder(
        path, channels=spec.latent_channels, factor=spec.vae_factor, dtype=dtype, device=home or device
    )
    vae.set_tiling(config.cache.vae_tiling)
    return vae


def count_steps(config: RunConfig, items: list[Item], processes: int) -> Any:
    """Length of a run, from the real buckets."""
    buckets: dict[tuple[Any, int], int] = {}
    for item in items:
        key = (item.bucket, item.batch_size)
        buckets[key] = buckets.get(key, 0) + item.num_repeats
    return calculate_steps(
        [(count, size) for (_, size), count in buckets.items()],
        num_processes=processes,
        grad_accum_steps=config.train.grad_accum_steps,
        max_steps=config.train.max_steps,
        max_epochs=config.train.max_epochs,
    )


def train(config: RunConfig, items: list[Item], planned: int | None = None) -> None:
    """Train a run whose caches are complete, alone or as one process of several.

    Args:
        planned: see `Trainer`.
    """
    trainer = Trainer(config, items, planned)
    folder = config.output_dir
    with contextlib.ExitStack() as stack:
        if trainer.main:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(
                folder_lock(folder, lambda holder: ConfigError(f"run.output_dir {folder}: {holder} is training here"))
            )
            # What an interrupted start may still resume from is pruned at its next save, not here.
            tidy(folder, config.run.name)
            stack.callback(trainer.finish_uploads)
        trainer.ranks.wait()
        memory = advise_on_memory(
            TrainingError,
            lambda on_device: (
                f"end other programs that use it, or: {ways_to_save(config, on_device)}. The same command goes on from "
                "the newest state, if there is one"
            ),
        )
        with memory, explain_workers(config.train.loader_workers):
            trainer.build()
            stop = None
            try:
                trainer.run()
            except Interrupted as request:
                stop = request.with_traceback(None)  # whose frames hold the loader, which now ends its workers
            finally:
                kill_workers()
        trainer.ranks.end()
        if stop is not None:
            raise stop
