"""Optimizers, their parameter groups, and their state as named tensors.

Weight decay acts on matrices and kernels; norms, biases, gates and scalars (fewer than two axes) are left alone unless
``decay_all``. State is stored per parameter name with its dtypes, never pickled.
"""

import importlib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.config.schema.optimizer import OptimizerSection
from musubi_tuner.errors import CheckpointError, ConfigError
from musubi_tuner.optimizers import OPTIMIZERS

NamedParameters = list[tuple[str, nn.Parameter]]


def trainable(model: nn.Module) -> NamedParameters:
    """Names and parameters that receive gradients, in order.

    Raises:
        ConfigError: if there are none.
    """
    found = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not found:
        raise ConfigError("nothing is trainable: every parameter of the model is frozen")
    return found


Rates = Mapping[str, tuple[float, float | None]]
"""Parameter name -> factor of its learning rate, and its weight decay; None = that of the optimizer."""


def parameter_groups(
    parameters: NamedParameters,
    settings: OptimizerSection,
    plus_ratio: float | None = None,
    rates: Rates | None = None,
) -> list[dict[str, Any]]:
    """Groups of one learning rate and one weight decay, in the order in which they first occur, LoRA+ last, and a rate of 0 after that.

    Of the same rate, those with weight decay come first. ``names`` goes along for the state, ``name`` shows the rate. Some optimizers
    take the rate of the first group for all.

    Args:
        plus_ratio: LoRA+ (Hayou et al. 2024, arXiv:2402.12354): up matrices form groups that learn so many times faster.
        rates: of parameters that have their own; the factor multiplies that of LoRA+.
    """
    groups: dict[tuple[bool, bool, float, bool, float], dict[str, Any]] = {}
    order: dict[float, int] = {}
    for name, parameter in parameters:
        factor, own_decay = (rates or {}).get(name, (1.0, None))
        plus = bool(plus_ratio) and name.endswith("lora_up.weight")
        scale = factor * (plus_ratio or 1.0) if plus else factor
        matrix = settings.decay_all or parameter.ndim >= 2
        decay = (settings.weight_decay if own_decay is None else own_decay) if matrix else 0.0
        order.setdefault(factor, len(order))
        group = groups.setdefault(
            (not scale, plus, order[factor], not matrix, decay),
            {"params": [], "names": [], "name": f"lr_{settings.lr * scale:.2e}", "weight_decay": decay,
             "lr": settings.lr * scale, "lr_scale": scale},
        )  # fmt: skip
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups, key=lambda key: key[:4])]


