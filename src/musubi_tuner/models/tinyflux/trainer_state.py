"""Checkpoints of the published TinyFlux trainer as something that a run can go on from.

    name.pt   v4.2   step, epoch, best_loss, model, optimizer, scheduler, ema {shadow, decay}, trainer_config, model_config
              v4.1   step, epoch, loss, optimizer, scheduler, ema_decay; the weights lie beside it, rounded to bfloat16:
                     name.safetensors, name_ema.safetensors

torch numbers the moments of an optimizer by the place of the parameter in its list. That trainer's list is
``model.parameters()`` without the frozen ones, whose order is that of the keys of ``model``: a state dict names parameters in
the order of registration, buffers between them. `spatial_to_qk_scale` is in the list and never has moments. The
safetensors files of v4.1 are sorted, so there the order is that of our model, which registers its parts as v4.1 does.
Counts and all shapes are checked.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musubi_tuner.config import RunConfig
from musubi_tuner.errors import CheckpointError
from musubi_tuner.models.family import PublishedState
from musubi_tuner.models.tinyflux.family import geometry_of
from musubi_tuner.models.tinyflux.geometry import ModelOptions, TinyFluxConfig
from musubi_tuner.models.tinyflux.model import TinyFluxDeep, rotary_frequencies
from musubi_tuner.models.tinyflux.settings import model_of, resolve_experts
from musubi_tuner.models.tinyflux.state_dict import build
from musubi_tuner.models.tinyflux.trainer_settings import read_settings, write_settings
from musubi_tuner.models.tinyflux.upgrade import UpgradeReport, summary, upgrade_weights
from musubi_tuner.weights.checkpoints import averaged_inside, read_torch_file, read_weights, strip_wrappers

ENTRIES = {
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "Adafactor": {"step", "RMS", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"},
    "AdamW8bit": {"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"},
}
"""What an optimizer remembers of a parameter."""
NESTED = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes, since 0.49, keeps all of it but the step."""
BLOCK = 256
"""Values of a moment in 8 bits that share an absmax; those of small parameters are float32."""
FROZEN = {"freeze_lune": ("lune_predictor.", "expert_predictor."), "freeze_sol": ("sol_prior.",)}
"""Field of a config -> parts that it freezes."""
COMPARED = ("experts", "objective", "train", "optimizer", "scheduler", "ema")
"""Tables that decide how training goes on."""
INSTEAD = "or use --fresh_optimizer to keep the weights and start with empty moments"


def read_state(path: Path, config: RunConfig, *, moments: bool = True) -> PublishedState:
    """Read a checkpoint for a run.

    Args:
        config: the run, whose model the file must hold. moments: take over the optimizer's.

    Raises:
        CheckpointError: if the file is of another kind, or does not belong to the run's model and optimizer.
    """
    held = _read(path)
    geometry = geometry_of(config)
    model = build(geometry)
    weights, average, notes = _weights(path, held)
    what = f"{path}: cannot be continued by {config.path}"
    tensors, report = _named(weights, geometry, what)
    ema = None
    if average is not None:
        ema, averaged = upgrade_weights(
            average, geometry, model=tensors, whole_parts=False, strict=True, what=f"{what}, its average"
        )
        if averaged.copied:
            notes.append(f"average: lacks {', '.join(summary(averaged.copied))}; copied from the model")
    if report.remapped:
        notes.append(f"weights: {len(report.remapped)} tensors have other names here")
    if report.dropped:
        notes.append(f"weights: left out {', '.join(summary(report.dropped))}, which the model does not use")
    optimizer: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    if moments:
        order = _order(weights, report, held, model, what)
        optimizer, scalars = _moments(held["optimizer"], order, model, config.optimizer.type, what, notes)
    settings = held.get("trainer_config")
    if isinstance(settings, dict):
        notes += [
            f"differs: {key} was {theirs!r}, is {ours!r} in this run"
            for key, theirs, ours in _compared(settings, config)
        ]
    exact = model_of(config).rope_freqs == "exact"
    return PublishedState(
        _whole(tensors, geometry, exact),
        None if ema is None else _whole(ema, geometry, exact),
        optimizer,
        scalars,
        held["step"],
        held["epoch"],
        _finite(held.get("best_loss")),
        _rate(held.get("scheduler")),
        notes,
    )


