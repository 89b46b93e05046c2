"""Optimizers, their parameter groups, and their state as named tensors.

Weight decay acts on matrices and kernels; norms, biases, gates and scalars (fewer than two axes) are left alone unless
``decay_all``. State is stored per parameter name with its dtypes, never pickled.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.config.schema.optimizer import OptimizerSection
from musubi_tuner.errors import CheckpointError, ConfigError
from musubi_tuner.units import Bytes

SMALL_8BIT, BLOCK_8BIT = 4096, 256
"""Parameters with fewer values keep float32 moments in bitsandbytes' AdamW8bit; codes of so many values share a float32 scale."""

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
    """Groups of one learning rate and one weight decay, in the order in which they first occur, LoRA+ last.

    Of the same rate, those with weight decay come first. ``names`` goes along for the state, ``name`` shows the rate.

    Args:
        plus_ratio: LoRA+ (Hayou et al. 2024, arXiv:2402.12354): up matrices form groups that learn so many times faster.
        rates: of parameters that have their own; the factor multiplies that of LoRA+.
    """
    groups: dict[tuple[bool, float, bool, float], dict[str, Any]] = {}
    order: dict[float, int] = {}
    for name, parameter in parameters:
        factor, own_decay = (rates or {}).get(name, (1.0, None))
        plus = bool(plus_ratio) and name.endswith("lora_up.weight")
        scale = factor * (plus_ratio or 1.0) if plus else factor
        matrix = settings.decay_all or parameter.ndim >= 2
        decay = (settings.weight_decay if own_decay is None else own_decay) if matrix else 0.0
        order.setdefault(factor, len(order))
        group = groups.setdefault(
            (plus, order[factor], not matrix, decay),
            {"params": [], "names": [], "name": f"lr_{settings.lr * scale:.2e}", "weight_decay": decay,
             "lr": settings.lr * scale, "lr_scale": scale},
        )  # fmt: skip
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups, key=lambda key: key[:3])]


def state_bytes(kind: str, shapes: Mapping[torch.Size, int]) -> Bytes:
    """What an optimizer will remember of parameters, without its step counters.

    Args:
        kind: optimizer.type. shapes: of the parameters, and how many have each.
    """
    return sum(count * _state_of(kind, shape) for shape, count in shapes.items())


def _state_of(kind: str, shape: torch.Size) -> Bytes:
    values = shape.numel()
    if kind == "AdamW8bit" and values >= SMALL_8BIT:
        return 2 * values + 2 * 4 * -(-values // BLOCK_8BIT)
    if kind == "Adafactor":  # without a first moment; a mean for each row and each column of a matrix
        return 4 * (values if len(shape) < 2 else shape[:-1].numel() + shape[:-2].numel() * shape[-1])
    return 8 * values


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
    groups = parameter_groups(parameters, settings, plus_ratio, rates)
    betas = (settings.betas[0], settings.betas[1])
    # One kernel for all parameters: on a 2-core CPU the step of 2.2 million parameters takes an eighth of the time.
    fused = parameters[0][1].device.type in ("cpu", "cuda")
    if settings.type == "AdamW":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=fused or None)
    if settings.type == "AdamW8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ConfigError(f'optimizer.type = "AdamW8bit" needs bitsandbytes ({error}); or use "AdamW"') from error
        return AdamW8bit(groups, lr=settings.lr, betas=betas, eps=settings.eps)
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=settings.lr, scale_parameter=False, relative_step=False, warmup_init=False)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of all groups, each by its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def _named(optimizer: torch.optim.Optimizer) -> dict[str, tuple[nn.Parameter, dict[str, Any]]]:
    """Name -> parameter and its group."""
    return {
        name: (parameter, group)
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """State as tensors by ``parameter/entry`` and as plain values by parameter and entry."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, (parameter, _) in _named(optimizer).items():
        if parameter not in optimizer.state:
            continue
        values[name] = {}
        for entry, value in optimizer.state[parameter].items():
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
    foreign = sorted(set(values) - set(known))
    if foreign:
        raise CheckpointError(f"the optimizer state has {len(foreign)} unknown parameters ({', '.join(foreign[:3])})")
    states: dict[str, dict[str, Any]] = {name: dict(entries) for name, entries in values.items()}
    for key, tensor in tensors.items():
        name, _, entry = key.partition("/")
        parameter, group = known[name]
        # torch keeps the step counter on the CPU unless the kernel reads it on the device.
        on_host = entry == "step" and not (group.get("fused") or group.get("capturable"))
        states[name][entry] = tensor.to("cpu" if on_host else parameter.device, copy=True)
    optimizer.state.clear()
    for name, entries in states.items():
        optimizer.state[known[name][0]] = entries


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients to at most ``max_norm`` (0 = leave them) and return their norm before that, float32 scalar."""
    gradients = [p for p in parameters if p.grad is not None]
    return torch.nn.utils.clip_grad_norm_(gradients, max_norm or float("inf"))
