"""Writing the checkpoints of a run: weights, averages and state under one stem, and their names in the list.

A checkpoint counts once it is listed. Used by the main rank only.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from musubi_tuner import __version__
from musubi_tuner.adapters.attach import AdapterSet
from musubi_tuner.adapters.files import named_for_files, save_adapter
from musubi_tuner.config import RunConfig, Steps
from musubi_tuner.files import fault_point, link_file
from musubi_tuner.training.adapting import adapter_metadata
from musubi_tuner.training.checkpoint import (
    Best,
    CheckpointList,
    Entry,
    TrainingState,
    save_weights,
    stem_on_the_way,
    write_state,
)
from musubi_tuner.training.release import write_release
from musubi_tuner.training.role import Role, Weights, prefix_of
from musubi_tuner.training.task import Position

Said = Callable[[str], None]


class Saver:
    """The checkpoints of one start of a run.

    Args:
        roles: whose weights are saved. geometry, options: of its model, recorded with the weights.
        carried: tensors that do not train, saved with them.
        started: time of the start, in seconds since 1970. say: prints a line.
    """

    def __init__(
        self,
        config: RunConfig,
        roles: Sequence[Role],
        *,
        geometry: Any,
        options: dict[str, Any],
        carried: dict[str, Tensor],
        steps: Steps,
        started: float,
        say: Said,
    ) -> None:
        self.config, self.roles, self.geometry, self.options = config, roles, geometry, options
        self.carried = carried
        self.steps, self.started, self.say = steps, started, say
        self.folder, self.name = config.output_dir, config.run.name
        self.best_step = 0

    def on_the_way(
        self, due: Mapping[str, str], at: Position, weights: Weights, state: TrainingState | None
    ) -> list[Entry]:
        """Save the checkpoints that are due, by name and kind, each with the state if there is one."""
        return [
            self._save(name, kind, stem_on_the_way(self.name, kind, at.step, at.epoch + 1), at, weights, state)
            for name, kind in due.items()
        ]

    def final(
        self, names: Mapping[str, str], at: Position, weights: Weights, state: TrainingState | None, ended: str = ""
    ) -> Entry:
        """Save the end of the run and its release folder.

        Args:
            names: under which it is listed too, with their kinds. ended: why the run ends before its budget.
        """

        def release(entry: Entry) -> None:
            if self.config.save.release:
                write_release(self.config, entry)

        return self._save(
            "final", "final", self.name, at, weights, state, before_listing=release, names=names, ended=ended
        )

    def best(self, best: Best, at: Position, weights: Weights) -> Entry:
        """Save weights and averages as the best; a run goes on from its states, so there is none here."""
        entry = Entry(at.step, at.epoch + 1, "best", model="best.safetensors", metric=best.metric, value=best.value)
        self._write(entry, "best", at, weights)
        checkpoints = CheckpointList.read(self.folder, self.name)
        checkpoints.add("best", entry)
        fault_point("best.listed")
        self.best_step = entry.step
        return entry

    def keep_former_end(self, at: Position) -> None:
        """The final checkpoint of a run that was made longer becomes one on the way."""
        names = CheckpointList.read(self.folder, self.name).keep_former_end(at.step)
        if names:
            self.say(f"{self.name}.safetensors of step {at.step} is kept as {', '.join(names)}")

    def _save(
        self,
        name: str,
        kind: str,
        stem: str,
        at: Position,
        weights: Weights,
        state: TrainingState | None,
        before_listing: Callable[[Entry], None] = lambda entry: None,
        names: Mapping[str, str] | None = None,
        ended: str = "",
    ) -> Entry:
        save = self.config.save
        entry = Entry(at.step, at.epoch + 1, kind, model=f"{stem}.safetensors", ended=ended)
        # What was kept as the best at this very step is not written a second time.
        self._write(entry, stem, at, weights, same_as="best" if self.best_step == at.step else "")
        if state is not None:
            entry.state = f"{stem}-state"
            write_state(self.folder / entry.state, state)
        before_listing(entry)
        checkpoints = CheckpointList.read(self.folder, self.name)
        checkpoints.add(name, entry, names)
        fault_point("checkpoint.listed")
        checkpoints.prune("step", save.keep_last_steps, name)
        checkpoints.prune("epoch", save.keep_last_epochs, name)
        checkpoints.prune_states(save.keep_last_states, name)
        self.say(f"step {at.step}: saved {entry.model}")
        return entry

    def _write(self, entry: Entry, stem: str, at: Position, weights: Weights, same_as: str = "") -> None:
        """Write the weights and their average.

        Args:
            same_as: stem of files that hold them already.
        """
        self._write_file(
            f"{stem}.safetensors",
            self.carried | weights.trained,
            "model",
            at,
            same_as and f"{same_as}.safetensors",
        )
        if weights.averaged:
            entry.ema = f"{stem}_ema.safetensors"
            averages = self.carried | weights.averaged
            self._write_file(entry.ema, averages, "ema", at, same_as and f"{same_as}_ema.safetensors")

    def _write_file(self, name: str, tensors: dict[str, Tensor], kind: str, at: Position, same_as: str) -> None:
        if same_as and link_file(self.folder / same_as, self.folder / name):
            return
        dtype, module = self.config.save.dtype, self.roles[0].module
        if isinstance(module, AdapterSet):
            save_adapter(
                self.folder / name,
                named_for_files(tensors),
                self._adapter_header(module, kind, at),
                getattr(torch, dtype),
            )
            return
        # Buffers are constants of the model, which rounding would change; what is carried along stays as it was.
        exact = {f"{prefix_of(role)}{key}" for role in self.roles for key, _ in role.module.named_buffers()}
        save_weights(self.folder / name, tensors, dtype, self._header(kind, at), {*exact, *self.carried})

    def _adapter_header(self, adapters: AdapterSet, kind: str, at: Position) -> dict[str, str]:
        return adapter_metadata(
            self.config,
            adapters,
            started=self.started,
            steps=self.steps,
            step=at.step,
            epoch=at.epoch + 1,
            optimizer=self.roles[0].optimizer,
            kind=kind,
            options=self.options,
        )

    def _header(self, kind: str, at: Position) -> dict[str, str]:
        spec = self.config.spec
        return {
            "format": "pt",
            "architecture": spec.full_name,
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": spec.modelspec_architecture,
            "modelspec.title": self.name,
            "config_json": json.dumps(self.geometry.to_dict()),
            "options_json": json.dumps(self.options),
            "weights": kind,
            "step": str(at.step),
            "epoch": str(at.epoch + 1),
            "code_version": __version__,
        }
