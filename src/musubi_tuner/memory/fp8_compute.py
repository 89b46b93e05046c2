"""Which layers of a model multiply in fp8, and whether the device can."""

import torch
from torch import Tensor, nn

from musubi_tuner.errors import ConfigError
from musubi_tuner.memory.fp8_product import MULTIPLE, scaled_product
from musubi_tuner.memory.frozen_linear import FrozenLinear


def why_not(layer: FrozenLinear) -> str | None:
    """Why a layer's product cannot be computed in fp8; None if it can."""
    if layer.storage not in ("fp8", "fp8_scaled"):
        return f"stored as {layer.storage}"
    if layer.code_dtype is not torch.float8_e4m3fn:
        return "stored in float8_e5m2"
    if layer.scale_shape is not None and layer.scale_shape.numel() not in (1, layer.out_features):
        return "scaled by blocks of columns"
    if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
        return f"sides not multiples of {MULTIPLE}"
    return None


def compute_in_fp8(model: nn.Module, *, backward: bool) -> list[str]:
    """Let every frozen layer that can compute its product in fp8 do so.

    Args:
        backward: the gradient of the input too.

    Returns:
        Lines for the person: how many layers do, and why others do not.

    Raises:
        ConfigError: if no layer can.
    """
    done, others = 0, dict[str, int]()
    for layer in model.modules():
        if not isinstance(layer, FrozenLinear) or layer.storage == "plain":
            continue
        reason = why_not(layer)
        if reason is None:
            layer.fp8_compute = "both" if backward else "forward"
            done += 1
        else:
            others[reason] = others.get(reason, 0) + 1
    told = "; ".join(f"{count} layers are {reason}" for reason, count in others.items())
    if not done:
        raise ConfigError(
            f"memory.fp8_compute: no layer of this model can be computed in fp8 ({told or 'none is quantised'}). It needs scales by "
            'tensor or by row: memory.base_storage = "fp8_scaled" with a bf16 file, or a file with such scales'
        )
    lines = [f"fp8: {done} layers multiply in fp8, their input gradients in {'fp8' if backward else 'bf16'}"]
    return [*lines, *([f"note: {told}; these are dequantised and multiplied in bf16"] if told else [])]


def require_fp8(device: torch.device) -> None:
    """Check that a device multiplies fp8 numbers.

    Raises:
        ConfigError: saying what is needed.
    """
    needed = (
        "memory.fp8_compute needs a GPU that multiplies float8 numbers with a scale per row (NVIDIA of compute capability 8.9 or "
        "higher: RTX 40 and 50, L4, L40, H100 and later)"
    )
    way_out = "set it to false: storage in fp8 works on every device"
    if device.type != "cuda":
        raise ConfigError(f"{needed}, and this run computes on {device.type}; {way_out}")
    try:
        multiply_once(device)
        torch.cuda.synchronize(device)
    except (RuntimeError, ValueError) as problem:
        name, reason = torch.cuda.get_device_name(device), str(problem).splitlines()[0]
        raise ConfigError(f"{needed}; {name} does not ({reason}); {way_out}") from problem


def multiply_once(device: torch.device) -> Tensor:
    """The smallest product in fp8, of ones; [16, 16]."""
    ones = torch.ones(MULTIPLE, MULTIPLE, device=device)
    return scaled_product(ones, ones.to(torch.float8_e4m3fn), torch.ones(MULTIPLE, 1, device=device))