def build_optimizer(
    parameters: NamedParameters,
    settings: OptimizerSection,
    plus_ratio: float | None = None,
    rates: Rates | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of a run; see `parameter_groups`.

    Raises:
        ConfigError: if its package is not installed.
    """
    record = OPTIMIZERS[settings.type]
    try:
        module, name = record.source.split(":")
        constructor = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ConfigError(
            f'optimizer.type = "{settings.type}" needs {record.package} ({error}); {record.way_out}'
        ) from error
    options = {**record.given, **{key: tuple(v) if isinstance(v, list) else v for key, v in settings.args.items()}}
    betas = tuple(settings.betas)
    if record.betas == "momentum":
        options["momentum"] = betas[0]
    elif record.betas:
        options["betas"] = betas
    if record.eps:
        options["eps"] = settings.eps
    if record.source in FUSED and parameters[0][1].device.type in ("cpu", "cuda"):
        options["fused"] = True
    lr = None if options.get("relative_step") else settings.lr
    groups = parameter_groups(parameters, settings, plus_ratio, rates)
    if lr is None:
        groups = [{**group, "lr": None} for group in groups]
    optimizer: torch.optim.Optimizer = constructor(groups, lr=lr, **options)
    if record.averages:
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


FUSED = ("torch.optim:AdamW", "torch.optim:Adam")
"""One kernel for all parameters: on a 2-core CPU the step of 2.2 million parameters takes an eighth of the time."""


def rates_of_patterns(names: Mapping[str, str], settings: OptimizerSection) -> dict[str, float]:
    """Parameter name -> factor of its learning rate, for those that optimizer.group_lr has a pattern for.

    Args:
        names: parameter name -> the dotted name that patterns are compared with.

    Raises:
        ConfigError: for a pattern that matches nothing.
    """
    for pattern in settings.group_lr:
        if not any(fnmatchcase(shown, pattern) for shown in names.values()):
            raise ConfigError(
                f"optimizer.group_lr: {pattern!r} matches no trained parameter; their names are like {next(iter(names.values()))}, and * "
                "stands for any part of them"
            )
    found = {}
    for name, shown in names.items():
        rate = next((rate for pattern, rate in settings.group_lr.items() if fnmatchcase(shown, pattern)), None)
        if rate is not None:
            found[name] = rate / settings.lr
    return found


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of all groups, each by its own factor; not that of an optimizer which has its own."""
    for group in optimizer.param_groups:
        if group["lr"] is not None:
            group["lr"] = lr * group["lr_scale"]


def _named(optimizer: torch.optim.Optimizer) -> dict[str, tuple[nn.Parameter, dict[str, Any]]]:
    """Name -> parameter and its group."""
    return {
        name: (parameter, group)
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }


GROUP = "group:"
"""Begins the name under which entries of a parameter group are saved."""


def optimizer_state(
    optimizer: torch.optim.Optimizer, remembers: Iterable[str] = ()
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """State as tensors by ``parameter/entry`` and as plain values by parameter and entry.

    Args:
        remembers: entries of the parameter groups that belong to it; see `optimizers.Optimizer`.
    """
    states = {name: optimizer.state[p] for name, (p, _) in _named(optimizer).items() if p in optimizer.state}
    for index, group in enumerate(optimizer.param_groups if remembers else ()):
        states[f"{GROUP}{index}"] = {key: group[key] for key in remembers if key in group}
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, entries in states.items():
        values[name] = {}
        for entry, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{entry}"] = value.detach()
            elif value is None or isinstance(value, bool | int | float | str):
                values[name][entry] = value
            else:
                raise CheckpointError(f"optimizer state {name}/{entry} is a {type(value).__name__}; it cannot be saved")
    return tensors, values


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, dict[str, Any]]
) -> None:
    """Restore what `optimizer_state` returned, entry by entry and in the same dtypes.

    Raises:
        CheckpointError: if the state belongs to other parameters.
    """
    known = _named(optimizer)
    groups = {f"{GROUP}{index}": group for index, group in enumerate(optimizer.param_groups)}
    foreign = sorted(set(values) - set(known) - set(groups))
    if foreign:
        raise CheckpointError(f"the optimizer state has {len(foreign)} unknown parameters ({', '.join(foreign[:3])})")
    states: dict[str, dict[str, Any]] = {name: dict(entries) for name, entries in values.items()}
    for key, tensor in tensors.items():
        name, _, entry = key.partition("/")
        parameter, group = known.get(name) or (groups[name]["params"][0], groups[name])
        # torch keeps the step counter on the CPU unless the kernel reads it on the device.
        on_host = entry == "step" and not (group.get("fused") or group.get("capturable"))
        states[name][entry] = tensor.to("cpu" if on_host else parameter.device, copy=True)
    optimizer.state.clear()
    for name, entries in states.items():
        if name in groups:
            groups[name].update(entries)
        else:
            optimizer.state[known[name][0]] = entries


def found_rate(optimizer: torch.optim.Optimizer) -> float | None:
    """The learning rate that an optimizer has found, without its factor; None if it looks for none."""
    found = optimizer.param_groups[0].get("d")
    return None if found is None else float(found)


def relative_rate(update: int, warmup_init: bool) -> float:
    """Adafactor's own rate of an update, from 0, without the scale of a parameter: ``min(0.01, 1 / sqrt(k + 1))``, and with
    ``warmup_init`` ``1e-6 (k + 1)`` in the place of 0.01 (Shazeer and Stern 2018, arXiv:1804.04235)."""
    step = update + 1
    return float(min(1e-6 * step if warmup_init else 1e-2, step**-0.5))


@torch.no_grad()
def averaged_parameters(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The weights to use of a schedule-free optimizer, by name: ``x = y + (1 - 1 / beta) (z - y)``, where y are those that train.

    Defazio et al. 2024, arXiv:2405.15682. They are computed anew, and y is left alone, since going back would round it.
    """
    found = {}
    for name, (parameter, group) in _named(optimizer).items():
        state = optimizer.state.get(parameter, {})
        beta = group["betas"][0] if "betas" in group else group["momentum"]
        if "z" in state:
            found[name] = parameter.detach().lerp(state["z"].to(parameter.device, parameter.dtype), 1 - 1 / beta)
    return found


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients to at most ``max_norm`` (0 = leave them) and return their norm before that, float32 scalar."""
    gradients = [p for p in parameters if p.grad is not None]
    return torch.nn.utils.clip_grad_norm_(gradients, max_norm or float("inf"))
