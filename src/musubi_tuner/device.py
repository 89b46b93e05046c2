"""Which device and precision a setting means, and bringing the inputs of a model there."""

import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from musubi_tuner.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from musubi_tuner.config import RunConfig
    from musubi_tuner.config.schema.run import RunSection


def choose_device(setting: str) -> "torch.device":
    """The device of `run.device`; under a launcher each process takes the GPU of its rank.

    Raises:
        ConfigError: if a device was asked for that is not there.
    """
    import torch

    index = int(os.environ.get("LOCAL_RANK", "0"))
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if setting == "cuda" and not cuda:
        raise ConfigError(
            'run.device is "cuda", but this torch sees no GPU; use "auto" or "cpu", or install a CUDA build'
        )
    if setting == "mps" and not mps:
        raise ConfigError('run.device is "mps", but this machine has none; use "auto" or "cpu"')
    if setting == "cuda" or (setting == "auto" and cuda):
        return torch.device("cuda", index)
    return torch.device("mps" if setting == "mps" or (setting == "auto" and mps) else "cpu")


def has_bf16(device: "torch.device") -> bool:
    """Whether a device computes in bfloat16 itself; others emulate it, which takes many times as long."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def with_precision(config: "RunConfig") -> "RunConfig":
    """The config with ``train.mixed_precision = "auto"`` replaced by what it means on this machine."""
    if config.train.mixed_precision != "auto":
        return config
    precision = "bf16" if has_bf16(choose_device(config.run.device)) else "no"
    return config.model_copy(update={"train": config.train.model_copy(update={"mixed_precision": precision})})


def to_model(
    inputs: Mapping[str, Any], device: "torch.device", dtype: "torch.dtype", exact: Collection[str]
) -> dict[str, Any]:
    """Arguments of a model call, every tensor on its device and in its precision.

    Each family calls this right before its model, so training, validation and drawing need not know where the model is.
    Whoever moves batches earlier does so to hide the copy.

    Args:
        inputs: by name of the argument; what is no tensor stays as it is.
        dtype: of floating tensors; other tensors keep theirs. exact: names of floating tensors that are float32 instead.
    """
    import torch

    def bring(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        # Moved before the cast, which would take pinned memory away. A copy to the CPU must have arrived.
        moved = value.to(device, non_blocking=device.type != "cpu")
        if not moved.is_floating_point():
            return moved
        return moved.to(torch.float32 if name in exact else dtype)

    return {name: bring(name, value) for name, value in inputs.items()}


def encoder_dtype(setting: str, device: "torch.device", gpu: str) -> "torch.dtype":
    """Precision of a frozen network: as set, else ``gpu`` on a GPU and float32 on a CPU."""
    import torch

    name = setting if setting != "auto" else gpu if device.type == "cuda" else "float32"
    return getattr(torch, name)


def apply_backend_flags(settings: "RunSection", device: "torch.device", sizes: int) -> str | None:
    """Set the numeric switches of torch for this process.

    Args:
        sizes: number of different picture sizes; trying out convolution kernels pays for one only.

    Returns:
        A line for the person, where there is something to say.
    """
    import torch

    if settings.deterministic:
        # Read by cuBLAS when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(settings.deterministic)
    if device.type != "cuda":
        return "kernels: repeatable ones only" if settings.deterministic else None
    tf32 = settings.allow_tf32 and not settings.deterministic
    benchmark = settings.cudnn_benchmark and not settings.deterministic and sizes == 1
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = benchmark
    repeatable = ", repeatable ones only" if settings.deterministic else ""
    return f"kernels: TF32 {'on' if tf32 else 'off'}, cudnn benchmark {'on' if benchmark else 'off'}{repeatable}"


def set_threads(threads: int | None, processes: int) -> int:
    """Set the CPU threads of this process alike for every form of launch, and return them."""
    import torch

    count = threads or max(1, (os.cpu_count() or 1) // max(1, processes))
    torch.set_num_threads(count)
    return count