def write_state(state: PublishedState, config: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """The content of a ``step_N.pt`` of v4.2, and lines on what that trainer does otherwise.

    Its optimizer has one group: all parameters in the order of the model, except frozen ones.

    Raises:
        CheckpointError: for a model that computes what the published one cannot, or moments that it does not have.
    """
    geometry = geometry_of(config)
    if geometry.options != ModelOptions():
        raise CheckpointError(
            f"{config.path}: its model computes otherwise than the published one ({geometry.options})"
        )
    kind = config.optimizer.type
    if kind not in ("AdamW", "Adafactor"):
        raise CheckpointError(
            f'{config.path}: optimizer.type is "{kind}"; only moments of AdamW and Adafactor can be written for that trainer'
        )
    model = build(geometry)
    frozen = tuple(part for field, parts in FROZEN.items() if getattr(geometry, field) for part in parts)
    learning = [
        name for name, _ in model.named_parameters() if not name.startswith(frozen)
    ]  # one that is never used is in its list too
    moments: dict[int, dict[str, Any]] = {}
    for key, tensor in state.optimizer.items():
        name, _, entry = key.rpartition("/")
        moments.setdefault(learning.index(name), {})[entry] = tensor
    for name, values in state.scalars.items():
        if values:
            moments.setdefault(learning.index(name), {}).update(values)
    settings = write_settings(config)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config.optimizer.lr, betas=tuple(settings["betas"]),
                                  weight_decay=settings["weight_decay"])  # fmt: skip
    group = {**{key: value for key, value in optimizer.param_groups[0].items() if key != "params"},
             "initial_lr": config.optimizer.lr, "params": list(range(len(learning)))}  # fmt: skip
    if kind == "Adafactor":
        group = {
            "lr": config.optimizer.lr,
            "weight_decay": settings["weight_decay"],
            "initial_lr": config.optimizer.lr,
            "params": group["params"],
        }
    document = {
        "step": state.step,
        "epoch": state.epoch,
        "best_loss": math.inf if state.best is None else state.best,
        "model": {key: state.model[key] for key in model.state_dict()},
        "optimizer": {"state": dict(sorted(moments.items())), "param_groups": [group]},
        "scheduler": {
            "base_lrs": [config.optimizer.lr],
            "last_epoch": state.step,
            "_step_count": state.step + 1,
            "_get_lr_called_within_step": False,
            "_last_lr": [state.rate],
            "lr_lambdas": [None],
        },
        "trainer_config": settings,
        "model_config": geometry.to_dict(),
    }
    if state.ema is not None:
        document["ema"] = {
            "shadow": {key: state.ema[key] for key in model.state_dict() if key in state.ema},
            "decay": config.ema.decay,
        }
    lines = [
        f"weights, average and moments of {len(moments)} of {len(learning)} parameters, update {state.step}, epoch {state.epoch}",
        *(
            f"differs: {key} is {ours!r} in this run, and {theirs!r} in that trainer"
            for key, theirs, ours in _compared(settings, config)
        ),
    ]
    return document, lines


def _read(path: Path) -> dict[str, Any]:
    """The dictionary in the file, with counts that are counts."""
    if not path.is_file():
        raise CheckpointError(f"{path}: file not found")
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: holds weights only; give the .pt file that the trainer wrote beside it")
    held = read_torch_file(path)
    lacking = [key for key in ("step", "epoch", "optimizer") if not isinstance(held, dict) or key not in held]
    if lacking:
        raise CheckpointError(f"{path}: is no checkpoint of the published trainer; it has no {', '.join(lacking)}")
    for key in ("step", "epoch"):
        if type(held[key]) is not int or held[key] < 0:
            raise CheckpointError(f"{path}: {key} is {held[key]!r}, expected a whole number")
    return dict(held)


def _weights(path: Path, held: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, list[str]]:
    """Weights and average under the names of the file, and notes."""
    if isinstance(held.get("model"), dict):
        shadow = averaged_inside(held)
        found = _plain(held["model"], f"{path}: model")
        return found, None if shadow is None else _plain(shadow, f"{path}: ema.shadow"), []
    beside = path.with_suffix(".safetensors")
    if not beside.is_file():
        raise CheckpointError(f"{path}: holds no weights, and {beside.name} is not beside it")
    twin = path.with_name(f"{path.stem}_ema.safetensors")
    weights = read_weights(beside).tensors
    average = read_weights(twin).tensors if twin.is_file() else None
    notes = [f"weights: from {beside.name}" + (f", average: from {twin.name}" if average is not None else "")]
    rounded = {str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()} - {"float32"}
    if rounded:
        notes.append(f"weights: were rounded to {', '.join(sorted(rounded))} when they were saved")
    return weights, average, notes


