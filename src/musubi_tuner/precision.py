"""Names of precisions, and the autocast of a model's forward pass."""

import torch

COMPUTE_DTYPES: dict[str, torch.dtype | None] = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""train.mixed_precision -> dtype of the products of a model; None = that of its weights."""


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Products in ``dtype``; None leaves them as they are."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
