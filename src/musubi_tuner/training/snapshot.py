"""A state: everything that must survive a restart, taken from a run and given back to one.

Randomness is keyed by what it is for, so nothing random has to be saved: a state holds weights, averages, optimizer tensors,
sums of losses, a position and what measurements have led to, and what `identity` compares. All ranks take it together; the main one writes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from musubi_tuner import __version__
from musubi_tuner.errors import CheckpointError
from musubi_tuner.training.checkpoint import Best, TrainingState, read_tensors
from musubi_tuner.training.metrics import Metrics
from musubi_tuner.training.ranks import Ranks
from musubi_tuner.training.role import Role, RoleState, prefix_of
from musubi_tuner.training.samples import Reconstructions, Samples
from musubi_tuner.training.task import Position
from musubi_tuner.training.until import UntilMetric
from musubi_tuner.training.window import EpochLoss, Window

PARTS = ("model", "ema", "optimizer")


@dataclass
class Snapshot:
    """The parts of a run that change, and what of it does not.

    Attributes:
        roles: what trains. If there are several, every name in a state is prefixed with its role's name.
        remembered: see `Task`. places: see `Source`. ranks: that take it.
        identity: values of a state that are the same in all states of a start.
    """

    roles: Sequence[Role]
    position: Position
    window: Window
    epoch_loss: EpochLoss
    samples: Samples | Reconstructions | None
    best: Best | None
    until: UntilMetric | None
    remembered: dict[str, float]
    places: dict[str, Any] | None
    ranks: Ranks
    identity: Mapping[str, Any]

    def take(self, metrics: Metrics | None) -> TrainingState | None:
        """The state, on the main rank; None on the others. All ranks call this together."""
        self.window.gather()
        places = None if self.places is None else self.ranks.joined(self.places)
        states = {prefix_of(role): role.state() for role in self.roles}
        if metrics is None:
            return None
        metrics.flush()
        scaler = self.roles[0].scaler
        updates = {role.name: state.average_updates for role, state in zip(self.roles, states.values())}
        plateaus = {role.name: role.plateau.state() for role in self.roles if role.plateau}
        tensors = {
            part: {
                f"{prefix}{name}": tensor
                for prefix, state in states.items()
                for name, tensor in getattr(state, part).items()
            }
            for part in PARTS
        }
        return TrainingState(
            **tensors,
            values={
                "step": self.position.step,
                "position": vars(self.position),
                "samples_due": self.samples is not None and self.samples.due,
                "optimizer": {
                    f"{prefix}{name}": entries
                    for prefix, state in states.items()
                    for name, entries in state.scalars.items()
                },
                "ema_updates": updates if len(updates) > 1 else next(iter(updates.values())),
                "scaler": scaler.state_dict() if scaler else None,
                **self.window.state(),
                **self.epoch_loss.state(),
                "best": self.best.state() if self.best else None,
                **({"until": self.until.state()} if self.until else {}),
                **({"plateau": plateaus} if plateaus else {}),
                **({"remembered": self.remembered} if self.remembered else {}),
                **({"places": places, "resume_exact": False} if places is not None else {}),
                "metrics_bytes": metrics.length,
                **self.identity,
                "code_version": __version__,
            },
        )

    def restore(self, path: Path, values: Mapping[str, Any]) -> None:
        """Go on from a state.

        Args:
            path, values: its folder and plain data.

        Raises:
            CheckpointError: if it belongs to another model or optimizer.
        """
        tensors = {part: read_tensors(path, part) for part in PARTS}
        known = tuple(prefix_of(role) for role in self.roles)
        for name in (name for named in (*tensors.values(), values["optimizer"]) for name in named):
            if not name.startswith(known):
                raise CheckpointError(f"{path}: belongs to another model ({name})")
        for role in self.roles:
            prefix, updates = prefix_of(role), values["ema_updates"]
            own = {part: _below(prefix, named) for part, named in tensors.items()}
            count = updates[role.name] if isinstance(updates, dict) else updates
            other = role.load_state(
                RoleState(**own, scalars=_below(prefix, values["optimizer"]), average_updates=count)
            )
            if other:
                raise CheckpointError(f"{path}: belongs to another model ({other[0]})")
        scaler = self.roles[0].scaler
        if scaler and values["scaler"]:
            scaler.load_state_dict(values["scaler"])
        for field, value in values["position"].items():
            setattr(self.position, field, value)
        if self.samples:
            self.samples.due = values.get("samples_due", self.samples.due and self.position.step == 0)
        self.window.load_state(values)
        self.epoch_loss.load_state(values)
        if self.best:
            self.best.load_state(values.get("best"))
        if self.until:
            self.until.load_state(values.get("until"))
        self.remembered |= values.get("remembered") or {}
        if self.places is not None:
            self.places |= {reader: tuple(place) for reader, place in (values.get("places") or {}).items()}
        for role in self.roles:
            if role.plateau:
                role.plateau.load_state((values.get("plateau") or {}).get(role.name))


def _below(prefix: str, named: Mapping[str, Any]) -> dict[str, Any]:
    """Entries whose name begins so, without it."""
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