def _plain(tensors: Any, what: str) -> dict[str, Tensor]:
    """Tensors by name, without the prefixes of wrappers, in the order of the file."""
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{what}: expected tensors by name")
    return {strip_wrappers(key): tensor for key, tensor in tensors.items()}


def _named(weights: dict[str, Tensor], geometry: TinyFluxConfig, what: str) -> tuple[dict[str, Tensor], UpgradeReport]:
    """The weights under the names of the run's model; only rotary frequencies may be missing."""
    try:
        tensors, report = upgrade_weights(weights, geometry, whole_parts=False, strict=True, what=what)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. A run can only continue with the same model; for another one give the weights as model.path of a new run"
        ) from error
    guided = [key for key in report.dropped if "guidance_in." in key]
    if guided:
        raise CheckpointError(f"{what}: it embeds guidance ({guided[0]}), and the run's model does not")
    return tensors, report


def _whole(tensors: Mapping[str, Tensor], geometry: TinyFluxConfig, exact: bool) -> dict[str, Tensor]:
    """A state dict in float32, with memory of its own and, if asked for, exact rotary frequencies."""
    found = {key: tensor.float().clone() for key, tensor in tensors.items()}
    if exact:
        found |= {f"rope.freqs_{axis}": rotary_frequencies(width) for axis, width in enumerate(geometry.axes_dims_rope)}
    return found


def _order(
    weights: Mapping[str, Tensor], report: UpgradeReport, held: dict[str, Any], model: TinyFluxDeep, what: str
) -> list[str | None]:
    """Our name of every parameter of the optimizer in its order; None for those that our model does not have."""
    groups = held["optimizer"].get("param_groups") if isinstance(held["optimizer"], dict) else None
    if not isinstance(groups, list) or not isinstance(held["optimizer"].get("state"), dict):
        raise CheckpointError(f"{what}: its optimizer has no param_groups and state; {INSTEAD}")
    if len(groups) != 1:
        raise CheckpointError(f"{what}: its optimizer has {len(groups)} groups of parameters, expected 1; {INSTEAD}")
    numbers = groups[0].get("params") if isinstance(groups[0], dict) else None
    if not isinstance(numbers, list) or numbers != list(range(len(numbers))):
        raise CheckpointError(f"{what}: the parameters of its optimizer are not numbered from 0; {INSTEAD}")
    count = len(numbers)
    ours = {key: report.remapped.get(key, key) for key in weights}
    parameters = [key for key in weights if not key.startswith("rope.freqs_") and not key.endswith(".sin_basis")]
    if "model" not in held:
        known = [name for name, _ in model.named_parameters()]
        if sorted(known) != sorted(ours[key] for key in parameters):
            raise CheckpointError(
                f"{what}: the order of its {len(parameters)} parameters is not recorded, and the model has others; {INSTEAD}"
            )
        parameters = known
    config = held.get("model_config")
    frozen = [
        part for field, parts in FROZEN.items() if isinstance(config, dict) and config.get(field) for part in parts
    ]
    learning = [key for key in parameters if not key.startswith(tuple(frozen))] if frozen else parameters
    chosen = next((names for names in (learning, parameters) if len(names) == count), None)
    if chosen is None:
        raise CheckpointError(
            f"{what}: its optimizer has {count} parameters, its model {len(parameters)}"
            f"{f', {len(learning)} of them not frozen' if frozen else ''}; {INSTEAD}"
        )
    own = {name for name, _ in model.named_parameters()}
    names = [ours.get(key, key) for key in chosen]
    return [name if name in own else None for name in names]


