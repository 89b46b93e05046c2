"""States of the published FluxFlow trainer, 0.4.0 to 0.5.1: training_states.pt and training_state.json, read and written.

    optimizers   by name, as torch has them: moments by the number of a parameter, in the order of the modules
    schedulers   by name: counters and rates
    ema          decay, and the average of [compressor, expander] as 0. and 1.

Read with ``weights_only``; written as plain tensors and numbers, which that reads.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.config import RunConfig
from musubi_tuner.errors import CheckpointError
from musubi_tuner.files import read_json
from musubi_tuner.models.family import PublishedState
from musubi_tuner.models.fluxflow.checkpoint import load_checkpoint
from musubi_tuner.models.fluxflow.geometry import FluxFlowConfig
from musubi_tuner.models.fluxflow.state_dict import OUR_PREFIX, PARTS, build_part, read_system
from musubi_tuner.weights.checkpoints import read_torch_file

TENSORS, PROGRESS = "training_states.pt", "training_state.json"
MODULES = {
    "vae": ("compressor", "expander"),
    "flow": ("flow",),
    "text_encoder": ("text_encoder",),
    "discriminator": ("discriminator",),
}
"""Role, and name of its optimizer in pipelines -> the modules whose parameters that has, in this order."""
OTHER_NAMES = {
    "flow": "optimizer_FDiff",
    "vae": "optimizer_Diff",
    "text_encoder": "optimizer_te",
    "discriminator": "optimizer_Dimg",
}
"""Of optimizers in runs that are no pipelines."""
SHADOW = {"compressor": "0.", "expander": "1."}
"""Beginnings of the names in the average."""
WAY_OUT = "leave the moments behind with --fresh_optimizer"


def read_state(path: Path, config: RunConfig, *, moments: bool = True) -> PublishedState:
    """A state for a run that goes on from it.

    Args:
        path: its folder or its training_states.pt; the weights lie beside it. moments: take over those of the optimizers.

    Raises:
        CheckpointError: if it is none, or does not belong to the run's roles.
    """
    folder = path if path.is_dir() else path.parent
    held = read_torch_file(folder / TENSORS) if (folder / TENSORS).is_file() else None
    if not isinstance(held, dict) or not isinstance(held.get("optimizers"), dict):
        raise CheckpointError(f"{folder}: holds no {TENSORS} with optimizers; to start from its weights set model.path")
    system = read_system(load_checkpoint(folder))
    assert system.geometry is not None
    facts = config.spec.task(config)
    wanted = PARTS[:4] if facts.denoises else tuple(part for role in facts.roles for part in MODULES[role])
    lacking = [part for part in wanted if part not in system.parts]
    if lacking:
        raise CheckpointError(f"{folder}: has no {' and no '.join(lacking)}, which this run trains or needs")
    model = {f"{OUR_PREFIX[part]}{key}": t.float() for part in wanted for key, t in system.parts[part].items()}
    shadow = _shadow(held.get("ema"), folder)
    ema = {key: shadow.get(key, tensor) for key, tensor in model.items()} if shadow else None
    trained = ("flow",) if facts.denoises else facts.roles
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for role in trained if moments else ():
        own = held["optimizers"].get(role, held["optimizers"].get(OTHER_NAMES[role]))
        names = parameter_names(system.geometry, role)
        count = _moments(own, names, model, tensors, scalars, f"{folder / TENSORS}: optimizer of {role}")
        notes.append(f"optimizer: moments of {count} of {len(names)} parameters of {role}")
    step, epoch = _progress(folder)
    return PublishedState(model, ema, tensors, scalars, step, epoch, notes=notes)


def parameter_names(geometry: FluxFlowConfig, role: str) -> list[str]:
    """Our names of the parameters of a published optimizer, in its order."""
    with torch.device("meta"):
        modules = {part: build_part(part, geometry) for part in MODULES[role]}
    return [f"{OUR_PREFIX[part]}{name}" for part, module in modules.items() for name, _ in module.named_parameters()]


def _moments(
    state: Any,
    names: Sequence[str],
    model: Mapping[str, Tensor],
    tensors: dict[str, Tensor],
    scalars: dict[str, dict[str, Any]],
    what: str,
) -> int:
    """Add the moments of one optimizer; how many parameters have some."""
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
        raise CheckpointError(f"{what}: is not there; {WAY_OUT}")
    numbers = [n for group in state.get("param_groups", ()) for n in group.get("params", ())]
    if len(numbers) != len(names):
        raise CheckpointError(f"{what}: has {len(numbers)} parameters, the model {len(names)}; {WAY_OUT}")
    for number, name in zip(numbers, names, strict=True):
        values = state["state"].get(number)
        if values is None:
            continue
        scalars[name] = {}
        for entry, value in values.items():
            if not isinstance(value, Tensor):
                scalars[name][entry] = value
                continue
            if value.numel() > 1 and value.shape != model[name].shape:
                shape = list(model[name].shape)
                raise CheckpointError(f"{what}: {entry} of {name} is {list(value.shape)}, expected {shape}; {WAY_OUT}")
            tensors[f"{name}/{entry}"] = value.float().clone()
    return len(state["state"])


def _shadow(ema: Any, folder: Path) -> dict[str, Tensor]:
    """The average of the autoencoder by our names; empty if there is none."""
    if ema is None:
        return {}
    shadow = ema.get("shadow") if isinstance(ema, dict) else None
    if not isinstance(shadow, dict):
        raise CheckpointError(f"{folder / TENSORS}: ema has no shadow of tensors by name")
    found: dict[str, Tensor] = {}
    for part, prefix in SHADOW.items():
        own = {key.removeprefix(prefix): t for key, t in shadow.items() if key.startswith(prefix)}
        found |= {f"{OUR_PREFIX[part]}{key}": tensor.float() for key, tensor in own.items()}
    return found


def _progress(folder: Path) -> tuple[int, int]:
    """Updates and epochs done."""
    path = folder / PROGRESS
    try:
        values = read_json(path)
        step, epoch = values["global_step"], values["epoch"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise CheckpointError(f"{path}: cannot be read ({problem}); it says how far the run was") from problem
    if type(step) is not int or type(epoch) is not int or min(step, epoch) < 0:
        raise CheckpointError(f"{path}: global_step is {step!r} and epoch {epoch!r}, expected whole numbers")
    return step, epoch


def published_state(
    geometry: FluxFlowConfig,
    groups: Mapping[str, Mapping[str, Any]],
    optimizer: Mapping[str, Tensor],
    scalars: Mapping[str, Mapping[str, Any]],
    average: Mapping[str, Tensor],
    decay: float,
    step: int,
) -> dict[str, Any]:
    """The content of training_states.pt from a state of ours.

    Args:
        groups: what the optimizer of a role is called with, its learning rate now among it. optimizer, scalars: of the state, by our names. average: its averaged weights; empty = none.
        decay: of the average. step: updates done.
    """
    optimizers, schedulers = {}, {}
    for role, group in groups.items():
        names = parameter_names(geometry, role)
        state: dict[int, dict[str, Any]] = {}
        for number, name in enumerate(names):
            own = {key.rpartition("/")[2]: t.clone() for key, t in optimizer.items() if key.rpartition("/")[0] == name}
            own |= scalars.get(name, {})
            if own:
                state[number] = own
        optimizers[role] = {"state": state, "param_groups": [{**group, "params": list(range(len(names)))}]}
        schedulers[role] = {"last_epoch": step, "_step_count": step + 1, "_last_lr": [group["lr"]]}
    found: dict[str, Any] = {"optimizers": optimizers, "schedulers": schedulers}
    shadow = {
        f"{SHADOW[part]}{key.removeprefix(OUR_PREFIX[part])}": tensor.clone()
        for part in SHADOW
        for key, tensor in average.items()
        if key.startswith(OUR_PREFIX[part])
    }
    return {**found, "ema": {"decay": decay, "shadow": shadow}} if shadow else found
