"""The shape of a FLUX.1 model and the sizes of its parameters. Torch-free.

Field names are those of Black Forest Labs' parameter record; the defaults are FLUX.1-dev (11.9 B parameters). The
number of blocks is read from a checkpoint, so pruned variants load.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

TIME_WIDTH = 256
"""Width of the sinusoidal embedding of time and guidance."""
PATCH = 2
"""Latent pixels per token and axis."""


@dataclass(frozen=True)
class FluxConfig:
    """Geometry of a FLUX.1 model.

    Attributes:
        in_channels: values per token, 2 x 2 latent pixels of 16 channels. vec_in_dim: pooled text. context_in_dim: T5.
        depth, depth_single_blocks: numbers of double and single blocks.
        axes_dim: rotary widths of the three position axes; their sum is the width of a head.

    Raises:
        ValueError: naming the numbers, if they do not fit together.
    """

    in_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True

    def __post_init__(self) -> None:
        self._check_types()
        object.__setattr__(self, "axes_dim", tuple(self.axes_dim))
        for name in ("in_channels", "vec_in_dim", "context_in_dim", "hidden_size", "num_heads", "theta"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        for name in ("depth", "depth_single_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, it must not be negative")
        if self.in_channels % PATCH**2:
            raise ValueError(f"in_channels is {self.in_channels}, it must be a multiple of {PATCH**2}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if len(self.axes_dim) != 3 or any(width < 2 or width % 2 for width in self.axes_dim):
            raise ValueError(f"axes_dim is {list(self.axes_dim)}, it must be three even numbers of at least 2")
        if sum(self.axes_dim) != self.head_dim:
            raise ValueError(
                f"axes_dim {list(self.axes_dim)} sums to {sum(self.axes_dim)}, it must be hidden_size / num_heads = "
                f"{self.head_dim}"
            )
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}, it must be positive")

    def _check_types(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            good, expected = {
                int: (whole, "a whole number"),
                float: (whole or isinstance(value, float), "a number"),
                bool: (isinstance(value, bool), "true or false"),
            }.get(
                field.type,  # type: ignore[arg-type]  # annotations are types here, not strings
                (isinstance(value, list | tuple) and all(type(v) is int for v in value), "a list of whole numbers"),
            )
            if not good:
                raise ValueError(f"{field.name} is {value!r}, expected {expected}")

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        """Width of the hidden layer of every block MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def latent_channels(self) -> int:
        """Channels of the autoencoder."""
        return self.in_channels // PATCH**2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a plain object; unknown keys are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, fields in order."""
        return {**asdict(self), "axes_dim": list(self.axes_dim)}

    def to_json(self) -> str:
        """Text of a `config.json`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"