def _moments(
    state: dict[str, Any], order: list[str | None], model: TinyFluxDeep, wanted: str, what: str, notes: list[str]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Moments by our names: tensors by ``parameter/entry``, and plain values by parameter and entry."""
    found: dict[int, dict[str, Any]] = state["state"]
    if not all(isinstance(values, dict) and isinstance(values.get(NESTED, {}), dict) for values in found.values()):
        raise CheckpointError(f"{what}: its optimizer does not hold its moments by name; {INSTEAD}")
    held = {
        index: {entry: value for entry, value in values.items() if entry != NESTED} | values.get(NESTED, {})
        for index, values in found.items()
    }
    entries = {entry for values in held.values() for entry in values}
    kind = next((name for name, known in ENTRIES.items() if entries <= known), None)
    if kind == "AdamW8bit" and wanted == "AdamW":
        held = {index: _in_float32(values, f"{what}: moments of parameter {index}") for index, values in held.items()}
        notes.append("optimizer: its moments have 8 bits in the file; AdamW continues from their values in float32")
    elif held and kind != wanted:
        known = (
            f"are of {kind}"
            if kind
            else f"({', '.join(sorted(map(str, entries))[:4])}) are of an optimizer that is not known"
        )
        advice = f'set optimizer.type = "{kind}", ' if kind else ""
        raise CheckpointError(f'{what}: optimizer.type is "{wanted}", and its moments {known}; {advice}{INSTEAD}')
    parameters = dict(model.named_parameters())
    learning = [name for name, parameter in parameters.items() if parameter.requires_grad]
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    left = []
    for index, values in held.items():
        name = order[index] if index in range(len(order)) else None
        if name is None or not parameters[name].requires_grad:
            left.append(name or f"number {index}")
            continue
        scalars[name] = {}
        for entry, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{entry}"] = _shaped(value, entry, parameters[name].shape, f"{what}: {name}")
            elif isinstance(value, int | float):
                scalars[name][entry] = value
            else:
                raise CheckpointError(f"{what}: {entry} of {name} is a {type(value).__name__}; {INSTEAD}")
    fresh = [name for name in learning if name not in scalars]
    notes.append(f"optimizer: moments of {len(scalars)} of {len(learning)} parameters")
    if fresh:
        notes.append(f"  without moments there, so they begin with none: {', '.join(summary(fresh))}")
    if left:
        notes.append(f"  left out, because this run does not train them: {', '.join(summary(left))}")
    return tensors, scalars


def _shaped(value: Tensor, entry: str, shape: torch.Size, what: str) -> Tensor:
    """An entry of an optimizer in the shape that belongs to its parameter; float32, but for codes of 8 bits."""
    blocks = (-(-shape.numel() // BLOCK),)
    expected = {
        "step": (), "RMS": (), "exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": (*shape[:-2], *shape[-1:]),
        "qmap1": (256,), "qmap2": (256,), "absmax1": blocks, "absmax2": blocks,
    }  # fmt: skip
    wanted = expected.get(entry, tuple(shape))
    if value.shape != wanted and not value.numel() == math.prod(wanted) == 1:
        raise CheckpointError(f"{what}: {entry} is {list(value.shape)}, expected {list(wanted)}; {INSTEAD}")
    return (value if value.dtype == torch.uint8 else value.float()).reshape(wanted).clone()


def _in_float32(values: dict[str, Any], what: str) -> dict[str, Any]:
    """The entries of AdamW from those of bitsandbytes' AdamW8bit: codes stand for ``qmap[code] * absmax`` of their block."""
    found: dict[str, Any] = {"step": torch.tensor(float(values.get("step", 0)))}
    for number, entry in (("1", "exp_avg"), ("2", "exp_avg_sq")):
        codes = values.get(f"state{number}")
        if not isinstance(codes, Tensor) or codes.dtype != torch.uint8:
            found[entry] = codes
            continue
        parts = {f"qmap{number}": 256, f"absmax{number}": -(-codes.numel() // BLOCK)}
        for key, count in parts.items():
            held = values[key].numel() if isinstance(values.get(key), Tensor) else 0
            if held != count:
                raise CheckpointError(f"{what}: {key} has {held} values, expected {count}; {INSTEAD}")
        levels, largest = (values[key].float() for key in parts)
        found[entry] = levels[codes.long()] * largest.repeat_interleave(BLOCK)[: codes.numel()].view_as(codes)
    return found


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _rate(scheduler: Any) -> float | None:
    """The learning rate that the scheduler would have used next."""
    rates = scheduler.get("_last_lr") if isinstance(scheduler, dict) else None
    return _finite(rates[0]) if isinstance(rates, list) and rates else None


def _compared(settings: dict[str, Any], config: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Keys that decide how training goes on, with the values of that trainer and of the run, where they differ."""
    imported = read_settings(settings)
    if imported is None:
        return
    ours = {f"experts.{name}": value for name, value in resolve_experts(config).items()}
    for section in COMPARED:
        for name, value in imported.document.get(section, {}).items():
            key = f"{section}.{name}"
            found = ours.get(key, config.get(key))
            if found != value and name not in ("unet", "lune", "sol"):
                yield key, value, found
