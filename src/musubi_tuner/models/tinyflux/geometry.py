"""The shape of a TinyFlux-Deep v4.2 model, and its `config.json`. Torch-free.

`config.json` is a flat object of exactly these fields (``axes_dims_rope`` a list): the published loader refuses any other.
Reading ignores unknown keys and keys that start with an underscore; older spellings are mapped.
``guidance_embeds`` is of models before v4.2 and of our own, which the published loader cannot build: it is written only where
it is true.

`ModelOptions` say how a model computes with the same weights. They are no fields of `config.json`: those that differ from
the published model stand among the options of training, in ``options.json`` beside it and in the header of weight files.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from musubi_tuner.files import read_json

LEGACY_NAMES = {
    "use_expert_predictor": "use_lune_expert",
    "expert_dim": "lune_expert_dim",
    "expert_hidden_dim": "lune_hidden_dim",
    "expert_dropout": "lune_dropout",
}
"""Field names of v3 and v4.1 configs; the current name wins when both are present."""


@dataclass(frozen=True)
class ModelOptions:
    """What a new model may compute otherwise than the published one; the defaults are the published ways.

    Attributes:
        text_positions: ``zero``: text tokens carry no position; ``index``: the i-th is at (i, 0, 0), in both kinds of blocks.
        temperature_per_head: divide the queries of each head by its own temperature of Sol, not by the mean over heads.
        timestep_scale: the time embedding is of t times this; Sol's geometric terms keep t.

    Raises:
        ValueError: naming the value that is not possible.
    """

    text_positions: str = "zero"
    temperature_per_head: bool = False
    timestep_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.text_positions not in ("zero", "index"):
            raise ValueError(f"text_positions is {self.text_positions!r}, expected 'zero' or 'index'")
        if not isinstance(self.temperature_per_head, bool):
            raise ValueError(f"temperature_per_head is {self.temperature_per_head!r}, expected true or false")
        scale = self.timestep_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
            raise ValueError(f"timestep_scale is {scale!r}, expected a positive number")
        object.__setattr__(self, "timestep_scale", float(scale))

    def changed(self) -> dict[str, Any]:
        """The options that differ from the published model."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True)
class TinyFluxConfig:
    """Geometry of a TinyFlux model; the defaults are the published 245 M parameter model.

    Attributes:
        options: how it computes; not part of `config.json`, see `ModelOptions`.

    Raises:
        ValueError: naming the numbers, if they do not fit together.
    """

    hidden_size: int = 512
    num_attention_heads: int = 4
    attention_head_dim: int = 128
    in_channels: int = 16
    patch_size: int = 1
    joint_attention_dim: int = 768
    pooled_projection_dim: int = 768
    num_double_layers: int = 15
    num_single_layers: int = 25
    mlp_ratio: float = 4.0
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    use_lune_expert: bool = True
    lune_expert_dim: int = 1280
    lune_hidden_dim: int = 512
    lune_dropout: float = 0.1
    freeze_lune: bool = False
    use_sol_prior: bool = True
    sol_spatial_size: int = 8
    sol_hidden_dim: int = 256
    sol_geometric_weight: float = 0.7
    freeze_sol: bool = False
    use_t5_vec: bool = True
    guidance_embeds: bool = False
    options: ModelOptions = ModelOptions()

    def __post_init__(self) -> None:
        self._check_types()
        object.__setattr__(self, "axes_dims_rope", tuple(self.axes_dims_rope))
        counts = [
            field.name
            for field in fields(self)
            if field.type is int and field.name not in ("num_double_layers", "num_single_layers")
        ]
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        for name in ("num_double_layers", "num_single_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, it must not be negative")
        if self.patch_size != 1:
            raise ValueError(
                f"patch_size is {self.patch_size}; TinyFlux has one token per latent pixel, so only 1 works"
            )
        if self.hidden_size != self.num_attention_heads * self.attention_head_dim:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not num_attention_heads {self.num_attention_heads} x "
                f"attention_head_dim {self.attention_head_dim} = {self.num_attention_heads * self.attention_head_dim}"
            )
        axes = self.axes_dims_rope
        if len(axes) != 3 or any(width < 2 or width % 2 for width in axes):
            raise ValueError(f"axes_dims_rope is {list(axes)}, it must be three even numbers of at least 2")
        if sum(axes) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope {list(axes)} sums to {sum(axes)}, it must be attention_head_dim {self.attention_head_dim}"
            )
        if self.sol_hidden_dim < 2:
            raise ValueError(f"sol_hidden_dim is {self.sol_hidden_dim}, it must be at least 2")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}, it must be positive")
        if not 0 <= self.sol_geometric_weight <= 1:
            raise ValueError(f"sol_geometric_weight is {self.sol_geometric_weight}, it must lie in [0, 1]")
        if not 0 <= self.lune_dropout < 1:
            raise ValueError(f"lune_dropout is {self.lune_dropout}, it must lie in [0, 1)")

    def _check_types(self) -> None:
        for field in fields(self):
            if field.name == "options":
                continue
            value = getattr(self, field.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if field.type is int:
                good, expected = whole, "a whole number"
            elif field.type is float:
                good, expected = whole or (isinstance(value, float) and math.isfinite(value)), "a number"
            elif field.type is bool:
                good, expected = isinstance(value, bool), "true or false"
            else:
                good = isinstance(value, list | tuple) and all(type(part) is int for part in value)
                expected = "a list of whole numbers"
            if not good:
                raise ValueError(f"{field.name} is {value!r}, expected {expected}")

    @property
    def mlp_hidden(self) -> int:
        """Width of the hidden layer of every block MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @classmethod
    def shape_fields(cls) -> set[str]:
        """Names of the fields of `config.json`."""
        return {field.name for field in fields(cls)} - {"options"}

    def with_options(self, values: Mapping[str, Any]) -> Self:
        """The same shape with the model options among ``values``, the others as published.

        Raises:
            ValueError: naming a value that is not possible.
        """
        known = {field.name for field in fields(ModelOptions)}
        return replace(self, options=ModelOptions(**{name: values[name] for name in known & set(values)}))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a `config.json` object; unknown and underscored keys are ignored, legacy names are mapped."""
        known = cls.shape_fields()
        current = {name: value for name, value in values.items() if name in known}
        for old, new in LEGACY_NAMES.items():
            if old in values:
                current.setdefault(new, values[old])
        return cls(**current)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, fields in order, without the options."""
        values = {**asdict(self), "axes_dims_rope": list(self.axes_dims_rope)}
        del values["options"]
        if not self.guidance_embeds:
            del values["guidance_embeds"]
        return values

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read a `config.json`, with the options that ``options.json`` beside it records, or its own ``_metadata`` as of old.

        Raises:
            ValueError: if a file is not a JSON object, or its numbers do not fit together.
        """
        values, beside = _read_object(path), path.with_name("options.json")
        metadata = values.get("_metadata")
        options = metadata.get("options") if isinstance(metadata, dict) else None
        if beside.is_file():
            options = _read_object(beside)
        try:
            return cls.from_dict(values).with_options(options if isinstance(options, dict) else {})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_json(self) -> str:
        """Text of a `config.json`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


def _read_object(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, expected a JSON object")
    return values
